"""Workers that publish over other transports than their own gRPC, and routers that follow them there."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from deploy.processes import WorkerSettings, running_worker
from kv_events.bus.grpc import GrpcEventSource
from kv_events.bus.redis_stream import AUTH_VARIABLE
from kv_events.bus.url import open_source, publishing
from kv_events.events import BlockStored
from rhizome.errors import InvalidRequest
from rhizome.v1 import router_pb2
from router.client import Client
from router.service import running_router
from tests.support.processes import Launcher
from tests.support.redis_server import RedisServer
from tests.support.router_cluster import Cluster, refusal, with_cluster
from tests.support.scripted_worker import ScriptedWorker

TRANSPORTS = ("zmq", "redis", "grpc")


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


def url_of(transport: str, request: pytest.FixtureRequest) -> str:
    if transport == "redis":
        server: RedisServer = request.getfixturevalue("server")
        return server.url(f"{uuid.uuid4()}:{{worker}}")
    return f"{transport}://127.0.0.1:0"


@asynccontextmanager
async def fleet(model: Path, *urls: str) -> AsyncIterator[Client]:
    """A client of a router with two workers that publish at `urls`."""
    async with AsyncExitStack() as stack:
        address = await stack.enter_async_context(running_router(validate=True))
        for name in ("worker-0", "worker-1"):
            settings = WorkerSettings(
                model, name, routers=(address,), threads=1, kv_cache_mib=1, max_model_len=512, events=urls
            )
            await stack.enter_async_context(running_worker(settings))
        client = await stack.enter_async_context(Client(address))
        await client.wait_ready(2)
        yield client


async def truth(worker: router_pb2.WorkerEntry) -> bytes:
    """The digest of what a worker holds, in its own words."""
    source = GrpcEventSource(worker.address)
    try:
        return (await source.snapshot()).digest
    finally:
        await source.close()


async def until_in_step(client: Client) -> list[router_pb2.WorkerEntry]:
    """Wait until the router's view of each worker is the worker's own."""
    async with asyncio.timeout(30):
        while True:
            workers = await client.workers()
            if all([worker.index_synced and worker.index_digest == await truth(worker) for worker in workers]):
                return list(workers)
            await asyncio.sleep(0.02)


async def chat(client: Client, conversations: int) -> None:
    """One after the other, on each worker in turn: 20 are enough for a small cache to evict."""
    for number in range(conversations):
        messages = [{"role": "user", "content": f"conversation {number}: " + "where do the roots end? " * 8}]
        await client.complete(messages=messages, max_tokens=4, temperature=0.0, policy="round-robin")


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(90):
            await test()

    asyncio.run(main())


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_router_follows_its_workers_where_they_publish(
    tiny_model: Path, request: pytest.FixtureRequest, transport: str
) -> None:
    """After some chats the index has each worker's digest; what a tool reads at the registered URL is the same."""

    async def test() -> None:
        async with fleet(tiny_model, url_of(transport, request)) as client:
            await chat(client, 20)
            for worker in await until_in_step(client):
                assert worker.events_url.startswith(f"{transport}://127.0.0.1:")
                assert not worker.events_url.endswith(":0")
                assert worker.events_applied == worker.next_event_seq > 0
                assert worker.events_malformed == worker.event_gaps == worker.digest_mismatches == 0
                assert worker.events_stale == worker.events_duplicate == 0
                async with open_source(worker.events_url) as source:
                    batches = await source.replay(worker.epoch, 0)
                assert len(batches) == worker.next_event_seq
            messages = [{"role": "user", "content": "conversation 19: " + "where do the roots end? " * 8}]
            assert (await client.explain(messages=messages)).candidates[0].cached_tokens > 0

    run(test)


def test_the_first_of_several_urls_is_what_routers_read(tiny_model: Path, server: RedisServer) -> None:
    """The others are for whoever else wants to read; all tell the same."""

    async def test() -> None:
        redis = server.url("several:{worker}")
        async with fleet(tiny_model, "zmq://127.0.0.1:0", redis) as client:
            await chat(client, 4)
            for worker in await until_in_step(client):
                assert worker.events_url.startswith("zmq://")
                async with open_source(redis.replace("{worker}", worker.worker_id)) as source:
                    assert (await source.replay(worker.epoch, 0))[-1].digest == worker.index_digest

    run(test)


