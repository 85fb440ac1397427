"""Where a fleet that runs on this machine can be reached: one small file of its user for each."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

MAX_BYTES = 4096


class FleetExists(OSError):
    """There is a file of that name already."""


@dataclass(frozen=True)
class FleetState:
    """Of one fleet. Whoever can read it may end the fleet."""

    name: str
    address: str  # of the launcher's control service, host:port
    token: str
    pid: int

    def __repr__(self) -> str:
        return f"FleetState(name={self.name!r}, address={self.address!r}, pid={self.pid})"


def folders() -> list[Path]:
    """Where such files lie by the XDG base directory specification, the preferred place first."""
    home = Path.home()
    found = [os.environ.get("XDG_RUNTIME_DIR"), os.environ.get("XDG_STATE_HOME") or str(home / ".local" / "state")]
    return [Path(folder) / "rhizome" for folder in found if folder]


@contextmanager
def recorded(state: FleetState) -> Iterator[Path]:
    """The file is there until left. Raises OSError where no folder can be written, FleetExists where one is there."""
    for number, folder in enumerate(places := folders()):
        try:
            path = _write(folder, state)
            break
        except FleetExists:
            raise
        except OSError:
            if number + 1 == len(places):
                raise
    try:
        yield path
    finally:
        remove(state)


def find() -> list[FleetState]:
    """What is recorded, by name. Files of others, and what is none of ours, are passed over."""
    states: dict[str, FleetState] = {}
    for folder in folders():
        with suppress(OSError):
            for path in sorted(folder.glob("*.json")):
                if state := _read(path):
                    states.setdefault(state.name, state)
    return sorted(states.values(), key=lambda state: state.name)


def remove(state: FleetState) -> None:
    """Remove the file of exactly this fleet, if it is still there."""
    for folder in folders():
        path = folder / f"{state.name}.json"
        if _read(path) == state:
            with suppress(OSError):
                path.unlink()


def _write(folder: Path, state: FleetState) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / f"{state.name}.json"
    handle, draft = tempfile.mkstemp(dir=folder, prefix=".")  # with mode 0600
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(asdict(state), file)
        os.link(draft, path)  # whole from the first moment, and never over another one
    except FileExistsError:
        raise FleetExists(f"{path} is there already") from None
    finally:
        os.unlink(draft)
    return path


def _read(path: Path) -> FleetState | None:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_uid != os.getuid():
                return None
            values = json.loads(file.read(MAX_BYTES))
        state = FleetState(**values)
    except (OSError, ValueError, TypeError):
        return None
    texts = (state.name, state.address, state.token)
    return state if all(isinstance(text, str) for text in texts) and isinstance(state.pid, int) else None
