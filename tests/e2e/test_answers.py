"""Answers that a prefill worker begins and another goes on with, as scripted workers see them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from rhizome.v1 import fleet_pb2, generation_pb2, worker_pb2
from tests.support.router_cluster import Cluster, refusal, with_cluster
from tests.support.scripted_worker import MAX_MODEL_LEN, Script, ScriptedWorker, chunk

OFFERS = ["tcp://127.0.0.1:9"]
PROMPT = list(range(1, 250)) * 4
PULLS: dict[str, Any] = {"transfer_offers": OFFERS, "fetch_token_s": 1e-9}


async def begins(request: worker_pb2.WorkerGenerateRequest, context: Any) -> AsyncIterator[bytes]:
    """The first token, and a ticket for the prompt's blocks."""
    usage = generation_pb2.Usage(prompt_tokens=len(PROMPT), cached_tokens=32)
    yield chunk("a", worker_id="p", usage=usage, transfer_ticket=b"ticket")


async def goes_on(request: worker_pb2.WorkerGenerateRequest, context: Any) -> AsyncIterator[bytes]:
    """Two tokens more."""
    at = len(request.answered) // 4
    yield chunk("abcdef"[at : at + 1], worker_id="d")
    yield chunk("abcdef"[at + 1 : at + 2], finish_reason=generation_pb2.FINISH_REASON_STOP)


def refuses(code: grpc.StatusCode) -> Script:
    async def script(request: worker_pb2.WorkerGenerateRequest, context: Any) -> AsyncIterator[bytes]:
        await context.abort(code, "no")
        yield b""

    return script


async def breaks(request: worker_pb2.WorkerGenerateRequest, context: Any) -> AsyncIterator[bytes]:
    """One token, and the worker is gone."""
    async for piece in goes_on(request, context):
        yield piece
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the worker stops")


def with_workers(
    test: Callable[[Cluster, ScriptedWorker, list[ScriptedWorker]], Awaitable[None]], scripts: list[Script]
) -> None:
    """A prefill worker, and decode workers with these scripts: the first is idle, each other one has more to do."""

    async def run(running: Cluster) -> None:
        prefill = await running.join("p", role=fleet_pb2.WORKER_ROLE_PREFILL, **PULLS)
        prefill.script = begins
        decoders = []
        for number, script in enumerate(scripts):
            decoder = await running.join(f"d{number}", role=fleet_pb2.WORKER_ROLE_DECODE, **PULLS)
            decoder.script = script
            decoder.status.running = decoder.status.waiting = number
            await decoder.heartbeat(running.address)
            decoders.append(decoder)
        await running.ready(1 + len(scripts))
        await test(running, prefill, decoders)
        await running.nothing_in_flight()

    with_cluster(run, local_prefill_s=0.0)


def test_each_part_is_asked_for_as_it_must_be() -> None:
    """The first with a seed and to hold, the second with what was answered, the ticket and the first one's usage; the
    client sees one answer, and no ticket."""

    async def test(running: Cluster, prefill: ScriptedWorker, decoders: list[ScriptedWorker]) -> None:
        chunks = [each async for each in running.client.generate(token_ids=PROMPT, stop=["#"])]
        assert "".join(each.text for each in chunks) == "abc"
        assert [each.worker_id for each in chunks] == ["p", "d", ""]
        assert not any(each.transfer_ticket for each in chunks)
        (first,), (second,) = prefill.requests, decoders[0].requests
        assert first.hold
        assert not second.hold
        assert first.sampling.HasField("seed")
        assert first.sampling.max_tokens == MAX_MODEL_LEN - len(PROMPT)
        assert second.sampling == first.sampling
        assert not first.answered
        assert second.answered == ord("a").to_bytes(4, "little")
        assert (second.pull_ticket, second.answered_cached_tokens) == (b"ticket", 32)
        assert (second.token_ids, second.block_keys) == (first.token_ids, first.block_keys)

    with_workers(test, [goes_on])


def test_who_will_not_go_on_is_passed_over() -> None:
    """Full, or still busy with the same request: the next one goes on, with the same ticket; when nobody is left the
    answer ends with their word."""

    async def test(running: Cluster, prefill: ScriptedWorker, decoders: list[ScriptedWorker]) -> None:
        answer = await running.client.complete(token_ids=PROMPT)
        assert answer.text == "abc"
        assert [len(decoder.requests) for decoder in decoders] == [1, 1, 1]
        assert decoders[2].requests[0].pull_ticket == b"ticket"
        decoders[2].script = refuses(grpc.StatusCode.RESOURCE_EXHAUSTED)
        await refusal(running.client.complete(token_ids=PROMPT), grpc.StatusCode.UNAVAILABLE)

    codes = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.ALREADY_EXISTS)
    with_workers(test, [*map(refuses, codes), goes_on])


def test_a_ticket_is_used_until_somebody_has_gone_on() -> None:
    """Whoever goes on after that one is told of nothing that is lent, for it is no longer."""

    async def test(running: Cluster, prefill: ScriptedWorker, decoders: list[ScriptedWorker]) -> None:
        answer = await running.client.complete(token_ids=PROMPT)
        assert answer.text == "abcd"
        assert decoders[0].requests[0].pull_ticket == b"ticket"
        assert decoders[1].requests[0].pull_ticket == b""
        assert len(decoders[1].requests[0].answered) == 8

    with_workers(test, [breaks, goes_on])


def test_one_that_holds_nothing_is_gone_on_with_all_the_same() -> None:
    """And one that ends at once is not gone on with."""

    async def no_ticket(request: worker_pb2.WorkerGenerateRequest, context: Any) -> AsyncIterator[bytes]:
        yield chunk("a", worker_id="p")

    async def ends(request: worker_pb2.WorkerGenerateRequest, context: Any) -> AsyncIterator[bytes]:
        yield chunk("a", worker_id="p", finish_reason=generation_pb2.FINISH_REASON_LENGTH)

    async def says_nothing(request: worker_pb2.WorkerGenerateRequest, context: Any) -> AsyncIterator[bytes]:
        return
        yield b""

    async def test(running: Cluster, prefill: ScriptedWorker, decoders: list[ScriptedWorker]) -> None:
        prefill.script = no_ticket
        assert (await running.client.complete(token_ids=PROMPT)).text == "abc"
        assert decoders[0].requests[0].pull_ticket == b""
        prefill.script = ends
        assert (await running.client.complete(token_ids=PROMPT)).text == "a"
        assert len(decoders[0].requests) == 1
        prefill.script = says_nothing
        await refusal(running.client.complete(token_ids=PROMPT), grpc.StatusCode.UNAVAILABLE)

    with_workers(test, [goes_on])
