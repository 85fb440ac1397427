"""`rhizome events …` as a person types it, against an embedded cluster with real traffic."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from deploy.cli import main
from deploy.events.top import Detail, TopApp
from deploy.events.top_model import watching
from deploy.events.top_tables import LiveTable
from rhizome.v1 import worker_pb2, worker_pb2_grpc
from rhizome.v1.router_pb2 import WorkerEntry
from router.client import SyncClient
from tests.support.processes import Launcher

SYSTEM = {"role": "system", "content": "You keep the archive of a small observatory and answer briefly. " * 3}
WORKERS = ("worker-0", "worker-1")


def background(*arguments: str) -> subprocess.Popen[str]:
    """A command as a process of its own."""
    command = (sys.executable, "-m", "deploy.cli", "--log-level=warning", "events", *arguments)
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
    """A command within this process, which spares it the start: exit code, standard output and error."""
    streams = [io.TextIOWrapper(io.BytesIO(data), encoding="utf-8") for data in (stdin.encode(), b"", b"")]
    code: Any = 0
    with pytest.MonkeyPatch.context() as patch:
        for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
            patch.setattr(sys, name, stream)
        patch.setattr(sys, "argv", ["rhizome", "--log-level=warning", "events", *arguments])
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    texts = []
    for stream in streams[1:]:
        stream.seek(0)
        texts.append(stream.read())
    return code, texts[0], texts[1]


def events(*arguments: str, code: int = 0, stdin: str = "") -> str:
    ended, out, told = run(*arguments, stdin=stdin)
    assert ended == code, told + out
    return out


def lines(*arguments: str, code: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in events(*arguments, "--json", code=code).splitlines()]


def question(number: int) -> list[dict[str, str]]:
    return [SYSTEM, {"role": "user", "content": f"Which shelf holds the comet logs of {1900 + number}? " * 2}]


def cached(entry: WorkerEntry) -> int:
    """Blocks by the worker's own word: what the router last heard of it may be as old as its tree."""
    with grpc.insecure_channel(entry.address) as channel:
        return int(worker_pb2_grpc.WorkerStub(channel).GetStatus(worker_pb2.GetStatusRequest()).blocks_cached)


