"""`rhizome doctor`: its findings are true, and its exit code tells broken from merely slower."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import radix
from deploy.doctor import CHECKS, Finding, Status, check_huge_pages, examine, tree_difference
from radix.keys import Hashes
from radix.reference import ReferenceTree


def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "deploy.cli", "doctor", *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=110, env=os.environ | environment)


def findings(done: subprocess.CompletedProcess[str]) -> dict[str, Finding]:
    """Of a run with --json, by name."""
    assert not done.stderr
    return {finding["name"]: Finding(**finding) for finding in json.loads(done.stdout)["findings"]}


def test_this_machine_is_fit() -> None:
    """Nothing is broken where the tests run; every check has one line, and the core is the one that was imported."""
    done = doctor(RHIZOME_FLEET_SECRET="0123456789abcdef")
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert len(lines) == len(CHECKS)
    assert all(line.split()[0] in ("ok", "warning") for line in lines)
    (core,) = [line for line in lines if line.split()[1] == "core"]
    assert ("native" if radix.BACKEND == "native" else "plain Python") in core
    assert "ok       secret" in done.stdout


def test_plain_python_is_a_warning_that_says_why() -> None:
    """The fallback gives the same answers: exit code 0."""
    done = doctor("--json", RHIZOME_RADIX="reference")
    assert done.returncode == 0
    core = findings(done)["core"]
    assert core.status == Status.WARNING
    assert "plain Python" in core.text
    assert "RHIZOME_RADIX=reference" in core.text


def test_what_is_broken_is_told_apart_and_ends_with_1() -> None:
    """One broken thing hides no other finding."""
    done = doctor("--json", RHIZOME_FLEET_SECRET="short", RHIZOME_RADIX="fast")
    assert done.returncode == 1
    assert json.loads(done.stdout)["fit"] is False
    found = findings(done)
    assert list(found) == list(CHECKS)
    broken = {name: finding.text for name, finding in found.items() if finding.status == Status.BROKEN}
    assert broken.keys() == {"core", "hashing", "tree", "secret"}
    assert "RHIZOME_RADIX is 'fast'" in broken["core"]
    assert "at least 16 bytes" in broken["secret"]


def test_a_command_with_a_core_that_cannot_be_ends_with_one_line() -> None:
    """Exit code 2, as for any bad input."""
    command = (sys.executable, "-m", "deploy.cli", "router", "--port", "0")
    environment = os.environ | {"RHIZOME_RADIX": "fast"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=environment)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["rhizome: RHIZOME_RADIX is 'fast': 'native', 'reference' or nothing"]


def test_a_router_says_at_start_which_core_it_runs_on() -> None:
    """Before the line with its address; plain Python is worth a warning."""
    command = (sys.executable, "-m", "deploy.cli", "router", "--port", "0")
    environment = os.environ | {"RHIZOME_RADIX": "reference"}
    lines = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as router:
        assert router.stderr is not None
        for line in router.stderr:
            lines.append(line)
            if "serving on" in line:
                break
        router.terminate()
    assert "WARNING" in lines[-2]
    assert "index core: plain Python" in lines[-2]


class ForgetfulTree(ReferenceTree):
    """Loses the last block of long chains."""

    def store(self, worker: int, hashes: Hashes, parent: int = 0, tier: int = 0) -> int:
        return super().store(worker, hashes[:40], parent, tier)


class AmnesicTree(ReferenceTree):
    """Counts what it removes and removes nothing."""

    def remove(self, worker: int, hashes: Hashes, tier: int = 0) -> int:
        removed = super().remove(worker, hashes, tier)
        for at in range(len(hashes)):
            super().store(worker, hashes[at : at + 1], 0, tier)
        return removed


@pytest.mark.parametrize("tree", [ForgetfulTree, AmnesicTree])
def test_the_self_test_finds_a_tree_that_is_wrong(tree: type[ReferenceTree]) -> None:
    """And says where; two that are right do not differ."""
    assert tree_difference(tree(), ReferenceTree()).startswith("step ")
    assert tree_difference(ReferenceTree(), ReferenceTree()) == ""


@pytest.mark.parametrize(
    ("words", "status"),
    [("[always] madvise never", "ok"), ("always [madvise] never", "ok"), ("always madvise [never]", "warning")],
)
def test_huge_pages_are_read_from_the_kernels_own_words(tmp_path: Path, words: str, status: str) -> None:
    """The mode in brackets is the one in force; a system without the file has none."""
    switch = tmp_path / "enabled"
    switch.write_text(words + "\n")
    assert check_huge_pages(switch)[0] == status
    assert check_huge_pages(tmp_path / "missing")[0] == Status.WARNING


def test_a_check_that_fails_is_a_finding() -> None:
    """The doctor goes on to the next one."""

    def fails() -> tuple[Status, str]:
        raise OSError("no such luck")

    assert examine({"first": fails, "second": lambda: (Status.OK, "fine")}) == [
        Finding("first", Status.BROKEN, "OSError: no such luck"),
        Finding("second", Status.OK, "fine"),
    ]
