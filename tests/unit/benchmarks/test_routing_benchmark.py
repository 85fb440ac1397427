"""The routing benchmark: every part runs and gives its rows, and bad usage is told at once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import routing, routing_scale
from benchmarks.routing_plan import Plan, traces
from benchmarks.routing_policies import carried_rows
from benchmarks.routing_route import route_rows
from benchmarks.routing_scale import ScalePlan
from deploy.traces.synthesize import synthesize
from deploy.traces.trace import write_trace
from deploy.traces.workload import PRESETS

TINY = Plan(
    workers=(2,),
    loads=(0.8, 1.0),
    requests=60,
    saturations=(("chat", 5.0),),
    carried=False,
    speed_workers=2,
    jobs=1,
    decision_workers=8,
    decision_entries=10_000,
    decision_tokens=256,
    decision_prompts=12,
    decisions=30,
    warm_up=5,
    route_decisions=0,
    route_warm_up=5,
    route_prompts=4,
    route_repeats=1,
)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that no machine lacks."""
    path = tmp_path_factory.mktemp("traces") / "chat_trace.jsonl"
    write_trace(synthesize(PRESETS["chat"], 80, seed=3), path)
    return path


def test_every_part_of_the_benchmark_gives_its_rows(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows have the names that others look for, a figure each, and go to the table and the JSON alike; exit code 0."""
    path = tmp_path / "routing.json"
    assert routing.main(["--json", str(path), "--trace", str(trace)], TINY) == 0
    report = json.loads(path.read_text())
    assert report["name"] == "routing"
    rows = {each["what"]: each for each in report["rows"]}
    assert len(rows) == len(report["rows"]), "two rows have one name"
    assert {
        "decision p50 256 tokens 10k W8",
        "decision p99 256 tokens 10k W8",
        "decision hashing p50 256 tokens 10k W8",
        "decision submit p99 256 tokens 10k W8",
        "chat N2 simulated requests",
        "chat N2 load 1 mean TTFT vs dynamo",
        "chat N2 load 1 mean TTFT vs dynamo-p16",
        "chat N2 load 1 short p99 vs dynamo",
        "chat N2 load 0.8 gap to bound",
        "chat N2 load 0.8 gap to bound host tier, peer fetch",
        "chat N2 load 0.8 mean TTFT vs best other",
        "chat N2 load 1 p99 TTFT vs best other",
        "chat N2 load 1 disturbed",
        "chat N2 load 1 step times x0.5",
        "chat N2 load 1 step times x2, events late and lost",
    } <= rows.keys()
    assert all(each["ours"] for each in rows.values())
    best = rows["chat N2 load 1 mean TTFT vs best other"]
    assert best["ratio"] == pytest.approx(best["peer"] / best["ours"], rel=1e-2)
    assert "simulated requests" in capsys.readouterr().out


def test_a_trace_that_saturates_no_fleet_leaves_the_other_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said on standard error; what needs no saturation is measured all the same."""
    path = tmp_path / "single.jsonl"
    write_trace(synthesize(PRESETS["chat"], 1, seed=3), path)
    assert routing.main(["--trace", str(path)], TINY) == 0
    told = capsys.readouterr()
    assert "left out" in told.err
    assert "decision p50" in told.out


def test_the_rate_carried_is_compared_where_it_is_asked_for() -> None:
    """One row, against the peer's defaults, at the most workers."""
    found = carried_rows(replace(TINY, workers=(1,)), synthesize(PRESETS["chat"], 40, seed=3))
    assert [each.what for each in found] == ["chat N1 rate carried"]
    assert found[0].peer_name == "dynamo"
    assert found[0].ratio is not None


def test_without_files_there_are_traces_all_the_same() -> None:
    """Published ones where they are found, else generated ones; no longer than the plan says."""
    known = traces(Plan(requests=20, generated=40), ())
    assert known
    assert {len(trace) for trace in known} == {20}
    assert {"preset-chat", "preset-agent"} <= {trace.name for trace in known}
    assert len(traces(Plan(requests=20, generated=30, traces=1), ())) == 1


def test_a_router_serves_all_decisions_over_the_network() -> None:
    """Decisions a second of its own and by the clock, and what a client waits; beside the peer's where it is there."""
    found = {each.what: each for each in route_rows(replace(TINY, route_decisions=20))}
    assert {"Route decisions 256 tokens W8", "Route p99 256 tokens W8"} <= found.keys()
    assert all(each.ours > 0 for each in found.values())


def test_scaling_gives_rows_for_one_router_and_for_several(tmp_path: Path) -> None:
    """What decisions, reports, events and memory cost, and fleets beside the same behind one router."""
    path = tmp_path / "scale.json"
    plan = ScalePlan(
        (2,), decisions=30, entries=5_000, batches=50, requests=50, least_requests=100, fleets=((2, 1), (2, 2))
    )
    assert routing_scale.main(["--json", str(path)], plan) == 0
    rows = {each["what"]: each for each in json.loads(path.read_text())["rows"]}
    assert {"decisions 8192 tokens W2", "report W2", "events applied", "memory of a worker"} <= rows.keys()
    assert rows["rag mean TTFT W2 R1"]["peer"] is None
    assert rows["rag mean TTFT W2 R2"]["peer"] == rows["rag mean TTFT W2 R1"]["ours"]


@pytest.mark.parametrize(
    "arguments", [["--fast"], ["--json", "no/such/folder/routing.json"], ["--trace", "no-such-file"], ["--jobs", "0"]]
)
def test_bad_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown option, or a file that cannot be read or written, is told before anything is run."""
    with pytest.raises(SystemExit) as ended:
        routing.main(arguments, TINY)
    assert ended.value.code == 2
    assert "--" in capsys.readouterr().err
