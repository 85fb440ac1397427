"""WorkerTiming: learns step costs from cumulative counters, whatever they say."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.fleet import WorkerReport
from router.pace import LEAST, MOST, MOST_AGE
from router.timing import LEAST_OF_PRIOR, OUTLIER, PRIOR, WINDOW_S, StepCosts, WorkerTiming, steps_of, typical

H100 = StepCosts(0.024, 7.1e-5, 3.2e-9, 0.016, 5e-5, 6e-8)  # of the order of 70B on 4 of them
PLAIN = StepCosts(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def mixed(
    report: WorkerReport,
    costs: StepCosts,
    prefills: list[tuple[int, int]],
    decodes: tuple[int, int, int] = (0, 0, 0),
    beside: tuple[int, int] = (0, 0),
    stall_s: float = 0.0,
) -> WorkerReport:
    """The next report of a worker that ran a step for each of `prefills` (new tokens, tokens before them), each beside
    decoding sequences (how many, tokens of their contexts), then `decodes`: steps, sequences in each, context of each.
    """
    steps, sequences, context = decodes
    attention = sum(new * (start + new / 2) for new, start in prefills)
    tokens = sum(new for new, _ in prefills)
    prefill_s = len(prefills) * costs.prefill_step_s + tokens * costs.token_s + attention * costs.attention_s
    prefill_s += len(prefills) * (beside[0] * costs.sequence_s + beside[1] * costs.context_s)
    decode_s = steps * (costs.decode_step_s + sequences * costs.sequence_s + context * costs.context_s)
    return replace(
        report,
        prefill_steps=report.prefill_steps + len(prefills),
        prefill_tokens=report.prefill_tokens + tokens,
        prefill_attention=report.prefill_attention + attention,
        prefill_decodes=report.prefill_decodes + len(prefills) * beside[0],
        prefill_context=report.prefill_context + len(prefills) * beside[1],
        prefill_s=report.prefill_s + prefill_s + stall_s,
        decode_steps=report.decode_steps + steps,
        decode_tokens=report.decode_tokens + steps * sequences,
        decode_context=report.decode_context + steps * context,
        decode_s=report.decode_s + decode_s,
    )


def after(report: WorkerReport, steps: list[int], costs: StepCosts, decode_steps: int = 0) -> WorkerReport:
    """The same for prompts at their beginning, and three short sequences that decode."""
    return mixed(report, costs, [(size, 0) for size in steps], (decode_steps, 3, 100))


def some_load(random: Random) -> tuple[list[tuple[int, int]], tuple[int, int, int], tuple[int, int]]:
    """Half a second as a busy worker may spend it: chunks of long and short prompts, batches of all sizes."""
    sizes = (40, 300, 2048, 8192)
    prefills = [(random.choice(sizes), random.choice((0, 0, 4096, 32768))) for _ in range(random.randint(0, 3))]
    sequences = random.randint(1, 64)
    batch = (sequences, sequences * random.randint(100, 8000))
    return prefills, (random.randint(1, 10), *batch), batch


def scaled(factor: float) -> StepCosts:
    """H100 so many times slower."""
    return StepCosts(*(factor * term for term in H100))


def predicted(costs: StepCosts, tokens: int) -> float:
    return costs.prefill_s(tokens, 512)


def batch_s(costs: StepCosts, sequences: int = 32, context: int = 4000) -> float:
    """A decode step of so many sequences with so much context each."""
    return costs.decode_step_s + sequences * (costs.sequence_s + context * costs.context_s)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("step_s", [1e-3, 5e-3, 0.02, 0.1])
@pytest.mark.parametrize("token_s", [1e-6, 1e-5, 1e-4, 1e-3])
def test_it_converges_to_the_workers_costs(step_s: float, token_s: float, seed: int) -> None:
    """From a fast GPU to a slow CPU: after some 500 prefill steps predictions are within a sixth or 4 ms."""
    costs = PLAIN._replace(prefill_step_s=step_s, token_s=token_s, decode_step_s=2 * step_s)
    timing, report, random = WorkerTiming(), WorkerReport(), Random(seed)
    for _ in range(120):
        steps = [random.choice((1, 20, 100, 512)) for _ in range(random.randint(1, 8))]
        report = after(report, steps, costs, decode_steps=5)
        timing.observe(report, PRIOR)
    for tokens in (1, 512):
        assert predicted(timing.costs, tokens) == pytest.approx(predicted(costs, tokens), rel=0.16, abs=0.004)
    decode_s = timing.costs.decode_step_s + 3 * timing.costs.sequence_s
    assert decode_s == pytest.approx(costs.decode_step_s, rel=0.1, abs=0.001)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("scale", "within"), [(0.2, 0.05), (1.0, 0.05), (10.0, 0.3)])
def test_every_kind_of_step_is_predicted(scale: float, within: float, seed: int) -> None:
    """Long and short prompts, alone or after cached ones, small and large batches, from two minutes of a busy worker's
    reports. One that is ten times as slow has shown a tenth of the steps by then."""
    costs = StepCosts(*(scale * term for term in H100))
    timing, report, random = WorkerTiming(), WorkerReport(), Random(seed)
    while report.prefill_s + report.decode_s < 120:
        report = mixed(report, costs, *some_load(random))
        timing.observe(report, PRIOR)
    for tokens, cached in ((1000, 0), (8192, 0), (80_000, 0), (2000, 30_000)):
        assert timing.costs.prefill_s(tokens, 8192, cached) == pytest.approx(
            costs.prefill_s(tokens, 8192, cached), rel=within
        )
    for sequences, context in ((1, 1000), (32, 4000), (64, 8000)):
        assert batch_s(timing.costs, sequences, context) == pytest.approx(
            batch_s(costs, sequences, context), rel=within
        )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("stalls", [1, 3])
def test_a_stall_changes_little(stalls: int, seed: int) -> None:
    """A report of a hundred times the time that its work takes, among many: predictions stay within a half."""
    timing, report, random = WorkerTiming(), WorkerReport(), Random(seed)
    for number in range(120):
        load = some_load(random)
        stalled = number >= 60 and number % 20 == 0 and number < 60 + 20 * stalls
        alone_s = mixed(WorkerReport(), H100, *load).prefill_s
        report = mixed(report, H100, *load, stall_s=99 * max(alone_s, 0.05) if stalled and load[0] else 0.0)
        timing.observe(report, PRIOR)
        if number > 60:
            assert predicted(timing.costs, 8000) == pytest.approx(predicted(H100, 8000), rel=0.5)
            assert batch_s(timing.costs) == pytest.approx(batch_s(H100), rel=0.5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("pace", [0.5, 2.0])
def test_a_new_pace_is_found(pace: float, seed: int) -> None:
    """A GPU that shares, or no longer: after three windows of its work it is taken for what it is."""
    timing, report, random = WorkerTiming(), WorkerReport(), Random(seed)
    for _ in range(200):
        report = mixed(report, H100, *some_load(random))
        timing.observe(report, PRIOR)
    changed = StepCosts(*(pace * term for term in H100))
    begun = report.prefill_s + report.decode_s
    while report.prefill_s + report.decode_s < begun + 3 * WINDOW_S:
        report = mixed(report, changed, *some_load(random))
        timing.observe(report, PRIOR)
    for measure in (lambda costs: costs.prefill_s(8000, 8192), batch_s):
        old, new, found = measure(H100), measure(changed), measure(timing.costs)
        assert (found - old) / (new - old) == pytest.approx(1.0, abs=0.25)


def test_small_prefills_do_not_make_a_worker_look_slow() -> None:
    """Two equal workers, one with short prefills thanks to its cache: both predict the same for a long one."""
    costs = PLAIN._replace(prefill_step_s=0.010, token_s=1e-4, decode_step_s=0.01)
    timings = []
    for sizes in ([20, 60, 30], [400, 512, 300]):
        timing, report = WorkerTiming(), WorkerReport()
        for number in range(40):
            report = after(report, [sizes[number % 3]] * 3, costs)
            timing.observe(report, PRIOR)
        timings.append(predicted(timing.costs, 500))
    assert timings[0] == pytest.approx(timings[1], rel=0.25)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stalls", [1, 2])
@pytest.mark.parametrize("prior", [0.5, 1.0, 2.0])
def test_a_slow_first_step_poisons_nothing(prior: float, stalls: int, seed: int) -> None:
    """The first step, or two, takes ten seconds (something is compiled): predictions stay within a few times the prior,
    and are near after seven seconds of ordinary work, or twenty."""
    timing, random = WorkerTiming(scaled(prior)), Random(seed)
    report = WorkerReport()
    for _ in range(stalls):
        report = mixed(report, H100, [(100, 0)], (2, 3, 100), stall_s=10.0)
        timing.observe(report, scaled(prior))
        assert predicted(timing.costs, 100) < 1.1 * OUTLIER**stalls * max(prior, 1.0) * predicted(H100, 100)
    begun = report.prefill_s + report.decode_s
    while report.prefill_s + report.decode_s < begun + (7 if stalls == 1 else 20):
        report = mixed(report, H100, *some_load(random))
        timing.observe(report, scaled(prior))
    assert timing.costs.prefill_s(8000, 8192) == pytest.approx(H100.prefill_s(8000, 8192), rel=0.25)
    assert batch_s(timing.costs) == pytest.approx(batch_s(H100), rel=0.25)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_prior_that_is_wrong_by_two_is_overcome_at_once(factor: float, seed: int) -> None:
    """After ten seconds of work predictions are within a fifth."""
    timing, report, random = WorkerTiming(scaled(factor)), WorkerReport(), Random(seed)
    while report.prefill_s + report.decode_s < 10:
        report = mixed(report, H100, *some_load(random))
        timing.observe(report, scaled(factor))
    assert timing.costs.prefill_s(8000, 8192) == pytest.approx(H100.prefill_s(8000, 8192), rel=0.2)
    assert batch_s(timing.costs) == pytest.approx(batch_s(H100), rel=0.2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("pace", [0.5, 2.0, 4.0])
def test_a_new_pace_is_found_at_once_and_back_again(pace: float, seed: int) -> None:
    """Lower clocks, or a neighbour: five reports with work of each kind tell, and five more once it has gone; what was
    learned before still holds then."""
    timing, report, random = WorkerTiming(), WorkerReport(), Random(seed)

    def run(costs: StepCosts, reports: int) -> None:
        nonlocal report
        for _ in range(reports):
            prefills, decodes, beside = some_load(random)
            report = mixed(report, costs, prefills or [(4096, 0)], decodes, beside)
            timing.observe(report, PRIOR)

    run(H100, 200)
    for costs, named in ((scaled(pace), pace), (H100, 1.0)):
        run(costs, 5)
        assert timing.costs.prefill_s(8000, 8192) == pytest.approx(costs.prefill_s(8000, 8192), rel=0.2)
        assert batch_s(timing.costs) == pytest.approx(batch_s(costs), rel=0.2)
        assert timing.pace == pytest.approx((named, named), rel=0.25)


def test_prefill_may_slow_down_alone() -> None:
    """Lower clocks cost compute, not memory bandwidth: prefill has a pace of its own."""
    timing, report, random = WorkerTiming(), WorkerReport(), Random(1)
    slower = H100._replace(token_s=3 * H100.token_s, attention_s=3 * H100.attention_s)
    for number in range(210):
        report = mixed(report, H100 if number < 200 else slower, [(8192, 0)], *some_load(random)[1:])
        timing.observe(report, PRIOR)
    assert timing.pace[0] > 2
    assert timing.pace[1] == 1
    assert batch_s(timing.costs) == pytest.approx(batch_s(H100), rel=0.15)


def test_an_avoided_worker_is_tried_again() -> None:
    """A pace is forgotten where no work comes to show it: whatever slowed the worker down may have gone."""
    timing, report, random = WorkerTiming(), WorkerReport(), Random(1)
    for number in range(200 + LEAST):
        costs = H100 if number < 200 else scaled(5)
        report = mixed(report, costs, [(8192, 0)], *some_load(random)[1:])
        timing.observe(report, PRIOR)
    assert min(timing.pace) > 3
    for _ in range(MOST_AGE - LEAST):
        timing.observe(report, PRIOR)
    assert min(timing.pace) > 3
    for _ in range(LEAST):
        timing.observe(report, PRIOR)
    assert max(timing.pace) == 1.0
    assert timing.costs.prefill_s(8000, 8192) < 2 * H100.prefill_s(8000, 8192)


def test_what_an_idle_worker_had_shown_fades() -> None:
    """A worker that was slow, and then had nothing to do for long, is taken to be like its peers."""
    timing, report, random = WorkerTiming(), WorkerReport(), Random(1)
    for _ in range(20):
        report = mixed(report, scaled(20), *some_load(random))
        timing.observe(report, H100)
    assert timing.costs.prefill_s(8000, 8192) > 10 * H100.prefill_s(8000, 8192)
    for _ in range(3600):
        timing.observe(report, H100)
    assert timing.costs.prefill_s(8000, 8192) == pytest.approx(H100.prefill_s(8000, 8192), rel=0.2)


def test_before_data_the_prior_stands() -> None:
    """A worker that has done nothing changes nothing; what is typical is so of those that were measured."""
    timing = WorkerTiming()
    assert not timing.observe(WorkerReport(), PRIOR)
    assert not timing.measured
    assert timing.costs == PRIOR
    assert typical([timing]) is typical([]) is None
    measured = WorkerTiming()
    assert measured.observe(after(WorkerReport(), [100], StepCosts(0.02, 1e-3, 0, 0.05, 0, 0), 1), PRIOR)
    assert measured.measured
    assert typical([timing, measured]) == measured.learned


def test_what_was_not_seen_is_as_it_is_with_its_peers() -> None:
    """A worker that has prefilled short prompts only: attention, and what decoding costs, are the prior's."""
    peers = StepCosts(*(3 * term for term in PRIOR))
    timing, report = WorkerTiming(), WorkerReport()
    for _ in range(20):
        report = mixed(report, H100, [(20, 0), (40, 0)])
        timing.observe(report, peers)
    assert timing.costs.attention_s == pytest.approx(peers.attention_s, rel=0.05)
    assert timing.costs[3:] == pytest.approx(peers[3:])
    assert predicted(timing.costs, 30) == pytest.approx(predicted(H100, 30), rel=0.2)


