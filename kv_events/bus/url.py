"""Where a worker's events are read or published, as a URL; every transport is opened from here.

memory://NAME                         within this process
grpc://host:port                      a worker's KvEvents service
zmq://host:port[?option=value&...]    ZeroMQ PUB with a replay socket: our own workers, vLLM, SGLang
    replay=PORT        of the replay socket (default: port + 1)
    topic=PREFIX       read only topics that begin so; published under
    dialect=auto       or rhizome, vllm, sglang: what is spoken there; auto asks. Published with dialect=vllm, batches
                       end with vllm's own fields: for Dynamo, which refuses longer ones
    worker=NAME        what a foreign server is called (default: as its topic `kv@NAME@MODEL` says, else host:port)
    model=NAME&block_size=N[&adapter=NAME]   give a foreign server's blocks the fleet's keys, in blocks of N tokens
redis://[user:password@]host[:port][/db]/STREAM      a Redis Stream; rediss:// with TLS
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from ipaddress import IPv6Address
from typing import NoReturn
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from kv_events.bus import EventSource
from kv_events.log import EventLog
from kv_events.wire import MAX_BLOCK_SIZE
from rhizome.errors import InvalidRequest

SCHEMES = ("memory", "grpc", "zmq", "redis", "rediss")
DIALECTS = ("auto", "rhizome", "vllm", "sglang")
ZMQ_OPTIONS = ("replay", "topic", "dialect", "worker", "model", "block_size", "adapter")

MAX_URL_CHARS = 2048
MAX_NAME_CHARS = 128  # of a worker, a model, a stream, a host's label and all: as long as names are elsewhere
MAX_HOST_CHARS = 253  # of a domain name (RFC 1035)
NOT_HOSTS = ("dns", "google-c2p", "google-c2p-experimental", "ipv4", "ipv6", "unix", "unix-abstract", "vsock", "xds")
"""What gRPC takes for a way to find a server (`unix:80` for a socket in the file system), not for a server's name."""
REDIS_PORT = 6379
MAX_REDIS_DATABASE = 2**16 - 1

_FIELD = "events_url"
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.IGNORECASE)  # of a domain name (RFC 1035), laxly


@dataclass(frozen=True, slots=True)
class BusUrl:
    """A bus URL's parts; those that a scheme does not have are empty or 0. `str()` leaves the password out."""

    scheme: str
    name: str = ""  # memory: NAME; redis: STREAM
    host: str = ""  # without brackets
    port: int = 0  # 0: a free one, to publish at
    replay_port: int = 0  # zmq
    topic: str = ""  # zmq
    dialect: str = "auto"  # zmq
    worker: str = ""  # zmq
    model: str = ""  # zmq
    block_size: int = 0  # zmq: tokens
    adapter: str = ""  # zmq
    user: str = ""  # redis
    password: str = field(default="", repr=False)  # redis
    database: int = 0  # redis

    @property
    def address(self) -> str:
        """host:port, an IPv6 address in brackets."""
        return _address(self.host, self.port)

    @property
    def url(self) -> str:
        """The URL, with the password: for whoever is to read there."""
        return self._text(self.password)

    def __str__(self) -> str:
        return self._text("***" if self.password else "")

    def _text(self, password: str) -> str:
        if self.scheme == "memory":
            return f"memory://{self.name}"
        if self.scheme == "grpc":
            return f"grpc://{self.address}"
        if self.scheme == "zmq":
            options = {
                "replay": "" if self.replay_port == _default_replay(self.port) else str(self.replay_port),
                "topic": self.topic,
                "dialect": "" if self.dialect == "auto" else self.dialect,
                "worker": self.worker,
                "model": self.model,
                "block_size": str(self.block_size or ""),
                "adapter": self.adapter,
            }
            query = urlencode({name: value for name, value in options.items() if value}, safe="@/:")
            return f"zmq://{self.address}{'?' if query else ''}{query}"
        secret = f":{quote(password, safe='*')}" if password else ""
        login = f"{quote(self.user, safe='')}{secret}@" if self.user or secret else ""
        database = f"/{self.database}" if self.database else ""
        return f"{self.scheme}://{login}{self.address}{database}/{quote(self.name, safe=':{}')}"


