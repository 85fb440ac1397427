"""A fleet's registry in Redis: what its workers announce, for any number of routers to read.

    STREAM   *   join: ..., status: ...   from each worker, every ANNOUNCE_S: what it is, and how it is now
             *   leave: ...               its goodbye

The values are the very messages, signed, that a router takes over gRPC (rhizome.v1.Fleet); here they are bytes. As each
entry says all, a router that comes late, and a Redis that comes back empty, know the fleet after ANNOUNCE_S. The stream
keeps about MAX_ENTRIES, 16 MiB at most.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any, NamedTuple

from kv_events.bus.redis_stream import answer, connect, unavailable, without_login
from kv_events.bus.url import BusUrl, parse_bus_url
from kv_events.wire import WireError
from rhizome.errors import InvalidRequest

logger = logging.getLogger(__name__)

ANNOUNCE_S = 0.5
HISTORY_S = 3.0
"""A router that comes reads from that long ago on: a worker is heard of several times in it."""
MAX_ENTRIES = 16_384  # of 1,024 workers, some seconds
MAX_ENTRY_BYTES = 65_536
READ_ENTRIES = 256

JOIN, STATUS, LEAVE = b"join", b"status", b"leave"


class Announcement(NamedTuple):
    """Serialized messages: RegisterRequest and HeartbeatRequest, or a DeregisterRequest alone."""

    join: bytes = b""
    status: bytes = b""
    leave: bytes = b""


def parse_registry_url(url: str) -> BusUrl:
    """redis://host:port[/db]/FLEET. Raises InvalidRequest."""
    try:
        bus = parse_bus_url(url)
    except InvalidRequest as error:
        raise InvalidRequest("registry", error.value, error.limit) from None
    if not bus.scheme.startswith("redis") or bus.port == 0:
        raise InvalidRequest("registry", str(bus), "redis://host:port/FLEET, or rediss://")
    return bus


def events_at(registry: BusUrl, worker_id: str) -> str:
    """The bus URL at which a worker of that registry publishes its events, unless it is told another one."""
    return replace(registry, name=f"{registry.name}:events:{worker_id}").url


class Registry:
    """A connection to a fleet's registry, made when it is used. Its methods raise Unavailable while Redis is away."""

    def __init__(self, bus: BusUrl) -> None:
        """Raises InvalidRequest for credentials that cannot be read."""
        self.where = str(without_login(bus))
        self._stream = bus.name
        self._redis: Any = connect(bus)

    async def close(self) -> None:
        """Close all connections."""
        await self._redis.aclose()

    async def announce(self, announcement: Announcement) -> None:
        """Add an entry."""
        fields = {name: value for name, value in zip((JOIN, STATUS, LEAVE), announcement, strict=True) if value}
        with unavailable(self.where):
            await answer(self._redis.xadd(self._stream, fields, maxlen=MAX_ENTRIES, approximate=True))

    async def read(self) -> AsyncGenerator[list[Announcement], None]:
        """What is announced, in order, from HISTORY_S ago on. Yields at least every ANNOUNCE_S, if only an
        empty list: Redis is there."""
        with unavailable(self.where):
            seconds, _ = await answer(self._redis.time())  # the entries' own clock
            at: Any = f"{int(1000 * (seconds - HISTORY_S))}-0"
            while True:
                blocking = self._redis.xread({self._stream: at}, count=READ_ENTRIES, block=int(1000 * ANNOUNCE_S))
                read = await answer(blocking, ANNOUNCE_S)
                entries = read[0][1] if read else []
                if entries:
                    at = entries[-1][0]
                yield [each for each in map(self._parsed, entries) if each]

    def _parsed(self, entry: tuple[Any, dict[bytes, bytes] | None]) -> Announcement | None:
        try:
            return _announcement(entry[1] or {})
        except WireError as error:
            logger.warning("%s: entry %s: %s", self.where, entry[0], error)
            return None


def _announcement(fields: dict[bytes, bytes]) -> Announcement:
    """Raises WireError."""
    size_bytes = sum(map(len, fields.values()))
    if size_bytes > MAX_ENTRY_BYTES:
        raise WireError(f"{size_bytes} bytes, at most {MAX_ENTRY_BYTES} are read")
    found = Announcement(*(fields.get(name, b"") for name in (JOIN, STATUS, LEAVE)))
    if not found.leave and not (found.join and found.status):
        raise WireError("neither join and status, nor leave")
    return found