def test_a_long_past_in_one_report_counts_no_more_than_a_window() -> None:
    """A router that restarted sees an hour's work at once, and still learns that the pace is another now."""
    random, past = Random(1), WorkerReport()
    while past.prefill_s + past.decode_s < 3600:
        past = mixed(past, H100, *some_load(random))
    timing, report = WorkerTiming(), past
    timing.observe(past, PRIOR)
    slower = StepCosts(*(2 * term for term in H100))
    while report.prefill_s + report.decode_s < past.prefill_s + past.decode_s + 4 * WINDOW_S:
        report = mixed(report, slower, *some_load(random))
        timing.observe(report, PRIOR)
    assert timing.costs.prefill_s(8000, 8192) == pytest.approx(slower.prefill_s(8000, 8192), rel=0.2)


COUNTS = st.integers(0, 2**63)
SECONDS = st.floats(allow_nan=True, allow_infinity=True)
REPORTS = st.builds(
    WorkerReport,
    prefill_steps=COUNTS | st.integers(0, 100),
    prefill_tokens=COUNTS | st.integers(0, 10_000),
    prefill_s=SECONDS | st.floats(0, 100),
    prefill_attention=SECONDS | st.floats(0, 1e9),
    prefill_decodes=COUNTS | st.integers(0, 100),
    prefill_context=COUNTS | st.integers(0, 10_000),
    decode_steps=COUNTS | st.integers(0, 100),
    decode_tokens=COUNTS | st.integers(0, 100),
    decode_context=COUNTS | st.integers(0, 10_000),
    decode_s=SECONDS | st.floats(0, 100),
)