def parse_bus_url(url: str) -> BusUrl:
    """The parts of `url`. Raises InvalidRequest for what is no bus URL; names what is wrong, never a password."""
    if len(url) > MAX_URL_CHARS:
        raise InvalidRequest(_FIELD, f"{url[:5]}...", f"at most {MAX_URL_CHARS} characters, it has {len(url)}")
    if not url.isascii() or not url.isprintable() or " " in url:
        _refuse(url, "printable ASCII characters without spaces (others as %XX)")
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        _refuse(url, f"one of {known}")
    if scheme == "memory":
        return _memory(url)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:  # a port that is none, or brackets that do not close
        _refuse(url, f"{scheme}://host:port with a port from 0 to 65535, an IPv6 address as host in brackets")
    if parts.fragment or "#" in url:
        _refuse(url, "no fragment (#...)")
    if scheme != "zmq" and "?" in url:
        _refuse(url, f"no query options: {scheme}:// knows none")
    match scheme:
        case "grpc" | "zmq":
            if parts.path not in ("", "/") or "@" in parts.netloc:
                _refuse(url, f"{scheme}://host:port, without a path or a user")
            bus = BusUrl(scheme, host=_host(url, host), port=_port(url, port))
            return bus if scheme == "grpc" else _with_options(url, bus, parts.query)
        case _:
            user, password = unquote(parts.username or ""), unquote(parts.password or "")
            at = BusUrl(scheme, host=_host(url, host), port=REDIS_PORT if port is None else port)
            return replace(_stream(url, at, parts.path), user=user, password=password)


@asynccontextmanager
async def open_source(url: str | BusUrl, *, secret: bytes = b"") -> AsyncIterator[EventSource]:
    """The events that are published at `url`, until left. Nothing is reached before they are first read.

    `secret` is the fleet's: with it, and a `model` in the URL, a foreign server's blocks get the keys that the fleet's
    routers look for. Raises InvalidRequest.
    """
    bus = parse_bus_url(url) if isinstance(url, str) else url
    if bus.scheme != "memory" and bus.port == 0:
        raise InvalidRequest(_FIELD, str(bus), "a port from 1 to 65535")
    if bus.scheme == "memory":
        from kv_events.bus import memory

        yield memory.PublishedEventSource(bus.name)
    elif bus.scheme == "grpc":
        from kv_events.bus import grpc

        source = grpc.GrpcEventSource(bus.address)
        try:
            yield source
        finally:
            await source.close()
    elif bus.scheme == "zmq":
        from kv_events.bus import zmq

        async with zmq.open_source(bus, secret=secret) as zmq_source:
            yield zmq_source
    else:
        from kv_events.bus import redis

        async with redis.open_source(bus) as redis_source:
            yield redis_source


@asynccontextmanager
async def publishing(
    log: EventLog, url: str | BusUrl, *, topic: str = "", insecure: bool = False
) -> AsyncIterator[str]:
    """Publish `log` at `url` until left; yields the URL at which others read it (a free port filled in for port 0).

    `topic` is zmq's, where the URL names none; `kv@WORKER@MODEL` is what vLLM's tools expect. What others connect to is
    bound to loopback, unless `insecure`. Publishing never blocks the log's engine. Raises InvalidRequest, also for a
    port or a name that is taken.
    """
    bus = parse_bus_url(url) if isinstance(url, str) else url
    if bus.scheme in ("grpc", "zmq"):
        from rhizome.rpc import check_bind_host

        check_bind_host(bus.host, insecure=insecure)
    if bus.scheme == "memory":
        from kv_events.bus import memory

        with memory.published(log, bus.name):
            yield bus.url
    elif bus.scheme == "grpc":
        from kv_events.bus import grpc

        async with grpc.publish(log, bus.host, bus.port) as port:
            yield replace(bus, port=port).url
    elif bus.scheme == "zmq":
        from kv_events.bus import zmq

        async with zmq.publish(log, replace(bus, topic=bus.topic or topic)) as zmq_url:
            yield zmq_url
    else:
        from kv_events.bus import redis

        async with redis.publish(log, bus) as redis_url:
            yield redis_url


