"""What every event transport does, opened by its URL. A further one is one more line in BUSES."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager, suppress
from typing import Any, TypeAlias

import numpy as np
import pytest

from kv_events import wire
from kv_events.bus import EventSource
from kv_events.bus.follow import follow
from kv_events.bus.grpc import SNAPSHOT_CHUNK_BLOCKS
from kv_events.bus.url import open_source, publishing
from kv_events.events import BlockRemoved, BlockStored, EventBatch
from kv_events.log import EventLog
from kv_events.view import WorkerView
from radix import make_tree
from radix.digest import EMPTY_DIGEST
from radix.tree import Tier
from rhizome.errors import Conflict, InvalidRequest, Trimmed, Unavailable
from tests.support.redis_server import RedisServer

Connect: TypeAlias = Callable[[EventLog], AbstractAsyncContextManager[EventSource]]

BUSES: dict[str, Callable[[pytest.FixtureRequest], str]] = {
    "memory": lambda _: f"memory://{uuid.uuid4()}",
    "grpc": lambda _: "grpc://127.0.0.1:0",
    "zmq": lambda _: "zmq://127.0.0.1:0",
    "redis": lambda request: request.getfixturevalue("redis_server").url(str(uuid.uuid4())),
}
"""Where to publish in one test, by transport."""

BROKERS: frozenset[str] = frozenset({"redis"})
"""Transports that go on telling what a publisher said after it has left."""

PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(params=BUSES)
def bus(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def url(request: pytest.FixtureRequest, bus: str) -> str:
    return BUSES[bus](request)


@pytest.fixture
def connect(url: str) -> Connect:
    """Publish a log and read it."""

    @asynccontextmanager
    async def connected(log: EventLog) -> AsyncIterator[EventSource]:
        async with publishing(log, url) as where, open_source(where) as source:
            await arrival(source, log)
            yield source

    return connected


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, PATIENCE_S))


def append(log: EventLog, *hashes: int) -> EventBatch:
    return log.append([BlockStored(np.array(hashes, dtype=np.uint64), 0, 16)], 1.25)


def payloads(batches: list[EventBatch]) -> list[bytes]:
    return [wire.encode(batch) for batch in batches]


async def take(batches: AsyncIterator[EventBatch], count: int) -> list[EventBatch]:
    return [await anext(batches) for _ in range(count)]


async def until(condition: Callable[[], bool]) -> None:
    """Give other tasks the loop until the condition holds; run() bounds it."""
    while not condition():
        await asyncio.sleep(0.001)


async def arrival(source: EventSource, log: EventLog) -> None:
    """All that is in the log can be read from the source: a transport may take a while."""
    while True:
        with suppress(Conflict, Unavailable):
            await source.replay(log.epoch, log.next_seq)
            return
        await asyncio.sleep(0.001)


@asynccontextmanager
async def followed(source: EventSource, view: WorkerView) -> AsyncIterator[None]:
    following = asyncio.create_task(follow(source, view, first_delay_s=0.001, max_delay_s=0.01))
    try:
        yield
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


def test_kept_batches_come_first_then_live_ones(connect: Connect) -> None:
    """In order, whole, each once, from the sequence number on that was asked for."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        sent = [append(log, block) for block in range(1, 6)]
        async with connect(log) as source, aclosing(source.subscribe(5, 2)) as batches:
            received = await take(batches, 3)
            sent += [append(log, 6), append(log, 7, 8)]
            received += await take(batches, 2)
            assert payloads(received) == payloads(sent[2:])

    run(test())


def test_epoch_zero_takes_whichever_there_is(connect: Connect) -> None:
    """A tool that knows nothing of a worker can tail it."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        append(log, 1)
        async with connect(log) as source, aclosing(source.subscribe(0, 0)) as batches:
            assert [batch.epoch for batch in await take(batches, 1)] == [5]
            assert len(await source.replay(0, 0)) == 1

    run(test())


def test_a_stream_begins_before_its_first_batch(connect: Connect) -> None:
    """A worker that has said nothing yet can be subscribed to, and its snapshot is empty."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        async with connect(log) as source:
            snapshot = await source.snapshot()
            assert (snapshot.epoch, snapshot.next_seq, snapshot.digest) == (5, 0, EMPTY_DIGEST)
            assert await source.replay(5, 0) == []
            async with aclosing(source.subscribe(5, 0)) as batches:
                first = asyncio.create_task(anext(batches))
                await asyncio.sleep(0.01)
                append(log, 1)
                assert (await first).seq == 0

    run(test())


