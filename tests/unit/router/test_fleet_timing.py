"""FleetTiming: what workers learn from each other, and how predictions turned out."""

from __future__ import annotations

import pytest

from router.fleet import WorkerReport
from router.fleet_timing import REFRESH_S, FleetTiming
from router.prediction_errors import WINDOW, PredictionErrors, PredictionSummary
from router.table import Column, WorkerTable
from router.timing import PRIOR, StepCosts

SLOW = StepCosts(*(2 * term for term in PRIOR))


def fleet(*workers: str, prior: StepCosts = PRIOR) -> FleetTiming:
    table = WorkerTable()
    timing = FleetTiming(table, prior)
    for slot, worker_id in enumerate(workers):
        table.add(slot)
        timing.add(worker_id, "model", slot)
    timing.check(workers)
    return timing


def work(steps: int, seconds: float) -> WorkerReport:
    """So many prefill steps of 100 tokens."""
    return WorkerReport(prefill_steps=steps, prefill_tokens=100 * steps, prefill_s=seconds)


def test_a_worker_without_data_is_as_its_peers_are() -> None:
    """Whether it is there already or comes later; before there are any data, as the prior says."""
    timing = fleet("a", "b", prior=SLOW)
    assert timing.of("b").costs == SLOW
    timing.observe("a", work(100, 50.0), 1.0)
    assert timing.of("b").costs == timing.of("a").learned != SLOW
    timing.add("c", "model", 2)
    assert timing.of("c").costs == timing.of("a").learned
    timing.add("d", "other", 3)
    assert timing.of("d").costs == SLOW
    timing.check("abcd")


def test_one_odd_worker_does_not_mislead_the_others() -> None:
    """What is typical is a median."""
    timing = fleet("a", "b", "odd", "new")
    for worker_id, seconds in (("a", 3.0), ("b", 3.0), ("odd", 300.0)):
        for number in range(1, 6):
            timing.observe(worker_id, work(100 * number, number * seconds), number * REFRESH_S)
    timing.observe("a", work(600, 18.0), 10 * REFRESH_S)
    assert timing.of("new").costs.prefill_s(100, 100) == pytest.approx(0.03, rel=0.1)


def test_whoever_leaves_is_forgotten() -> None:
    """With a model's last worker what is known of the model goes, too."""
    timing = fleet("a", "b")
    timing.observe("a", work(100, 50.0), 1.0)
    timing.drop("a")
    timing.check("b")
    assert timing.of("b").costs != PRIOR
    timing.drop("b")
    timing.drop("b")
    timing.add("a", "model", 0)
    assert timing.of("a").costs == PRIOR
    timing.first_token("gone", 1.0, 2.0)
    assert (timing.errors.requests, timing.errors_of("a").requests) == (1, 0)


def test_the_table_says_what_is_learned() -> None:
    """As decisions read it, pace included."""
    table = WorkerTable()
    timing = FleetTiming(table)
    table.add(0)
    timing.add("a", "model", 0)
    for number in range(1, 80):
        timing.observe("a", work(number * 10, 0.3 * number + max(0, number - 75) * 0.6), float(number))
    assert timing.of("a").pace[0] > 2
    assert table.values[Column.TOKEN_S, 0] == timing.of("a").costs.token_s > 2 * timing.of("a").learned.token_s
    timing.check("a")


def test_errors_are_of_the_latest_requests() -> None:
    """Exact quantiles over a window; how many there were in all."""
    errors = PredictionErrors()
    assert errors.summary() == PredictionSummary()
    errors.add(100.0, 0.0)
    for number in range(WINDOW):
        errors.add(1.0, 1.0 + number / (WINDOW - 1))
    found = errors.summary()
    assert found.requests == WINDOW + 1
    assert found[1:] == pytest.approx((1.0, 1.5, 0.5, 0.9))
