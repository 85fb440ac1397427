"""Bus URLs: what is one, what each part means, and what is refused."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_events.bus.url import SCHEMES, BusUrl, open_source, parse_bus_url, publishing
from kv_events.log import EventLog
from rhizome.errors import InvalidRequest

ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("memory://w0", {"scheme": "memory", "name": "w0"}),
    ("memory://W 0".replace(" ", "_") + ":1@x", {"name": "W_0:1@x"}),
    ("grpc://127.0.0.1:7001", {"scheme": "grpc", "host": "127.0.0.1", "port": 7001, "address": "127.0.0.1:7001"}),
    ("grpc://[::1]:7001/", {"host": "::1", "port": 7001, "address": "[::1]:7001"}),
    ("zmq://engine:5557", {"scheme": "zmq", "port": 5557, "replay_port": 5558, "dialect": "auto", "topic": ""}),
    ("grpc://node-3.my_rack.example.:7001", {"host": "node-3.my_rack.example."}),
    ("grpc://unix.example:7001", {"host": "unix.example"}),
    ("grpc://[fe80::1%eth0]:7001", {"host": "fe80::1%eth0"}),
    ("zmq://engine:0", {"port": 0, "replay_port": 0}),
    ("zmq://engine:5557?replay=6000&dialect=vllm", {"replay_port": 6000, "dialect": "vllm"}),
    ("zmq://engine:65535?replay=1", {"port": 65535, "replay_port": 1}),
    ("zmq://engine:5557?topic=kv@w0@meta/llama%203&worker=w0", {"topic": "kv@w0@meta/llama 3", "worker": "w0"}),
    ("zmq://engine:5557?model=m&block_size=16&adapter=a", {"model": "m", "block_size": 16, "adapter": "a"}),
    ("redis://host/events", {"scheme": "redis", "port": 6379, "name": "events", "database": 0, "user": ""}),
    ("redis://me:p%40ss@host:7000/3/kv%2Fw0", {"user": "me", "password": "p@ss", "database": 3, "name": "kv/w0"}),
    ("rediss://:secret@[fe80::1]:7000/kv:{w0}", {"password": "secret", "host": "fe80::1", "name": "kv:{w0}"}),
]


@pytest.mark.parametrize(("url", "parts"), ACCEPTED, ids=[url for url, _ in ACCEPTED])
def test_the_parts_of_a_url(url: str, parts: dict[str, Any]) -> None:
    """Each is where it belongs; and the URL that they make says the same."""
    bus = parse_bus_url(url)
    assert {name: getattr(bus, name) for name in parts} == parts
    assert parse_bus_url(bus.url) == bus


REFUSED = [
    ("", "one of memory://, grpc://, zmq://, redis://, rediss://"),
    ("127.0.0.1:7001", "one of memory://"),
    ("http://host:1", "one of memory://"),
    ("ZMQ://host:1", "one of memory://"),
    ("zmq:host:1", "one of memory://"),
    ("memory://", "1 to 128 characters"),
    ("memory://a/b", "other than /"),
    ("memory://" + "a" * 129, "1 to 128 characters"),
    ("grpc://host", "a port"),
    ("grpc://:7001", "a host"),
    ("grpc://host:65536", "a port from 0 to 65535"),
    ("grpc://host:-1", "a port from 0 to 65535"),
    ("grpc://host:port", "a port from 0 to 65535"),
    ("grpc://[::1:7001", "a port from 0 to 65535"),
    ("grpc://host:1/path", "without a path"),
    ("grpc://me@host:1", "without a path or a user"),
    ("grpc://host:1?replay=2", "no query options"),
    ("grpc://host:1#a", "no fragment"),
    ("grpc://ho st:1", "without spaces"),
    ("zmq://-:1", "a host of 1 to"),
    ("zmq://...:1", "a host of 1 to"),
    ("zmq://%:1", "a host of 1 to"),
    ("grpc://unix:80", "unix: means something else to gRPC"),
    ("grpc://DNS:80", "dns: means something else to gRPC"),
    ("grpc://unix-abstract:80", "means something else to gRPC"),
    ("zmq://ipv4:80", "means something else to gRPC"),
    ("zmq://a..b:1", "a host of 1 to"),
    ("zmq://a-:1", "a host of 1 to"),
    ("zmq://-a:1", "a host of 1 to"),
    ("zmq://_a:1", "a host of 1 to"),
    ("zmq://.:1", "a host of 1 to"),
    ("zmq://a%41:1", "a host of 1 to"),
    ("redis://" + "a" * 64 + "/s", "a host of 1 to"),
    ("redis://[1:2]/s", "IPv6"),
    ("grpc://[v1.x:y]:1", "IPv6"),
    ("grpc://[fe80::1%]:1", "IPv6"),
    ("grpc://hôst:1", "printable ASCII"),
    ("grpc://host:1\n", "printable ASCII"),
    ("zmq://host:65535", "replay from 0 to 65535"),
    ("zmq://host:1?replay=65536", "replay from 0 to 65535"),
    ("zmq://host:1?replay=-1", "replay from 0 to 65535"),
    ("zmq://host:1?replay=", "replay of 1 to 128"),
    ("zmq://host:1?replay", "NAME=VALUE"),
    ("zmq://host:1?replay=2&replay=3", "each option once"),
    ("zmq://host:1?relay=2", "no option relay: replay, topic"),
    ("zmq://host:1?" + "&".join(f"topic={n}" for n in range(9)), "each once"),
    ("zmq://host:1?dialect=trtllm", "dialect as one of auto, rhizome, vllm, sglang"),
    ("zmq://host:1?model=m", "model and block_size together"),
    ("zmq://host:1?block_size=16", "model and block_size together"),
    ("zmq://host:1?adapter=a", "adapter only with them"),
    ("zmq://host:1?model=m&block_size=0", "block_size from 1 to"),
    ("zmq://host:1?model=m&block_size=1048577", "block_size from 1 to 1048576"),
    ("zmq://host:1?worker=" + "w" * 129, "worker of 1 to 128"),
    ("zmq://host:1?worker=a%0Ab", "worker of 1 to 128 printable"),
    ("redis://host", "/STREAM"),
    ("redis://host/", "/STREAM"),
    ("redis://host/x/events", "the database from 0 to"),
    ("redis://host/1/2/events", "/STREAM"),
    ("redis://host/a?b=1", "no query options"),
    ("grpc://" + "h" * 3000 + ":1", "at most 2048 characters"),
]


@pytest.mark.parametrize(("url", "limit"), REFUSED)
def test_what_is_no_bus_url_is_refused(url: str, limit: str) -> None:
    """With the field's name and what would do."""
    with pytest.raises(InvalidRequest) as refused:
        parse_bus_url(url)
    assert refused.value.field == "events_url"
    assert limit in refused.value.limit