def test_replay_ends_with_the_newest_batch(connect: Connect) -> None:
    """From the position asked for; nothing when that is the next one."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        sent = [append(log, block) for block in range(1, 6)]
        async with connect(log) as source:
            assert payloads(await source.replay(5, 1)) == payloads(sent[1:])
            assert await source.replay(5, 5) == []

    run(test())


def test_a_long_replay_is_whole(connect: Connect) -> None:
    """All that a log keeps: many batches, and large ones."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        for block in range(1, 2_000):
            append(log, block)
        for block in range(1, 40):
            log.append([BlockStored(np.arange(1, 8_000, dtype=np.uint64) << np.uint64(block), 0, 16)], 0.0)
        async with connect(log) as source:
            batches = await source.replay(5, 7)
        same = payloads(batches) == payloads(log.since(7))
        assert same, [batch.seq for batch in batches]

    run(test())


def test_what_is_no_longer_kept_is_trimmed(connect: Connect) -> None:
    """Subscription and replay say so, instead of leaving a hole."""

    async def test() -> None:
        log = EventLog("w0", 5, 16, capacity=2)
        for block in range(1, 6):
            append(log, block)
        async with connect(log) as source:
            with pytest.raises(Trimmed, match="kept from 3 on"):
                await source.replay(5, 2)
            with pytest.raises(Trimmed):
                await anext(source.subscribe(5, 2))

    run(test())


@pytest.mark.parametrize(("epoch", "seq"), [(4, 0), (6, 0), (5, 3)])
def test_another_stream_is_a_conflict(connect: Connect, epoch: int, seq: int) -> None:
    """Another epoch, or a position that this log has not reached."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        append(log, 1)
        async with connect(log) as source:
            with pytest.raises(Conflict):
                await source.replay(epoch, seq)
            with pytest.raises(Conflict):
                await anext(source.subscribe(epoch, seq))

    run(test())


@pytest.mark.parametrize("tiered", [False, True])
@pytest.mark.parametrize("blocks", [0, 1, SNAPSHOT_CHUNK_BLOCKS, SNAPSHOT_CHUNK_BLOCKS + 1])
def test_a_snapshot_arrives_whole(connect: Connect, blocks: int, tiered: bool) -> None:
    """Also an empty one, one of several messages, and one of blocks that are not all on the device alone."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        chain = np.arange(1, blocks + 1, dtype=np.uint64) << np.uint64(30)
        if blocks:
            log.append([BlockStored(chain, 0, 16)], 0.0)
        if tiered and blocks:
            log.append([BlockStored(chain[::2], 0, 16, medium="CPU"), BlockStored(chain[-1:], 0, 16, medium="DISK")], 0)
        async with connect(log) as source:
            snapshot = await source.snapshot()
        for tier, held in zip(Tier, (chain, chain[::2], chain[-1:]), strict=True):
            expected = held if tiered or tier == Tier.DEVICE else chain[:0]
            assert np.array_equal(snapshot.block_hashes[snapshot.held_in(tier)], expected)
        assert (snapshot.worker, snapshot.epoch, snapshot.next_seq) == ("w0", 5, log.next_seq)
        assert (snapshot.digest, snapshot.block_size) == (log.digest, 16)
        assert np.array_equal(snapshot.block_hashes, chain)
        assert np.array_equal(snapshot.parent_hashes, np.r_[0, chain[:-1]] if blocks else chain)
        assert snapshot.block_hashes.dtype == snapshot.parent_hashes.dtype == np.uint64

    run(test())


def test_a_snapshot_joins_with_a_subscription(connect: Connect) -> None:
    """What happens between the two is neither lost nor applied twice."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        view = WorkerView("w0", 0, make_tree())
        append(log, 1, 2, 3)
        async with connect(log) as source:
            assert view.restore(await source.snapshot())
            append(log, 4)
            log.append([BlockRemoved(np.array([2], dtype=np.uint64))], 0.0)
            async with aclosing(source.subscribe(*view.position())) as batches:
                for batch in await take(batches, log.next_seq - view.position()[1]):
                    view.offer(batch)
        assert view.synced
        assert view.digest == log.digest
        assert view.counts.duplicates == view.counts.gaps == 0

    run(test())


def test_an_engine_in_another_thread_is_followed(connect: Connect) -> None:
    """Every batch that another thread appends arrives, in order; nobody has to poke the loop."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        count = 2_000
        engine = threading.Thread(target=lambda: [append(log, block + 1) for block in range(count)])
        async with connect(log) as source, aclosing(source.subscribe(5, 0)) as batches:
            engine.start()
            assert [batch.seq for batch in await take(batches, count)] == list(range(count))
        engine.join()

    run(test())


