"""The demo of prefill apart from decode, on this machine and on Ray."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(500)

PATIENCE_S = 30.0
MARK = "RHIZOME_TEST_MARK"
NO_RAY = "import sys; sys.modules['ray'] = None; from deploy.cli import main; main()"


def demo(*arguments: str, mark: str = "") -> tuple[dict[str, Any], str]:
    """What a demo of two conversations says, as JSON and in words."""
    command = (sys.executable, "-m", "deploy.cli", "demo", "--json", "--sessions=2", "--turns=2", *arguments)
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=os.environ | {MARK: mark})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def check_disagg(report: dict[str, Any], words: str) -> None:
    """Prefill worker and decode workers had their parts in every answer, and the answers are those of the others."""
    assert report["answers_identical"] is True
    assert report["trees_equal"] is True
    assert list(report["modes"]) == ["aggregated", "disaggregated"]
    rows = {mode: [row for row in report["rows"] if row["mode"] == mode] for mode in report["modes"]}
    assert [len(of_mode) for of_mode in rows.values()] == [4, 4]
    for row in rows["disaggregated"]:
        prefill, decode = row["workers"]
        assert prefill == "prefill-0"
        assert decode.startswith("decode-")
        assert len(row["itl_ms"]) == 31
    pulls = report["pulls"]["disaggregated"]
    decoders = [pulls["decode-0"], pulls["decode-1"]]
    blocks = sum(each["blocks"] for each in decoders)
    assert sum(each["size_bytes"] for each in decoders) >= blocks > 0
    assert sum(each["pulls"] for each in decoders) > 0
    assert sum(each["skipped_blocks"] for each in decoders) > 0, "the second turn finds the first"
    assert {each["transport"] for each in decoders} <= {"shm", "tcp", "grpc", ""}
    for mode in report["modes"].values():
        assert all(mode["all_turns"][name] > 0 for name in mode["all_turns"])
    for told in ("What workers took from others", "ITL p99", "Answers identical in the two runs: yes"):
        assert told in words


def marked(mark: str) -> list[int]:
    """Processes that inherited a variable."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def check_nothing_is_left(mark: str, words: str) -> None:
    """Of a Ray that the demo has started: no process, and no file."""
    folders = re.findall(r"starting Ray for the demo alone, in (\S+):", words)
    assert folders
    deadline_s = time.monotonic() + PATIENCE_S
    while (left := marked(mark)) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert left == []
    assert not any(Path(folder).exists() for folder in folders)


def test_prefill_apart_from_decode_answers_as_workers_that_do_both() -> None:
    """On this machine."""
    check_disagg(*demo("--disagg"))


def test_the_demo_starts_a_ray_of_its_own_and_leaves_nothing_of_it() -> None:
    """The same there."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'rhizome[ray]'")
    mark = uuid.uuid4().hex
    report, words = demo("--disagg", "--ray=local", mark=mark)
    check_disagg(report, words)
    check_nothing_is_left(mark, words)


def heed_ctrl_c() -> None:
    """Tests that run in a shell's background inherit that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_the_demo_and_its_ray() -> None:
    """While the fleet starts."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'rhizome[ray]'")
    mark = uuid.uuid4().hex
    command = (sys.executable, "-m", "deploy.cli", "demo", "--json", "--ray=local")
    words, told = "", False
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {MARK: mark}, preexec_fn=heed_ctrl_c
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            words += line
            if "placing routers and workers" in line and not told:  # the line may be printed again
                os.kill(process.pid, signal.SIGINT)
                told = True
        assert process.wait(200) == 130, words
    assert "Traceback" not in words
    check_nothing_is_left(mark, words)


def test_without_ray_the_demo_says_what_to_install() -> None:
    """One line, exit code 2."""
    command = (sys.executable, "-c", NO_RAY, "demo", "--ray")
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "pip install 'rhizome[ray]'" in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--disagg", "--workers=1"), "--workers is 1: 2 to 16 with --disagg"),
        (("--ray=nowhere.invalid:6379",), "no Ray cluster at nowhere.invalid:6379"),
    ],
)
def test_what_cannot_be_played_is_refused(arguments: tuple[str, ...], says: str) -> None:
    """Before anything is started."""
    command = (sys.executable, "-m", "deploy.cli", "demo", *arguments)
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode in (1, 2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr
