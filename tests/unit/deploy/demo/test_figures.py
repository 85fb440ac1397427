"""What the demo makes of what it has seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from deploy.conversations import TurnTokens
from deploy.demo.figures import Outcome, Pulls, Row, TreeCheck, p99
from rhizome.v1 import worker_pb2

ROW = Row("one", 1, 1, "w", 32, 0, 100.0, "ab", (1, 2), ("w",), (10.0, 20.0))


def outcome(*rows: Row) -> Outcome:
    """Two turns of one session in each mode, of 32 and 64 prompt tokens, and right trees."""
    prompt = tuple(range(100))
    turns = [TurnTokens(1, 1, prompt[:32], (1, 2)), TurnTokens(1, 2, prompt[:64], (1, 2))]
    trees = {row.mode: {"w": TreeCheck(3, 3, True)} for row in rows}
    return Outcome(list(rows), turns, trees, {}, block_size=16)


def two_turns(mode: str, **changes: Any) -> list[Row]:
    """The second finds the first in the cache."""
    return [
        replace(ROW, mode=mode, **changes),
        replace(ROW, mode=mode, turn=2, prompt_tokens=64, cached_tokens=32, ttft_ms=50.0, **changes),
    ]


def test_the_same_answers_in_all_modes_are_good() -> None:
    """Token for token; the text does not matter."""
    seen = outcome(*two_turns("one"), *two_turns("two", answer="other"))
    assert seen.modes == ["one", "two"]
    assert seen.good()
    assert seen.report()["answers_identical"] is True


@pytest.mark.parametrize(
    "rows",
    [
        [*two_turns("one"), *two_turns("two", tokens=(1, 3))],
        [*two_turns("one"), *two_turns("two", tokens=(1,))],
        [*two_turns("one"), two_turns("two")[0]],
    ],
)
def test_another_answer_is_seen(rows: list[Row]) -> None:
    """Other tokens, fewer tokens, or none."""
    seen = outcome(*rows)
    assert not seen.answers_identical()
    assert not seen.good()


def test_a_tree_that_is_not_its_workers_is_seen() -> None:
    """Of any worker, after any mode."""
    seen = outcome(*two_turns("one"), *two_turns("two"))
    seen.trees["two"]["v"] = TreeCheck(3, 2, False)
    assert seen.answers_identical()
    assert not seen.trees_equal()
    assert not seen.good()


def test_summaries_tell_reuse_of_later_turns_and_times_of_all() -> None:
    """The first turn finds nothing, whatever the mode."""
    (line,) = outcome(*two_turns("one")).summaries()
    assert (line.hit_share, line.hit_share_of_maximum, line.mean_ttft_ms) == (0.5, 1.0, 50.0)
    times = line.all_turns
    assert (times.mean_ttft_ms, times.p99_ttft_ms, times.mean_itl_ms, times.p99_itl_ms) == (75.0, 100.0, 15.0, 20.0)


def test_p99_is_what_one_in_a_hundred_exceeds() -> None:
    """The nearest rank: always one of the values."""
    assert p99([7.0]) == 7.0
    assert p99([float(value) for value in range(100, 0, -1)]) == 99.0
    assert p99([float(value) for value in range(1, 102)]) == 100.0


def test_pulls_are_those_since_before() -> None:
    """Counted from a worker's start by itself; the way is told where it was taken."""
    early = Pulls.of(worker_pb2.WorkerStatus(pulls=2, pulled_blocks=5, pulled_bytes=50, pull_transport="shm"))
    late = Pulls.of(
        worker_pb2.WorkerStatus(
            pulls=5, pulls_short=1, pulled_blocks=9, pulled_bytes=90, pull_skipped_blocks=7, pull_transport="tcp"
        )
    )
    assert early.since(Pulls()) == early
    assert late.since(early) == Pulls(3, 1, 4, 40, 7, "tcp")
    assert late.since(late) == Pulls()
