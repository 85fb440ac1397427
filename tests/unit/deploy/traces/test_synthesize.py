"""Synthetic traces: repeatable, shaped as their workload says, and fitted so that more of the same can be made."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from deploy.traces.fit import fit_workload
from deploy.traces.reuse import measure_reuse
from deploy.traces.sessions import sessions_of
from deploy.traces.stats import trace_stats
from deploy.traces.synthesize import synthesize
from deploy.traces.trace import Trace, read_trace
from deploy.traces.workload import AGENT, BATCH, CHAT, PRESETS, RAG, Distribution, Workload, Zipf
from rhizome.errors import InvalidRequest

PUBLISHED = Path(__file__).parents[5] / "shared" / "traces"
REQUESTS = 3000


def nameless(trace: Trace) -> Trace:
    """As one that does not tell its sessions."""
    return replace(trace, requests=tuple(replace(request, session="") for request in trace.requests))


def hit_ratio(trace: Trace) -> float:
    """Of an infinite cache, of blocks."""
    reuse = measure_reuse(trace)
    return sum(reuse.hits) / reuse.uses.total()


@pytest.mark.parametrize("workload", PRESETS.values(), ids=PRESETS.keys())
def test_equal_seeds_make_equal_traces_that_hold_together(workload: Workload) -> None:
    """Same seed, same trace; another seed, another. Every prompt has its blocks, each id always behind the same one."""
    trace = synthesize(workload, 400, 7)
    assert trace == synthesize(workload, 400, 7)
    assert trace != synthesize(workload, 400, 8)
    assert len(trace) == 400
    assert trace.requests[0].arrival_s == 0
    assert [r.arrival_s for r in trace.requests] == sorted(r.arrival_s for r in trace.requests)
    parents: dict[int, int] = {}
    for request in trace.requests:
        assert 1 <= request.input_tokens <= workload.max_input_tokens
        assert request.output_tokens >= 1
        assert len(request.block_ids) == math.ceil(request.input_tokens / workload.block_size)
        for before, block in zip((-1, *request.block_ids), request.block_ids, strict=False):
            assert parents.setdefault(block, before) == before
    assert sorted(parents) == list(range(len(parents)))  # numbered in order of first sight


@pytest.mark.parametrize(
    ("workload", "low", "high"),
    [(CHAT, 0.65, 0.9), (AGENT, 0.92, 0.98), (RAG, 0.5, 0.8), (BATCH, 0.0, 0.0)],
    ids=["chat", "agent", "rag", "batch"],
)
def test_presets_reuse_what_they_promise(workload: Workload, low: float, high: float) -> None:
    """Agents 95%, batches nothing, the others between."""
    assert low <= hit_ratio(synthesize(workload, REQUESTS, 1)) <= high


def test_rate_is_the_workloads_from_the_start() -> None:
    """Sessions that began before the trace go on in it, so the first quarter is as busy as the last."""
    trace = synthesize(replace(CHAT, burstiness=0.0, requests_per_s=10.0), 6000, 3)
    at = [request.arrival_s for request in trace.requests]
    assert len(at) / trace.duration_s == pytest.approx(10, rel=0.12)
    assert at[1500] / trace.duration_s == pytest.approx(0.25, abs=0.05)


def test_bursts_and_days_show_in_the_arrivals() -> None:
    """Counts of spans spread more with burstiness; a day's first half is busier than its second."""
    plain = replace(BATCH, burstiness=0.0, requests_per_s=5.0)
    spreads = [fit_workload(synthesize(w, REQUESTS, 5)).burstiness for w in (plain, replace(plain, burstiness=1.0))]
    assert spreads[0] < 0.3
    assert 0.6 < spreads[1] < 1.4
    day = synthesize(replace(plain, diurnal=0.8, day_s=600.0), REQUESTS, 5)
    morning = sum(request.arrival_s < 300 for request in day.requests if request.arrival_s < 600)
    assert morning > 2 * sum(300 <= request.arrival_s < 600 for request in day.requests)


def test_a_prompt_that_grows_too_long_starts_over() -> None:
    """As agents compact their context: no prompt passes the limit, and the session goes on."""
    trace = synthesize(replace(AGENT, max_input_tokens=20_000), 1000, 2)
    lengths = [[trace.requests[n].input_tokens for n in session] for session in sessions_of(trace)]
    assert max(map(max, lengths)) <= 20_000
    assert any(later < earlier for turns in lengths for earlier, later in pairwise(turns))


