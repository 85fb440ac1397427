"""A fleet on one machine, from a file: `rhizome up --config`, and what other processes see of it and do to it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from deploy.fleet.state_file import find
from rhizome.v1 import launcher_pb2, launcher_pb2_grpc
from router.client import Client
from tests.support.processes import wait_until_gone
from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.timeout(300)

PASSWORD = "Xylophon"
FLEET = """
name: demo
model: {simulated: 8b-1xh100}
routers: {count: 2, port: 0}
workers:
  - {name: chat, count: 2}
  - {name: spare, count: 0}
"""


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fleets of this test alone."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def rhizome(*arguments: str, code: int = 0) -> str:
    """What the command prints: on standard output, or its one line of error."""
    command = (sys.executable, "-m", "deploy.cli", "--log-level=error", *arguments)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


def rows(*arguments: str) -> dict[str, dict[str, Any]]:
    """`rhizome status --json`, by server."""
    return {row["server"]: row for row in json.loads(rhizome("status", "--json", *arguments))["servers"]}


@contextmanager
def up(text: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The fleet of a file, ready."""
    file = folder / "fleet.yaml"
    file.write_text(text)
    command = (sys.executable, "-m", "deploy.cli", "up", "--config", str(file))
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if line.startswith("ready: "):
                    break
            else:
                raise AssertionError("it ended before it was ready")
            threading.Thread(target=process.stderr.read, daemon=True).start()  # for the pipe not to fill
            yield process
        finally:
            process.terminate()


def test_a_fleet_is_shown_scaled_and_ended_from_another_process(tmp_path: Path) -> None:
    """Both routers know all workers; a worker that leaves ends its answer first; at the end nothing is left."""
    with up(FLEET, tmp_path) as process:
        before = rows()
        assert list(before) == ["router-0", "router-1", "chat-0", "chat-1"]
        assert all(row["state"] == "serving" and row["pid"] and row["address"] for row in before.values())
        assert all(before[name]["lease_left_s"] > 0 and before[name]["epoch"] for name in ("chat-0", "chat-1"))
        assert rhizome("scale", "spare", "1").strip() == "spare: 1 workers"
        routers = [before[name]["address"] for name in ("router-0", "router-1")]

        async def scale_down_under_load() -> None:
            async with Client(routers[0]) as client, Client(routers[1]) as other:
                for router in (client, other):
                    assert {entry.worker_id for entry in await router.workers()} == {"chat-0", "chat-1", "spare-0"}
                long = {"max_tokens": 300, "ignore_eos": True, "policy": "round-robin"}
                answers = [asyncio.create_task(client.complete("tell me", **long)) for _ in range(3)]
                async with asyncio.timeout(30):
                    while not all(entry.in_flight for entry in await client.workers()):
                        await asyncio.sleep(0.02)
                told = await asyncio.to_thread(rhizome, "scale", "chat", "1")
                assert told.strip() == "chat: 1 workers"
                assert [len((await answer).token_ids) for answer in answers] == [300] * 3
                assert {(await answer).worker_id for answer in answers} == {"chat-0", "chat-1", "spare-0"}
                for router in (client, other):
                    assert {entry.worker_id for entry in await router.workers()} == {"chat-0", "spare-0"}

        asyncio.run(scale_down_under_load())
        wait_until_gone(before["chat-1"]["pid"])
        assert "one of routers, chat, spare" in rhizome("scale", "nothing", "1", code=2)
        assert "in a fleet without a registry" in rhizome("scale", "routers", "3", code=2)
        rhizome("down", "--drain", "5")
        assert process.wait(timeout=30) == 0
        for row in before.values():
            wait_until_gone(row["pid"])
        assert "no fleet of this user runs on this machine" in rhizome("status", code=1)
        assert find() == []


def with_password(redis: RedisServer) -> str:
    """The line of a fleet's file that names a registry."""
    return f"registry: {redis.url('demo').replace('://', f'://:{PASSWORD}@')}\n"


def test_a_fleet_with_a_registry_is_found_there(tmp_path: Path) -> None:
    """Every router hears of every worker over Redis: neither is told the other's address. No process's command line
    has the password of it."""
    with RedisServer("--requirepass", PASSWORD) as redis, up(FLEET + with_password(redis), tmp_path):
        assert rhizome("scale", "spare", "1").strip() == "spare: 1 workers"
        shown = rows()
        assert all(shown[name]["lease_left_s"] for name in ("chat-0", "chat-1", "spare-0"))
        for row in shown.values():
            told = Path(f"/proc/{row['pid']}/cmdline").read_text().split("\0")
            assert f"--registry={redis.url('demo')}" in told
            assert not any(PASSWORD in argument for argument in told)
        assert PASSWORD not in rhizome("status") + rhizome("status", "--json")


