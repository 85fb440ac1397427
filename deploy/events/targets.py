"""What a tool is pointed at: a router with all its workers, one stream on any bus, or a recording."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kv_events.bus.url import SCHEMES, open_source, parse_bus_url
from rhizome.errors import InvalidRequest, RhizomeError, Unavailable
from rhizome.ticket import fleet_secret
from rhizome.validate import check_address

if TYPE_CHECKING:
    import grpc

    from kv_events.bus import EventSource
    from kv_events.bus.recorded import RecordedSource
    from rhizome.v1.router_pb2 import WorkerEntry
    from router.client import Client

DEFAULT_TARGET = "router://127.0.0.1:7700"
ROUTER_SCHEME = "router://"
FIRST_ANSWER_S = 10.0
"""How long a router may take for its first answer; one that is not there refuses at once."""


@dataclass(frozen=True, slots=True)
class Stream:
    """One worker's events, open to be read."""

    name: str  # the worker's id, as its router calls it; else `url`
    url: str  # where it is read, for people: without a password
    source: EventSource
    live: bool = True  # False: a recording's, whose subscription ends with what was recorded


@dataclass(slots=True)
class Targets:
    """An open target. `streams` are as of the last refresh()."""

    target: str  # for people: without a password
    router: Client | None = None  # of a router:// target
    recording: Path | None = None  # a file: RecordingReader.records has all its streams in the order in which they came
    entries: dict[str, WorkerEntry] = field(default_factory=dict)  # what the router says of all its workers, by id
    problems: dict[str, str] = field(default_factory=dict)  # workers of the router whose stream cannot be opened: why
    _only: frozenset[str] = frozenset()
    _opened: dict[tuple[str, str], tuple[Stream, AsyncExitStack]] = field(default_factory=dict)  # by name and URL

    @property
    def streams(self) -> tuple[Stream, ...]:
        """In order of their names."""
        return tuple(self._opened[key][0] for key in sorted(self._opened))

    async def refresh(self) -> tuple[Stream, ...]:
        """Ask the router anew: streams of workers that joined are opened, of those that left or moved closed.

        Other targets stay as they are. Raises Unavailable when the router cannot be reached.
        """
        if self.router is not None:
            self.entries = {entry.worker_id: entry for entry in await _list_workers(self.router, self.target)}
            wanted = {(name, events_url(entry)) for name, entry in self.entries.items()}
            wanted = {(name, url) for name, url in wanted if not self._only or name in self._only}
            self.problems.clear()
            for key in self._opened.keys() - wanted:
                await self._opened.pop(key)[1].aclose()
            for name, url in sorted(wanted - self._opened.keys()):
                try:
                    await self.open(name, url)
                except RhizomeError as error:  # one worker's trouble is not the others'
                    self.problems[name] = str(error)
        return self.streams

    async def open(self, name: str, url: str) -> None:
        """Open the stream at a bus URL, by which it is called where it has no name. Raises InvalidRequest."""
        bus = parse_bus_url(url)
        async with AsyncExitStack() as stack:
            source = await stack.enter_async_context(open_source(bus, secret=fleet_secret()))
            self.add(Stream(name or str(bus), str(bus), source), stack.pop_all(), url)

    def add(self, stream: Stream, closing: AsyncExitStack | None = None, url: str = "") -> None:
        """Take in a stream that is open."""
        self._opened[stream.name, url or stream.url] = (stream, closing or AsyncExitStack())

    async def close(self) -> None:
        """Close all streams."""
        while self._opened:
            await self._opened.popitem()[1][1].aclose()


@asynccontextmanager
async def open_targets(target: str = DEFAULT_TARGET, workers: Collection[str] = ()) -> AsyncIterator[Targets]:
    """Open what `target` names: `router://host:port`, a bus URL (kv_events.bus.url) or a recording's file.

    `workers` keeps to these; of a router and a recording, which know theirs, each must be there. Raises InvalidRequest
    for what is no target, RecordingError for a damaged recording, Unavailable for a router that cannot be reached. A
    bus is reached when it is first read.
    """
    opened = Targets(target, _only=frozenset(workers))
    async with AsyncExitStack() as stack:
        stack.push_async_callback(opened.close)
        if target.startswith(ROUTER_SCHEME):
            opened.router = await stack.enter_async_context(open_router(target))
            async with _patience(target):
                await opened.refresh()
            _check_known(workers, opened.entries)
        elif "://" in target:
            if target.partition("://")[0] not in SCHEMES:
                raise InvalidRequest("target", target, _KINDS)
            await opened.open("", target)
            opened.target = opened.streams[0].url
        else:
            opened.recording = Path(target)
            sources = await asyncio.to_thread(_recorded_sources, opened.recording)
            _check_known(workers, sources)
            for name, source in sources.items():
                if not workers or name in workers:
                    opened.add(Stream(name, target, source, live=False))
        yield opened


def open_router(target: str) -> Client:
    """A client of the router that `target` names, not connected yet. Raises InvalidRequest for another target."""
    from router.client import Client

    return Client(router_address(target))


def router_address(target: str) -> str:
    """host:port of a `router://host:port`. Raises InvalidRequest for anything else."""
    address = target.removeprefix(ROUTER_SCHEME).removesuffix("/")
    if not target.startswith(ROUTER_SCHEME):
        raise InvalidRequest("target", target, f"a router is needed, as in {DEFAULT_TARGET}")
    check_address("target", address)
    return address


def events_url(entry: WorkerEntry) -> str:
    """The bus URL of a worker's events: its own gRPC server where it names no other."""
    return entry.events_url or f"grpc://{entry.address}"


_KINDS = "router://HOST:PORT, a bus URL (grpc://, zmq://, redis://) or a recording that exists"


async def _list_workers(router: Client, target: str) -> list[WorkerEntry]:
    import grpc

    try:
        return await router.workers()
    except grpc.aio.AioRpcError as error:
        raise unavailable(target, error) from error


def unavailable(target: str, error: grpc.aio.AioRpcError) -> Unavailable:
    """A router's refusal as one of our errors."""
    return Unavailable(f"{target}: {error.code().name}: {error.details()}")


@asynccontextmanager
async def _patience(target: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(FIRST_ANSWER_S):
            yield
    except TimeoutError:
        raise Unavailable(f"{target}: no answer within {FIRST_ANSWER_S:g} s") from None


def _check_known(workers: Collection[str], known: Collection[str]) -> None:
    for worker in workers:
        if worker not in known:
            raise InvalidRequest("worker", worker, f"one of {', '.join(sorted(known)) or 'none: no worker is there'}")


def _recorded_sources(path: Path) -> dict[str, RecordedSource]:
    """Raises InvalidRequest for what is no recording, RecordingError for a damaged one."""
    from deploy.events.files import open_recording
    from kv_events.bus.recorded import recorded_sources

    if not path.is_file():
        raise InvalidRequest("target", str(path), _KINDS)
    open_recording("target", path).close()
    return recorded_sources(path)
