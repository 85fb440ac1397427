"""WorkerTiming: learns step costs from cumulative counters, whatever they say."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.fleet import WorkerReport
from router.timing import PRIOR, StepCosts, WorkerTiming, average, steps_of


def after(report: WorkerReport, steps: list[int], costs: StepCosts, decode_steps: int = 0) -> WorkerReport:
    """The next report of a worker that ran prefill steps of these sizes, and decode steps, at these costs."""
    return replace(
        report,
        prefill_steps=report.prefill_steps + len(steps),
        prefill_tokens=report.prefill_tokens + sum(steps),
        prefill_s=report.prefill_s + sum(costs.prefill_step_s + costs.prefill_token_s * size for size in steps),
        decode_steps=report.decode_steps + decode_steps,
        decode_tokens=report.decode_tokens + 3 * decode_steps,
        decode_s=report.decode_s + costs.decode_step_s * decode_steps,
    )


def predicted(costs: StepCosts, tokens: int) -> float:
    return costs.prefill_s(tokens, 512)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("step_s", [1e-3, 5e-3, 0.02, 0.1])
@pytest.mark.parametrize("token_s", [1e-6, 1e-5, 1e-4, 1e-3])
def test_it_converges_to_the_workers_costs(step_s: float, token_s: float, seed: int) -> None:
    """From a fast GPU to a slow CPU: after 20 s of reports predictions are within a tenth or 3 ms."""
    costs = StepCosts(step_s, token_s, decode_step_s=2 * step_s)
    timing, report, random = WorkerTiming(), WorkerReport(), Random(seed)
    for number in range(40):
        steps = [random.choice((1, 20, 100, 512)) for _ in range(random.randint(1, 8))]
        report = after(report, steps, costs, decode_steps=5)
        timing.observe(report, PRIOR, 0.5 * number)
    for tokens in (1, 512):
        assert predicted(timing.costs, tokens) == pytest.approx(predicted(costs, tokens), rel=0.1, abs=0.003)
    assert timing.costs.decode_step_s == pytest.approx(costs.decode_step_s, rel=0.1)


def test_small_prefills_do_not_make_a_worker_look_slow() -> None:
    """Two equal workers, one with short prefills thanks to its cache: both predict the same for a long one."""
    costs = StepCosts(prefill_step_s=0.010, prefill_token_s=1e-4, decode_step_s=0.01)
    timings = []
    for sizes in ([20, 60, 30], [400, 512, 300]):
        timing, report = WorkerTiming(), WorkerReport()
        for number in range(40):
            report = after(report, [sizes[number % 3]] * 3, costs)
            timing.observe(report, PRIOR, 0.5 * number)
        timings.append(predicted(timing.costs, 500))
    assert timings[0] == pytest.approx(timings[1], rel=0.25)


def test_a_slow_start_is_forgotten() -> None:
    """A first step of 5 s (something was compiled) does not mark a worker for ever, even without new work."""
    slow = after(WorkerReport(), [100], StepCosts(5.0, 0.0, 0.0))
    timing = WorkerTiming()
    timing.observe(slow, PRIOR, 0.0)
    assert predicted(timing.costs, 100) > 1.0
    for second in range(1, 600):
        timing.observe(slow, PRIOR, float(second))
    assert predicted(timing.costs, 100) < 0.1


def test_before_data_the_prior_stands() -> None:
    """A worker that has done nothing is taken for what its peers are; with no peers, for a slow one."""
    timing = WorkerTiming()
    peers = StepCosts(0.5, 0.25, 0.125)
    timing.observe(WorkerReport(), peers, 0.0)
    assert not timing.measured
    assert timing.costs == peers
    assert average([timing]) == average([]) == PRIOR
    measured = WorkerTiming()
    measured.observe(after(WorkerReport(), [100], StepCosts(0.02, 1e-3, 0.05), 1), PRIOR, 0.0)
    assert average([timing, measured]) == measured.costs


COUNTS = st.integers(0, 2**63)
SECONDS = st.floats(allow_nan=True, allow_infinity=True)


@given(
    st.lists(
        st.builds(
            WorkerReport,
            prefill_steps=COUNTS | st.integers(0, 100),
            prefill_tokens=COUNTS | st.integers(0, 10_000),
            prefill_s=SECONDS | st.floats(0, 100),
            decode_steps=COUNTS | st.integers(0, 100),
            decode_s=SECONDS | st.floats(0, 100),
        ),
        max_size=20,
    )
)
def test_senseless_reports_never_make_senseless_costs(reports: list[WorkerReport]) -> None:
    """Counters that go back, NaN and infinity: costs stay finite and not negative."""
    timing = WorkerTiming()
    for number, report in enumerate(reports):
        timing.observe(report, average([timing]), 0.5 * number)
        for value in (timing.costs.prefill_step_s, timing.costs.prefill_token_s, timing.costs.decode_step_s):
            assert math.isfinite(value)
            assert value >= 0
        assert predicted(timing.costs, 100) > 0


def test_steps() -> None:
    """A prefill takes as many steps as its budget demands."""
    assert [steps_of(tokens, 512) for tokens in (0, 1, 512, 513)] == [0, 1, 1, 2]
