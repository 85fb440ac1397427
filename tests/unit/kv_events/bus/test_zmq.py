"""ZmqEventSource against publishers that lie, vanish and drop."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest

from kv_events import wire
from kv_events.bus import EventSource, zmq, zmq_dialect, zmq_frames, zmq_publisher
from kv_events.bus.follow import follow
from kv_events.bus.url import BusUrl, open_source
from kv_events.bus.zmq import ZmqEventSource
from kv_events.bus.zmq_frames import Answer, ReplayRequest, SnapshotRequest
from kv_events.bus.zmq_publisher import ZmqPublisher
from kv_events.events import BlockStored
from kv_events.log import EventLog
from kv_events.view import WorkerView
from kv_events.wire import WireError
from radix import make_tree
from rhizome.errors import Trimmed, Unavailable

PATIENCE_S = 60.0


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, PATIENCE_S))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def append(log: EventLog, *hashes: int) -> None:
    log.append([BlockStored(np.array(hashes, dtype=np.uint64), 0, 16)], 1.25)


def some_log(batches: int = 3, **options: Any) -> EventLog:
    log = EventLog("w0", 5, 16, **options)
    for block in range(1, batches + 1):
        append(log, block)
    return log


@asynccontextmanager
async def served(publisher: ZmqPublisher) -> AsyncIterator[BusUrl]:
    try:
        port, replay = await publisher.start("127.0.0.1", 0, 0)
        yield BusUrl("zmq", host="127.0.0.1", port=port, replay_port=replay, dialect="rhizome")
    finally:
        await publisher.close()


async def read_all(source: EventSource) -> None:
    async with aclosing(source.subscribe(5, 0)) as batches:
        async for batch in batches:
            assert batch.seq < 3


class Dropping(ZmqPublisher):
    """Its PUB socket loses what `drops` says."""

    drops: Callable[[int], bool] = staticmethod(lambda _: False)

    def __init__(self, log: EventLog) -> None:
        super().__init__(log, "kv@w0@m")
        send = self._live.send
        self._live.send = lambda frames: self.drops(int.from_bytes(frames[1], "big")) or send(frames)  # type: ignore


@pytest.mark.parametrize("lost", [{4}, {3, 4, 5}, {6, 7}, set(range(3, 8))])
def test_what_the_pub_socket_loses_is_replayed(lost: set[int]) -> None:
    """In the middle of the stream or at its end, where nothing that follows would show it."""

    async def test() -> None:
        log = some_log(3)
        publisher = Dropping(log)
        publisher.drops = lost.__contains__  # type: ignore[method-assign]
        async with served(publisher) as bus, open_source(bus) as source:
            async with aclosing(source.subscribe(5, 0)) as batches:
                received = [await anext(batches) for _ in range(3)]
                for block in range(4, 9):
                    append(log, block)
                received += [await anext(batches) for _ in range(5)]
                assert [batch.seq for batch in received] == list(range(8))

    run(test())


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_lost_a_subscription_has_no_hole(seed: int) -> None:
    """A log that is appended to in bursts and keeps little, a PUB socket that drops at random, readers from anywhere:
    each gets every batch from its position on to the goodbye, or Trimmed, and then nothing was skipped before it."""
    chance = random.Random(seed)

    async def read(source: EventSource, first: int) -> None:
        seqs: list[int] = []
        trimmed = False
        try:
            async with aclosing(source.subscribe(5, first)) as batches:
                async for batch in batches:
                    seqs.append(batch.seq)
                    if chance.random() < 0.02:
                        await asyncio.sleep(chance.random() * 0.01)
        except Trimmed:
            trimmed = True
        assert seqs == list(range(first, first + len(seqs)))
        assert trimmed or first + len(seqs) == 1_500, f"seed {seed}"

    async def test() -> None:
        log = some_log(30, capacity=chance.choice([40, 400, 4_000]))
        loss = chance.choice([0.01, 0.3, 1.0])
        publisher = Dropping(log)
        publisher.drops = lambda _: chance.random() < loss  # type: ignore[method-assign]
        async with served(publisher) as bus:
            sources = [ZmqEventSource(bus) for _ in range(3)]
            readers = [asyncio.create_task(read(source, chance.randint(0, 30))) for source in sources]
            while log.next_seq < 1_500:
                for _ in range(min(chance.choice([1, 5, 100]), 1_500 - log.next_seq)):
                    append(log, log.next_seq + 1)
                await asyncio.sleep(chance.choice([0, 0.001, 0.003]))
            log.close()
            await asyncio.gather(*readers)
            for source in sources:
                source.close()

    run(test())


def test_a_lost_goodbye_is_noticed() -> None:
    """The stream ends all the same."""

    async def test() -> None:
        log = some_log(3)
        publisher = Dropping(log)
        publisher.drops = lambda _: True  # type: ignore[method-assign]
        async with served(publisher) as bus, open_source(bus) as source:
            async with aclosing(source.subscribe(5, 2)) as batches:
                await anext(batches)
                log.close()
                assert [batch.seq async for batch in batches] == []

    run(test())


class Lying(ZmqPublisher):
    """Says what `lie` makes of its answers."""

    def __init__(self, log: EventLog, lie: Callable[[Answer, list[bytes]], tuple[Any, list[bytes]]]) -> None:
        super().__init__(log, "kv@w0@m")
        self._lie = lie

    def _send(self, identity: bytes, number: int, answer: Answer, parts: list[bytes]) -> None:
        answer, parts = self._lie(answer, parts)
        header = answer if isinstance(answer, bytes) else zmq_frames.encode_answer(0, answer, [])[3]
        self._asked.send([identity, b"", zmq_frames.MAGIC, zmq_frames.number_bytes(number), header, *parts])


def other_batch(**changes: Any) -> bytes:
    return wire.encode(some_log().since(0)[0]._replace(**changes))


LIES: dict[str, Callable[[Answer, list[bytes]], tuple[Any, list[bytes]]]] = {
    "poison": lambda answer, parts: (answer, [b"\xc1"] * len(parts)),
    "batches of another worker": lambda answer, parts: (answer, [other_batch(worker="w1")] * len(parts)),
    "batches out of order": lambda answer, parts: (answer, parts[::-1] if len(parts) > 1 else [b""]),
    "one batch again and again": lambda answer, parts: (answer, [other_batch(seq=0)] * 3 if parts else []),
    "a header that is none": lambda answer, parts: (b"\xc1", parts),
    "a header of the wrong types": lambda answer, parts: (msgpack.packb(["ok", 1, 2, 3, 4, 5, 6, 7, 8]), parts),
    "a short header": lambda answer, parts: (msgpack.packb(["ok", "", "w0"]), parts),
    "an unknown status": lambda answer, parts: (msgpack.packb(["fine", "", "w0", 5, 3, False, True, 0, 0]), parts),
    "a huge number": lambda answer, parts: (msgpack.packb(["ok", "", "w0", 2**63, 3, False, True, 0, 0]), parts),
    "a nested header": lambda answer, parts: (b"\x91" * 300, parts),
    "a long header": lambda answer, parts: (msgpack.packb(["ok", "x" * 5_000]), parts),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_what_is_no_answer_is_a_wire_error(lie: Callable[[Answer, list[bytes]], tuple[Any, list[bytes]]]) -> None:
    """Of each method, and nothing else."""

    async def test() -> None:
        async with served(Lying(some_log(), lie)) as bus, open_source(bus) as source:
            with pytest.raises(WireError):
                await source.replay(5, 0)
            with pytest.raises(WireError):
                await read_all(source)
            with pytest.raises(WireError):
                await source.snapshot()

    run(test())


SNAPSHOT_LIES: dict[str, Callable[[Answer, list[bytes]], tuple[Any, list[bytes]]]] = {
    "a piece that is too long": lambda answer, parts: (answer, [parts[0] + b"x"]),
    "a piece that is empty": lambda answer, parts: (answer, [b""]),
    "no piece": lambda answer, parts: (answer, []),
    "two pieces": lambda answer, parts: (answer, [parts[0][:1], parts[0][1:]]),
    "another total": lambda answer, parts: (replace(answer, total=answer.total + len(parts[0])), parts),
    "a flipped bit": lambda answer, parts: (answer, [bytes([parts[0][0], parts[0][1] ^ 1]) + parts[0][2:]]),
}


@pytest.mark.parametrize("lie", SNAPSHOT_LIES.values(), ids=SNAPSHOT_LIES.keys())
def test_a_torn_snapshot_is_a_wire_error(lie: Callable[[Answer, list[bytes]], tuple[Any, list[bytes]]]) -> None:
    """However it was torn."""

    async def test() -> None:
        async with served(Lying(some_log(), lie)) as bus, open_source(bus) as source:
            with pytest.raises(WireError):
                await source.snapshot()

    run(test())


def test_a_publisher_that_does_not_answer_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a bounded wait; late answers are not taken for those to other requests."""
    monkeypatch.setattr(zmq, "ANSWER_S", 0.05)

    async def test() -> None:
        log = some_log()
        mute = [True]
        held: list[tuple[Any, ...]] = []

        class Mute(ZmqPublisher):
            def _send(self, *answer: Any) -> None:
                held.append(answer)
                while not mute[0] and held:
                    super()._send(*held.pop(0))

        async with served(Mute(log, "")) as bus, open_source(bus) as source:
            with pytest.raises(Unavailable):
                await source.replay(5, 1)
            mute[0] = False
            assert [batch.seq for batch in await source.replay(5, 2)] == [2]

    run(test())


