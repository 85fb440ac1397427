"""Views of workers behind a hostile network are right whenever they say so, and all of them in the end.

The schedules, and what is asserted in them: event_schedules.py. The seed of one that fails is in the error.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from tests.simulation.event_schedules import simulate, simulate_with_little_room

SCHEDULES = 10_000
SCHEDULES_WITH_LITTLE_ROOM = 1_000
SHARE = 100  # of one process at a time

Simulation = Callable[[int], dict[str, int]]

TROUBLES = (
    *("lost", "doubled", "overtaken", "not a batch", "late routers", "router restarts", "raced snapshots", "trimmed"),
    *("restarts", "zombie batches", "zombie answers"),
    *("applied", "duplicates", "gaps", "stale", "mismatches", "resyncs", "bad_snapshots"),  # as the views count them
)


def run(simulation: Simulation, seeds: range) -> Counter[str]:
    """Schedules one after the other; returns what happened in all of them."""
    totals: Counter[str] = Counter()
    for seed in seeds:
        try:
            totals.update(simulation(seed))
        except Exception as error:
            call = f"tests.simulation.event_schedules.{simulation.__name__}({seed})"
            raise AssertionError(f"the schedule of seed {seed} fails: {call}: {error!r}") from error
    return totals


def run_all(simulation: Simulation, seeds: range) -> Counter[str]:
    """Schedules on every core, in processes that are started anew: what else this one has loaded stays out of them."""
    shares = [seeds[start : start + SHARE] for start in range(0, len(seeds), SHARE)]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        totals: Counter[str] = Counter()
        for counted in pool.map(run, [simulation] * len(shares), shares):
            totals.update(counted)
    return totals


@pytest.mark.timeout(600)  # half a minute of two cores, where nobody else wants them
def test_views_converge_under_ten_thousand_schedules() -> None:
    """Under any schedule; and the schedules do hold every kind of trouble, most of them thousands of times."""
    totals = run_all(simulate, range(SCHEDULES))
    assert all(totals[trouble] > SCHEDULES / 10 for trouble in TROUBLES), totals


def test_views_that_are_cut_short_are_right_once_there_is_room() -> None:
    """Under any schedule; and many are cut short."""
    totals = run_all(simulate_with_little_room, range(SCHEDULES_WITH_LITTLE_ROOM))
    assert all(totals[trouble] > SCHEDULES_WITH_LITTLE_ROOM / 20 for trouble in (*TROUBLES, "truncated")), totals


@pytest.mark.slow
def test_views_converge_under_many_more_schedules() -> None:
    """The same, for longer, with seeds of its own."""
    run_all(simulate, range(SCHEDULES, 10 * SCHEDULES))
    run_all(simulate_with_little_room, range(SCHEDULES, 2 * SCHEDULES))


@pytest.mark.parametrize("simulation", [simulate, simulate_with_little_room])
def test_a_schedule_is_drawn_from_its_seed_alone(simulation: Simulation) -> None:
    """So that one that failed can be run again."""
    assert simulation(7) == simulation(7)


def test_a_schedule_that_fails_tells_its_seed() -> None:
    """And how to run it again."""

    def fails(seed: int) -> dict[str, int]:
        assert seed != 5
        return {}

    with pytest.raises(
        AssertionError, match=r"the schedule of seed 5 fails: tests.simulation.event_schedules.fails\(5\)"
    ):
        run(fails, range(10))
