"""The router over gRPC: bad input is refused by name and limit, and the server goes on."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

from rhizome.errors import InvalidRequest
from rhizome.v1 import generation_pb2, router_pb2
from router.service import running_router
from tests.support.router_cluster import Cluster, detail, refusal, with_cluster
from tests.support.scripted_worker import MAX_MODEL_LEN, VOCAB_SIZE

BAD_REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "empty text": ("prompt", {"prompt": ""}),
    "no tokens": ("prompt", {"token_ids": []}),
    "too many tokens": ("prompt tokens", {"token_ids": [1] * MAX_MODEL_LEN}),
    "much too long a text": ("prompt", {"prompt": "x" * (64 * MAX_MODEL_LEN + 1)}),
    "a token out of range": ("token_ids[2]", {"token_ids": [1, 2, VOCAB_SIZE]}),
    "no messages": ("chat.messages", {"messages": []}),
    "an unknown role": ("chat.messages[1].role", {"messages": [{"role": r, "content": "x"} for r in ("user", "root")]}),
    "too many messages": ("chat.messages", {"messages": [{"role": "user", "content": ""}] * 1025}),
    "negative temperature": ("sampling.temperature", {"prompt": "x", "temperature": -1.0}),
    "NaN": ("sampling.top_p", {"prompt": "x", "top_p": float("nan")}),
    "absurd max_tokens": ("sampling.max_tokens", {"prompt": "x", "max_tokens": 2**32 - 1}),
    "absurd n": ("sampling.n", {"prompt": "x", "n": 1000}),
    "an unknown policy": ("policy", {"prompt": "x", "policy": "best"}),
    "a request id with a space": ("request_id", {"prompt": "x", "request_id": "a b"}),
}


def test_bad_input_is_refused_by_field_and_limit_and_the_router_goes_on() -> None:
    """INVALID_ARGUMENT with BadRequest details; no worker hears of it."""

    async def test(running: Cluster) -> None:
        worker = await running.join()
        await running.ready()
        for name, (field, ask) in BAD_REQUESTS.items():
            for call in (running.client.complete, running.client.explain):
                error = await refusal(call(**ask), grpc.StatusCode.INVALID_ARGUMENT)
                violation = detail(error, error_details_pb2.BadRequest()).field_violations[0]
                assert violation.field == field, name
                assert violation.description in (error.details() or ""), name
        assert worker.requests == []
        assert (await running.client.complete("x")).text == "hello world"

    with_cluster(test)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (router_pb2.GenerateRequest().SerializeToString(), "text, chat or token_ids"),
        (b"\x1a\x02\xff\xfe", "UTF-8"),
        (b"\xff\xff\xff", "GenerateRequest"),
        (
            router_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(packed=b"abc")).SerializeToString(),
            "4 bytes for each",
        ),
        (
            router_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(packed=b"abcd", ids=[1])).SerializeToString(),
            "one of the two",
        ),
    ],
)
def test_malformed_messages_are_refused(data: bytes, says: str) -> None:
    """Bytes that are no request, text that is no UTF-8, a request without a prompt: INVALID_ARGUMENT, not a crash."""

    async def test(running: Cluster) -> None:
        await running.join()
        await running.ready()
        async with grpc.aio.insecure_channel(running.address) as channel:
            for method in ("Route", "Explain"):
                error = await refusal(
                    channel.unary_unary(f"/rhizome.v1.Router/{method}")(data), grpc.StatusCode.INVALID_ARGUMENT
                )
                assert says in (error.details() or "")
            call = channel.unary_stream("/rhizome.v1.Router/Generate")(data)
            await refusal(call.read(), grpc.StatusCode.INVALID_ARGUMENT)

    with_cluster(test)


def test_what_no_message_can_hold_is_refused_by_the_client() -> None:
    """Negative counts, lone surrogates and unknown parameters are named before anything is sent."""

    async def test(running: Cluster) -> None:
        for field, ask in {
            "sampling.max_tokens": {"prompt": "x", "max_tokens": -1},
            "sampling.frobnicate": {"prompt": "x", "frobnicate": 1},
            "prompt": {"prompt": "\ud800"},
            "prompt ": {"token_ids": [-1]},
            "prompt  ": {},
            "prompt   ": {"prompt": "x", "token_ids": [1]},
        }.items():
            with pytest.raises(InvalidRequest) as caught:
                await running.client.complete(**ask)  # type: ignore[arg-type]
            assert caught.value.field == field.strip()

    with_cluster(test)


def test_a_message_of_100_mb_is_refused_and_the_router_goes_on() -> None:
    """RESOURCE_EXHAUSTED by the message limit."""

    async def test(running: Cluster) -> None:
        await running.join()
        await running.ready()
        options = [("grpc.max_send_message_length", -1)]
        async with grpc.aio.insecure_channel(running.address, options=options) as channel:
            call = channel.unary_unary("/rhizome.v1.Router/Route")(b"\x1a" + b"x" * 100 * 2**20)
            await refusal(call, grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert (await running.client.complete("x")).text == "hello world"

    with_cluster(test)


def test_set_up_is_refused_clearly() -> None:
    """A port in use, a host off loopback, an unknown policy."""

    async def test(running: Cluster) -> None:
        port = int(running.address.rpartition(":")[2])
        for field, options in {
            "port": {"port": port},
            "host": {"host": "0.0.0.0"},
            "policy": {"policy": "best"},
        }.items():
            with pytest.raises(InvalidRequest) as caught:
                async with running_router(**options):  # type: ignore[arg-type]
                    pass
            assert caught.value.field == field

    with_cluster(test)
