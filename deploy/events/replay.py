"""`rhizome events replay`: a recording plays again, into a tree or onto a bus, and has to come out as recorded."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from deploy.events.files import open_recording
from deploy.events.following import ticks
from deploy.events.progress import progress_bar
from deploy.events.show import Output, table
from kv_events.bus.follow import follow
from kv_events.bus.url import open_source, parse_bus_url, publishing
from kv_events.inspect.recording import Record, RecordingReader
from kv_events.inspect.replay import Pace, ReplayedStream, Replayer
from kv_events.inspect.words import printable
from kv_events.log import EventLog
from kv_events.view import WorkerView
from radix import make_tree
from radix.digest import EMPTY_DIGEST
from rhizome.errors import InvalidRequest, Unavailable

TREE = "tree"
WORKER = "{worker}"

READ_BACK_S = 10.0
"""How long what was published may take to be read again."""

HOUR_S = 3600.0

DRAIN_S = 1.0
"""How long readers of a log that ends get to read the rest."""

_TURN_RECORDS = 64
"""Replayed at full speed between two turns of those who publish."""

HEADS = ("worker", "at", "blocks", "batches", "logs", "digest", "recorded")


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """What `replay` was asked for."""

    file: Path
    into: str = TREE  # or a bus URL
    speed: float | None = None  # times real time; None: as recorded onto a bus, as fast as can be into a tree
    workers: tuple[str, ...] = ()  # none: all
    hold: bool = False  # go on publishing when all was replayed
    insecure: bool = False
    as_json: bool = False


async def run_replay(options: ReplayOptions) -> bool:
    """Replay, print the digests, and return whether they are as recorded. Raises InvalidRequest, WireError,
    Unavailable where what was published cannot be read again."""
    output, pace = Output(as_json=options.as_json), _pace(options)
    with open_recording("file", options.file) as reader:
        names, replayer = _names(reader, options.workers), Replayer()
        async with AsyncExitStack() as stack:
            bus = None if options.into == TREE else _Bus(options, names, output)
            if bus is not None:
                stack.push_async_callback(bus.close)
            with progress_bar("replaying", reader.size_bytes) as advance:
                await _play(reader.records(names), replayer, pace, bus, advance)
            if bus is not None:
                await bus.read_back()
            _tell(output, replayer, reader)
            if bus is not None and options.hold:
                print("rhizome: all is replayed and stays published; Ctrl-C ends", file=sys.stderr)
                async with aclosing(ticks(HOUR_S)) as ticking:
                    async for _ in ticking:
                        pass
    return all(stream.equal for stream in replayer.streams.values())


def _pace(options: ReplayOptions) -> Pace:
    if options.speed is not None:
        return Pace(options.speed)
    return Pace(math.inf if options.into == TREE else 1.0)


def _names(reader: RecordingReader, wanted: Collection[str]) -> list[str]:
    recorded = list(reader.summary().workers)
    for worker in wanted:
        if worker not in recorded:
            raise InvalidRequest("worker", worker, f"one of {', '.join(recorded) or 'none: no worker was recorded'}")
    return [name for name in recorded if not wanted or name in wanted]


async def _play(
    records: Iterator[Record], replayer: Replayer, pace: Pace, bus: _Bus | None, advance: Callable[[int], None]
) -> None:
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    for count, record in enumerate(records):
        advance(record.offset)
        delay_s = start_s + pace.due_s(record.time_ns) - loop.time()
        if delay_s > 0 or count % _TURN_RECORDS == 0:
            await asyncio.sleep(max(0.0, delay_s))
        stream = replayer.take(record)
        if stream is not None and bus is not None:
            await bus.begin(stream)


class _Bus:
    """Publishes each stream's present log."""

    def __init__(self, options: ReplayOptions, names: Sequence[str], output: Output) -> None:
        """Raises InvalidRequest where the streams cannot all be published there."""
        self._insecure = options.insecure
        self._output = output
        self._urls = {name: options.into.replace(WORKER, quote(name, safe="")) for name in names}
        self._published: dict[str, _Published] = {}
        parsed = [parse_bus_url(url) for url in self._urls.values()]
        fixed = [bus.url for bus in parsed if bus.port or bus.scheme == "memory"]
        if len(set(fixed)) < len(fixed):
            limit = f"a URL with {WORKER} in it, or with port 0, as {len(names)} workers are replayed"
            raise InvalidRequest("into", options.into, limit)

    async def begin(self, stream: ReplayedStream) -> None:
        """A stream goes on in a new log: publish that in the place of the former one."""
        assert stream.log is not None
        former = self._published.pop(stream.name, None)
        if former is not None:
            if former.log.epoch != stream.log.epoch:
                await former.say_goodbye()
            await former.stack.aclose()
        async with AsyncExitStack() as stack:
            where = self._urls[stream.name]
            url = await stack.enter_async_context(publishing(stream.log, where, insecure=self._insecure))
            self._urls[stream.name] = url  # with the port that was free
            self._published[stream.name] = _Published(stream.log, url, stack.pop_all())
        if former is None:
            self._tell(stream.name, url)

    async def read_back(self) -> None:
        """Read everything as anybody would. Raises Unavailable where that is not what was published."""
        await asyncio.gather(*(self._read_back(name, one) for name, one in self._published.items()))

    async def close(self) -> None:
        """Say goodbye, and publish no more."""
        await asyncio.gather(*(one.say_goodbye() for one in self._published.values()))
        while self._published:
            await self._published.popitem()[1].stack.aclose()

    async def _read_back(self, name: str, published: _Published) -> None:
        log, view = published.log, WorkerView(published.log.worker, 0, make_tree())
        async with open_source(published.url) as source:
            reading = asyncio.create_task(follow(source, view, name=name, max_delay_s=0.5))
            try:
                async with asyncio.timeout(READ_BACK_S):
                    while not (view.synced and view.position() == (log.epoch, log.next_seq)):
                        await asyncio.sleep(0.01)
            except TimeoutError:
                shown = parse_bus_url(published.url)
                raise Unavailable(f"{name}: reading {shown} for {READ_BACK_S:g} s did not bring it all back") from None
            finally:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)

    def _tell(self, name: str, url: str) -> None:
        shown = str(parse_bus_url(url))
        if self._output.as_json:
            self._output.json({"worker": name, "url": shown})
        else:
            self._output.line([(printable(name), "worker"), (f": published at {shown}", "")])
        self._output.flush()


