"""The router over gRPC: its fleet, direct mode, queries, the synchronous client."""

from __future__ import annotations

import asyncio
import time

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from rhizome import ticket
from rhizome.v1 import fleet_pb2, router_pb2, worker_pb2
from router.client import SyncClient
from tests.support.router_cluster import LONG_LEASE_S, PROMPT, Cluster, hangs, refusal, with_cluster
from tests.support.scripted_worker import ScriptedWorker


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
        worker.script = hangs
        async with running.heartbeats(worker):
            await running.ready()
            call = running.client.stub.Generate(router_pb2.GenerateRequest(text="x"))
            assert (await call.read()).text == "first "
        await running.until(lambda entry: entry is None)
        await refusal(running.client.index("worker-0"), grpc.StatusCode.NOT_FOUND)
        assert not call.done()
        assert not worker.cancelled.is_set()
        await refusal(worker.heartbeat(running.address), grpc.StatusCode.NOT_FOUND)
        async with running.heartbeats(worker):
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


def test_with_a_secret_nobody_else_can_speak_for_a_worker() -> None:
    """An unsigned goodbye or report is PERMISSION_DENIED, and changes nothing."""
    secret = b"fleet secret"

    async def test(running: Cluster) -> None:
        worker = await running.join(epoch=7, secret=secret)
        await running.ready()
        worker.secret = b""
        await refusal(worker.deregister(running.address), grpc.StatusCode.PERMISSION_DENIED)
        await refusal(worker.heartbeat(running.address), grpc.StatusCode.PERMISSION_DENIED)
        assert (await running.client.complete("x")).text == "hello world"
        worker.secret = secret
        await worker.heartbeat(running.address)
        await worker.deregister(running.address)
        assert await running.entry() is None

    with_cluster(test, secret=secret)


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
