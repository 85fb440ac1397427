"""A real router server, real clients and scripted workers, over gRPC on loopback."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from rhizome import rpc, ticket
from rhizome.errors import InvalidRequest, Overloaded
from rhizome.v1 import fleet_pb2, generation_pb2, router_pb2, worker_pb2
from router.client import Client, SyncClient
from router.service import running_router
from tests.support.scripted_worker import MAX_MODEL_LEN, MODEL, VOCAB_SIZE, ScriptedWorker, chunk, serving_worker

PROMPT = list(range(100)) * 4
LONG_LEASE_S = 60.0  # scripted workers send no heartbeats unless told to


class Cluster:
    """A router, a client to it, and workers by id."""

    def __init__(self, address: str, client: Client, stack: AsyncExitStack) -> None:
        self.address = address
        self.client = client
        self._stack = stack

    async def join(self, worker_id: str = "worker-0", epoch: int = 1, **options: Any) -> ScriptedWorker:
        return await self._stack.enter_async_context(serving_worker(self.address, worker_id, epoch, **options))

    async def ready(self, workers: int = 1) -> None:
        await self.client.wait_ready(workers, timeout_s=30)

    async def entry(self, worker_id: str = "worker-0") -> router_pb2.WorkerEntry | None:
        return next((entry for entry in await self.client.workers() if entry.worker_id == worker_id), None)

    async def until(self, holds: Callable[[router_pb2.WorkerEntry | None], bool], worker_id: str = "worker-0") -> None:
        """Wait for what the router says of a worker to fulfil a condition."""
        async with asyncio.timeout(30):
            while not holds(await self.entry(worker_id)):
                await asyncio.sleep(0.01)

    async def nothing_in_flight(self) -> None:
        await self.until_all(lambda entry: entry.in_flight == 0)

    async def until_all(self, holds: Callable[[router_pb2.WorkerEntry], bool]) -> None:
        async with asyncio.timeout(30):
            while not all(holds(entry) for entry in await self.client.workers()):
                await asyncio.sleep(0.01)


@asynccontextmanager
async def cluster(**options: Any) -> AsyncIterator[Cluster]:
    """Nothing may be in flight at the end, whatever the test did."""
    options = {"lease_s": LONG_LEASE_S, "validate": True} | options
    async with running_router(**options) as address, Client(address) as client, AsyncExitStack() as stack:
        running = Cluster(address, client, stack)
        yield running
        await running.nothing_in_flight()


def with_cluster(test: Callable[[Cluster], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), cluster(**options) as running:
            await test(running)

    asyncio.run(main())


async def refusal(call: Awaitable[object], code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is code, caught.value.details()
    return caught.value


def detail(error: grpc.aio.AioRpcError, message: Any) -> Any:
    status = rpc_status.from_call(error)
    assert status is not None
    assert status.details[0].Unpack(message)
    return message


async def hangs(request: worker_pb2.WorkerGenerateRequest, context: Any) -> AsyncIterator[bytes]:
    yield chunk("first ", worker_id="scripted")
    await asyncio.Event().wait()


# Routing and passing through.


def test_a_request_goes_to_the_worker_that_holds_its_prefix() -> None:
    """The index follows the workers' events; metadata, answer and Explain name the holder and the cached tokens."""

    async def test(running: Cluster) -> None:
        await running.join("worker-0")
        holder = await running.join("worker-1")
        await running.ready(2)
        held = holder.hold(PROMPT)
        await running.until(lambda entry: entry is not None and entry.indexed_blocks == held, "worker-1")
        decision = await running.client.explain(token_ids=PROMPT)
        assert decision.worker_id == "worker-1"
        assert decision.candidates[0].cached_tokens == 399  # the last token is always computed
        assert decision.candidates[1].cached_tokens == 0
        call = running.client.stub.Generate(
            router_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=PROMPT), request_id="mine")
        )
        metadata = dict(await call.initial_metadata())
        assert (metadata["rhizome-worker"], metadata["rhizome-cached-tokens"]) == ("worker-1", "399")
        assert metadata["rhizome-request-id"] == "mine"
        assert float(metadata["rhizome-predicted-ttft-ms"]) > 0
        assert [piece.text async for piece in call] == ["hello ", "world"]
        assert [request.request_id for request in holder.requests] == ["mine"]

    with_cluster(test)