def test_a_snapshot_of_many_pieces_arrives_while_others_are_made() -> None:
    """Readers that ask together share one; each gets a whole one, at least as new as its request."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        log.append([BlockStored(np.arange(1, 60_001, dtype=np.uint64), 0, 16)], 0.0)
        publisher = ZmqPublisher(log, "")
        async with served(publisher) as bus:
            sources = [ZmqEventSource(bus) for _ in range(10)]
            first = publisher._snapshots_begun
            for step in range(3):
                append(log, 2**50 + step)
                wanted = log.next_seq
                snapshots = await asyncio.gather(*(source.snapshot() for source in sources))
                assert all(snapshot.next_seq >= wanted for snapshot in snapshots)
                assert all(len(snapshot.block_hashes) == 60_001 + step for snapshot in snapshots)
            assert publisher._snapshots_begun - first <= 3 * 3
            assert len(publisher._snapshots) <= zmq_publisher.KEPT_SNAPSHOTS
            for source in sources:
                source.close()

    run(test())


def test_a_snapshot_that_is_let_go_amid_its_reading_is_asked_for_anew() -> None:
    """As its pieces are not kept for ever."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        log.append([BlockStored(np.arange(1, 60_001, dtype=np.uint64), 0, 16)], 0.0)

        class Forgetful(ZmqPublisher):
            forgets = 2

            async def _send_piece(self, identity: bytes, number: int, request: SnapshotRequest) -> None:
                if request.offset and self.forgets:
                    self.forgets -= 1
                    self._snapshots.clear()
                await super()._send_piece(identity, number, request)

        async with served(Forgetful(log, "")) as bus, open_source(bus) as source:
            assert len((await source.snapshot()).block_hashes) == 60_000

    run(test())


