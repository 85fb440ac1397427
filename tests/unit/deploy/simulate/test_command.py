"""`rhizome simulate`: what it prints, writes and refuses; the numbers are the same on however many jobs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from deploy.simulate import command
from deploy.simulate.results import MACHINE_FIELDS
from deploy.traces.synthesize import synthesize
from deploy.traces.trace import write_trace
from deploy.traces.workload import CHAT
from rhizome.errors import InvalidRequest

# fmt: off
FIELDS = [
    "policy", "workers", "routers", "speed", "ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s",
    "ttft_short_p99_s", "itl_mean_s", "hit_ratio", "goodput", "imbalance", "prefill_saved", "preemptions",
    "prediction_error_p50_s", "prediction_error_p90_s", "refused",
]
# fmt: on


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file of sessions."""
    path = tmp_path_factory.mktemp("traces") / "small.jsonl.gz"
    write_trace(synthesize(CHAT, 90, 4), path)
    return path


def run(*arguments: object) -> str:
    """Standard output; errors come as they were raised."""
    invoked = CliRunner().invoke(app, ["simulate", *map(str, arguments)], catch_exceptions=False)
    assert invoked.exit_code == 0, invoked.output
    return invoked.stdout


def same_everywhere(text: str) -> dict[str, Any]:
    """A document without what the machine's speed decides."""
    read: dict[str, Any] = json.loads(text)
    read["rows"] = [{name: row[name] for name in row if name not in MACHINE_FIELDS} for row in read["rows"]]
    return read


def test_jobs_and_order_change_no_number(trace: Path) -> None:
    """One process, two processes, policies the other way round: each row is the same to the bit."""
    common = (trace, "--workers", "2,3", "--speed", 6, "--event-loss", 0.2, "--routers", 2, "--seed", 9, "--json")
    one = same_everywhere(run(*common, "--policy", "predicted-ttft,sglang", "--jobs", 1))
    two = same_everywhere(run(*common, "--policy", "predicted-ttft,sglang", "--jobs", 2))
    turned = same_everywhere(run(*common, "--policy", "sglang,predicted-ttft", "--jobs", 2))
    assert one == two
    assert [(row["workers"], row["policy"]) for row in one["rows"]] == [
        (workers, policy) for workers in (2, 3) for policy in ("predicted-ttft", "sglang")
    ]
    by_case = [{(row["workers"], row["policy"]): row for row in found["rows"]} for found in (one, turned)]
    assert by_case[0] == by_case[1]


def test_a_table_plots_and_results_come_out(trace: Path, tmp_path: Path) -> None:
    """A table a fleet on standard output; in the folder rows with every field, and a PNG of each kind."""
    out = tmp_path / "new" / "out"
    text = run(
        trace, "--workers", 2, "--policy", "round-robin,predicted-ttft", "--speed", "1,8", "--jobs", 1, "--out", out
    )
    assert text.count("2 workers (70b-4xh100), speed") == 2
    assert text.count("predicted-ttft") == 2
    results = json.loads((out / "results.json").read_text())
    assert results["trace"]["name"] == "small"
    assert len(results["rows"]) == 4
    for row in results["rows"]:
        assert set(FIELDS) <= set(row)
        assert row["requests"] == 90
    assert sorted(path.name for path in out.iterdir()) == [
        "latency-2.png",
        "results.json",
        "ttft-2-x1.png",
        "ttft-2-x8.png",
    ]


def test_prefill_apart_from_decode_is_a_row_beside_the_plain_fleets(trace: Path) -> None:
    """With its roles in its name; one worker begins, another goes on with what it pulls."""
    common = (trace, "--workers", 3, "--roles", "prefill=1,decode=2", "--policy", "predicted-ttft", "--speed", 4)
    assert "predicted-ttft, prefill=1,decode=2" in run(*common, "--jobs", 1)
    one, two = (same_everywhere(run(*common, "--jobs", jobs, "--json")) for jobs in (1, 2))
    assert one == two
    assert one["peer_fetch"]
    plain, split = one["rows"]
    assert (plain["roles"], plain["handed_over"]) == ("", 0.0)
    assert split["roles"] == "prefill=1,decode=2"
    assert 0.2 < split["handed_over"] < 1
    assert split["fetched_share"] > plain["fetched_share"]
    assert split["itl_mean_s"] < plain["itl_mean_s"]