def test_several_followers_of_a_busy_engine_come_into_step(connect: Connect) -> None:
    """However far they fall behind an engine that does nothing but append: each has what the worker has in the end."""

    async def test() -> None:
        log = EventLog("w0", 5, 16, capacity=512)

        def work() -> None:
            for block in range(1, 10_001):
                append(log, block)
                if block > 300:
                    log.append([BlockRemoved(np.array([block - 300], dtype=np.uint64))], 0.0)

        views = [WorkerView("w0", 0, make_tree()) for _ in range(3)]
        engine = threading.Thread(target=work)
        async with connect(log) as source:
            async with followed(source, views[0]), followed(source, views[1]), followed(source, views[2]):
                engine.start()
                await until(lambda: not engine.is_alive() and all(view.position() == (5, 19_700) for view in views))
        assert {view.digest for view in views} == {log.digest}
        assert all(view.synced for view in views)

    run(test())


def test_a_subscriber_that_stalls_is_trimmed_and_costs_little(connect: Connect) -> None:
    """While it does not read, the worker goes on, and keeps what is bounded; then it learns that it missed something,
    and nothing was skipped."""

    async def test() -> None:
        log = EventLog("w0", 5, 16, capacity=8)
        hashes = np.arange(1, 12_001, dtype=np.uint64) << np.uint64(40)
        append(log, 1)
        async with connect(log) as source:
            unread = log.subscribers
            async with aclosing(source.subscribe(5, 0)) as batches:
                await take(batches, 1)
                before = resident_bytes()

                def work() -> None:
                    for _ in range(3_000):  # 324 MB on the wire
                        log.append([BlockRemoved(hashes)], 0.0)

                engine = threading.Thread(target=work)
                engine.start()
                await until(lambda: not engine.is_alive())
                await asyncio.sleep(0.1)  # what is under way may pile up now
                assert resident_bytes() - before < 150e6
                seqs = []

                async def read() -> None:
                    async for batch in batches:
                        seqs.append(batch.seq)  # noqa: PERF401 - what came before the error counts

                with pytest.raises(Trimmed):
                    await read()
            assert seqs == list(range(1, len(seqs) + 1))
            assert len(seqs) < 3_000
            await until(lambda: log.subscribers == unread)
        await until(lambda: log.subscribers == 0)

    run(test())