def test_many_who_ask_for_snapshots_are_told_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a bound, as Unavailable."""
    monkeypatch.setattr(zmq_publisher, "MAX_RUNNING", 0)

    async def test() -> None:
        async with served(ZmqPublisher(some_log(), "")) as bus, open_source(bus) as source:
            with pytest.raises(Unavailable, match="too many"):
                await source.snapshot()
            assert len(await source.replay(5, 0)) == 3

    run(test())


def test_pages_are_bounded() -> None:
    """In batches and in bytes; a batch that is larger than a page is a page of its own."""

    async def test() -> None:
        log = some_log(1_000)
        large = np.arange(1, 2**15, dtype=np.uint64) << np.uint64(30)
        log.append([BlockStored(large, 0, 16)], 0.0)
        log.append([BlockStored(large, 0, 16)], 0.0)
        publisher = ZmqPublisher(log, "")
        try:
            assert len(publisher._page(ReplayRequest(5, 0))[1]) == zmq_publisher.PAGE_BATCHES
            assert len(publisher._page(ReplayRequest(5, 1_000))[1]) == 1
            assert publisher._page(ReplayRequest(5, 1_002))[1] == []
        finally:
            await publisher.close()

    run(test())


def test_the_dialect_is_found_out() -> None:
    """Of a publisher of ours: by its answer, and where its replay socket is not where it should be, by its batches."""

    async def test() -> None:
        log = some_log()
        async with served(ZmqPublisher(log, "")) as bus:
            assert await zmq_dialect.is_ours(bus)
            telling = asyncio.create_task(zmq_dialect.is_ours(replace(bus, replay_port=bus.port)))
            while not telling.done():
                append(log, log.next_seq + 1)
                await asyncio.sleep(0.01)
            assert await telling
            async with open_source(replace(bus, dialect="auto")) as source:
                assert (await source.snapshot()).next_seq == log.next_seq
                async with aclosing(source.subscribe(0, 1)) as batches:
                    assert (await anext(batches)).seq == 1

    run(test())


def test_batches_that_are_published_for_others_are_read_with_their_digests() -> None:
    """Where dialect=auto finds a publisher of ours, its batches are asked for, as those that it publishes lack our own
    fields; a reader needs no snapshot for it."""

    class Counted(ZmqPublisher):
        snapshots = 0

        async def _send_piece(self, *of: Any) -> None:
            self.snapshots += 1
            await super()._send_piece(*of)

    async def test() -> None:
        log = some_log()
        publisher = Counted(log, "kv@w0@m", for_others=True)
        view = WorkerView("w0", 0, make_tree())
        async with served(publisher) as bus:
            telling = asyncio.create_task(zmq_dialect.is_ours(bus))
            while not telling.done():  # live batches do not mislead it
                append(log, log.next_seq + 1)
                await asyncio.sleep(0.001)
            assert await telling
            async with open_source(replace(bus, dialect="auto")) as source:
                following = asyncio.create_task(follow(source, view, first_delay_s=0.001))
                for _ in range(50):
                    append(log, log.next_seq + 1)
                    await asyncio.sleep(0.002)
                await until(lambda: view.synced and view.position() == (5, log.next_seq))
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
        assert view.counts.malformed == 0
        assert publisher.snapshots == 1

    run(test())


def test_another_publisher_for_others_is_noticed_by_its_numbers() -> None:
    """It begins anew at the same ports: without our own fields nothing else in its batches shows it."""

    async def test() -> None:
        log, other = some_log(8), EventLog("w0", 6, 16)
        publisher = ZmqPublisher(log, "kv@w0@m", for_others=True)
        async with served(publisher) as bus, open_source(bus) as source:
            batches = source.subscribe(5, 0)
            for _ in range(8):
                await anext(batches)
            append(log, 9)
            assert (await anext(batches)).seq == 8
            publisher._log = other
            append(other, 1)
            publisher._live.send([b"kv@w0@m", *publisher._numbered(other.read(0, 1)[0])])
            with pytest.raises(Unavailable, match="has started anew"):
                await anext(batches)
            await batches.aclose()

    run(test())


def test_a_closed_source_stays_closed() -> None:
    """Instead of opening sockets that nobody closes."""

    async def test() -> None:
        async with served(ZmqPublisher(some_log(), "")) as bus:
            async with open_source(bus) as source:
                await source.replay(5, 0)
            with pytest.raises(Unavailable, match="closed"):
                await source.replay(5, 0)

    run(test())