def test_tenants_are_skewed() -> None:
    """The first of Zipf's tenants asks most; a session has one tenant."""
    trace = synthesize(replace(CHAT, tenants=Zipf(3, 1.5)), 2000, 2)
    counts = [sum(r.tenant == f"tenant-{n}" for r in trace.requests) for n in range(3)]
    assert sum(counts) == 2000
    assert counts[0] > counts[1] > counts[2] > 0
    assert len({(r.session, r.tenant) for r in trace.requests}) == len({r.session for r in trace.requests})


def test_inferred_sessions_are_nearly_the_true_ones() -> None:
    """Without names most of an agent's turns are put where they belong."""
    trace = synthesize(AGENT, 2000, 4)
    true = {(a, b) for session in sessions_of(trace) for a, b in pairwise(session)}
    told = {(a, b) for session in sessions_of(nameless(trace)) for a, b in pairwise(session)}
    assert len(true & told) > 0.95 * len(true)
    assert len(told - true) < 0.02 * len(true)


@pytest.mark.parametrize("workload", PRESETS.values(), ids=PRESETS.keys())
def test_what_is_fitted_and_made_again_is_like_its_source(workload: Workload) -> None:
    """From a trace without session names. A heavy tail on few documents or sessions makes single traces differ: lengths
    within a third in the mean, hit ratio within 0.06, requests with reuse within 0.1, the rate within a third."""
    source = nameless(synthesize(workload, REQUESTS, 11))
    again = synthesize(fit_workload(source), REQUESTS, 12)
    ours, theirs = trace_stats(again), trace_stats(source)
    assert ours.block_size == theirs.block_size
    assert ours.input_tokens.mean == pytest.approx(theirs.input_tokens.mean, rel=0.35)
    assert ours.output_tokens.mean == pytest.approx(theirs.output_tokens.mean, rel=0.1)
    assert ours.hit_ratio_blocks == pytest.approx(theirs.hit_ratio_blocks, abs=0.06)
    assert ours.requests_with_reuse == pytest.approx(theirs.requests_with_reuse, abs=0.1)
    assert ours.requests_per_s == pytest.approx(theirs.requests_per_s, rel=0.35)


@pytest.mark.parametrize("name", ["conversation", "synthetic"])
def test_published_traces_are_made_again(name: str) -> None:
    """Mooncake's, where they are at hand: mean lengths within 12%, hit ratio within 0.04, working set within 12%."""
    path = PUBLISHED / f"{name}_trace.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    source = read_trace(path)
    again = synthesize(fit_workload(source), len(source), 1)
    tokens = [sum(r.input_tokens for r in trace.requests) for trace in (again, source)]
    outputs = [sum(r.output_tokens for r in trace.requests) for trace in (again, source)]
    distinct = [len({block for r in trace.requests for block in r.block_ids}) for trace in (again, source)]
    for ours, theirs in (tokens, outputs, distinct):
        assert ours == pytest.approx(theirs, rel=0.12)
    assert hit_ratio(again) == pytest.approx(hit_ratio(source), abs=0.04)


def test_distributions_keep_means_and_order() -> None:
    """Many samples become a few points of equal weight with the same mean; geometric turns have theirs."""
    rng = random.Random(1)
    values = [rng.lognormvariate(3, 1.5) for _ in range(5000)]
    fitted = Distribution.of(values)
    assert len(fitted.points) == 200
    assert fitted.mean == pytest.approx(sum(values) / len(values))
    assert list(fitted.points) == sorted(fitted.points)
    assert Distribution.of([]).points == (1.0,)
    assert Distribution.geometric(4).mean == pytest.approx(4, rel=0.03)
    assert set(Distribution.geometric(1).points) == {1.0}


@pytest.mark.parametrize(
    ("field", "value"), [("system_share", 1.5), ("requests_per_s", 0.0), ("block_size", 0), ("burstiness", -1.0)]
)
def test_impossible_workloads_are_refused(field: str, value: float) -> None:
    """With the field's name, before anything is made."""
    with pytest.raises(InvalidRequest, match=field):
        replace(CHAT, **{field: value})


def test_a_trace_of_one_request_can_be_fitted() -> None:
    """Nothing to learn from is no error."""
    one = synthesize(CHAT, 1, 1)
    assert len(synthesize(fit_workload(one), 20, 1)) == 20
    with pytest.raises(InvalidRequest, match="requests is 0"):
        synthesize(CHAT, 0, 1)
