"""A little of the fuzzing in each test run: mutated seeds for every target, and some seconds of atheris."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.seeds import DICTIONARY
from tests.fuzz.targets import TARGETS

INPUTS, SLOW = 800, {"foreign-stream": 100}


def mutated(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """Bytes with a few changes, of the kinds that libFuzzer makes."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at, length = chance.randint(0, len(changed)), chance.randint(1, 8)
        match chance.randrange(6):
            case 0:
                changed[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del changed[at : at + length]
            case 2:
                changed[at:at] = changed[at : at + length]
            case 3:
                changed[at:at] = chance.choice(DICTIONARY)
            case 4:
                word = chance.choice(DICTIONARY)
                changed[at : at + len(word)] = word
            case 5:
                other = chance.choice(others)
                changed[at:] = other[chance.randint(0, len(other)) :]
    return bytes(changed)


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_inputs_raise_wire_error_only(name: str) -> None:
    """Every reader of bytes from afar, on what our writers and real servers write, and on what is made of it."""
    target = TARGETS[name]
    seed = random.randrange(2**32)
    chance, seeds = random.Random(seed), target.seeds()
    for data in seeds + [mutated(chance.choice(seeds), seeds, chance) for _ in range(SLOW.get(name, INPUTS))]:
        try:
            target.read(data)
        except Exception as error:
            error.add_note(f"seed {seed}, input {data.hex()}")
            raise


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not here: pip install '.[fuzz]'")
def test_the_fuzzer_runs(tmp_path: Path) -> None:
    """It is guided by what the readers do, counts its inputs, and finds nothing."""
    command = [sys.executable, "-m", "tests.fuzz", "--runs", "3000", "--target", "foreign", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "findings in: none" in done.stdout
    assert "3,000" in done.stdout
    assert list((tmp_path / "foreign").iterdir()), "inputs that reach what no seed reaches are kept"
