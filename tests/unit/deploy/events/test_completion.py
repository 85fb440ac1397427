"""What a shell is offered; and that commands start quickly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deploy.events import completion
from deploy.events.cli import events_app
from deploy.events.completion import complete_target, complete_worker
from tests.support.router_cluster import Cluster, with_cluster


def test_a_target_is_a_kind_of_url_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the folder that was begun with; no error for a folder that is none."""
    (tmp_path / "some.rhz").touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "other.rhz").touch()
    monkeypatch.chdir(tmp_path)
    assert complete_target("") == [*completion.SCHEMES, "some.rhz", "sub/"]
    assert complete_target("r") == ["router://127.0.0.1:7700", "redis://"]
    assert complete_target("router://") == ["router://127.0.0.1:7700"]
    assert complete_target("sub/o") == ["sub/other.rhz"]
    assert complete_target(f"{tmp_path}/so") == [f"{tmp_path}/some.rhz"]
    assert complete_target("no/such/") == []


class Typed:
    """A command line as far as it was typed."""

    def __init__(self, target: str | None) -> None:
        self.params = {"target": target}


def workers_of(target: str | None, incomplete: str = "") -> list[str]:
    context: Any = Typed(target)
    return complete_worker(context, incomplete)


def test_workers_are_asked_of_the_router() -> None:
    """Those that are there; nothing, at once, where no router is."""

    async def test(running: Cluster) -> None:
        import asyncio

        for name in ("worker-0", "worker-1", "other"):
            await running.join(name)
        target = f"router://{running.address}"
        assert await asyncio.to_thread(workers_of, target) == ["other", "worker-0", "worker-1"]
        assert await asyncio.to_thread(workers_of, target, "w") == ["worker-0", "worker-1"]

    with_cluster(test)
    assert workers_of("router://127.0.0.1:1") == []
    assert workers_of("grpc://127.0.0.1:1") == []


def completed(words: str, folder: Path) -> str:
    """What bash is offered for an unfinished command line."""
    environment = os.environ | {
        "_RHIZOME_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    program = Path(sys.executable).parent / "rhizome"
    done = subprocess.run([program], env=environment, cwd=folder, capture_output=True, text=True, timeout=60)
    return done.stdout


def test_bash_completes_commands_options_and_values(tmp_path: Path) -> None:
    """Through the script that --show-completion prints."""
    assert set(completed("rhizome events ", tmp_path).split()) >= {"tail", "tree", "explain", "top"}
    assert completed("rhizome events tail --kind ", tmp_path).split() == ["stored", "removed", "cleared"]
    assert completed("rhizome events tree --form", tmp_path).split() == ["--format"]
    assert completed("rhizome events tree --format s", tmp_path).split() == ["svg"]
    assert completed("rhizome events tail rou", tmp_path).split() == ["router://127.0.0.1:7700"]


HEAVY = ("textual", "torch", "pyarrow", "zmq", "redis", "kv_events", "router", "worker", "rich.progress")


def test_help_and_completion_import_nothing_heavy() -> None:
    """No screen, no server, no tensors, no buses: a prompt waits for this."""
    program = "import sys; sys.argv = ['rhizome', 'events', '--help']\nimport deploy.cli\n"
    program += "try:\n deploy.cli.main()\nexcept SystemExit:\n pass\n"
    program += f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "[]"


COMMANDS = ["tail", "tree", "explain", "top", "record", "replay", "stats", "verify", "diff", "convert"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples(command: str) -> None:
    """At the end of its help, as they would be typed."""
    done = CliRunner().invoke(events_app, [command, "--help"])
    assert done.exit_code == 0
    assert f"rhizome events {command}" in done.output.partition("Examples:")[2]