def test_workers_serve_on_while_redis_is_gone(tiny_model: Path) -> None:
    """Not there at their start, killed later: requests are answered, and the index is right once it is back."""

    async def test() -> None:
        with RedisServer() as server:
            server.kill()
            async with fleet(tiny_model, server.url("kv:{worker}")) as client:
                await chat(client, 4)
                assert not any(worker.index_synced for worker in await client.workers())
                server.start()
                await until_in_step(client)
                server.kill()
                await chat(client, 8)
                server.start()
                await chat(client, 4)
                await until_in_step(client)

    run(test)


def test_a_port_that_is_taken_is_refused_at_once(tiny_model: Path) -> None:
    """By name, before the worker joins any fleet."""

    async def test() -> None:
        async with fleet(tiny_model, "zmq://127.0.0.1:0") as client:
            taken = (await client.workers())[0].events_url.partition("?")[0]
            settings = WorkerSettings(tiny_model, "worker-2", threads=1, kv_cache_mib=1, events=(taken,))
            with pytest.raises(InvalidRequest, match=re.escape(taken.removeprefix("zmq://").rpartition(":")[2])):
                async with running_worker(settings):
                    pass

    run(test)


def test_the_cluster_command_gives_each_worker_its_own(server: RedisServer, tiny_model: Path) -> None:
    """`rhizome up --events URL` with {worker} in it."""
    with Launcher(tiny_model, "--events", server.url("up:{worker}")) as launcher:

        async def test() -> None:
            async with Client(launcher.address) as client:
                await chat(client, 3)
                (worker,) = await until_in_step(client)
                assert worker.events_url == server.url("up:worker-0")
                assert worker.events_applied > 0

        run(test)


BAD_URLS = {
    "memory://w0": "a port that others can reach",
    "zmq://127.0.0.1:0": "a port that others can reach",
    "redis://:secret@127.0.0.1:6379/kv": f"no login: routers bring their own .{AUTH_VARIABLE}",
    "kafka://127.0.0.1:9092/kv": "one of memory://, grpc://, zmq://",
    "redis://127.0.0.1:6379": "STREAM",
    "zmq://127.0.0.1:7?dialect=morse": "dialect as one of",
    "zmq://" + "h" * 3000 + ":7": "at most",
}


@pytest.mark.parametrize(("url", "says"), BAD_URLS.items(), ids=[url[:40] for url in BAD_URLS])
def test_a_registration_whose_events_cannot_be_read_is_refused(url: str, says: str) -> None:
    """INVALID_ARGUMENT that names the field, and no password; the fleet stays as it is."""

    async def test(running: Cluster) -> None:
        worker = ScriptedWorker(events_url=url)
        await worker.start()
        try:
            error = await refusal(worker.register(running.address), grpc.StatusCode.INVALID_ARGUMENT)
            assert re.search(f"events_url is .*: .*{says}", error.details() or ""), error.details()
            assert "secret" not in (error.details() or "")
            assert await running.client.workers() == []
        finally:
            await worker.kill()

    with_cluster(test)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_worker_that_publishes_as_another_changes_nothing_of_it(
    request: pytest.FixtureRequest, transport: str
) -> None:
    """It registers under its own name and says events of its neighbour: the router counts them, if they come at all."""

    async def test(running: Cluster) -> None:
        honest = await running.join("worker-0")
        honest.hold(list(range(64)))
        liar = ScriptedWorker("worker-0", epoch=7)  # its log speaks as worker-0
        liar.registration.worker_id = "worker-1"
        await liar.start()
        try:
            async with publishing(liar.log, url_of(transport, request).replace("{worker}", "liar")) as told:
                liar.registration.events_url = told
                await liar.register(running.address)
                for block in range(1, 20):
                    liar.log.append([BlockStored(np.array([block], dtype=np.uint64), 0, 16)], 0.0)
                    await asyncio.sleep(0.01)
                await running.until(lambda entry: entry is not None and entry.index_synced)
                workers = {worker.worker_id: worker for worker in await running.client.workers()}
                assert workers["worker-0"].index_digest == honest.log.digest
                assert workers["worker-0"].epoch == 1
                assert workers["worker-1"].indexed_blocks == 0
                assert not workers["worker-1"].index_synced
        finally:
            await liar.kill()

    with_cluster(test)