@settings(max_examples=50)
@given(st.lists(REPORTS, max_size=20))
def test_senseless_reports_never_make_senseless_costs(reports: list[WorkerReport]) -> None:
    """Counters that go back, NaN and infinity: costs stay finite, and no term is less than its share of the prior at
    the fastest pace."""
    timing = WorkerTiming()
    for report in reports:
        prior = typical([timing]) or PRIOR
        timing.observe(report, prior)
        for value, least in zip(timing.costs, prior, strict=True):
            assert math.isfinite(value)
            assert value >= 0.999 * min(LEAST_OF_PRIOR / MOST * least, value + 1) > 0
        assert math.isfinite(predicted(timing.costs, 100))
        assert predicted(timing.costs, 100) > 0


@settings(max_examples=5, deadline=None)
@given(st.lists(REPORTS, max_size=5))
def test_after_senseless_reports_sense_is_learned(reports: list[WorkerReport]) -> None:
    """However absurd they were: none counts more than a window, and they fade."""
    timing, random = WorkerTiming(), Random(3)
    for report in reports:
        timing.observe(report, PRIOR)
    report = WorkerReport()
    while report.prefill_s + report.decode_s < 15 * WINDOW_S:
        report = mixed(report, H100, *some_load(random))
        timing.observe(report, PRIOR)
    assert predicted(timing.costs, 8192) == pytest.approx(predicted(H100, 8192), rel=0.5)


def test_steps() -> None:
    """A prefill takes as many steps as its budget demands."""
    assert [steps_of(tokens, 512) for tokens in (0, 1, 512, 513)] == [0, 1, 1, 2]
