"""`rhizome events tree`: the tree of a recording, of a live stream and of a router; every form."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.events.tree import TreeOptions, form_of, run_tree
from kv_events.bus.url import publishing
from kv_events.events import BlockStored
from kv_events.inspect.words import parse_key
from kv_events.log import EventLog
from rhizome.errors import InvalidRequest
from tests.support.recordings import Fleet, recorded
from tests.support.router_cluster import PROMPT, Cluster, with_cluster


def shown(capsys: pytest.CaptureFixture[str], target: str, **options: Any) -> str:
    asyncio.run(run_tree(TreeOptions(target, **options)))
    return capsys.readouterr().out


@pytest.fixture
def recording(tmp_path: Path) -> tuple[str, Fleet]:
    path = tmp_path / "some.rhz"
    return str(path), recorded(path)


def held(fleet: Fleet) -> dict[str, set[int]]:
    return {name: set(log.snapshot().block_hashes.tolist()) for name, log in fleet.logs.items()}


def test_a_files_ending_tells_the_form(recording: tuple[str, Fleet], tmp_path: Path) -> None:
    """Unless --format does; one that is not known is refused, and nothing is written."""
    path, _ = recording
    for name, begins in (("t.dot", "digraph"), ("t.json", "{"), ("t.txt", f"{path}")):
        asyncio.run(run_tree(TreeOptions(path, out=tmp_path / name)))
        assert (tmp_path / name).read_text().startswith(begins), name
    asyncio.run(run_tree(TreeOptions(path, form="json", out=tmp_path / "t.svg")))
    assert json.loads((tmp_path / "t.svg").read_text())
    assert form_of(TreeOptions(path, out=tmp_path / "t.SVG")) == "svg"
    with pytest.raises(InvalidRequest, match="ends in one of .txt, .json, .dot, .gv, .svg, or --format"):
        asyncio.run(run_tree(TreeOptions(path, out=tmp_path / "t.png")))
    assert not (tmp_path / "t.png").exists()


def test_a_recording_is_played_to_its_end(recording: tuple[str, Fleet], capsys: pytest.CaptureFixture[str]) -> None:
    """What each worker held then, whole; one worker's alone."""
    path, fleet = recording
    told = json.loads(shown(capsys, path, form="json", depth=1000, max_nodes=1000))
    blocks = held(fleet)
    assert told["blocks"] == len(set.union(*blocks.values()))
    assert told["entries"] == sum(map(len, blocks.values()))
    alone = json.loads(shown(capsys, path, form="json", worker="worker-1", depth=1000, max_nodes=1000))
    assert alone["blocks"] == sum(node["blocks"] for node in alone["nodes"]) == len(blocks["worker-1"])
    assert all("worker-1" in [holder["worker"] for holder in node["holders"]] for node in alone["nodes"])
    with pytest.raises(InvalidRequest, match="worker is 'w7': one of worker-0, worker-1, worker-2"):
        shown(capsys, path, worker="w7")


def test_text_below_a_key(recording: tuple[str, Fleet], capsys: pytest.CaptureFixture[str]) -> None:
    """From a block on; one that is not held is refused."""
    path, fleet = recording
    block = max(held(fleet)["worker-0"])
    lines = shown(capsys, path, below=parse_key("below", f"{block:016x}")).splitlines()
    assert lines[0].startswith(f"{path}: ")
    assert f"{block:016x}" in lines[1]
    with pytest.raises(InvalidRequest, match="no block that is held"):
        shown(capsys, path, below=parse_key("below", "ffffffffffffffff"))


def test_graphs_go_to_a_file(
    recording: tuple[str, Fleet], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphviz's language as text, and drawn by its program; without that the command says what is missing."""
    path, _ = recording
    assert shown(capsys, path, form="dot").startswith("digraph tree {")
    assert not shown(capsys, path, form="text", out=tmp_path / "tree.txt")
    assert "worker-0" in (tmp_path / "tree.txt").read_text()
    with pytest.raises(InvalidRequest, match="a file that can be written"):
        shown(capsys, path, form="dot", out=tmp_path / "missing" / "tree.dot")
    if shutil.which("dot") is None:
        pytest.skip("no Graphviz: apt-get install graphviz")
    shown(capsys, path, form="svg", out=tmp_path / "tree.svg")
    assert "<svg" in (tmp_path / "tree.svg").read_text()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InvalidRequest, match="dot is not on PATH"):
        shown(capsys, path, form="svg")


def test_a_live_stream_is_what_its_worker_holds_now(capsys: pytest.CaptureFixture[str]) -> None:
    """From a snapshot, over a real bus."""
    log = EventLog("w", 1, 16)
    log.append([BlockStored(np.arange(1, 5, dtype=np.uint64), 0, 16)], 0.0)

    async def main() -> None:
        async with publishing(log, "grpc://127.0.0.1:0") as url:
            await run_tree(TreeOptions(url, form="json"))

    asyncio.run(main())
    (node,) = json.loads(capsys.readouterr().out)["nodes"]
    assert (node["blocks"], node["holders"]) == (4, [{"worker": "w", "tiers": ["device"]}])


def test_a_routers_tree_has_hits(capsys: pytest.CaptureFixture[str]) -> None:
    """Its own tree, with where requests went."""

    async def test(running: Cluster) -> None:
        worker = await running.join()
        await running.ready()
        held_blocks = worker.hold(PROMPT)
        await running.until(lambda entry: entry is not None and entry.indexed_blocks == held_blocks)
        for _ in range(3):
            await running.client.explain(token_ids=PROMPT)
        await run_tree(TreeOptions(f"router://{running.address}", form="json", worker="worker-0"))

    with_cluster(test)
    (node,) = json.loads(capsys.readouterr().out)["nodes"]
    assert (node["blocks"], node["hits"]) == (len(PROMPT) // 16, 3)
