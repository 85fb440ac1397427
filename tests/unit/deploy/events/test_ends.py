"""How `rhizome events` commands end: by Ctrl-C, by a reader that has gone, before anything was imported."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import pytest

from deploy import cli, entry
from deploy.events import stats, tail, tree, verify
from deploy.events.group import plain_log_lines


def ended(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["rhizome", "events", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0


def raising(error: type[BaseException]) -> Any:
    async def run(*_: object) -> None:
        raise error

    return run


@pytest.mark.parametrize(("command", "code"), [("tail", 0), ("stats", 0), ("verify", 130), ("tree", 130)])
def test_ctrl_c_is_the_end_of_what_runs_until_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, code: int
) -> None:
    """And ends anything else with 130; no word is said."""
    for module, name in ((tail, "run_tail"), (stats, "run_stats"), (verify, "run_verify"), (tree, "run_tree")):
        monkeypatch.setattr(module, name, raising(KeyboardInterrupt))
    assert ended(monkeypatch, command) == code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("command", "code"), [("tail", 0), ("tree", 0), ("verify", 1)])
def test_a_reader_that_has_had_enough_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, code: int
) -> None:
    """As `head` has; but nothing is called right that nobody has read to its end."""
    for module, name in ((tail, "run_tail"), (verify, "run_verify"), (tree, "run_tree")):
        monkeypatch.setattr(module, name, raising(BrokenPipeError))
    assert ended(monkeypatch, command) == code
    assert capsys.readouterr() == ("", "")


def test_what_is_still_unwritten_is_not_told_at_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last lines of a command, which its reader did not wait for."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)

        async def run(*_: object) -> None:
            print("lines")

        monkeypatch.setattr(tree, "run_tree", run)
        assert ended(monkeypatch, "tree") == 0


def test_ctrl_c_during_the_imports_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a third of a second."""

    class Interrupted:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "deploy.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "deploy.cli")
    monkeypatch.delattr("deploy.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(SystemExit) as end:
        entry.main()
    assert end.value.code == 130


def test_log_lines_are_plain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """No time, no module, no Python names: like what the tools say themselves."""
    handler = logging.StreamHandler(sys.stderr)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    plain_log_lines()
    logging.getLogger("some.module").warning("w0: %s", "gone")
    assert capsys.readouterr().err == "rhizome: w0: gone\n"
