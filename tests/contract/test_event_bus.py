"""What every event transport does. A further one is one more line in BUSES."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import Any, TypeAlias

import grpc
import numpy as np
import pytest

from kv_events import wire
from kv_events.bus import EventSource
from kv_events.bus.follow import follow
from kv_events.bus.grpc import SNAPSHOT_CHUNK_BLOCKS, GrpcEventSource, KvEventsService
from kv_events.bus.memory import MemoryEventSource
from kv_events.events import BlockRemoved, BlockStored, EventBatch
from kv_events.log import EventLog
from kv_events.view import WorkerView
from radix import make_tree
from radix.digest import EMPTY_DIGEST
from radix.tree import Tier
from rhizome.errors import Conflict, Trimmed, Unavailable
from rhizome.rpc import SERVER_OPTIONS, Context
from rhizome.v1 import worker_pb2 as pb

Connect: TypeAlias = Callable[[EventLog], AbstractAsyncContextManager[EventSource]]

PATIENCE_S = 30.0


@asynccontextmanager
async def over_memory(log: EventLog) -> AsyncIterator[EventSource]:
    yield MemoryEventSource(log)


@asynccontextmanager
async def grpc_server(events: KvEventsService, port: int = 0) -> AsyncIterator[int]:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((events.handler(),))
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(grace=None)


@asynccontextmanager
async def over_grpc(log: EventLog) -> AsyncIterator[EventSource]:
    async with grpc_server(KvEventsService(log)) as port:
        source = GrpcEventSource(f"127.0.0.1:{port}")
        try:
            yield source
        finally:
            await source.close()


BUSES: dict[str, Connect] = {
    "memory": over_memory,
    "grpc": over_grpc,
}


@pytest.fixture(params=BUSES.values(), ids=BUSES.keys())
def connect(request: pytest.FixtureRequest) -> Connect:
    return request.param


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


def test_replay_ends_with_the_newest_batch(connect: Connect) -> None:
    """From the position asked for; nothing when that is the next one."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        sent = [append(log, block) for block in range(1, 6)]
        async with connect(log) as source:
            assert payloads(await source.replay(5, 1)) == payloads(sent[1:])
            assert await source.replay(5, 5) == []

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
                for batch in await take(batches, 2):
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


def test_a_subscriber_that_stalls_is_trimmed_and_costs_nothing(connect: Connect) -> None:
    """While it does not read, the worker goes on; then it learns that it missed something, and nothing was skipped."""

    async def test() -> None:
        log = EventLog("w0", 5, 16, capacity=8)
        hashes = np.arange(1, 4001, dtype=np.uint64) << np.uint64(40)
        append(log, 1)
        async with connect(log) as source, aclosing(source.subscribe(5, 0)) as batches:
            await take(batches, 1)
            for _ in range(1_000):  # 36 MB on the wire
                log.append([BlockRemoved(hashes)], 0.0)
                await asyncio.sleep(0)
            seqs: list[int] = []

            async def read() -> None:
                async for batch in batches:
                    seqs.append(batch.seq)  # noqa: PERF401 - what came before the error counts

            with pytest.raises(Trimmed):
                await read()
        assert seqs == list(range(1, len(seqs) + 1))
        assert len(seqs) < 1_000
        await until(lambda: log.subscribers == 0)

    run(test())


def test_leaving_unsubscribes(connect: Connect) -> None:
    """A subscriber that closes, or whose task is cancelled, is gone from the log."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        append(log, 1)
        async with connect(log) as source:
            async with aclosing(source.subscribe(5, 0)) as batches:
                await take(batches, 1)
                assert log.subscribers == 1
            await until(lambda: log.subscribers == 0)

            async def read() -> None:
                async with aclosing(source.subscribe(5, 0)) as batches:
                    async for _ in batches:
                        pass

            reader = asyncio.create_task(read())
            await until(lambda: log.subscribers == 1)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            await until(lambda: log.subscribers == 0)

    run(test())


def test_a_worker_that_leaves_ends_its_streams(connect: Connect) -> None:
    """After its last batch was delivered."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        append(log, 1)
        async with connect(log) as source, aclosing(source.subscribe(5, 0)) as batches:
            await take(batches, 1)
            append(log, 2)
            log.close()
            assert [batch.seq async for batch in batches] == [1]

    run(test())