@dataclass(frozen=True, slots=True)
class _Published:
    log: EventLog
    url: str
    stack: AsyncExitStack

    async def say_goodbye(self) -> None:
        """Its readers get the rest, if they take it soon."""
        self.log.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                while self.log.subscribers:
                    await asyncio.sleep(0.01)


def _tell(output: Output, replayer: Replayer, reader: RecordingReader) -> None:
    streams = list(replayer.streams.values())
    if output.as_json:
        for stream in streams:
            output.json(_as_json(stream))
    elif streams:
        for line in table(HEADS, [_row(stream) for stream in streams]):
            output.line(line)
    for stream in streams:
        if (first := stream.first_difference) is not None and not output.as_json:
            where = f"first at batch {first.seq} of epoch {first.epoch}"
            output.text(f"{printable(stream.name)}: {stream.differences} digests differ, {where}", "bad")
    if not reader.complete:
        print("rhizome: the recording was cut off: this is what is whole", file=sys.stderr)
    output.flush()


def _as_json(stream: ReplayedStream) -> dict[str, Any]:
    log, first = stream.log, stream.first_difference
    return {
        "worker": stream.name,
        "epoch": 0 if log is None else log.epoch,
        "next_seq": 0 if log is None else log.next_seq,
        "blocks": 0 if log is None else len(log),
        "batches": stream.batches,
        "logs": stream.logs,
        "digest": (EMPTY_DIGEST if log is None else log.digest).hex(),
        "recorded_digest": stream.recorded_digest.hex(),
        "equal": stream.equal,
        "differences": stream.differences,
        "first_difference": {"epoch": first.epoch, "seq": first.seq} if first else None,
    }


def _row(stream: ReplayedStream) -> list[str]:
    told = _as_json(stream)
    return [
        printable(stream.name),
        f"{told['epoch']}/{told['next_seq']}",
        f"{told['blocks']:,}",
        f"{stream.batches:,}",
        str(stream.logs),
        told["digest"],
        "equal" if stream.equal else "DIFFERENT",
    ]
