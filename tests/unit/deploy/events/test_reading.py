"""Streams read on and on: every batch once and in order, and a note wherever that could not be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest

from deploy.events import reading
from deploy.events.reading import Note, Position, StreamReader, from_seq, kept, live, oldest_kept, read_all
from deploy.events.targets import Stream, Targets
from kv_events.bus.memory import MemoryEventSource
from kv_events.events import BlockStored, EventBatch, Snapshot
from kv_events.log import EventLog
from kv_events.wire import WireError
from rhizome.errors import InvalidRequest, Trimmed, Unavailable

Script = Callable[[int, int], AsyncGenerator[EventBatch, None]]


def filled(batches: int, *, epoch: int = 1, capacity: int = 64, worker: str = "w") -> EventLog:
    log = EventLog(worker, epoch, 16, capacity)
    for number in range(batches):
        say(log, number)
    return log


def say(log: EventLog, number: int = 0) -> None:
    log.append([BlockStored(np.array([number + 1], dtype=np.uint64), 0, 16)], 0.0)


class Scripted(MemoryEventSource):
    """A log's source, of which single answers are replaced."""

    def __init__(self, log: EventLog, *answers: Exception | Callable[[EventBatch], list[EventBatch]] | None) -> None:
        super().__init__(log)
        self.use(log)
        self._answers = list(answers)  # to subscriptions: an error, what becomes of each batch, or None: as it is

    def use(self, log: EventLog) -> None:
        self.log = self._log = log

    async def subscribe(self, epoch: int, from_seq: int) -> AsyncGenerator[EventBatch, None]:
        answer = self._answers.pop(0) if self._answers else None
        if isinstance(answer, Exception):
            raise answer
        async with aclosing(super().subscribe(epoch, from_seq)) as batches:
            async for batch in batches:
                for each in [batch] if answer is None else answer(batch):
                    yield each


@pytest.fixture(autouse=True)
def _no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "FIRST_DELAY_S", 0.001)
    monkeypatch.setattr(reading, "MAX_DELAY_S", 0.002)
    monkeypatch.setattr(reading, "REFRESH_S", 0.01)


def run(test: Awaitable[Any]) -> Any:
    async def main() -> Any:
        async with asyncio.timeout(30):
            return await test

    return asyncio.run(main())


def told(item: EventBatch | Note) -> object:
    return item.kind if isinstance(item, Note) else (item.epoch, item.seq)


async def take(reader: StreamReader, count: int, then: Callable[[], None] | None = None, after: int = -1) -> list[Any]:
    """What comes first; `then` happens after so many of them."""
    found: list[Any] = []
    async with aclosing(reader.items()) as items:
        async for item in items:
            found.append(told(item))
            if len(found) == after and then:
                then()
            if len(found) == count:
                break
    return found


def test_what_is_kept_comes_first_then_what_is_new() -> None:
    """From any batch on; `live` is behind the newest."""
    log = filled(3)
    source = MemoryEventSource(log)
    assert run(live(source)) == Position(1, 3)
    reader = StreamReader(source, Position(1, 1))
    assert run(take(reader, 3, lambda: say(log), after=2)) == [(1, 1), (1, 2), (1, 3)]
    assert reader.position == Position(1, 4)


def test_a_start_that_is_not_kept_goes_to_the_oldest_that_is() -> None:
    """By bisection, wherever it is; past the next batch there is nothing to begin with."""
    source = MemoryEventSource(filled(100, capacity=7))
    assert run(oldest_kept(source)) == Position(1, 93)
    assert run(from_seq(5)(source)) == Position(1, 5)
    assert run(take(StreamReader(source, Position(1, 5)), 3)) == ["trimmed", (1, 93), (1, 94)]
    assert [batch.seq for batch in run(kept(source, 0))] == list(range(93, 100))
    assert [batch.seq for batch in run(kept(source, 98))] == [98, 99]
    with pytest.raises(InvalidRequest, match="from is 101: at most 100"):
        run(from_seq(101)(source))
    for batches, capacity in ((0, 1), (1, 1), (2, 1), (5, 5), (5, 4)):
        source = MemoryEventSource(filled(batches, capacity=capacity))
        assert run(oldest_kept(source)).seq == max(0, batches - capacity)


def test_batches_that_are_lost_or_doubled_or_late_are_put_right() -> None:
    """A gap is filled by a replay, and said; what was read is not read again."""

    def lossy(batch: EventBatch) -> list[EventBatch]:
        return [] if batch.seq in (1, 2) else [batch, batch]

    source = Scripted(filled(5), lossy)
    assert run(take(StreamReader(source, Position(1, 0)), 6)) == [(1, 0), "gap", (1, 1), (1, 2), (1, 3), (1, 4)]


def test_a_gap_that_no_replay_fills_is_counted() -> None:
    """The batches are lost, and the reader goes on."""

    class NoReplay(Scripted):
        async def replay(self, epoch: int, from_seq: int) -> list[EventBatch]:
            raise Trimmed("gone")

    source = NoReplay(filled(4), lambda batch: [] if batch.seq in (1, 2) else [batch])

    async def test() -> list[object]:
        async with aclosing(StreamReader(source, Position(1, 0)).items()) as items:
            return [await anext(items) for _ in range(3)]

    _, gap, last = run(test())
    assert gap == Note("gap", "batches 1 to 2 did not come; 2 are lost")
    assert last.seq == 3


