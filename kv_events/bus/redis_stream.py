"""Events in Redis Streams: the layout that RedisPublisher writes and RedisEventSource reads, and how they connect.

    STREAM   epoch-S      start: ""    of this epoch the worker has said S batches; the next entry is batch S
             epoch-(s+1)  batch: ...   batch s as kv_events.wire has it
             epoch-(N+1)  end: ""      goodbye: there will be no batch N
    STREAM:snapshot                    kv_events.snapshot_bytes, of a position from which all entries are kept

The ID of an entry is the position after it, so a reader's position is an ID to read on from. Redis takes IDs in rising
order only: what is sent twice is refused the second time, and so is a worker's former incarnation, for its epoch is
smaller. Both keys expire TTL_S after their worker was heard last. Redis 6.2 or newer (XADD with NOMKSTREAM and MINID).

Credentials are those of the URL, or of RHIZOME_REDIS_AUTH: [scheme://][user]:password@host:port (%XX for what has a
meaning there; several separated by spaces). Each is used for that server alone, whoever names a server, and by that
scheme alone; without a scheme by rediss://, and by redis:// on loopback: nobody who names a server has a password sent
over a network in the clear, unless the variable says redis:// itself. None is ever logged, raised or told to a router:
what workers register has no login, and routers and tools bring their own.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import unquote

from kv_events.bus.url import BusUrl
from kv_events.wire import WireError
from rhizome.errors import InvalidRequest, Unavailable

if TYPE_CHECKING:
    from redis.asyncio import Redis

T = TypeVar("T")

logger = logging.getLogger(__name__)

AUTH_VARIABLE = "RHIZOME_REDIS_AUTH"
TIMEOUT_S = 5.0  # of connecting, and of each round trip
TRANSFER_S = 25.0  # more for a snapshot: 256 MiB at most
BLOCK_S = 2.0  # a reader's wait for what is new, after which it looks whether the stream is still there
TTL_S = 600  # outlasts a worker that is cut off for some minutes; a fleet that shrank leaves nothing for long

START, BATCH, END = b"start", b"batch", b"end"


def snapshot_key(stream: str) -> str:
    """Where a stream's snapshot is."""
    return f"{stream}:snapshot"


def without_login(bus: BusUrl) -> BusUrl:
    """A URL as it may be logged, raised and told to others."""
    return replace(bus, user="", password="")


def credentials(bus: BusUrl) -> tuple[str, str]:
    """User and password, each may be empty: those of the URL, else those that the environment has for its server.

    Raises InvalidRequest for a variable that cannot be read; never says what is in it.
    """
    if bus.user or bus.password:
        return bus.user, bus.password
    withheld = False
    for entry in os.environ.get(AUTH_VARIABLE, "").split():
        scheme, separator, rest = entry.partition("://")
        if not separator:
            scheme, rest = "", entry
        login, _, server = rest.rpartition("@")
        user, _, password = login.partition(":")
        host, _, port = server.rpartition(":")
        if not (password and host and port.isdecimal() and scheme in ("", "redis", "rediss")):
            raise InvalidRequest(
                AUTH_VARIABLE,
                "not readable",
                "[redis://|rediss://][user]:password@host:port, several separated by spaces",
            )
        if (host.strip("[]"), int(port)) != (bus.host, bus.port):
            continue
        if scheme == bus.scheme or (not scheme and (bus.scheme == "rediss" or _is_loopback(bus.host))):
            return unquote(user), unquote(password)
        withheld = True
    if withheld:
        logger.warning(
            "%s: the login in %s is not sent by %s://; begin it with %s:// if it is to be",
            without_login(bus),
            AUTH_VARIABLE,
            bus.scheme,
            bus.scheme,
        )
    return "", ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class StreamId(NamedTuple):
    """An entry's ID: a worker's epoch, and the position after the entry."""

    epoch: int
    position: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.position}"

    @classmethod
    def parse(cls, text: Any) -> StreamId:
        """From Redis. Raises WireError."""
        try:
            epoch, position = text.split(b"-")
            return cls(int(epoch), int(position))
        except (AttributeError, TypeError, ValueError):
            raise WireError(f"{text!r:.100} is not an ID of a stream") from None


def connect(bus: BusUrl) -> Redis:
    """A client that connects when it is used, and tries nothing twice: its users know what may be repeated.

    `answer` bounds its commands. Close it with `aclose`. Raises InvalidRequest.
    """
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    user, password = credentials(bus)
    return Redis(
        host=bus.host,
        port=bus.port,
        db=bus.database,
        username=user or None,
        password=password or None,
        ssl=bus.scheme == "rediss",
        ssl_check_hostname=True,  # by the system's certificates, or those of SSL_CERT_FILE
        protocol=2,  # replies of the same shape from every release of server and client
        socket_connect_timeout=TIMEOUT_S,
        socket_timeout=None,  # see `answer`
        retry=Retry(NoBackoff(), 0),
    )


async def answer(command: Awaitable[T], extra_s: float = 0.0) -> T:
    """What a command answers within TIMEOUT_S, and `extra_s` where it blocks or carries much. Raises TimeoutError.

    redis-py's own timeout is no choice: it writes under asyncio.wait_for, which loses cancellations before Python 3.12.
    """
    limit_s = TIMEOUT_S + extra_s
    try:
        async with asyncio.timeout(limit_s):
            return await command
    except TimeoutError as error:
        raise TimeoutError(str(error) or f"no answer within {limit_s:g} s") from None


async def last_entry(redis: Redis, stream: str) -> tuple[StreamId, Any] | None:
    """ID and fields of a stream's newest entry; None where there is none."""
    entries: Any = await answer(redis.xrevrange(stream, count=1))
    return (StreamId.parse(entries[0][0]), entries[0][1]) if entries else None


@contextmanager
def unavailable(where: str) -> Iterator[None]:
    """Redis's errors as Unavailable, so that nobody else has to know Redis."""
    from redis.exceptions import RedisError

    try:
        yield
    except (RedisError, OSError) as error:
        raise Unavailable(f"{where}: {said(error)}") from error


def said(error: Exception) -> str:
    """An error of Redis in a line."""
    return f"{type(error).__name__}: {str(error)[:200]}"
