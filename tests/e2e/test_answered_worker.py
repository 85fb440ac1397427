"""A real worker goes on with an answer that was begun elsewhere."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from rhizome.v1 import generation_pb2 as pb
from rhizome.v1 import worker_pb2
from tests.e2e.test_worker_service import Worker, packed, request, with_worker
from tests.support.router_cluster import refusal

PROMPT = list(range(40, 90))
SAMPLING = {
    "greedy, penalized": {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    "seeded": {"temperature": 1.0, "seed": 5, "top_p": 0.9, "min_tokens": 4},
}


def continued(tokens: list[int], **sampling: object) -> worker_pb2.WorkerGenerateRequest:
    message = request(PROMPT, **sampling)
    message.answered = packed(tokens)
    return message


def told(chunks: list[pb.GenerateChunk]) -> list[tuple[object, ...]]:
    return [(list(chunk.token_ids), chunk.text, chunk.finish_reason) for chunk in chunks]


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
def test_wherever_an_answer_is_split_the_rest_is_the_same(tiny_model: Path, sampling: dict[str, object]) -> None:
    """Tokens, text (bytes of a character on either side of the split, too) and the reason, with stop strings."""

    async def test(served: Worker) -> None:
        whole = await served.chunks(request(PROMPT, max_tokens=24, **sampling))
        text = "".join(chunk.text for chunk in whole)
        for stop in ([], [text[len(text) // 2 :][:3]]):
            whole = await served.chunks(request(PROMPT, max_tokens=24, stop=stop, **sampling))
            tokens = [chunk.token_ids[0] for chunk in whole]
            for split in range(1, len(whole)):
                rest = await served.chunks(continued(tokens[:split], max_tokens=24, stop=stop, **sampling))
                assert told(rest) == told(whole[split:])
                assert rest[-1].usage.completion_tokens == len(whole)

    with_worker(tiny_model, test)


REFUSED = {
    "ended": (continued([1, 2], max_tokens=2), "answered"),
    "vocabulary": (continued([1, 5000]), "answered"),
    "length": (continued([1] * 2000), "answered"),
    "choices": (continued([1], n=2, temperature=1.0, seed=1), "answered"),
    "seed": (continued([1], temperature=1.0), "sampling.seed"),
    "bytes": (worker_pb2.WorkerGenerateRequest(token_ids=packed(PROMPT), answered=b"abc"), "answered"),
}


def test_what_cannot_go_on_is_refused_by_name(tiny_model: Path) -> None:
    """INVALID_ARGUMENT with the field; nothing is kept."""

    async def test(served: Worker) -> None:
        for message, field in REFUSED.values():
            error = await refusal(served.chunks(message), grpc.StatusCode.INVALID_ARGUMENT)
            assert field in (error.details() or "")

    with_worker(tiny_model, test)
