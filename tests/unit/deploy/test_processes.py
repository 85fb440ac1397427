"""What a worker's process is told, and what a process says when it serves."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.fleet.plan import check_own
from deploy.processes import WorkerSettings, serve_until_stopped
from rhizome.errors import InvalidRequest
from rhizome.ticket import SECRET_VARIABLE


@asynccontextmanager
async def stopped_at_once() -> AsyncIterator[str]:
    """A server that gets SIGTERM as soon as it serves."""
    asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGTERM)
    yield "127.0.0.1:7700"


@pytest.mark.parametrize(("secret", "said"), [("", True), ("a secret of the fleet", False)])
def test_a_process_without_the_fleets_secret_says_so(
    secret: str, said: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At start, once, naming the variable; the secret itself is never logged."""
    monkeypatch.setenv(SECRET_VARIABLE, secret)
    with caplog.at_level(logging.INFO):
        asyncio.run(serve_until_stopped(stopped_at_once(), supervised=False))
    assert "serving on 127.0.0.1:7700" in caplog.text
    assert (f"no {SECRET_VARIABLE}: nothing is signed" in caplog.text) == said
    assert not secret or secret not in caplog.text


@pytest.mark.parametrize(
    ("url", "options", "says"),
    [
        ("kafka://127.0.0.1/x", {}, "events_url is .*: one of memory://"),
        ("memory://w0", {}, "events is 'memory://w0': grpc://, zmq:// or redis://"),
        ("zmq://10.0.0.7:5557", {}, "host is '10.0.0.7': a loopback address, or --insecure"),
        ("grpc://0.0.0.0:5557", {"insecure": True, "routers": ("127.0.0.1:7700",)}, "advertise is None: the host by"),
        ("redis://:secret@127.0.0.1/a/b/c", {}, r"redis://:\*\*\*@127.0.0.1/a/b/c"),
    ],
)
def test_events_that_nobody_could_read_are_refused_before_the_model_is_loaded(
    tmp_path: Path, url: str, options: dict[str, object], says: str
) -> None:
    """By field, value and limit; a password is not said."""
    settings = WorkerSettings(tmp_path, "w0", kv_cache_mib=1, events=(url,), **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match=says):
        settings.check()


def test_a_worker_publishes_under_its_own_name_and_is_read_at_the_advertised_host(tmp_path: Path) -> None:
    """{worker} stands for its id, quoted; a wildcard stands for the host by which others reach it."""
    urls = ("redis://redis.example/kv:{worker}", "zmq://[::]:0")
    settings = WorkerSettings(
        tmp_path, "host-1/3", kv_cache_mib=1, events=urls, routers=("r:1",), insecure=True, advertise="node-3"
    )
    settings.check()
    assert [bus.name for bus in settings.buses] == ["kv:host-1/3", ""]
    assert settings.read_at("zmq://[::]:4711?replay=4713") == "zmq://node-3:4711?replay=4713"
    assert settings.read_at("zmq://0.0.0.0:4711") == "zmq://node-3:4711"
    for url in ("zmq://10.0.0.7:4711", "redis://redis.example:6379/kv:w0"):
        assert settings.read_at(url) == url
    in_brackets = replace(settings, advertise="[2001:db8::1]")
    assert in_brackets.reached_at("[::]:7000") == "[2001:db8::1]:7000"
    assert in_brackets.read_at("zmq://[::]:4711") == "zmq://[2001:db8::1]:4711"
    for_others = "zmq://0.0.0.0:4711?dialect=vllm"
    assert settings.read_by_routers([for_others, "zmq://0.0.0.0:4713?dialect=rhizome"]).startswith("zmq://node-3:4713")
    assert settings.read_by_routers([for_others]) == settings.read_by_routers([]) == ""


@pytest.mark.parametrize("url", ["zmq://127.0.0.1:5557", "grpc://127.0.0.1:5557", "redis://127.0.0.1/kv"])
def test_workers_of_one_cluster_do_not_share_a_bus(url: str) -> None:
    """Each needs a port or a stream of its own; one alone takes what it gets."""
    check_own(url, 1)
    with pytest.raises(InvalidRequest, match="as 2 workers need one each"):
        check_own(url, 2)
    check_own("redis://127.0.0.1/kv:{worker}", 2)
    check_own("zmq://127.0.0.1:0", 2)
