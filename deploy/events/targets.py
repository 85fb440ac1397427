"""What a tool is pointed at: a router with all its workers, one stream on any bus, or a recording."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from rhizome.errors import InvalidRequest, RhizomeError, Unavailable
from rhizome.ticket import fleet_secret
from rhizome.validate import check_address

if TYPE_CHECKING:
    from kv_events.bus import EventSource
    from rhizome.v1.router_pb2 import WorkerEntry
    from router.client import Client

DEFAULT_TARGET = "router://127.0.0.1:7700"
ROUTER_SCHEME = "router://"
FIRST_ANSWER_S = 10.0
"""How long a router may take for its first answer; one that is not there refuses at once."""


@dataclass(frozen=True, slots=True)
class Stream:
    """One worker's events, open to be read."""

    name: str  # the worker's id where it is known beforehand, else `url`
    url: str  # where it is read, for people: without a password
    source: EventSource
    live: bool = True  # False: a recording, whose subscription ends with what was recorded


@dataclass(slots=True)
class _Opened:
    stream: Stream
    closing: AsyncExitStack


@dataclass(slots=True)
class Targets:
    """An open target. `streams` are its workers' streams as of the last refresh()."""

    target: str  # for people: without a password
    router: Client | None = None  # of a router:// target
    entries: dict[str, WorkerEntry] = field(default_factory=dict)  # what the router says of its workers, by id
    problems: dict[str, str] = field(default_factory=dict)  # workers of the router whose events cannot be read: why
    live: bool = True
    _only: frozenset[str] = frozenset()
    _opened: dict[tuple[str, str], _Opened] = field(default_factory=dict)  # by worker and URL

    @property
    def streams(self) -> tuple[Stream, ...]:
        """In order of their names."""
        return tuple(self._opened[key].stream for key in sorted(self._opened))

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
                await self._opened.pop(key).closing.aclose()
            for name, url in sorted(wanted - self._opened.keys()):
                try:
                    await self.add(name, url)
                except RhizomeError as error:  # one worker's trouble is not the others'
                    self.problems[name] = str(error)
        return self.streams

    async def add(self, name: str, url: str) -> None:
        """Open the stream at a bus URL. Raises InvalidRequest, Unavailable."""
        from kv_events.bus.url import open_source

        async with AsyncExitStack() as stack:
            source = await stack.enter_async_context(open_source(url, secret=fleet_secret()))
            shown = without_password(url)
            self._opened[name, url] = _Opened(Stream(name or shown, shown, source), stack.pop_all())

    def add_recorded(self, name: str, path: str, source: EventSource) -> None:
        """A worker's stream from a recording."""
        self._opened[name, path] = _Opened(Stream(name, path, source, live=False), AsyncExitStack())

    async def close(self) -> None:
        """Close all streams."""
        while self._opened:
            await self._opened.popitem()[1].closing.aclose()


@asynccontextmanager
async def open_targets(target: str = DEFAULT_TARGET, workers: Collection[str] = ()) -> AsyncIterator[Targets]:
    """Open what `target` names: `router://host:port`, a bus URL (kv_events.bus.url) or a recording's file.

    `workers` keeps to these; of a router and a recording, which know theirs, each must be there. Raises InvalidRequest
    for what is no target, Unavailable for a router that cannot be reached. A bus is reached when it is first read.
    """
    opened = Targets(without_password(target), _only=frozenset(workers))
    async with AsyncExitStack() as stack:
        stack.push_async_callback(opened.close)
        if target.startswith(ROUTER_SCHEME):
            opened.router = await stack.enter_async_context(open_router(target))
            async with _patience(target):
                await opened.refresh()
            _check_known(workers, opened.entries)
        elif "://" in target:
            await opened.add("", target)
        else:
            opened.live = False
            await _add_recording(opened, Path(target), workers)
        yield opened


def open_router(target: str) -> Client:
    """A client of the router that `target` names, not connected yet. Raises InvalidRequest for another target."""
    from router.client import Client

    return Client(router_address(target))


def router_address(target: str) -> str:
    """host:port of a `router://host:port`. Raises InvalidRequest for anything else."""
    address = target.removeprefix(ROUTER_SCHEME).removesuffix("/")
    if not target.startswith(ROUTER_SCHEME):
        raise InvalidRequest("target", without_password(target), f"a router is needed, as in {DEFAULT_TARGET}")
    check_address("target", address)
    return address


def events_url(entry: WorkerEntry) -> str:
    """The bus URL of a worker's events: its own gRPC server where it names no other."""
    return entry.events_url or f"grpc://{entry.address}"


def without_password(url: str) -> str:
    """The URL as it may be shown."""
    parts = urlsplit(url)
    if "@" not in parts.netloc:
        return url
    user, _, host = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user.partition(':')[0]}:***@{host}").geturl()


async def _list_workers(router: Client, target: str) -> list[WorkerEntry]:
    import grpc

    try:
        return await router.workers()
    except grpc.aio.AioRpcError as error:
        raise Unavailable(f"{target}: {error.code().name}: {error.details()}") from error


@asynccontextmanager
async def _patience(target: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(FIRST_ANSWER_S):
            yield
    except TimeoutError:
        raise Unavailable(f"{target}: no answer within {FIRST_ANSWER_S:g} s") from None


def _check_known(workers: Collection[str], known: Mapping[str, object]) -> None:
    for worker in workers:
        if worker not in known:
            raise InvalidRequest("worker", worker, f"one of {', '.join(sorted(known)) or 'none: no worker is there'}")


async def _add_recording(opened: Targets, path: Path, workers: Collection[str]) -> None:
    if not path.is_file():
        kinds = "router://HOST:PORT, a bus URL (grpc://, zmq://, redis://) or a recording that exists"
        raise InvalidRequest("target", str(path), kinds)
    from kv_events.inspect.recording import recorded_sources

    sources = await asyncio.to_thread(recorded_sources, path)
    _check_known(workers, sources)
    for name, source in sources.items():
        if not workers or name in workers:
            opened.add_recorded(name, str(path), source)
