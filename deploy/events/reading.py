"""Batches of one stream or many as they come, with a note wherever something is amiss: what `tail` prints."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from deploy.events.targets import Stream, Targets
from kv_events.bus import EventSource
from kv_events.events import EventBatch, Snapshot
from kv_events.wire import WireError
from rhizome.errors import Conflict, InvalidRequest, RhizomeError, Trimmed, Unavailable

FIRST_DELAY_S = 0.1
MAX_DELAY_S = 2.0
REFRESH_S = 1.0
"""How often a router is asked who is there."""

STATE_TRIES = 3

MAX_WAITING = 256
"""Batches that were read and not taken yet, of all streams: a slow taker holds the streams up, and they trim."""


class Note(NamedTuple):
    """Something about a stream that is no batch."""

    kind: str  # gap, restart, lost, back, trimmed, malformed, joined, left
    text: str


Item: TypeAlias = EventBatch | Note


class Named(NamedTuple):
    """What came, and on which stream; an empty name is the target's."""

    name: str
    item: Item


class Position(NamedTuple):
    """How far a stream was read: the next batch is `seq` of `epoch`; epoch 0 takes any."""

    epoch: int = 0
    seq: int = 0

    def __str__(self) -> str:
        return f"{self.epoch}/{self.seq}"


Start: TypeAlias = Callable[[EventSource], Awaitable[Position]]


async def state(source: EventSource) -> tuple[Snapshot, list[EventBatch]]:
    """A snapshot, and what came after it: a bus may keep one that is older than now. Raises as EventSource does."""
    for tries_left in reversed(range(STATE_TRIES)):
        snapshot = await source.snapshot()
        try:
            return snapshot, await source.replay(snapshot.epoch, snapshot.next_seq)
        except (Trimmed, Conflict):  # a newer snapshot has taken its place
            if not tries_left:
                raise
    raise AssertionError("unreachable")


async def live(source: EventSource) -> Position:
    """Where the stream stands now. Raises as EventSource does."""
    snapshot, since = await state(source)
    return Position(snapshot.epoch, snapshot.next_seq + len(since))


def from_seq(seq: int) -> Start:
    """A batch to begin with: one that is not kept any more stands for the oldest that is."""

    async def start(source: EventSource) -> Position:
        now = await live(source)
        if seq > now.seq:
            raise InvalidRequest("from", seq, f"at most {now.seq}, the next batch")
        return Position(now.epoch, seq)

    return start


async def oldest_kept(source: EventSource, gone: int = -1) -> Position:
    """The oldest batch that is kept, after one that is not; by bisection. Raises as EventSource does."""
    now = await live(source)
    low, high = gone, now.seq
    while low + 1 < high:
        middle = (low + high) // 2
        try:
            async with aclosing(source.subscribe(now.epoch, middle)) as batches:
                await anext(batches)
            high = middle
        except (Trimmed, StopAsyncIteration):
            low = middle
    return Position(now.epoch, high)


async def kept(source: EventSource, seq: int) -> list[EventBatch]:
    """What is kept from a batch on, or from the oldest one where that is gone. Raises as EventSource does."""
    start = await from_seq(seq)(source)
    try:
        return await source.replay(*start)
    except Trimmed:
        return await source.replay(*await oldest_kept(source, seq))