@pytest.mark.parametrize(
    "url",
    [
        "redis://me:hunter2@host:99999/s",
        "redis://me:hunter2@host/",
        "redis://me:hunter2/x@host/s/t/u",
        "redis://:hunter2@host/s?x=1",
        "redis://:hunter2@host/" + "s" * 3000,
        "rediss://me:hunter2@host/s#x",
        "grpc://me:hunter2@host:1",
        "http://me:hunter2@host:1",
        "redis:/me:hunter2@host/s",
        "me:hunter2@host/s",
    ],
)
def test_a_password_is_never_shown(url: str) -> None:
    """Neither in a refusal nor in a URL for people."""
    with pytest.raises(InvalidRequest) as refused:
        parse_bus_url(url)
    assert "hunter2" not in str(refused.value)
    bus = parse_bus_url("redis://me:hunter2@host/s")
    assert "hunter2" not in f"{bus} {bus!r}"
    assert "hunter2" in bus.url


@given(st.text(max_size=80) | st.builds(lambda scheme, rest: f"{scheme}://{rest}", st.sampled_from(SCHEMES), st.text()))
def test_any_text_is_a_url_or_refused(text: str) -> None:
    """Nothing else comes out; and what is one can be written and read again."""
    try:
        bus = parse_bus_url(text)
    except InvalidRequest:
        return
    assert parse_bus_url(bus.url) == bus


@pytest.mark.parametrize("url", ["grpc://127.0.0.1:0", "zmq://127.0.0.1:0", "redis://127.0.0.1:0/s"])
def test_nothing_is_read_at_port_0(url: str) -> None:
    """It stands for a free port, to publish at."""

    async def test() -> None:
        with pytest.raises(InvalidRequest, match="1 to 65535"):
            async with open_source(url):
                pass

    asyncio.run(test())


@pytest.mark.parametrize("url", ["grpc://0.0.0.0:0", "zmq://[::]:0"])
def test_only_loopback_is_bound_in_the_clear(url: str) -> None:
    """Unless the operator says so."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        with pytest.raises(InvalidRequest, match="loopback"):
            async with publishing(log, url):
                pass
        async with publishing(log, url, insecure=True) as where:
            assert parse_bus_url(where).port

    asyncio.run(test())


def test_libraries_are_loaded_only_for_the_transports_that_need_them() -> None:
    """Who parses a URL, or reads within the process, needs neither pyzmq nor redis nor gRPC."""
    program = (
        "import sys; from kv_events.bus.url import open_source, parse_bus_url; parse_bus_url('zmq://h:1');"
        "parse_bus_url('redis://h/s'); from kv_events.bus import memory;"
        "assert not {'zmq', 'redis', 'grpc'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_parts_have_defaults() -> None:
    """So that a URL can be made from what is known."""
    assert BusUrl("grpc", host="::1", port=7).url == "grpc://[::1]:7"
    assert BusUrl("zmq", host="h", port=7, replay_port=8).url == "zmq://h:7"