def test_workers_are_drawn_over_time(trace: Path, tmp_path: Path) -> None:
    """Where there are samples enough: one each hundred requests."""
    many = tmp_path / "many.jsonl"
    write_trace(synthesize(CHAT, 320, 4), many)
    run(many, "--workers", 2, "--policy", "predicted-ttft", "--speed", 4, "--jobs", 1, "--out", tmp_path)
    assert (tmp_path / "workers-2-x4.png").stat().st_size > 10_000


def test_without_matplotlib_there_are_results_and_a_note(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plots are an extra; nothing else depends on them."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = ["simulate", str(trace), "--workers=1", "--policy=random", "--jobs=1", f"--out={tmp_path}"]
    invoked = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert invoked.exit_code == 0
    assert "no plots: matplotlib is not installed (pip install 'rhizome[plots]')" in invoked.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_loads_are_run_at_shares_of_the_saturation_that_is_kept(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found once: a second run with the same setting takes it from the file, one with another seed does not."""
    arguments = (trace, "--requests", 50, "--workers", 1, "--policy", "round-robin,sticky", "--load", "0.5,1")
    arguments = (*arguments, "--jobs", 1, "--out", tmp_path)
    run(*arguments)
    results = json.loads((tmp_path / "results.json").read_text())
    [found] = results["saturation"]
    assert (found["policy"], found["workers"]) == ("round-robin", 1)
    assert [(row["load"], row["speed"] / found["speed"]) for row in results["rows"]] == [(0.5, 0.5)] * 2 + [(1, 1)] * 2

    def search(*_: object) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(command.Sweep, "saturations", search)
    run(*arguments)
    again = json.loads((tmp_path / "results.json").read_text())
    assert same_everywhere(json.dumps(again)) == same_everywhere(json.dumps(results))
    with pytest.raises(AssertionError, match="searched again"):
        run(*arguments, "--seed", 1)


def test_saturation_alone_is_a_table(trace: Path) -> None:
    """Policy, workers, speed and rate."""
    text = run(trace, "--requests", 50, "--workers", 1, "--find-saturation", "round-robin", "--jobs", 1)
    assert "saturated at speed" in text
    assert "round-robin" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workers", "0"), "--workers is 0: 1 to 4096"),
        (("--workers", "2", "--policy", "best"), "--policy is 'best': one of"),
        (("--workers", "2", "--hardware", "abacus"), "hardware is 'abacus': one of 70b-4xh100"),
        (("--workers", "2", "--requests", "0"), "requests is 0: at least 1"),
        (("--workers", "2", "--jobs", "0"), "--jobs is 0: 1 to 256"),
        (("--workers", "2", "--event-loss", "nan"), "--event-loss is nan: 0 to 1"),
        (("--workers", "2", "--out", "/dev/null/x"), "--out is '/dev/null/x': a folder that can be written"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    trace: Path, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """InvalidRequest, of which the command makes one line and exit code 2."""

    def never(*_: object) -> None:
        raise AssertionError("something was run")

    monkeypatch.setattr("deploy.simulate.sweep.replay", never)
    with pytest.raises(InvalidRequest) as refused:
        run(trace, *arguments)
    assert message in str(refused.value)


def test_a_wrong_file_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    """As a process: no traceback, whatever the file holds."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"timestamp": 0, "input_length": 5}\n')
    ended = subprocess.run(
        [sys.executable, "-m", "deploy.entry", "simulate", str(bad), "--workers", "2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "line 1: output_length is None" in ended.stderr