class Traffic:
    """An embedded cluster, and chats with it."""

    def __init__(self, client: SyncClient, address: str) -> None:
        self.client = client
        self.router = f"router://{address}"
        self.address = address
        self._asked = 0

    def talk(self, chats: int, to: str) -> None:
        """New chats with a worker; returns once the router has indexed what came of them."""
        for name in WORKERS:
            self.client.set_draining(name, name != to)
        for _ in range(chats):
            self._asked += 1
            self.client.complete(messages=question(self._asked), max_tokens=4, temperature=0.0)
        for name in WORKERS:
            self.client.set_draining(name, False)
        self.until(self._settled)

    def _settled(self) -> bool:
        return all(entry.index_synced and entry.indexed_blocks == cached(entry) for entry in self.client.workers())

    @property
    def indexed(self) -> dict[str, int]:
        return {entry.worker_id: entry.indexed_blocks for entry in self.client.workers()}

    @staticmethod
    def until(holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture(scope="module")
def cluster(tiny_model: Path) -> Iterator[Traffic]:
    """A router and two workers, each of which has answered some chats."""
    with Launcher(tiny_model, "--workers", "2") as launcher, SyncClient(launcher.address) as client:
        traffic = Traffic(client, launcher.address)
        for name in WORKERS:
            traffic.talk(3, to=name)
        yield traffic


def test_tail_prints_what_happens_while_it_happens(cluster: Traffic) -> None:
    """Live events of new chats, from both accounts of a worker: its router and its own address."""
    (address,) = [entry.address for entry in cluster.client.workers() if entry.worker_id == "worker-1"]
    following = [
        background("tail", target, "--json", "--limit", "1") for target in (cluster.router, f"grpc://{address}")
    ]
    while any(process.poll() is None for process in following):
        cluster.talk(1, to="worker-1")
    for process in following:
        assert process.wait() == 0
        assert process.stdout is not None
        (line,) = [json.loads(line) for line in process.stdout]
        assert (line["kind"], line["tier"], line["block_size"]) == ("stored", "device", 16)
        assert len(line["keys"]) == line["blocks"] > 0
        assert line["worker"] == "worker-1"
        process.stdout.close()


def test_tail_reads_what_is_kept(cluster: Traffic) -> None:
    """From the first batch on: all that was stored adds up to what the router has; filters narrow it down."""
    told = lines("tail", cluster.router, "--from", "0", "--no-follow")
    stored = {name: sum(line["blocks"] for line in told if line["worker"] == name) for name in WORKERS}
    assert stored == cluster.indexed
    only = lines("tail", cluster.router, "--no-follow", "--worker", "worker-1", "--key", told[-1]["keys"][0][:6])
    assert all(line["worker"] == "worker-1" and line["keys"] for line in only)
    text = events("tail", cluster.router, "--no-follow", "--kind", "stored").splitlines()
    assert len(text) == len(told)
    assert all("stored   device" in line for line in text)
    assert not lines("tail", cluster.router, "--no-follow", "--kind", "removed")


def test_stats_count_what_streams_hold(cluster: Traffic) -> None:
    """Blocks of each worker as the router has them, nothing missing."""
    told = lines("stats", cluster.router, "--for", "1")
    latest = {line["name"]: line for line in told}
    assert {name: line["blocks"] for name, line in latest.items()} == cluster.indexed
    assert all(line["synced"] and not line["gaps"] and not line["mismatches"] for line in latest.values())
    assert "worker-0" in events("stats", cluster.router, "--for", "1")


def test_tree_shows_who_holds_what(cluster: Traffic, tmp_path: Path) -> None:
    """All of it as JSON, the shared beginning with both holders as text, a graph, and a drawing."""
    whole = json.loads(events("tree", cluster.router, "--format", "json", "--max-nodes", "10000", "--depth", "100"))
    assert whole["entries"] == sum(cluster.indexed.values())
    assert sum(node["blocks"] for node in whole["nodes"]) == whole["blocks"]
    shared = whole["nodes"][0]
    assert {holder["worker"] for holder in shared["holders"]} == set(WORKERS)
    assert shared["hits"] > 0
    text = events("tree", cluster.router, "--max-nodes", "3").splitlines()
    assert text[0].startswith(f"{cluster.router}: {whole['blocks']} blocks")
    assert f"{shared['first']}…{shared['last']}  worker-0, worker-1" in text[1]
    below = events("tree", cluster.router, "--below", shared["last"], "--worker", "worker-0", "--format", "dot")
    assert below.startswith("digraph tree {")
    assert shared["last"] in below
    events("tree", cluster.router, "--below", "0", code=2)
    if shutil.which("dot"):
        events("tree", cluster.router, "--format", "svg", "--out", str(tmp_path / "tree.svg"))
        assert (tmp_path / "tree.svg").read_text().count("<svg") == 1


def test_explain_says_who_holds_a_prompt_and_why_it_goes_where(cluster: Traffic) -> None:
    """A chat's message, a text, standard input, token ids; keys as the tree has them."""
    text = "Which shelf holds the comet logs? " * 4
    cluster.client.complete(messages=[{"role": "user", "content": text}], max_tokens=2)
    cluster.talk(1, to="worker-0")
    told = json.loads(events("explain", "--router", cluster.address, "--chat", text, "--json"))
    assert len(told["keys"]) == told["prompt_tokens"] // 16
    first = told["holders"][0]
    candidates = {candidate["worker_id"]: candidate for candidate in told["candidates"]}
    assert told["worker"] == told["candidates"][0]["worker_id"]
    assert first["blocks"] == first["tier_blocks"]["device"] == len(told["keys"])
    assert candidates[first["worker"]]["cached_tokens"] >= 16 * (first["blocks"] - 1)
    subtree = json.loads(events("tree", cluster.router, "--below", told["keys"][0], "--format", "json"))
    assert first["worker"] in [holder["worker"] for holder in subtree["nodes"][0]["holders"]]
    shown = events("explain", "--router", cluster.address, "-", stdin=text)
    assert "chosen   worker-" in shown
    assert "TTFT s" in shown
    assert "prompt   40 tokens" in events("explain", "--router", cluster.router, "--token-ids", "5," * 39 + "5")
    events("explain", "--router", cluster.address, code=2)


def test_what_was_recorded_replays_verifies_and_compares(cluster: Traffic, tmp_path: Path) -> None:
    """The same digests from the file as from the cluster; a damaged file does not pass."""
    path = tmp_path / "session.rhz"
    recording = background("record", str(path), cluster.router, "--for", "4", "--json")
    cluster.talk(2, to="worker-0")
    recording.communicate(timeout=60)
    assert recording.returncode == 0
    events("replay", str(path), "--speed", "max")
    events("verify", str(path))
    events("diff", str(path), str(path))
    events("diff", cluster.router)
    tree = json.loads(events("tree", str(path), "--format", "json"))
    assert tree["entries"] == sum(cluster.indexed.values())
    lines_path = tmp_path / "session.jsonl"
    events("convert", str(path), str(lines_path))
    events("convert", str(lines_path), str(tmp_path / "again.rhz"))
    events("diff", str(path), str(tmp_path / "again.rhz"))
    assert {line["worker"] for line in lines("tail", str(path))} == set(WORKERS)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    events("verify", str(path), code=1)


def test_top_shows_the_cluster_and_looks_into_a_prefix(cluster: Traffic) -> None:
    """Headless, on the real streams: workers with their blocks, hot prefixes, the subtree of one."""

    async def main() -> None:
        async with asyncio.timeout(60), watching(cluster.router) as model:
            app = TopApp(model, interval_s=0.1)
            async with app.run_test(size=(150, 40)) as pilot:
                workers = app.query_one("#workers", LiveTable)
                prefixes = app.query_one("#prefixes", LiveTable)

                def shown(table: LiveTable[Any]) -> list[list[str]]:
                    return [[cell.plain for cell in table.get_row_at(at)] for at in range(table.row_count)]

                def blocks() -> dict[str, int]:
                    return {row[0]: int(row[1].replace(",", "")) for row in shown(workers)}

                await asyncio.to_thread(cluster.talk, 3, "worker-0")
                while blocks() != cluster.indexed or not prefixes.row_count:
                    await pilot.pause(0.05)
                assert all(row[-1] == "in step" for row in shown(workers))
                assert shown(prefixes)[0][-1] == "worker-0, worker-1"
                await pilot.press("enter")
                assert isinstance(app.screen, Detail)
                while "└─" not in str(app.screen.query_one("#lines").content):  # type: ignore[attr-defined]
                    await pilot.pause(0.05)
                await pilot.press("b", "q")

    asyncio.run(main())


def test_exit_codes_tell_scripts_what_was_wrong(cluster: Traffic) -> None:
    """1 for what cannot be reached, 2 for what cannot be meant; one line each."""
    for arguments, code in (
        (("tail", "router://127.0.0.1:1"), 1),
        (("tree", "grpc://127.0.0.1:1"), 1),
        (("explain", "--router", "127.0.0.1:1", "hello"), 1),
        (("tail", "no-such-file"), 2),
        (("tree", "ftp://somewhere"), 2),
        (("tail", cluster.router, "--key", "xyz"), 2),
        (("tail", cluster.router, "--worker", "nobody"), 2),
        (("top", cluster.router), 2),
    ):
        ended, out, told = run(*arguments)
        assert ended == code, arguments
        (line,) = told.splitlines()
        assert line.startswith("rhizome: ")
        assert not out
