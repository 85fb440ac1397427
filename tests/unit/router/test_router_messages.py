"""Messages: nothing is lost between the wire and the core."""

from __future__ import annotations

from dataclasses import fields

import pytest

from radix.hashing import BlockHasher, derive_salt
from radix.keys import hashes_of
from rhizome.errors import InvalidRequest
from rhizome.rpc import parse
from rhizome.v1 import fleet_pb2, generation_pb2, router_pb2, worker_pb2
from router.client import Completion, build_request
from router.fleet import Member, ModelCard, PullCounts, Role, WorkerReport
from router.links import MAX_TOKENIZER_FILES, collect_files
from router.messages import MAX_TRANSPORTS, prepare, worker_entry, worker_info, worker_report
from router.tokenizing import BadTokenizer


def test_every_field_of_a_status_reaches_the_core() -> None:
    """The core's report has the wire's fields, all but who speaks; a new one must not be forgotten."""
    names = {field.name for field in worker_pb2.WorkerStatus.DESCRIPTOR.fields}
    assert {field.name for field in fields(WorkerReport)} == names - {"worker_id", "epoch"}
    status = worker_pb2.WorkerStatus(running=1, decode_s=0.5, prefilled_request_ids=["a"], finished_request_ids=["b"])
    assert worker_report(status) == WorkerReport(
        running=1, decode_s=0.5, prefilled_request_ids=("a",), finished_request_ids=("b",)
    )


def test_what_was_pulled_over_each_transport_reaches_the_core_and_who_asks_it() -> None:
    """In order, every field; of a status that names very many transports the first ones."""
    names = {field.name for field in worker_pb2.PullCounts.DESCRIPTOR.fields}
    assert {field.name for field in fields(PullCounts)} == names
    status = worker_pb2.WorkerStatus(worker_id="w", epoch=4, pull_skipped_blocks=3, fetch_token_s=1e-6)
    status.pull_counts.add(transport="shm", pulls=4, failed=1, blocks=30, size_bytes=960, seconds=0.25)
    status.pull_counts.add(transport="tcp")
    report = worker_report(status)
    assert report.pull_counts == (PullCounts("shm", 4, 1, 30, 960, 0.25), PullCounts("tcp"))
    info = worker_info(fleet_pb2.RegisterRequest(worker_id="w", epoch=4, role=1))  # type: ignore[arg-type]
    assert worker_entry(Member(info, 1.0, report=report), 0.0).status == status
    for _ in range(MAX_TRANSPORTS):
        status.pull_counts.add(transport="more")
    assert len(worker_report(status).pull_counts) == MAX_TRANSPORTS


def test_a_registration_reaches_the_core() -> None:
    """All of it."""
    card = fleet_pb2.ModelCard(name="m", max_model_len=1, vocab_size=2, block_size=3, tokenizer_sha256="t")
    request = fleet_pb2.RegisterRequest(worker_id="w", epoch=4, address="h:1", role=3, model=card, max_waiting=8)  # type: ignore[arg-type]
    info = worker_info(request)
    assert (info.worker_id, info.epoch, info.role, info.max_waiting) == ("w", 4, Role.DECODE, 8)
    assert info.model == ModelCard("m", 1, 2, 3, "t")


def test_a_prompt_is_hashed_under_the_fleets_secret_and_the_salt_does_not_tell_it() -> None:
    """Clients in direct mode see the salt: it is made of public names, and computes nobody's keys."""
    card = ModelCard("m", max_model_len=100, vocab_size=100, block_size=4, tokenizer_sha256="")
    request = build_request(token_ids=list(range(9)))
    open_keys, keys = (prepare(request, card, None, each, streamed=True) for each in (b"", b"the fleet's secret"))
    expected = BlockHasher(4, derive_salt("m"), b"the fleet's secret").keys(range(9))
    assert keys.message.block_keys == expected.tobytes()
    assert keys.route.hashes.tolist() == hashes_of(expected).tolist()
    assert keys.message.salt == open_keys.message.salt == derive_salt("m")
    assert open_keys.message.block_keys == BlockHasher(4, derive_salt("m")).keys(range(9)).tobytes()


def test_priority_session_and_tenant_reach_the_decision() -> None:
    """A tenant's name has a bound, as the router remembers it."""
    card = ModelCard("m", max_model_len=100, vocab_size=100, block_size=4, tokenizer_sha256="")
    request = build_request(token_ids=[1, 2], priority=2, session_id="s", tenant="t")
    route = prepare(request, card, None, b"", streamed=True).route
    assert (route.priority, route.session, route.tenant) == (2, "s", "t")
    request.tenant = "t" * 129
    with pytest.raises(InvalidRequest, match="tenant is 'ttt.*at most 128 characters"):
        prepare(request, card, None, b"", streamed=True)