def test_routers_come_and_go_while_a_fleet_serves(tmp_path: Path) -> None:
    """A new one knows all workers and what they hold, and comes back where it was; one that leaves ends its answers,
    and its requests go elsewhere."""
    one_router = FLEET.replace("count: 2, port: 0", "count: 1, port: 0")
    with RedisServer("--requirepass", PASSWORD) as redis, up(one_router + with_password(redis), tmp_path):
        long = {"max_tokens": 300, "ignore_eos": True}

        async def main() -> None:
            async with Client(rows()["router-0"]["address"]) as first:
                prompt = "Which shelf holds the comet logs? " * 8
                answer = await first.complete(prompt, max_tokens=4)
                assert (await asyncio.to_thread(rhizome, "scale", "routers", "3")).strip() == "routers: 3"
                shown = rows()
                assert [name for name in shown if name.startswith("router")] == ["router-0", "router-1", "router-2"]
                os.kill(shown["router-1"]["pid"], signal.SIGKILL)
                async with Client(shown["router-2"]["address"]) as last:
                    assert {entry.worker_id for entry in await last.workers()} == {"chat-0", "chat-1"}
                    async with asyncio.timeout(60):
                        while not any(entry.indexed_blocks for entry in await last.workers()):
                            await asyncio.sleep(0.02)
                    again = await last.complete(prompt, max_tokens=4)
                    assert (again.worker_id, again.cached_tokens > 0) == (answer.worker_id, True)
                    answering = asyncio.create_task(last.complete("tell me", **long))
                    async with asyncio.timeout(60):
                        while not any(entry.in_flight for entry in await last.workers()):
                            await asyncio.sleep(0.02)
                    scaling = asyncio.create_task(asyncio.to_thread(rhizome, "scale", "routers", "2"))
                    assert len((await answering).token_ids) == 300
                    await scaling
                wait_until_gone(shown["router-2"]["pid"])
                while (after := rows())["router-1"]["state"] != "serving":
                    pass
                assert "router-2" not in after
                assert after["router-1"]["address"] == shown["router-1"]["address"]
                async with Client(after["router-1"]["address"]) as second:
                    await second.wait_ready(workers=2, timeout_s=60)
                    for router in (first, second):
                        assert len((await router.complete("tell me", max_tokens=4)).token_ids) == 4

        asyncio.run(main())


def test_a_killed_worker_is_seen_to_have_come_back(tmp_path: Path) -> None:
    """With a new epoch, a new process, and its restart counted."""
    with up(FLEET.replace("count: 2, port", "count: 1, port"), tmp_path):
        before = rows()["chat-0"]
        os.kill(before["pid"], signal.SIGKILL)
        wait_until_gone(before["pid"])
        while (after := rows()["chat-0"])["state"] != "serving" or after["epoch"] == before["epoch"]:
            pass
        assert after["restarts"] == 1
        assert after["epoch"] > before["epoch"]
        assert after["pid"] != before["pid"]


def test_names_stand_for_one_fleet_and_what_a_killed_one_left_is_removed(tmp_path: Path) -> None:
    """A name that is taken is refused; with two fleets a command has to say which; no token, no answer."""
    small = FLEET.replace("count: 2", "count: 1")
    with up(small, tmp_path) as process:
        (state,) = find()
        file = str(tmp_path / "fleet.yaml")
        assert "name is 'demo': another one" in rhizome("up", "--config", file, code=2)
        with grpc.insecure_channel(state.address) as channel:
            with pytest.raises(grpc.RpcError) as refused:
                launcher_pb2_grpc.LauncherStub(channel).Shutdown(launcher_pb2.ShutdownRequest(), timeout=10)
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        with up(small.replace("demo", "other"), tmp_path):
            assert "--fleet is None: one of demo, other" in rhizome("status", code=2)
            assert rows("--fleet", "other")
            process.kill()
            process.wait()
            assert [found.name for found in find()] == ["demo", "other"], "it could not clean up"
            assert rows()
            assert [found.name for found in find()] == ["other"]


def test_a_file_is_checked_without_starting_anything(tmp_path: Path) -> None:
    """What fits is summed up in a line; what does not is named by line, field, value and limit."""
    file = tmp_path / "fleet.yaml"
    file.write_text(FLEET)
    assert rhizome("config", "check", str(file)) == (
        f"{file}: fits: 2 routers, 2 workers: chat 2 (both), spare 0 (both)\n"
    )
    file.write_text(FLEET.replace("count: 2}", "count: -2}"))
    wrong = rhizome("config", "check", str(file), code=2)
    assert re.search(r"fleet\.yaml:6: workers\.0\.count is -2: greater than or equal to 0", wrong)
    assert "--workers is 3: not beside --config" in rhizome("up", "--config", str(file), "--workers", "3", code=2)