def test_following_keeps_a_view_in_step(connect: Connect) -> None:
    """From whatever is there at the start, through whatever comes, until cancelled."""

    async def test() -> None:
        log = EventLog("w0", 5, 16, capacity=4)
        for block in range(1, 20):
            append(log, block)
        view = WorkerView("w0", 0, make_tree())
        async with connect(log) as source:
            following = asyncio.create_task(follow(source, view, first_delay_s=0.001, max_delay_s=0.01))
            for block in range(20, 200):
                append(log, block)
                if block % 7 == 0:
                    await asyncio.sleep(0)
            await until(lambda: view.position() == (5, log.next_seq))
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        assert view.synced
        assert view.digest == log.digest != EMPTY_DIGEST

    run(test())


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"block_hashes": bytes(8)}, "8 bytes of hashes and 16 of parents: 16 are needed"),
        ({"parent_hashes": bytes(24)}, "goes on past its 2 blocks"),
        ({"tier_masks": b"\1"}, "1 masks of tiers: none or 2 are needed"),
        ({"tier_masks": b"\1" * 3}, "goes on past its 2 blocks"),
        ({"epoch": 0}, "no epoch"),
        ({"digest": b""}, "no digest"),
    ],
)
def test_a_torn_snapshot_is_refused(changes: dict[str, Any], error: str) -> None:
    """With WireError, whichever column does not fit."""

    class Torn(KvEventsService):
        async def snapshot(self, request: pb.SnapshotRequest, context: Context) -> None:
            fields = {"epoch": 5, "digest": bytes(16), "total_blocks": 2, "block_hashes": bytes(16)}
            chunk = pb.SnapshotChunk(**{**fields, "parent_hashes": bytes(16), **changes})
            await context.write(chunk.SerializeToString())

    async def test() -> None:
        async with grpc_server(Torn(EventLog("w0", 5, 16))) as port:
            source = GrpcEventSource(f"127.0.0.1:{port}")
            with pytest.raises(wire.WireError, match=error):
                await source.snapshot()
            await source.close()

    run(test())


def test_a_worker_that_is_not_there_is_unavailable() -> None:
    """Each method says so."""

    async def test() -> None:
        async with grpc_server(KvEventsService(EventLog("w0", 5, 16))) as port:
            pass
        source = GrpcEventSource(f"127.0.0.1:{port}")
        try:
            with pytest.raises(Unavailable):
                await source.snapshot()
            with pytest.raises(Unavailable):
                await source.replay(0, 0)
            with pytest.raises(Unavailable):
                await anext(source.subscribe(0, 0))
        finally:
            await source.close()

    run(test())


def test_following_survives_a_restart_of_the_worker() -> None:
    """The server goes away and comes back on its port with a new epoch and another cache: the view follows."""

    async def test() -> None:
        view = WorkerView("w0", 0, make_tree())
        log = EventLog("w0", 5, 16)
        append(log, 1, 2)
        async with grpc_server(KvEventsService(log)) as port:
            source = GrpcEventSource(f"127.0.0.1:{port}")
            following = asyncio.create_task(follow(source, view, first_delay_s=0.01, max_delay_s=0.1))
            await until(lambda: view.synced)
            append(log, 3)
            await until(lambda: view.position() == (5, 2))
        log = EventLog("w0", 6, 16)
        append(log, 9)
        async with grpc_server(KvEventsService(log), port):
            await until(lambda: view.position() == (6, 1))
            append(log, 10)
            await until(lambda: view.position() == (6, 2))
            assert view.synced
            assert view.digest == log.digest
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await source.close()

    run(test())