def test_bytes_that_are_no_message_are_refused() -> None:
    """By the name of the message."""
    assert parse(router_pb2.GenerateRequest, b"") == router_pb2.GenerateRequest()
    with pytest.raises(InvalidRequest, match=r"rhizome\.v1\.GenerateRequest"):
        parse(router_pb2.GenerateRequest, b"\xff")


def test_a_client_builds_what_it_is_asked_for() -> None:
    """Prompt, sampling and options each in its place; unset stays unset."""
    options = {"model": "m", "priority": -3, "session_id": "s", "tenant": "t"}
    request = build_request("hi", temperature=0.0, stop=["x"], n=2, **options)  # type: ignore[arg-type]
    assert request.text == "hi"
    assert {name: getattr(request, name) for name in options} == options
    assert request.sampling == generation_pb2.SamplingParams(temperature=0.0, stop=["x"], n=2)
    assert not request.sampling.HasField("top_p")
    assert build_request(messages=[]).WhichOneof("prompt") == "chat"
    assert build_request(token_ids=[1, 2]).token_ids.packed == b"\1\0\0\0\2\0\0\0"


@pytest.mark.parametrize(
    ("ask", "field"),
    [
        ({}, "prompt"),
        ({"messages": [], "token_ids": []}, "prompt"),
        ({"messages": [{"role": "user"}]}, "prompt"),
        ({"token_ids": [2**32]}, "prompt"),
        ({"token_ids": ["x"]}, "prompt"),
        ({"messages": [], "n": -1}, "sampling.n"),
        ({"messages": [], "temperature": "hot"}, "sampling.temperature"),
        ({"messages": [], "stop": 7}, "sampling.stop"),
        ({"messages": [], "priority": 2**40}, "priority"),
        ({"messages": [], "unheard_of": 1}, "sampling.unheard_of"),
    ],
)
def test_what_no_message_can_hold_is_named(ask: dict[str, object], field: str) -> None:
    """Before anything is sent."""
    with pytest.raises(InvalidRequest) as caught:
        build_request(**ask)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_a_completion_is_put_together_from_chunks() -> None:
    """Choices come interleaved; times are those of the first and the last chunk."""
    completion = Completion()
    usage = generation_pb2.Usage(prompt_tokens=7, cached_tokens=4, completion_tokens=1)
    done = generation_pb2.Usage(prompt_tokens=7, cached_tokens=4, completion_tokens=3)
    completion.add(generation_pb2.GenerateChunk(index=1, text="b", token_ids=[9], worker_id="w", usage=usage), 0.5)
    completion.add(generation_pb2.GenerateChunk(text="a", token_ids=[1]), 0.7)
    last = generation_pb2.GenerateChunk(
        text="c", token_ids=[2], finish_reason=generation_pb2.FINISH_REASON_LENGTH, usage=done
    )
    completion.add(last, 0.9)
    assert (completion.text, completion.token_ids, completion.finish_reason) == ("ac", [1, 2], "length")
    assert [choice.text for choice in completion.choices] == ["ac", "b"]
    assert (completion.worker_id, completion.ttft_s, completion.total_s) == ("w", 0.5, 0.9)
    assert (completion.prompt_tokens, completion.cached_tokens, completion.completion_tokens) == (7, 4, 3)


def test_a_completion_knows_the_times_between_its_tokens() -> None:
    """Of the first choice, from chunk to chunk; one that brings held-back text only is not waited for."""
    completion = Completion()
    assert (completion.itl_s, completion.worker_id) == ([], "")
    completion.add(generation_pb2.GenerateChunk(token_ids=[1], worker_id="p"), 0.5)
    assert completion.itl_s == []
    completion.add(generation_pb2.GenerateChunk(index=1, token_ids=[9]), 0.6)
    completion.add(generation_pb2.GenerateChunk(token_ids=[2, 3], worker_id="d"), 0.75)
    completion.add(generation_pb2.GenerateChunk(text="rest"), 0.9)
    completion.add(generation_pb2.GenerateChunk(token_ids=[4]), 1.0)
    assert completion.itl_s == [0.25, 0.25]
    assert (completion.worker_ids, completion.worker_id) == (["p", "d"], "p")


def test_files_are_bounded() -> None:
    """A worker cannot fill the router's memory with its tokenizer."""
    import asyncio

    async def pieces(count: int):  # type: ignore[no-untyped-def]
        for number in range(count):
            yield worker_pb2.FileChunk(name=f"f{number // 2}", data=b"x")

    assert asyncio.run(collect_files(pieces(4))) == {"f0": b"xx", "f1": b"xx"}
    with pytest.raises(BadTokenizer, match="more than"):
        asyncio.run(collect_files(pieces(2 * MAX_TOKENIZER_FILES + 1)))
