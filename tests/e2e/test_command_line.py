"""The `rhizome` command as a user types it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import Launcher


def rhizome(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "deploy.cli", *arguments)
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=110)


def refused(*arguments: str) -> str:
    """The one line with which a command refuses bad input, exit code 2."""
    done = rhizome(*arguments)
    assert done.returncode == 2, done.stderr
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("rhizome: ")
    return line


@pytest.mark.parametrize(
    "command", ["", "up", "router", "worker", "chat", "demo", "calibrate", "doctor", "model", "model tiny"]
)
def test_every_command_explains_itself(command: str) -> None:
    """--help works everywhere and needs neither torch nor a running cluster."""
    done = rhizome(*command.split(), "--help")
    assert done.returncode == 0
    assert "Usage: " in done.stdout


def test_bad_input_is_one_line_naming_what_is_wrong(tiny_model: Path, tmp_path: Path) -> None:
    """Field, value and limit; exit code 2; no traceback."""
    (tmp_path / "file").touch()
    missing = str(tmp_path / "missing")
    assert refused("worker", "--model", missing) == (
        f"rhizome: model is '{missing}': a folder with a Hugging Face checkpoint"
    )
    assert refused("worker", "--model", str(tiny_model), "--role", "cook") == (
        "rhizome: role is 'cook': one of both, prefill, decode"
    )
    assert "--insecure" in refused("router", "--host", "0.0.0.0", "--port", "0")
    assert "policy is 'dice': one of " in refused("router", "--policy", "dice", "--port", "0")
    assert "max_blocks is 0: 1 to 536870912" in refused("router", "--max-blocks", "0", "--port", "0")
    assert "observe is 'vllm-0': NAME=URL" in refused("router", "--observe", "vllm-0", "--port", "0")
    assert "model and block_size together" in refused("router", "--observe", "v=zmq://h:1?model=m", "--port", "0")
    assert "does not exist or is empty" in refused("model", "tiny", "--out", str(tmp_path))


def test_a_broken_checkpoint_is_refused_by_file_and_field(tiny_model: Path, tmp_path: Path) -> None:
    """An architecture that is not served, and a tensor of the wrong shape."""
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    line = refused("worker", "--model", str(tmp_path))
    assert "config.json: architectures is ['GPT2LMHeadModel']; supported: " in line
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 100}))
    line = refused("worker", "--model", str(tmp_path))
    assert "model.safetensors" in line
    assert "gate_proj" in line
    assert "100" in line


def test_a_client_without_a_router_says_so() -> None:
    """Exit code 1 and one line."""
    done = rhizome("chat", "--router", "127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("rhizome: UNAVAILABLE: ")
    assert "Traceback" not in done.stderr


def test_a_conversation_over_two_turns_reuses_its_history(tmp_path: Path) -> None:
    """`model tiny`, `up` and `chat`, as the README has it: the second turn finds the first one in the cache."""
    model = tmp_path / "tiny"
    assert rhizome("model", "tiny", "--out", str(model)).returncode == 0
    with Launcher(model) as launcher:
        talk = "Which shelf holds the comet logs?\nAnd who signed them?\n/new\nWhich shelf?\n"
        done = rhizome("chat", "--router", launcher.address, "--max-tokens", "24", stdin=talk)
    assert done.returncode == 0, done.stderr
    turns = re.findall(r"(worker-\d) · (\d+) prompt tokens, (\d+) cached · TTFT \d+ ms", done.stdout)
    assert len(turns) == 3
    prompts, cached = [int(turn[1]) for turn in turns], [int(turn[2]) for turn in turns]
    assert cached[0] == 0
    assert cached[1] >= prompts[0] - 16, "all of the first turn but its last, partly filled block"
    assert 0 < cached[2] < cached[1], "a new conversation shares the system prompt only"


def test_the_demo_shows_reuse_and_identical_answers() -> None:
    """The main job, small: exit code 0, and the JSON says what a person would look for."""
    done = rhizome("demo", "--json", "--sessions", "2", "--turns", "3")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["answers_identical"] is True
    assert report["trees_equal"] is True
    assert report["hit_share_of_maximum"] >= 0.85
    assert report["modes"]["cache-off"]["hit_share"] == 0
    assert len(report["rows"]) == 3 * 2 * 3
    held = [check["worker_blocks"] for check in report["trees"]["kv-aware"].values()]
    assert sum(held) > 0
    assert re.search(r"Answers identical in the three runs: yes", done.stderr)