def _refuse(url: str, limit: str) -> NoReturn:
    scheme, separator, rest = url.partition("://")
    login, at, where = rest.rpartition("@")
    if scheme not in ("memory", "zmq") and at and ":" in login:  # whatever else is wrong with it
        url = f"{scheme}{separator}{login.partition(':')[0]}:***@{where}"
    elif not separator and ":" in url.rpartition("@")[0]:
        url = f"{url.partition(':')[0]}:***@{url.rpartition('@')[2]}"
    raise InvalidRequest(_FIELD, url, limit) from None


def _memory(url: str) -> BusUrl:
    name = url.removeprefix("memory://")  # as it is: case, too, is part of it
    if not 1 <= len(name) <= MAX_NAME_CHARS or any(char in name for char in "/?#"):
        _refuse(url, f"memory://NAME with 1 to {MAX_NAME_CHARS} characters other than / ? #")
    return BusUrl("memory", name=name)


def _host(url: str, host: str) -> str:
    if ":" in host:  # it was in brackets
        try:
            IPv6Address(host)
        except ValueError:
            _refuse(url, "an IPv6 address in the brackets")
        return host
    labels = host.removesuffix(".").split(".")
    if len(host) > MAX_HOST_CHARS or not all(map(_LABEL.fullmatch, labels)) or host[0] == "_":  # libzmq takes none such
        _refuse(
            url,
            f"a host of 1 to {MAX_HOST_CHARS} letters, digits, dots and inner dashes, or an IPv6 address in brackets",
        )
    if host in NOT_HOSTS:
        _refuse(url, f"a host with another name: {host}: means something else to gRPC")
    return host


def _port(url: str, port: int | None) -> int:
    if port is None:
        _refuse(url, "a port, as in host:port")
    return port


def _default_replay(port: int) -> int:
    """vLLM's replay socket is usually the port after its events'; where a free port is taken, another free one."""
    return port + 1 if port else 0


def _with_options(url: str, bus: BusUrl, query: str) -> BusUrl:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, max_num_fields=len(ZMQ_OPTIONS))
    except ValueError:
        if query:
            _refuse(url, f"options as NAME=VALUE, joined by &, each once: {', '.join(ZMQ_OPTIONS)}")
        pairs = []
    options = dict(pairs)
    for name, value in pairs:
        if name not in ZMQ_OPTIONS:
            _refuse(url, f"no option {name}: {', '.join(ZMQ_OPTIONS)} are known")
        if not (1 <= len(value) <= MAX_NAME_CHARS and value.isprintable()):
            _refuse(url, f"{name} of 1 to {MAX_NAME_CHARS} printable characters")
    if len(options) < len(pairs):
        _refuse(url, "each option once")
    if options.get("dialect", "auto") not in DIALECTS:
        _refuse(url, f"dialect as one of {', '.join(DIALECTS)}")
    if ("model" in options) != ("block_size" in options) or ("adapter" in options and "model" not in options):
        _refuse(url, "model and block_size together, and adapter only with them")
    default_replay = str(_default_replay(bus.port))
    return replace(
        bus,
        replay_port=_number(url, "replay", options.get("replay", default_replay), 0, 65535),
        topic=options.get("topic", ""),
        dialect=options.get("dialect", "auto"),
        worker=options.get("worker", ""),
        model=options.get("model", ""),
        block_size=_number(url, "block_size", options.get("block_size", "0"), int("model" in options), MAX_BLOCK_SIZE),
        adapter=options.get("adapter", ""),
    )


def _stream(url: str, bus: BusUrl, path: str) -> BusUrl:
    database, separator, stream = path.removeprefix("/").rpartition("/")
    stream = unquote(stream)
    if not (1 <= len(stream) <= MAX_NAME_CHARS and stream.isprintable()) or "/" in database:
        _refuse(url, f"{bus.scheme}://host:port/STREAM or .../DB/STREAM, STREAM of 1 to {MAX_NAME_CHARS} characters")
    number = _number(url, "the database", database, 0, MAX_REDIS_DATABASE) if separator else 0
    return replace(bus, name=stream, database=number)


def _number(url: str, name: str, text: str, low: int, high: int) -> int:
    if not (text.isdecimal() and text.isascii() and len(text) <= 10 and low <= int(text) <= high):
        _refuse(url, f"{name} from {low} to {high}")
    return int(text)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
