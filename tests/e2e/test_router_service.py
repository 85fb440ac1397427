"""The router over gRPC: routing, passing through, deadlines, cancellation, failures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.rpc import error_details_pb2

from rhizome import rpc
from rhizome.errors import InvalidRequest, Overloaded
from rhizome.v1 import generation_pb2, router_pb2, worker_pb2
from router.client import SyncClient
from tests.support.router_cluster import PROMPT, Cluster, detail, hangs, refusal, with_cluster
from tests.support.scripted_worker import MODEL, chunk

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
        assert decision.candidates[0].cached_tokens == 384  # whole blocks, and the last token is always computed
        assert decision.candidates[1].cached_tokens == 0
        call = running.client.stub.Generate(
            router_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=PROMPT), request_id="mine")
        )
        metadata = dict(await call.initial_metadata())
        assert (metadata["rhizome-worker"], metadata["rhizome-cached-tokens"]) == ("worker-1", "384")
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
        await refusal(running.client.complete("x", timeout_s=1.0), grpc.StatusCode.DEADLINE_EXCEEDED)
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


def test_a_worker_that_is_gone_before_it_answered_is_replaced_by_another() -> None:
    """Nothing was delivered, so nobody notices: the request goes to a worker that is there."""

    async def test(running: Cluster) -> None:
        gone = await running.join()
        await running.join("worker-1")
        await running.ready(2)
        await gone.kill()
        for _ in range(3):
            assert (await running.client.complete("x", policy="round-robin")).text == "hello world"
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


def test_the_whole_tree_is_sent_while_workers_come_and_go() -> None:
    """GetTree: every worker by its name with what it holds, and where requests went; the synchronous client alike."""

    async def test(running: Cluster) -> None:
        workers = [await running.join(name) for name in ("worker-0", "worker-1")]
        await running.ready(2)
        held = [worker.hold(PROMPT[: 160 * (1 + number)]) for number, worker in enumerate(workers)]
        for worker, blocks in zip(workers, held, strict=True):
            name = worker.worker_id
            await running.until(lambda e, blocks=blocks: e is not None and e.indexed_blocks == blocks, name)
        await running.client.explain(token_ids=PROMPT)
        whole = await running.client.tree(hottest=10)
        assert sorted(whole.workers) == ["worker-0", "worker-1"]
        assert [whole.tree.count(whole.workers.index(worker.worker_id)) for worker in workers] == held
        assert whole.block_size == 16
        assert whole.hottest[0].depth == max(held)
        assert await running.client.hottest() == whole.hottest
        with SyncClient(running.address) as client:
            again = await asyncio.to_thread(client.tree, 10)
            assert (again.workers, again.hottest) == (whole.workers, whole.hottest)
            assert await asyncio.to_thread(client.hottest) == whole.hottest

    with_cluster(test)