class StreamReader:
    """Reads one live stream on and on, whatever happens to it."""

    def __init__(self, source: EventSource, position: Position) -> None:
        """`position` is where it begins, with its epoch, and then how far it was read."""
        self.position = position
        self._source = source
        self._epoch = position.epoch  # the last one that is known
        self._lost = False
        self._skip: Callable[[], Awaitable[Position]] | None = None  # where to go on, as soon as it can be asked

    async def items(self) -> AsyncGenerator[Item, None]:
        """Batches, each once and in order, for ever, and notes.

        A gap is filled by a replay where that can be. A worker that cannot be reached is tried again and again; one
        that starts anew is read from its first batch on; where batches are gone or broken it goes on with the next.
        """
        delay_s = 0.0
        while True:
            try:
                if self._skip:
                    former, self.position = self.position, await self._skip()
                    self._skip = None
                    yield Note("trimmed", f"goes on at {self.position}: batches from {former} on are not kept any more")
                async with aclosing(self._source.subscribe(*self.position)) as batches:
                    async for batch in batches:
                        delay_s = 0.0
                        for item in await self._in_order(batch):
                            yield item
                raise Unavailable("the worker ended its stream")
            except Unavailable as error:
                if not self._lost:
                    yield Note("lost", f"{error}; trying again")
                self._lost = True
            except Conflict:  # it started anew: whichever epoch it has now
                self.position = Position()
            except Trimmed:
                self._skip = partial(oldest_kept, self._source, self.position.seq)
            except WireError as error:
                yield Note("malformed", str(error))
                self._skip = partial(live, self._source)
            await asyncio.sleep(delay_s)
            delay_s = min(MAX_DELAY_S, max(FIRST_DELAY_S, 2 * delay_s))

    async def _in_order(self, batch: EventBatch) -> list[Item]:
        """A batch after what has to come before it; nothing of one that was read already."""
        items: list[Item] = []
        if self._lost:
            items.append(Note("back", "can be reached again"))
            self._lost = False
        if (batch.epoch, batch.seq) < (self._epoch, self.position.seq):
            return items
        if batch.epoch > self._epoch:
            items.append(Note("restart", f"started anew: epoch {batch.epoch} after {self._epoch}"))
            self._epoch = batch.epoch
            if self.position.epoch != batch.epoch:
                self.position = Position(batch.epoch, 0)
        if batch.seq > self.position.seq:
            items += await self._missed(batch)
        self.position = Position(batch.epoch, batch.seq + 1)
        return [*items, batch]

    async def _missed(self, batch: EventBatch) -> list[Item]:
        """What was not delivered before a batch: a note, and as much as can be had again."""
        first = self.position.seq
        try:
            again = await self._source.replay(batch.epoch, first)
        except (RhizomeError, WireError):
            again = []
        filled = [old for old in again if old.epoch == batch.epoch and first <= old.seq < batch.seq]
        lost = batch.seq - first - len(filled)
        what = f"batches {first} to {batch.seq - 1} did not come"
        return [Note("gap", f"{what}; {lost} are lost" if lost else f"{what}, and were read again"), *filled]


async def read_all(targets: Targets, start: Start) -> AsyncGenerator[Named, None]:
    """What all streams of a live target bring, as it comes, for ever; workers that join a router later are read too.

    `start` says where to begin with the streams that are there. Raises what it raises, but for a router's workers that
    cannot be reached: they are tried again.
    """
    async with aclosing(_Reading(targets, start).items()) as items:
        async for named in items:
            yield named


class _Reading:
    """The tasks that read the streams, each at its own pace, into one queue."""

    def __init__(self, targets: Targets, start: Start) -> None:
        self._targets = targets
        self._start = start
        self._queue: asyncio.Queue[Named | Exception] = asyncio.Queue(MAX_WAITING)
        self._readers: dict[str, StreamReader] = {}
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}  # by name and URL
        self._known: set[str] = set()  # names

    async def items(self) -> AsyncGenerator[Named, None]:
        watching = asyncio.create_task(self._guarded(self._watch()))
        try:
            while True:
                item = await self._queue.get()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            await _end([watching])
            await _end(self._tasks.values())

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            await self._queue.put(error)

    async def _watch(self) -> None:
        """Follow who is there."""
        start, lost = self._start, False
        while True:
            await self._follow(start)
            start = from_seq(0)
            await asyncio.sleep(REFRESH_S)
            try:
                await self._targets.refresh()
                lost = False
            except Unavailable as error:
                if not lost:
                    await self._say("", "lost", f"{error}; trying again")
                lost = True

    async def _follow(self, start: Start) -> None:
        present = {(stream.name, stream.url): stream for stream in self._targets.streams}
        names = {name for name, _ in present}
        for key in self._tasks.keys() - present.keys():
            await _end([self._tasks.pop(key)])
        for name in sorted(self._known - names):
            await self._say(name, "left", "left the router")
        for key, stream in present.items():
            if key not in self._tasks:
                if start is not self._start and stream.name not in self._known:
                    await self._say(stream.name, "joined", f"joined the router; read from {stream.url}")
                self._tasks[key] = asyncio.create_task(self._guarded(self._read(stream, start)))
        self._known = names

    async def _read(self, stream: Stream, start: Start) -> None:
        former = self._readers.get(stream.name)  # the worker moved
        position = former.position if former else await self._first_position(stream, start)
        reader = self._readers[stream.name] = StreamReader(stream.source, position)
        async with aclosing(reader.items()) as items:
            async for item in items:
                await self._queue.put(Named(stream.name, item))

    async def _first_position(self, stream: Stream, start: Start) -> Position:
        lost = False
        while True:
            try:
                return await start(stream.source)
            except (Unavailable, WireError) as error:
                if self._targets.router is None:
                    raise
                if not lost:
                    await self._say(stream.name, "lost", f"{error}; trying again")
                lost = True
                await asyncio.sleep(MAX_DELAY_S)

    async def _say(self, name: str, kind: str, text: str) -> None:
        await self._queue.put(Named(name, Note(kind, text)))


async def _end(tasks: Any) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
