"""The Redis bus when Redis dies, hangs or forgets: at quiescence every router's view is the worker's own."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import AsyncExitStack

import numpy as np
import pytest
from redis import Redis

from kv_events.bus import redis_publisher
from kv_events.bus.redis import open_source
from kv_events.bus.url import parse_bus_url
from kv_events.events import BlockStored
from kv_events.wire import MAX_HASHES_PER_EVENT
from tests.support.redis_fleet import Worker, be_impatient, in_step, published, router, run
from tests.support.redis_server import RedisServer


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    be_impatient(monkeypatch)


@pytest.mark.parametrize("meanwhile", [0, 20, 500])
def test_a_redis_that_is_killed_and_comes_back_empty(server: RedisServer, meanwhile: int) -> None:
    """Whether the worker rests, goes on for less than its log keeps, or for much more."""

    async def test() -> None:
        worker, url = Worker(), server.url("kv")
        async with published(worker, url), router(url) as view:
            await worker.run(50)
            await in_step(view, worker)
            server.kill()
            await worker.run(meanwhile)
            server.start()
            await in_step(view, worker)
            await worker.run(50)
            await in_step(view, worker)

    run(test())


@pytest.mark.parametrize("meanwhile", [20, 500])
@pytest.mark.parametrize("pause_s", [0.0, 1.5])
def test_a_redis_that_hangs(server: RedisServer, meanwhile: int, pause_s: float) -> None:
    """For less or more than the timeout: nothing is lost, and nothing piles up."""

    async def test() -> None:
        worker, url = Worker(), server.url("kv")
        async with published(worker, url), router(url) as view:
            await worker.run(50)
            await in_step(view, worker)
            server.pause()
            worker.go_on(meanwhile)
            await asyncio.sleep(pause_s)
            server.resume()
            await in_step(view, worker)
            assert view.counts.mismatches == 0

    run(test())


def test_an_append_waits_for_nobody(server: RedisServer) -> None:
    """Steps of the engine in the very thread of the event loop, which cannot run meanwhile, end although Redis hangs;
    what is kept for it is the log's ring, and the sizes of what the stream keeps."""

    async def test() -> None:
        worker, url = Worker(capacity=64), server.url("kv")
        bus = parse_bus_url(url)
        publisher = redis_publisher.RedisPublisher(worker.log, bus, kept_batches=32)
        task = asyncio.create_task(publisher.run())
        async with router(url) as view:
            await worker.run(20)
            await in_step(view, worker)
            server.pause()
            for _ in range(20):
                worker.go_on(500)
                await asyncio.sleep(0.01)
            assert worker.log.next_seq - worker.log.first_seq == 64
            window = publisher._window
            assert window is not None
            assert window.next - window.first <= 32
            server.resume()
            await in_step(view, worker)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await publisher.close()

    run(test())


