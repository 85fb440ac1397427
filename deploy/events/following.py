"""Every stream of a live target, followed for as long as is wanted: what record, stats and verify are built on."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress

from deploy.events.targets import Targets
from kv_events.bus import EventConsumer, EventSource
from kv_events.bus.follow import follow
from kv_events.events import EventBatch, Snapshot
from kv_events.inspect.observer import ObservedStream
from kv_events.wire import WireError
from rhizome.errors import InvalidRequest, RhizomeError, Unavailable

REFRESH_S = 1.0
"""How often a router is asked who is there."""

STEADY_S = 1.0
"""A subscription that has lasted for so long is taken to work, though nothing came."""


class WatchedSource:
    """An EventSource that remembers what went wrong with it."""

    def __init__(self, source: EventSource, on_reached: Callable[[tuple[int, int]], None] | None = None) -> None:
        """`on_reached` is told once, with the first snapshot, how far the stream had come by then: a bus may keep one
        that is older than now."""
        self._source = source
        self._on_reached = on_reached
        self._error = ""
        self._since_s = float("inf")  # of the subscription that runs

    @property
    def foreign(self) -> bool:
        """Whether the digests were made by the reader: vLLM and SGLang send none."""
        return bool(getattr(self._source, "foreign", False))

    @property
    def problem(self) -> str:
        """Why nothing comes; empty while it works."""
        return "" if time.monotonic() - self._since_s > STEADY_S else self._error

    async def subscribe(self, epoch: int, from_seq: int) -> AsyncGenerator[EventBatch, None]:
        """See EventSource."""
        self._since_s = time.monotonic()
        try:
            async with aclosing(self._source.subscribe(epoch, from_seq)) as batches:
                async for batch in batches:
                    self._error = ""
                    yield batch
            self._error = "the worker ended its stream"
        except Exception as error:
            self._error = str(error)
            raise
        finally:
            self._since_s = float("inf")

    async def replay(self, epoch: int, from_seq: int) -> list[EventBatch]:
        """See EventSource."""
        return await self._source.replay(epoch, from_seq)

    async def snapshot(self) -> Snapshot:
        """See EventSource."""
        try:
            snapshot = await self._source.snapshot()
        except Exception as error:
            self._error = str(error)
            raise
        self._error = ""
        if self._on_reached is not None:
            since: list[EventBatch] = []
            with suppress(RhizomeError, WireError):  # what is wrong shows when the stream is read
                since = await self._source.replay(snapshot.epoch, snapshot.next_seq)
            self._on_reached((snapshot.epoch, snapshot.next_seq + len(since)))
            self._on_reached = None
        return snapshot


class Following:
    """A task for each stream, which keeps its consumer in step. Workers that join the router later are followed too."""

    def __init__(self, targets: Targets, consumer_of: Callable[[str], EventConsumer]) -> None:
        """`consumer_of` is asked once a stream, by its name."""
        self._targets = targets
        self._consumer_of = consumer_of
        self._consumers: dict[str, EventConsumer] = {}
        self._sources: dict[str, WatchedSource] = {}
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}  # by name and URL
        self.router_problem = ""  # why the router did not say who is there
        self._refreshed_s = -math.inf

    @property
    def problems(self) -> list[str]:
        """What keeps streams from being read now."""
        told = [f"{name}: {source.problem}" for name, source in self._sources.items() if source.problem]
        opened = [f"{name}: {problem}" for name, problem in self._targets.problems.items()]
        return [*([self.router_problem] if self.router_problem else []), *opened, *told]

    def problem_of(self, name: str) -> str:
        """What keeps one stream from being read now; empty while it works."""
        source = self._sources.get(name)
        return source.problem if source else self._targets.problems.get(name, "")

    @property
    def foreign(self) -> dict[str, EventConsumer]:
        """The consumers of streams whose digests say nothing, by name: the reader made them itself."""
        return {name: self._consumers[name] for name, source in self._sources.items() if source.foreign}

    @property
    def reached(self) -> bool:
        """Whether anything came from anybody."""
        return any(consumer.position() != (0, 0) for consumer in self._consumers.values())

    @property
    def unread(self) -> dict[str, str]:
        """Streams of which nothing came at all, by name: why."""
        silent = [name for name in self._sources if self._consumers[name].position() == (0, 0)]
        return {name: self.problem_of(name) or "nothing came" for name in silent} | self._targets.problems

    async def refresh(self) -> None:
        """Follow who is there now; a router is asked once a second. Raises what a consumer raised."""
        for task in self._tasks.values():
            if task.done():
                task.result()
        if time.monotonic() - self._refreshed_s < REFRESH_S:
            return
        try:
            await self._targets.refresh()
            self.router_problem = ""
        except Unavailable as error:
            self.router_problem = str(error)
        self._refreshed_s = time.monotonic()
        present = {(stream.name, stream.url): stream for stream in self._targets.streams}
        await self._end([key for key in self._tasks if key not in present])
        for key in sorted(present.keys() - self._tasks.keys()):
            stream = present[key]
            if stream.name not in self._consumers:
                self._consumers[stream.name] = self._consumer_of(stream.name)
            consumer = self._consumers[stream.name]
            on_reached = consumer.live_from if isinstance(consumer, ObservedStream) else None
            source = self._sources[stream.name] = WatchedSource(stream.source, on_reached)
            self._tasks[key] = asyncio.create_task(follow(source, consumer, name=stream.name))

    def check_reached(self) -> None:
        """Raise Unavailable where nothing came from anybody."""
        if not self.reached:
            told = self.problems or [f"{name}: {why}" for name, why in self.unread.items()]
            raise Unavailable("; ".join(told) or f"{self._targets.target}: no worker is there")

    async def close(self) -> None:
        """Follow nobody any more."""
        await self._end(list(self._tasks))

    async def _end(self, keys: Sequence[tuple[str, str]]) -> None:
        tasks = [self._tasks.pop(key) for key in keys]
        for name, _ in keys:
            self._sources.pop(name, None)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def following(targets: Targets, consumer_of: Callable[[str], EventConsumer]) -> AsyncIterator[Following]:
    """Follow all streams of a live target until left. Raises InvalidRequest for a recording."""
    if targets.recording is not None:
        raise InvalidRequest("target", str(targets.recording), "a live one: router://HOST:PORT or a bus URL")
    followed = Following(targets, consumer_of)
    try:
        await followed.refresh()
        yield followed
    finally:
        await followed.close()


async def ticks(every_s: float, for_s: float | None = None) -> AsyncGenerator[float, None]:
    """Seconds gone by, about each `every_s`, until `for_s` are over or the first SIGINT or SIGTERM comes; the last is
    the end. A second signal ends the process."""
    loop = asyncio.get_running_loop()
    stopped, start_s = asyncio.Event(), loop.time()

    def remove_handlers() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    def stop() -> None:
        stopped.set()
        remove_handlers()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        while not stopped.is_set():
            elapsed_s = loop.time() - start_s
            left_s = math.inf if for_s is None else for_s - elapsed_s
            if left_s <= 0:
                break
            with suppress(TimeoutError):
                await asyncio.wait_for(stopped.wait(), min(every_s, left_s))
            yield loop.time() - start_s
    finally:
        remove_handlers()


def wall_clock_ns() -> Callable[[], int]:
    """A clock that tells wall time in ns and does not step back, whatever is done to the machine's clock."""
    offset_ns = time.time_ns() - time.monotonic_ns()
    return lambda: time.monotonic_ns() + offset_ns
