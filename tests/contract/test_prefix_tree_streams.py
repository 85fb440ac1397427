"""The fuzzer's streams of operations in Python: its model, the native tree and the reference give the same answers."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from radix.reference import ReferenceTree
from radix.tree import PrefixTree
from tests.support.prefix_trees import TREES, all_of
from tests.support.tree_streams import WORKERS, Depths, Replay, Stream

ROOT = Path(__file__).parents[2]
SEEDS = [bytes.fromhex(line) for line in (ROOT / "tests/native/streams.txt").read_text().splitlines()]
FUZZER = ROOT / "build/fuzz/tree"
SOURCES = [ROOT / "tests/native" / name for name in ("model.hpp", "streams.hpp", "fuzz_tree.cpp")]


def random_stream(seed: int) -> bytes:
    return random.Random(seed).randbytes(300)


def replay(make: Callable[..., PrefixTree], data: bytes) -> Replay:
    return Replay(make(*Stream(data).caps), data)


STREAMS = [*SEEDS, *map(random_stream, range(200))]


@pytest.mark.skipif("native" not in TREES, reason="no native tree: `make native` builds it")
def test_native_and_reference_agree_on_the_fuzzers_streams() -> None:
    """Each answer is the same; where a worker lied about parents, its depths may be larger."""
    for data in STREAMS:
        native, reference = replay(TREES["native"], data), replay(ReferenceTree, data)
        for found, expected in zip(native.answers(), reference.answers(), strict=True):
            assert len(found) == len(expected)
            for value, right in zip(found, expected, strict=True):
                if not isinstance(value, dict) or not isinstance(right, dict):
                    assert value == right
                    continue
                assert value.keys() == right.keys()
                for worker, depths in right.items():
                    larger = worker in reference.liars and all(map(int.__ge__, value[worker], depths))
                    assert value[worker] == depths or larger
        assert all_of(native.tree, WORKERS) == all_of(reference.tree, WORKERS)


@pytest.mark.skipif(
    not FUZZER.exists() or FUZZER.stat().st_mtime < max(source.stat().st_mtime for source in SOURCES),
    reason="no fuzzer of these sources: `make fuzz` builds it",
)
def test_the_fuzzers_model_and_the_reference_agree(tmp_path: Path) -> None:
    """What the fuzzer holds the native tree to is what the reference does."""
    for i, data in enumerate(STREAMS):
        (tmp_path / f"{i:03}").write_bytes(data)
    said = subprocess.run(
        [FUZZER, "-runs=0", tmp_path], env={"RADIX_FUZZ_PRINT": "1"}, capture_output=True, text=True, check=True
    )
    models = dict(answers.split("\n", 1) for answers in said.stdout.split("end\n")[:-1])
    for data in STREAMS:
        answers = [numbers(answer) for answer in replay(ReferenceTree, data).answers()]
        assert [[*map(int, line.split())] for line in models[data.hex()].splitlines()] == answers


def numbers(answer: list[int | Depths]) -> list[int]:
    flat = list[int]()
    for value in answer:
        rows = [[value]] if isinstance(value, int) else [[worker, *depths] for worker, depths in value.items()]
        flat += [number for row in rows for number in row]
    return flat