def test_a_redis_that_is_not_there_yet(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """Publishing begins all the same, with one warning, and events arrive once it is there."""

    async def test() -> None:
        worker, url = Worker(), server.url("kv")
        server.kill()
        async with published(worker, url), router(url) as view:
            await worker.run(100)
            server.start()
            await in_step(view, worker)

    run(test())
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "trying until events can be published there" in warning.getMessage()


@pytest.mark.parametrize("lost", ["everything", "stream", "snapshot"])
def test_what_redis_forgets_without_a_word_is_written_again(server: RedisServer, lost: str) -> None:
    """Flushed, evicted or deleted, while the worker rests: a router that starts then finds it."""

    async def test() -> None:
        worker, url = Worker(), server.url("kv")
        with Redis(port=server.port) as client:
            async with published(worker, url), router(url) as view:
                await worker.run(50)
                await in_step(view, worker)
                if lost == "everything":
                    client.flushall()
                else:
                    client.delete("kv" if lost == "stream" else "kv:snapshot")
                async with router(url) as late:
                    await in_step(late, worker)
                    await worker.run(50)
                    await in_step(late, worker)
                await in_step(view, worker)

    run(test())


def test_a_stream_is_trimmed_and_its_snapshot_always_joins_it(server: RedisServer) -> None:
    """However long the worker goes on: what is kept is bounded, and a router that starts late is in step."""

    async def test() -> None:
        worker, url = Worker(capacity=4096), server.url("kv")
        with Redis(port=server.port) as client:
            async with AsyncExitStack() as stack:
                await stack.enter_async_context(published(worker, url, kept_batches=200))
                early = await stack.enter_async_context(router(url))
                for _ in range(10):
                    await worker.run(150)
                    await in_step(early, worker)
                    late = await stack.enter_async_context(router(url))
                    await in_step(late, worker)
                    assert client.xlen("kv") <= 200 + 100 + 256  # a node of Redis holds 100 entries
                async with open_source(parse_bus_url(url)) as source:
                    with pytest.raises(redis_publisher.Trimmed, match="events are kept from [1-9]"):
                        await source.replay(5, 0)
        assert early.counts.gaps == early.counts.mismatches == 0

    run(test())


def test_large_batches_are_bounded_by_their_bytes(server: RedisServer) -> None:
    """A stream of few batches takes no more memory in Redis than was meant."""

    async def test() -> None:
        worker, url = Worker(), server.url("kv")
        blocks = np.arange(1, 20_001, dtype=np.uint64) << np.uint64(40)  # 180 kB a batch
        with Redis(port=server.port) as client:
            async with published(worker, url, kept_bytes=2**20), router(url) as view:
                for _ in range(30):
                    worker.log.append([BlockStored(blocks, 0, 16)], 0.0)
                    await in_step(view, worker)
                    assert client.memory_usage("kv") < 3 * 2**20

    run(test())


def test_a_batch_too_large_to_send_is_healed_by_the_snapshot(server: RedisServer) -> None:
    """The log keeps none such: the stream starts anew behind it."""

    async def test() -> None:
        worker, url = Worker(), server.url("kv")
        large = np.arange(1, MAX_HASHES_PER_EVENT + 2, dtype=np.uint64)
        async with published(worker, url), router(url) as view:
            await worker.run(20)
            await in_step(view, worker)
            worker.log.append([BlockStored(large, 0, 16)], 0.0)
            await in_step(view, worker)
            await worker.run(20)
            await in_step(view, worker)

    run(test())


def test_two_routers_read_one_stream(server: RedisServer) -> None:
    """One of them from the beginning, one later, both through an outage."""

    async def test() -> None:
        worker, url = Worker(), server.url("kv")
        async with published(worker, url), router(url) as first:
            await worker.run(100)
            async with router(url) as second:
                await worker.run(100)
                server.kill()
                server.start()
                await worker.run(100)
                await in_step(first, worker)
                await in_step(second, worker)

    run(test())


@pytest.mark.parametrize("seed", range(6))
def test_any_schedule_ends_in_step(server: RedisServer, seed: int) -> None:
    """Steps, outages, losses and restarts of the worker in any order."""

    async def test() -> None:
        chance = random.Random(seed)
        url, worker = server.url("kv"), Worker(seed=seed)
        with Redis(port=server.port) as client:
            async with AsyncExitStack() as routers, AsyncExitStack() as workers:
                view = await routers.enter_async_context(router(url))
                await workers.enter_async_context(published(worker, url, kept_batches=32))
                for _ in range(25):
                    match chance.choice(["run", "run", "burst", "kill", "pause", "flush", "trim", "restart"]):
                        case "run":
                            await worker.run(chance.randrange(60))
                        case "burst":
                            worker.go_on(chance.randrange(200))
                        case "kill":
                            server.kill()
                            await worker.run(chance.randrange(60))
                            server.start()
                        case "pause":
                            server.pause()
                            await worker.run(chance.randrange(60))
                            server.resume()
                        case "flush":
                            client.flushall()
                        case "trim":
                            client.xtrim("kv", maxlen=5, approximate=False)
                        case "restart":
                            worker = Worker(worker.log.epoch + 1, seed=seed)
                            await workers.enter_async_context(published(worker, url, kept_batches=32))
                await in_step(view, worker)

    run(test())
