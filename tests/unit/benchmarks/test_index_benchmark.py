"""The index benchmark: it runs, its workload is what it says, and README tells what it found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import index
from benchmarks.index_match import pools
from benchmarks.index_plan import Plan
from benchmarks.readme import README, RESULTS, with_section
from benchmarks.report import AT_MOST, Figure, figure, row
from benchmarks.workload import Workload, removals, stores
from radix.reference import ReferenceTree

TINY = Plan(
    hash_tokens=(64,),
    hashed_tokens=64,
    prefixes=10,
    event_workers=(8, 64),
    entries=10_000,
    large_entries=20_000,
    large_sessions=90,
    chunk_sessions=10,
    view_chunks=1,
    match_workers=64,
    match_blocks=(32, 512),
    match_holders=(8, 64),
    match_rounds=2,
    match_samples=10,
    pool_chains=4,
    pool_blocks=2**11,
    pool_entries=2**13,
    pool_least=2,
    drops=1,
    reference_entries=10_000,
    thread_rounds=1,
    thread_seconds=0.02,
    thread_batches=(4,),
    memory_bytes=2**20,
)


def test_every_part_of_the_benchmark_gives_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows have the names that others look for, a figure each, and go to the table and the JSON alike; exit code 0."""
    path = tmp_path / "index.json"
    assert index.main(["--json", str(path)], TINY) == 0
    report = json.loads(path.read_text())
    assert report["name"] == "index"
    assert {"cpu", "cores", "python", "numpy", "index"} <= report["machine"].keys()
    rows = {each["what"]: each for each in report["rows"]}
    assert len(rows) == len(report["rows"]), "two rows have one name"
    assert {
        "hash 64",
        "hash 64 list",
        "store 10k W8 E1",
        "store 10k W64 E64",
        "store 20k W64 E16",
        "remove 10k W64 E16 tail",
        "remove 20k W64 E1 random",
        "match p50 96 10k",
        "match p99 96 20k",
        "drop one of 64 at 20k",
        "drop one of 64 at 20k lookup gap",
        "view store W64 E16",
        "match p50 32 none H64",
        "match p99 512 full H8",
        "match p50 512 half H8 as_dict",
        "match p50 512 spread H64",
        "match p99 512 holed H8",
        "bytes per entry 20k W64",
        "threads 2 readers",
        "threads 2 readers p99 512",
        "limit dependent random read",
        "limit match p50 512 full H8",
    } <= rows.keys()
    assert all(each["ours"] is not None for each in rows.values())
    assert "threads 2 readers" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--fast"], ["--json"], ["--json", "no/such/folder/index.json"]])
def test_bad_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown option, or a file that could not be written after minutes of work, is told at once."""
    with pytest.raises(SystemExit) as ended:
        index.main(arguments, TINY)
    assert ended.value.code == 2
    assert "--" in capsys.readouterr().err


def test_readme_tells_what_the_reports_hold() -> None:
    """`python -m benchmarks.readme` writes the sections; nobody edits them by hand."""
    readme = README.read_text()
    reports = sorted(RESULTS.glob("*.json"))
    assert reports
    for path in reports:
        assert readme == with_section(readme, json.loads(path.read_text())), "run: python -m benchmarks.readme"


def test_a_row_is_judged_by_what_its_goal_says() -> None:
    """More is better of rates, less of times; a goal is a multiple of the peer, or a limit of our own figure."""
    fast, slow = Figure(30.0), Figure(10.0)
    assert row("store", "M blocks/s", fast, slow, goal=3).ratio == 3
    assert row("store", "M blocks/s", fast, slow, goal=3).met is True
    assert row("store", "M blocks/s", fast, slow, goal=3.1).met is False
    assert row("match", "us", slow, fast, goal=3).met is True
    assert row("match", "us", fast, slow, goal=3).ratio == pytest.approx(1 / 3, rel=1e-3)
    assert row("match", "us", slow, goal=3).met is None, "nothing to compare with"
    assert row("bytes", "bytes", slow, fast, goal=9, goal_is=AT_MOST).met is False
    assert row("bytes", "bytes", slow, goal=25, goal_is=AT_MOST).ratio == 2.5
    assert row("limit", "us", slow, limit=5).ratio == 0.5
    assert row("limit", "us", slow, limit=5).met is None
    assert figure([1, 2, 3, 4, 5]) == Figure(3, 2)
    assert figure([7]) == Figure(7, None)


@pytest.mark.parametrize("workers", [3, 8, 64])
def test_the_workload_has_the_entries_that_it_promises(workers: int) -> None:
    """Prefixes on min(4, W) workers, sessions on one that holds their prefix, whatever the size of events."""
    workload = Workload(workers, 20_000, prefixes=20)
    tree = ReferenceTree()
    for run in (*workload.prefixes(), *map(workload.session, range(workload.sessions))):
        for part in stores(run, 16):
            assert tree.store(part.worker, part.hashes, part.parent) == len(part.hashes), "a block comes twice"
    assert len(tree) == workload.entries
    assert 20_000 - 64 < workload.entries <= 20_000
    for index_ in range(0, workload.sessions, 17):
        run = workload.session(index_)
        depths = tree.match(workload.prompt(index_)).as_dict()
        assert depths.pop(run.worker) == 96
        assert sorted(depths.values()) == [32] * (min(4, workers) - 1)
        assert sum(tree.remove(run.worker, hashes) for hashes in removals(run, 16)) == 64


@pytest.mark.parametrize("holders", [8, 64])
def test_chains_are_held_as_far_as_their_kind_says(holders: int) -> None:
    """Full, half and none by as many workers as asked for; spread to depths of their own; no block in two chains."""
    kinds = pools(TINY, 512, holders)
    steps = {
        kind: {chain.step * held for chain in chains for held in chain.pieces.values()}
        for kind, chains in kinds.items()
    }
    assert steps["full"] == steps["holed"] == {512}
    assert steps["half"] == {256}
    assert steps["none"] == set()
    assert len(steps["spread"]) > 8
    assert steps["spread"] <= set(range(1, 513))
    assert {len(chain.pieces) for kind in ("full", "half", "spread", "holed") for chain in kinds[kind]} == {holders}
    hashes = np.concatenate([chain.hashes for chains in kinds.values() for chain in chains])
    assert len(np.unique(hashes)) == len(hashes)
