"""Files by which running fleets are found."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deploy.fleet import state_file
from deploy.fleet.state_file import FleetExists, FleetState


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def test_a_file_is_its_users_alone_and_goes_with_its_fleet() -> None:
    """Mode 0600 in a folder of 0700: the token in it ends the fleet. No repr shows it."""
    state = FleetState("demo", "127.0.0.1:1", "a token", 1)
    with state_file.recorded(state) as path:
        assert os.stat(path).st_mode & 0o777 == 0o600
        assert os.stat(path.parent).st_mode & 0o777 == 0o700
        assert state_file.find() == [state]
        assert list(path.parent.iterdir()) == [path]
    assert state_file.find() == []
    assert "a token" not in repr(state)


def test_no_file_is_written_over() -> None:
    """Nor removed by one that only has the same name."""
    state = FleetState("demo", "127.0.0.1:1", "a token", 1)
    other = FleetState("demo", "127.0.0.1:2", "another", 2)
    with state_file.recorded(state):
        with pytest.raises(FleetExists), state_file.recorded(other):
            pass
        state_file.remove(other)
        assert state_file.find() == [state]


def test_a_folder_that_cannot_be_written_is_passed_over(home: Path) -> None:
    """The other one is taken; with none it is an error."""
    (home / "run").write_text("in the way")
    state = FleetState("demo", "127.0.0.1:1", "a token", 1)
    with state_file.recorded(state) as path:
        assert path.is_relative_to(home / "state")
    (home / "state" / "rhizome").rmdir()
    (home / "state" / "rhizome").write_text("in the way, too")
    with pytest.raises(OSError, match="rhizome"), state_file.recorded(state):
        pass


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"name": 1, "address": "", "token": "", "pid": 1}', b"\xff"])
def test_what_is_no_such_file_is_passed_over(home: Path, content: bytes) -> None:
    """Whatever lies there."""
    folder = home / "run" / "rhizome"
    folder.mkdir(parents=True)
    (folder / "x.json").write_bytes(content)
    assert state_file.find() == []