def test_a_worker_that_cannot_be_reached_is_said_once_and_when_it_is_back() -> None:
    """However often it is tried."""
    source = Scripted(filled(2), *[Unavailable("nobody there")] * 5)
    assert run(take(StreamReader(source, Position(1, 0)), 4)) == ["lost", "back", (1, 0), (1, 1)]


def test_a_restart_is_said_and_read_from_its_first_batch() -> None:
    """The new epoch is another stream; one that has lost its first batches begins with the oldest kept."""
    source = Scripted(filled(3))
    reader = StreamReader(source, Position(1, 2))

    def restart() -> None:
        source.log.close()
        source.use(filled(2, epoch=7))

    assert run(take(reader, 5, restart, after=1)) == [(1, 2), "lost", "back", "restart", (7, 0)]
    source = Scripted(filled(9, epoch=8, capacity=2))
    assert run(take(StreamReader(source, Position(7, 2)), 4)) == ["trimmed", "restart", (8, 7), (8, 8)]


def test_bytes_that_are_no_batch_do_not_end_it() -> None:
    """It goes on with what comes next."""
    log = filled(3)
    source = Scripted(log, WireError("not msgpack"))
    assert run(take(StreamReader(source, Position(1, 0)), 3, lambda: say(log), after=2)) == [
        "malformed",
        "trimmed",
        (1, 3),
    ]


class Roster:
    """A router's list of workers, as Targets tells it."""

    def __init__(self, **streams: MemoryEventSource) -> None:
        self.router = object()
        self.streams: tuple[Stream, ...] = ()
        self.error: Exception | None = None
        self.set(**streams)

    def set(self, **streams: MemoryEventSource) -> None:
        self.streams = tuple(Stream(name, f"{name}:{id(source)}", source) for name, source in streams.items())

    async def refresh(self) -> tuple[Stream, ...]:
        if self.error:
            raise self.error
        return self.streams


async def collect(roster: Any, count: int, steps: dict[int, Callable[[], None]], start: Any = live) -> list[Any]:
    found: list[Any] = []
    async with aclosing(read_all(roster, start)) as items:
        async for name, item in items:
            found.append((name, told(item)))
            if len(found) in steps:
                steps[len(found)]()
            if len(found) == count:
                break
    return found


def test_workers_that_join_and_leave_are_followed() -> None:
    """One that comes later is read from its first batch; one that is gone is said to be."""
    first, second = filled(1, worker="a"), filled(2, worker="b")
    roster = Roster(a=MemoryEventSource(first))

    def join() -> None:
        roster.set(a=MemoryEventSource(first), b=MemoryEventSource(second))

    def leave() -> None:
        roster.set(b=roster.streams[1].source)

    found = run(collect(roster, 5, {1: join, 4: leave}, start=from_seq(0)))
    assert found == [("a", (1, 0)), ("b", "joined"), ("b", (1, 0)), ("b", (1, 1)), ("a", "left")]


def test_a_worker_that_moved_is_read_on_where_it_stood() -> None:
    """Another address under the same name, its epoch a later one."""
    roster = Roster(a=MemoryEventSource(filled(2)))

    def move() -> None:
        roster.set(a=MemoryEventSource(filled(1, epoch=2)))

    assert run(collect(roster, 4, {2: move}, start=from_seq(0))) == [
        ("a", (1, 0)),
        ("a", (1, 1)),
        ("a", "restart"),
        ("a", (2, 0)),
    ]


def test_a_router_that_goes_away_is_said_once_and_streams_go_on() -> None:
    """Workers do not need their router to be read."""
    log = filled(1)
    roster = Roster(a=MemoryEventSource(log))

    def gone() -> None:
        roster.error = Unavailable("no router")

    def more() -> None:
        say(log)

    found = run(collect(roster, 3, {1: gone, 2: more}, start=from_seq(0)))
    assert found == [("a", (1, 0)), ("", "lost"), ("a", (1, 1))]


class Dead(MemoryEventSource):
    """Nobody is there at first."""

    def __init__(self, log: EventLog, failures: int) -> None:
        super().__init__(log)
        self._failures = failures

    async def snapshot(self) -> Snapshot:
        self._failures -= 1
        if self._failures >= 0:
            raise Unavailable("nobody there")
        return await super().snapshot()


def test_a_bus_that_cannot_be_reached_is_an_error_and_a_routers_worker_is_waited_for() -> None:
    """The first is what was asked for; the second one among many."""
    targets = Targets("bus")
    targets.add(Stream("a", "a", Dead(filled(1), failures=1)))
    with pytest.raises(Unavailable, match="nobody there"):
        run(collect(targets, 1, {}))
    roster = Roster(a=Dead(filled(1), failures=3))
    assert run(collect(roster, 2, {}, start=from_seq(0))) == [("a", "lost"), ("a", (1, 0))]