def test_text_and_chat_are_tokenized_with_the_workers_own_files() -> None:
    """What reaches the worker is the template's text, token for token, with its keys."""

    async def test(running: Cluster) -> None:
        worker = await running.join()
        await running.ready()
        completion = await running.client.complete("hé", max_tokens=3, temperature=0.5)
        assert (completion.text, completion.finish_reason, completion.prompt_tokens) == ("hello world", "stop", 3)
        assert 0 < completion.ttft_s <= completion.total_s
        sent = worker.requests[0]
        assert (sent.model, sent.sampling.max_tokens, len(sent.salt)) == (MODEL, 3, 32)
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi " * 50}]
        await running.client.complete(messages=messages)
        sent = worker.requests[1]
        text = "<|system|>Be brief.\n<|user|>" + "Hi " * 50 + "\n<|assistant|>"
        assert len(sent.token_ids) == 4 * (1 + len(text))  # one token for the bos
        assert len(sent.block_keys) == 16 * ((1 + len(text)) // 16)

    with_cluster(test)


def test_chunks_pass_through_as_bytes() -> None:
    """A field of a later version, and even bytes that are no message, reach the client as they were."""
    pieces = [chunk("a") + b"\xf2\x7f\x03new", b"\xff\xff not a message"]

    async def script(request: worker_pb2.WorkerGenerateRequest, context: Any) -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async def test(running: Cluster) -> None:
        worker = await running.join()
        await running.ready()
        worker.script = script
        async with grpc.aio.insecure_channel(running.address) as channel:
            generate = channel.unary_stream(
                "/rhizome.v1.Router/Generate", request_serializer=router_pb2.GenerateRequest.SerializeToString
            )
            request = router_pb2.GenerateRequest(text="x")
            assert [piece async for piece in generate(request)] == pieces

    with_cluster(test)


def test_round_robin_takes_turns() -> None:
    """Whatever is cached where, each worker gets every second request."""

    async def test(running: Cluster) -> None:
        workers = [await running.join("worker-0"), await running.join("worker-1")]
        await running.ready(2)
        workers[0].hold(PROMPT)
        for _ in range(6):
            await running.client.complete(token_ids=PROMPT, policy="round-robin")
        assert [len(worker.requests) for worker in workers] == [3, 3]

    with_cluster(test)


def test_a_request_that_bypasses_the_cache_is_not_routed_by_it() -> None:
    """Explain counts nothing as cached, and the worker is told."""

    async def test(running: Cluster) -> None:
        worker = await running.join()
        await running.ready()
        held = worker.hold(PROMPT)
        await running.until(lambda entry: entry is not None and entry.indexed_blocks == held)
        decision = await running.client.explain(token_ids=PROMPT, bypass_prefix_cache=True)
        assert decision.candidates[0].cached_tokens == 0
        await running.client.complete(token_ids=PROMPT, bypass_prefix_cache=True)
        assert worker.requests[0].bypass_prefix_cache

    with_cluster(test)


# Deadlines, cancellation, failures.


def test_the_clients_deadline_reaches_the_worker() -> None:
    """The worker has what is left of the client's time, or no limit where the client set none; then it is cancelled."""

    async def test(running: Cluster) -> None:
        worker = await running.join()
        await running.ready()
        await running.client.complete("x", timeout_s=25.0)
        await running.client.complete("x")
        left_s, none = worker.time_left
        assert left_s is not None
        assert 15 < left_s < 26  # gRPC rounds up on the way
        assert none is None
        worker.script = hangs
        await refusal(running.client.complete("x", timeout_s=0.3), grpc.StatusCode.DEADLINE_EXCEEDED)
        await worker.cancelled.wait()

    with_cluster(test)


def test_a_client_that_goes_away_cancels_the_worker() -> None:
    """At once: the worker can free its blocks, and the router's reservation is gone."""

    async def test(running: Cluster) -> None:
        worker = await running.join()
        await running.ready()
        worker.script = hangs
        call = running.client.stub.Generate(router_pb2.GenerateRequest(text="x"))
        assert (await call.read()).text == "first "
        entry = await running.entry()
        assert entry is not None
        assert entry.in_flight == 1
        call.cancel()
        await worker.cancelled.wait()
        await running.nothing_in_flight()

    with_cluster(test)


def test_a_worker_that_dies_amid_an_answer_is_named() -> None:
    """UNAVAILABLE says which worker, and how many chunks had been delivered; the router goes on with the others."""

    async def test(running: Cluster) -> None:
        worker = await running.join()
        await running.ready()
        worker.script = hangs
        call = running.client.stub.Generate(router_pb2.GenerateRequest(text="x"))
        assert (await call.read()).text == "first "
        await worker.kill()
        error = await refusal(call.read(), grpc.StatusCode.UNAVAILABLE)
        assert "worker-0" in (error.details() or "")
        assert "after 1 chunks" in (error.details() or "")
        await running.nothing_in_flight()
        error = await refusal(running.client.complete("x"), grpc.StatusCode.UNAVAILABLE)
        assert "1 unreachable" in (error.details() or "")  # nothing more is sent there before it is heard of again
        await running.join("worker-1")
        await running.ready()
        assert (await running.client.complete("x")).text == "hello world"

    with_cluster(test)


def test_a_workers_own_refusal_passes_through_with_its_details() -> None:
    """Code, message and google.rpc details are the worker's."""

    async def full(request: worker_pb2.WorkerGenerateRequest, context: Any) -> AsyncIterator[bytes]:
        await rpc.abort(context, Overloaded("waiting is 8 of 8", retry_after_s=2.5))
        yield b""

    async def wrong(request: worker_pb2.WorkerGenerateRequest, context: Any) -> AsyncIterator[bytes]:
        await rpc.abort(context, InvalidRequest("sampling.top_k", 7, "at most 6"))
        yield b""

    async def test(running: Cluster) -> None:
        worker = await running.join()
        await running.ready()
        worker.script = full
        error = await refusal(running.client.complete("x"), grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert error.details() == "waiting is 8 of 8"
        assert detail(error, error_details_pb2.RetryInfo()).retry_delay.ToMilliseconds() == 2500
        worker.script = wrong
        error = await refusal(running.client.complete("x"), grpc.StatusCode.INVALID_ARGUMENT)
        assert detail(error, error_details_pb2.BadRequest()).field_violations[0].field == "sampling.top_k"

    with_cluster(test)


def test_nobody_to_serve_is_said_clearly() -> None:
    """No worker: UNAVAILABLE. Another model: NOT_FOUND that names those served. Only draining ones: UNAVAILABLE."""

    async def test(running: Cluster) -> None:
        error = await refusal(running.client.complete("x"), grpc.StatusCode.UNAVAILABLE)
        assert error.details() == "no worker is registered"
        await running.join()
        await running.ready()
        error = await refusal(running.client.complete("x", model="gpt-5"), grpc.StatusCode.NOT_FOUND)
        assert "'gpt-5' is not served" in (error.details() or "")
        assert MODEL in (error.details() or "")
        await running.client.set_draining("worker-0", True)
        error = await refusal(running.client.complete("x"), grpc.StatusCode.UNAVAILABLE)
        assert "1 draining" in (error.details() or "")
        await running.client.set_draining("worker-0", False)
        assert (await running.client.complete("x")).text == "hello world"
        await refusal(running.client.set_draining("worker-9", True), grpc.StatusCode.NOT_FOUND)

    with_cluster(test)


def test_draining_moves_new_requests_and_lets_old_ones_end() -> None:
    """The heartbeat tells the worker so, too."""

    async def test(running: Cluster) -> None:
        first = await running.join("worker-0")
        await running.ready()
        first.script = hangs
        call = running.client.stub.Generate(router_pb2.GenerateRequest(text="x"))
        assert (await call.read()).text == "first "
        await running.client.set_draining("worker-0", True)
        second = await running.join("worker-1")
        await running.ready()
        for _ in range(3):
            await running.client.complete("x")
        assert (len(first.requests), len(second.requests)) == (1, 3)
        assert (await first.heartbeat(running.address)).draining
        assert not first.cancelled.is_set()
        call.cancel()

    with_cluster(test)


def test_all_workers_busy_is_a_refusal_with_a_time_to_retry() -> None:
    """RESOURCE_EXHAUSTED with RetryInfo, and nothing is queued; once there is room the next request is served."""

    async def test(running: Cluster) -> None:
        worker = await running.join(max_running=1, max_waiting=1)
        await running.ready()
        limit = worker.registration.max_running + worker.registration.max_waiting
        worker.script = hangs
        calls = [running.client.stub.Generate(router_pb2.GenerateRequest(text="x")) for _ in range(limit)]
        for call in calls:
            await call.read()
        error = await refusal(running.client.complete("x"), grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert f"worker-0 {limit} of {limit}" in (error.details() or "")
        assert detail(error, error_details_pb2.RetryInfo()).retry_delay.ToMilliseconds() >= 100
        for call in calls:
            call.cancel()
        await running.nothing_in_flight()
        assert len(worker.requests) == limit

    with_cluster(test)


def test_a_request_id_in_flight_is_refused_a_second_time() -> None:
    """ALREADY_EXISTS; after the first has ended the id is free."""

    async def test(running: Cluster) -> None:
        worker = await running.join()
        await running.ready()
        worker.script = hangs
        call = running.client.stub.Generate(router_pb2.GenerateRequest(text="x", request_id="one"))
        await call.read()
        await refusal(running.client.complete("x", request_id="one"), grpc.StatusCode.ALREADY_EXISTS)
        call.cancel()
        await running.nothing_in_flight()

    with_cluster(test)


# Bad input.

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


# The fleet.


def test_a_zombie_of_an_old_epoch_is_refused_and_a_new_epoch_drops_old_blocks() -> None:
    """A worker that restarts replaces itself, its blocks at once; what is left of the former one gets no foot in."""

    async def test(running: Cluster) -> None:
        old = await running.join(epoch=1)
        held = old.hold(PROMPT)
        await running.until(lambda entry: entry is not None and entry.indexed_blocks == held)
        new = await running.join(epoch=2)
        entry = await running.entry()
        assert entry is not None
        assert (entry.epoch, entry.address) == (2, new.registration.address)
        old.hold(list(range(16, 48)))  # events of the old incarnation go nowhere
        error = await refusal(old.register(running.address), grpc.StatusCode.FAILED_PRECONDITION)
        assert "epoch 1 is older" in (error.details() or "")
        await refusal(old.heartbeat(running.address), grpc.StatusCode.FAILED_PRECONDITION)
        assert new.hold(PROMPT[:32]) == 2
        await running.until(lambda entry: entry is not None and entry.indexed_blocks == 2 and entry.index_synced)
        hashes, digest = await running.client.index("worker-0")
        assert len(hashes) == 2
        assert digest == new.log.digest

    with_cluster(test)


def test_a_lease_that_runs_out_drops_the_worker_and_its_blocks_but_ends_no_answer() -> None:
    """Its next heartbeat is told to register again, and then all is there once more."""

    async def test(running: Cluster) -> None:
        worker = await running.join()
        held = worker.hold(PROMPT)
        await running.ready()
        worker.script = hangs
        call = running.client.stub.Generate(router_pb2.GenerateRequest(text="x"))
        assert (await call.read()).text == "first "
        await running.until(lambda entry: entry is None)
        await refusal(running.client.index("worker-0"), grpc.StatusCode.NOT_FOUND)
        assert not call.done()
        assert not worker.cancelled.is_set()
        await refusal(worker.heartbeat(running.address), grpc.StatusCode.NOT_FOUND)
        await worker.register(running.address)
        await running.until(lambda entry: entry is not None and entry.indexed_blocks == held)
        call.cancel()
        await worker.cancelled.wait()

    with_cluster(test, lease_s=1.5)


def test_heartbeats_keep_the_lease_and_report_the_load() -> None:
    """Status and progress reach the fleet listing."""

    async def test(running: Cluster) -> None:
        worker = await running.join()
        assert (await worker.register(running.address)).lease_s == LONG_LEASE_S
        worker.status.MergeFrom(worker_pb2.WorkerStatus(running=3, blocks_in_use=40, prefill_tokens_outstanding=1000))
        await worker.heartbeat(running.address)
        await running.ready()
        entry = await running.entry()
        assert entry is not None
        assert (entry.status.running, entry.status.blocks_in_use) == (3, 40)
        assert LONG_LEASE_S - 30 < entry.lease_left_s <= LONG_LEASE_S
        decision = await running.client.explain("x")
        assert decision.candidates[0].queued_prefill_tokens == 1000
        assert decision.candidates[0].free_blocks == 960

    with_cluster(test)


def test_a_worker_unlike_the_fleet_is_refused() -> None:
    """Another block size for the same model, an unknown role, an address that is none, a zero: by name and value."""

    async def test(running: Cluster) -> None:
        await running.join()
        for change, code, says in (
            ({"model": fleet_pb2.ModelCard(block_size=32)}, grpc.StatusCode.FAILED_PRECONDITION, "block_size"),
            ({"role": 7}, grpc.StatusCode.INVALID_ARGUMENT, "role is 7"),
        ):
            other = ScriptedWorker("worker-1", **change)
            other.registration.address = "127.0.0.1:1"
            error = await refusal(other.register(running.address), code)
            assert says in (error.details() or "")
        other = ScriptedWorker("worker-1")
        other.registration.address = "nowhere"
        error = await refusal(other.register(running.address), grpc.StatusCode.INVALID_ARGUMENT)
        assert "host:port" in (error.details() or "")
        other.registration.address = "127.0.0.1:1"
        other.registration.max_batched_tokens = 0
        error = await refusal(other.register(running.address), grpc.StatusCode.INVALID_ARGUMENT)
        assert "max_batched_tokens is 0" in (error.details() or "")
        assert [entry.worker_id for entry in await running.client.workers()] == ["worker-0"]

    with_cluster(test)


def test_with_a_secret_only_signed_workers_join_and_requests_carry_tickets() -> None:
    """An unsigned registration and one under another secret are PERMISSION_DENIED; a ticket fits worker and epoch."""
    secret = b"fleet secret"

    async def test(running: Cluster) -> None:
        for wrong in (b"", b"other"):
            other = ScriptedWorker("worker-1", secret=wrong)
            other.registration.address = "127.0.0.1:1"
            await refusal(other.register(running.address), grpc.StatusCode.PERMISSION_DENIED)
        worker = await running.join(epoch=7, secret=secret)
        await running.ready()
        await running.client.complete("x" * 40)
        await running.client.complete("x" * 40, direct=True)
        now_ms = int(time.time() * 1000)
        assert all(ticket.has_valid_ticket(secret, sent, "worker-0", 7, now_ms) for sent in worker.requests)
        assert len(worker.requests) == 2
        worker.status.finished_request_ids.append(worker.requests[1].request_id)
        await worker.heartbeat(running.address)

    with_cluster(test, secret=secret)


def test_a_worker_whose_tokenizer_does_not_verify_serves_nothing() -> None:
    """Its files lack the digest of its model card: no request is sent there, and the error says what is missing."""

    async def test(running: Cluster) -> None:
        worker = ScriptedWorker()
        worker.files["tokenizer.json"] += b" "
        await worker.start()
        await worker.register(running.address)
        error = await refusal(running.client.complete("x"), grpc.StatusCode.UNAVAILABLE)
        assert "tokenizer" in (error.details() or "")
        error = await refusal(running.client.complete(token_ids=[1]), grpc.StatusCode.UNAVAILABLE)
        assert "1 starting" in (error.details() or "")
        await worker.kill()

    with_cluster(test)


# Direct mode, queries, the synchronous client.


def test_direct_mode_streams_from_the_worker_and_ends_with_its_report() -> None:
    """Route reserves; the worker's status reports, not the stream, tell the router of first token and end."""

    async def test(running: Cluster) -> None:
        worker = await running.join()
        await running.ready()
        completion = await running.client.complete("x" * 100, direct=True, request_id="direct")
        assert completion.text == "hello world"
        entry = await running.entry()
        assert entry is not None
        assert entry.in_flight == 1
        decision = await running.client.explain("x")
        assert decision.candidates[0].queued_prefill_tokens == 100
        worker.status.prefilled_request_ids.append("direct")
        await worker.heartbeat(running.address)
        decision = await running.client.explain("x")
        assert (decision.candidates[0].queued_prefill_tokens, decision.candidates[0].running) == (0, 1)
        worker.status.finished_request_ids.append("direct")
        await worker.heartbeat(running.address)
        entry = await running.entry()
        assert entry is not None
        assert entry.in_flight == 0

    with_cluster(test)


def test_caches_are_cleared_on_every_worker() -> None:
    """The sum of what they dropped; an unreachable worker is named."""

    async def test(running: Cluster) -> None:
        workers = [await running.join("worker-0"), await running.join("worker-1")]
        held = sum(worker.hold(PROMPT) for worker in workers)
        assert await running.client.clear_caches() == held
        await running.until_all(lambda entry: entry.index_synced and entry.indexed_blocks == 0)
        await workers[1].kill()
        error = await refusal(running.client.clear_caches(), grpc.StatusCode.UNAVAILABLE)
        assert "worker-1" in (error.details() or "")

    with_cluster(test)


def test_a_router_that_joins_late_takes_a_snapshot() -> None:
    """Blocks from before the registration are in the index, by content and digest."""

    async def test(running: Cluster) -> None:
        worker = ScriptedWorker()
        held = worker.hold(PROMPT)
        await worker.start()
        await worker.register(running.address)
        await running.until(lambda entry: entry is not None and entry.indexed_blocks == held and entry.index_synced)
        hashes, digest = await running.client.index("worker-0")
        assert digest == worker.log.digest
        assert np.array_equal(hashes, np.sort(worker.log.snapshot().block_hashes))
        await worker.kill()

    with_cluster(test)


def test_the_synchronous_client_does_the_same() -> None:
    """Generate, direct, explain, fleet, index and drain without asyncio."""

    def use(address: str) -> None:
        with SyncClient(address) as client:
            client.wait_ready()
            assert client.complete("x", n=1).text == "hello world"
            assert client.complete("x", direct=True, request_id="direct").text == "hello world"
            assert client.explain("x").worker_id == "worker-0"
            assert [entry.worker_id for entry in client.workers()] == ["worker-0"]
            assert len(client.index("worker-0")[0]) == 25
            client.set_draining("worker-0", True)
            with pytest.raises(grpc.RpcError) as caught:
                client.complete("x")
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            client.set_draining("worker-0", False)
            assert client.clear_caches() == 25

    async def test(running: Cluster) -> None:
        worker = await running.join()
        worker.hold(PROMPT)
        await running.until(lambda entry: entry is not None and entry.indexed_blocks == 25)
        await asyncio.to_thread(use, running.address)
        worker.status.finished_request_ids.append("direct")
        await worker.heartbeat(running.address)

    with_cluster(test)


def test_health_and_reflection() -> None:
    """Both services say that they serve, and describe themselves."""

    async def test(running: Cluster) -> None:
        async with grpc.aio.insecure_channel(running.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for service in ("", "rhizome.v1.Router", "rhizome.v1.Fleet"):
                answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            answer = await call.read()
            names = {service.name for service in answer.list_services_response.service}
            assert {"rhizome.v1.Router", "rhizome.v1.Fleet"} <= names
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF

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