def resident_bytes() -> int:
    """Of this process; 0 where it is not known."""
    try:
        with open("/proc/self/statm", encoding="ascii") as numbers:
            return int(numbers.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def test_leaving_unsubscribes(connect: Connect) -> None:
    """A subscriber that closes, or whose task is cancelled, is gone from the log."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        append(log, 1)
        async with connect(log) as source:
            unread = log.subscribers
            async with aclosing(source.subscribe(5, 0)) as batches:
                await take(batches, 1)
                assert log.subscribers == 1
            await until(lambda: log.subscribers == unread)

            async def read() -> None:
                async with aclosing(source.subscribe(5, 0)) as batches:
                    async for _ in batches:
                        pass

            reader = asyncio.create_task(read())
            await until(lambda: log.subscribers == 1)
            await asyncio.sleep(0.01)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            await until(lambda: log.subscribers == unread)
        await until(lambda: log.subscribers == 0)

    run(test())


def test_closing_leaves_nothing_behind(connect: Connect) -> None:
    """No task, no descriptor, no subscription: whether a stream was read, or opened and never read."""

    async def use() -> None:
        tasks = asyncio.all_tasks()
        log = EventLog("w0", 5, 16)
        append(log, 1)
        async with connect(log) as source:
            await source.snapshot()
            async with aclosing(source.subscribe(5, 0)) as read, aclosing(source.subscribe(5, 0)):
                await take(read, 1)
        await until(lambda: log.subscribers == 0)
        assert asyncio.all_tasks() == tasks

    for _ in range(2):  # what the first use of a library leaves is for the life of the process
        run(use())
    before = descriptors()
    for _ in range(3):
        run(use())
    gc.collect()
    deadline = time.monotonic() + PATIENCE_S
    while descriptors() > before:  # threads close sockets
        assert time.monotonic() < deadline, "descriptors are left open"
        time.sleep(0.001)


def descriptors() -> int:
    """Open in this process; 0 where that is not known."""
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def test_a_worker_that_leaves_ends_its_streams(connect: Connect) -> None:
    """After its last batch was delivered; and a stream that is read later ends, too."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        append(log, 1)
        async with connect(log) as source:
            async with aclosing(source.subscribe(5, 0)) as batches:
                await take(batches, 1)
                append(log, 2)
                log.close()
                assert [batch.seq async for batch in batches] == [1]
            async with aclosing(source.subscribe(5, 1)) as batches:
                assert [batch.seq async for batch in batches] == [1]

    run(test())


def test_following_keeps_a_view_in_step(connect: Connect) -> None:
    """From whatever is there at the start, through whatever comes, until cancelled."""

    async def test() -> None:
        log = EventLog("w0", 5, 16, capacity=4)
        for block in range(1, 20):
            append(log, block)
        view = WorkerView("w0", 0, make_tree())
        async with connect(log) as source, followed(source, view):
            for block in range(20, 200):
                append(log, block)
                if block % 7 == 0:
                    await asyncio.sleep(0)
            await until(lambda: view.position() == (5, log.next_seq))
        assert view.synced
        assert view.digest == log.digest != EMPTY_DIGEST

    run(test())


def test_following_survives_a_restart_of_the_worker(url: str) -> None:
    """The publisher goes away and comes back at its URL with a new epoch and another cache: the view follows."""

    async def test() -> None:
        view = WorkerView("w0", 0, make_tree())
        log = EventLog("w0", 5, 16)
        append(log, 1, 2)
        async with AsyncExitStack() as worker:
            where = await worker.enter_async_context(publishing(log, url))
            async with open_source(where) as source, followed(source, view):
                await until(lambda: view.synced and view.position() == (5, 1))
                append(log, 3)
                await until(lambda: view.position() == (5, 2))
                await worker.aclose()
                log = EventLog("w0", 6, 16)
                append(log, 9)
                async with publishing(log, where):
                    await until(lambda: view.position() == (6, 1))
                    append(log, 10)
                    await until(lambda: view.position() == (6, 2))
                    assert view.synced
                    assert view.digest == log.digest

    run(test())


def test_a_subscription_does_not_go_on_into_another_epoch(url: str) -> None:
    """It ends with an error, and who asks for the old epoch is told; never is a batch of one taken for the other's."""

    async def test() -> None:
        former, log = EventLog("w0", 5, 16), EventLog("w0", 6, 16)
        append(former, 1)
        for block in range(1, 4):
            append(log, block)
        async with AsyncExitStack() as worker:
            where = await worker.enter_async_context(publishing(former, url))
            async with open_source(where) as source:
                await arrival(source, former)
                async with aclosing(source.subscribe(5, 0)) as batches:
                    await take(batches, 1)
                    await worker.aclose()
                    async with publishing(log, where):
                        await arrival(source, log)
                        append(log, 4)
                        with pytest.raises((Conflict, Unavailable)):
                            await anext(batches)
                        with pytest.raises(Conflict):
                            await source.replay(5, 1)
                        await arrival(source, log)
                        assert len(await source.replay(6, 0)) == 4

    run(test())


def test_a_worker_that_is_not_there_is_unavailable(url: str, bus: str) -> None:
    """Each method says so, after a bounded wait: before anything was published, and once the publisher has left."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        append(log, 1)
        async with AsyncExitStack() as worker:
            where = await worker.enter_async_context(publishing(log, url))
            async with open_source(where) as source:
                await arrival(source, log)
                if bus in BROKERS:
                    return
                async with aclosing(source.subscribe(5, 0)) as batches:
                    await take(batches, 1)
                    await worker.aclose()
                    with pytest.raises(Unavailable):
                        await anext(batches)
                for ask in (source.snapshot, lambda: source.replay(0, 0), lambda: anext(source.subscribe(0, 0))):
                    with pytest.raises(Unavailable):
                        await ask()
            async with open_source(where) as source:
                with pytest.raises(Unavailable):
                    await source.snapshot()

    run(test())


def test_what_is_taken_is_not_published_at(url: str, bus: str) -> None:
    """A second publisher at the same URL is refused, and the first goes on."""
    if bus in BROKERS:
        pytest.skip("a broker takes what the newest epoch says")

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        append(log, 1)
        async with publishing(log, url) as where, open_source(where) as source:
            with pytest.raises(InvalidRequest):
                async with publishing(EventLog("w0", 6, 16), where):
                    pass
            assert len(await source.replay(5, 0)) == 1

    run(test())
