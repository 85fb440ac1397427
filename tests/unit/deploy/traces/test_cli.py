"""`rhizome trace`: what the commands print, write and refuse."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.traces.cli import traces_app
from deploy.traces.trace import read_trace
from rhizome.errors import InvalidRequest


def run(*arguments: str | Path) -> str:
    """Its output; errors come as they were raised."""
    result = CliRunner().invoke(traces_app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A small trace of a preset."""
    path = tmp_path / "made.jsonl.gz"
    run("synthesize", "--workload", "chat", "--requests", "200", "--seed", "3", "--out", path)
    return path


def test_a_made_trace_is_shown_in_tables_and_as_json(made: Path) -> None:
    """People and programs get the same numbers."""
    numbers = json.loads(run("stats", made, "--json"))
    assert (numbers["requests"], numbers["block_size"], numbers["name"]) == (200, 64, "made")
    text = run("stats", made)
    assert "made: 200 requests" in text
    assert f"{numbers['hit_ratio_blocks']:.3f} of blocks" in text


def test_a_trace_like_another_is_made_and_nothing_overwritten(made: Path, tmp_path: Path) -> None:
    """The same seed writes the same bytes; a file that is there stays unless told."""
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for out in (first, second):
        run("synthesize", "--like", made, "--requests", "50", "--seed", "1", "--rate", "100", "--out", out)
    assert first.read_bytes() == second.read_bytes()
    assert len(read_trace(first)) == 50
    with pytest.raises(InvalidRequest, match="--out"):
        run("synthesize", "--like", made, "--out", first)
    run("synthesize", "--like", made, "--requests", "7", "--out", first, "--force")
    assert len(read_trace(first)) == 7


def test_bad_input_is_refused(made: Path, tmp_path: Path) -> None:
    """Both sources or none, a folder that is not there, a block size that the trace has."""
    out = tmp_path / "out.jsonl"
    with pytest.raises(InvalidRequest, match="exactly one"):
        run("synthesize", "--out", out)
    with pytest.raises(InvalidRequest, match="exactly one"):
        run("synthesize", "--like", made, "--workload", "chat", "--out", out)
    with pytest.raises(InvalidRequest, match="--block-size"):
        run("synthesize", "--like", made, "--block-size", "16", "--out", out)
    with pytest.raises(InvalidRequest, match="a file that can be written"):
        run("synthesize", "--workload", "chat", "--requests", "1", "--out", tmp_path / "no" / "out.jsonl")
    with pytest.raises(InvalidRequest, match="a file that can be read"):
        run("stats", tmp_path / "none.jsonl")


def test_plots_are_drawn(made: Path, tmp_path: Path) -> None:
    """Five PNGs."""
    pytest.importorskip("matplotlib", reason="pip install 'rhizome[plots]'")
    run("stats", made, "--plots", tmp_path / "plots")
    drawn = sorted((tmp_path / "plots").iterdir())
    assert [path.stem for path in drawn] == ["arrivals", "hit_ratio", "lengths", "reuse", "working_set"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_without_matplotlib_plots_name_the_extra(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InvalidRequest, match=r"pip install 'rhizome\[plots\]'"):
        run("stats", made, "--plots", tmp_path / "plots")
