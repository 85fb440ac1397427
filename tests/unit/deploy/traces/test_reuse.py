"""Hits, distances, working sets and sessions of traces that are small enough to count by hand, or against a model."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.traces.reuse import HotPrefix, hot_prefixes, lru_hit_ratio, measure_reuse, working_sets
from deploy.traces.sessions import sessions_of
from deploy.traces.stats import spread, trace_stats
from deploy.traces.trace import Trace, TraceRequest, read_trace

PUBLISHED = Path(__file__).parents[5] / "shared" / "traces"
SIZE = 10


def trace_of(*prompts: tuple[float, tuple[int, ...]], short: int = 0) -> Trace:
    """A request for each (time, blocks), whose last block lacks `short` tokens."""
    return Trace("t", SIZE, tuple(TraceRequest(at, len(ids) * SIZE - short, 5, ids) for at, ids in prompts))


def test_blocks_hit_in_prefix_order_only() -> None:
    """A block that was seen behind one that was not is no hit; distances are those of the hits."""
    reuse = measure_reuse(trace_of((0, (1, 2, 3)), (4, (1, 2, 4)), (9, (5, 3)), (10, (1, 2, 3))))
    assert reuse.hits == [0, 2, 0, 3]
    assert reuse.requests_between == [1, 1, 2, 2, 1]
    assert reuse.seconds_between == [4, 4, 6, 6, 1]
    assert reuse.uses == {1: 3, 2: 3, 3: 3, 4: 1, 5: 1}


@settings(deadline=None, max_examples=60)
@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=25),
    capacity=st.integers(1, 30),
)
def test_an_lru_cache_hits_as_a_plain_one_does(prompts: list[list[int]], capacity: int) -> None:
    """Against a list ordered by last use; a cache for everything hits what an infinite one does."""
    names: dict[tuple[int, ...], int] = {}
    chains = [
        tuple(names.setdefault(tuple(prompt[: end + 1]), len(names)) for end in range(len(prompt)))
        for prompt in prompts
    ]
    trace = trace_of(*((float(at), chain) for at, chain in enumerate(chains)))
    cache: list[int] = []
    hits = 0
    for chain in chains:
        held = [block in cache for block in chain]
        hits += held.index(False) if False in held else len(held)
        cache = [*chain, *(block for block in cache if block not in chain)][:capacity]
    blocks = sum(map(len, chains))
    assert lru_hit_ratio(trace, capacity) == hits / blocks
    assert lru_hit_ratio(trace, len(names)) == sum(measure_reuse(trace).hits) / blocks


def test_working_sets_count_each_windows_blocks_once() -> None:
    """Windows follow each other; one without requests is empty."""
    trace = trace_of((0, (1, 2)), (5, (1, 3)), (31, (1,)))
    assert working_sets(trace, 10) == [3, 0, 0, 1]
    assert working_sets(trace, 100) == [3]


def test_hot_prefixes_are_whole_runs_by_what_they_save() -> None:
    """A run ends where requests part; what one request alone has is none."""
    trace = trace_of((0, (1, 2, 3, 4)), (1, (1, 2, 3, 5)), (2, (1, 2, 6)), (3, (1, 2, 6)))
    runs = hot_prefixes(trace, measure_reuse(trace).uses, 9)
    assert runs == [HotPrefix(2, 0, 2, 4), HotPrefix(3, 2, 1, 2), HotPrefix(6, 2, 1, 2)]
    assert [run.saved_blocks for run in runs] == [6, 1, 1]


def test_sessions_are_prompts_that_extend_each_other() -> None:
    """The latest prompt's full blocks and more; a shared system prompt alone makes no session."""
    trace = trace_of((0, (1, 2, 3)), (1, (1, 4, 5)), (2, (1, 2, 6, 7)), (3, (1, 2, 6, 8)), (4, (1, 9)), short=1)
    assert sessions_of(trace) == [[0, 2], [1], [3], [4]]
    whole = trace_of((0, (1,)), (1, (1, 2)), (2, (1, 3)), (3, (1, 3, 4)))
    assert sessions_of(whole) == [[0, 1], [2, 3]]


def test_named_sessions_are_taken_as_named() -> None:
    """Names beat what prompts look like."""
    named = [TraceRequest(float(at), 10, 1, (at,), name) for at, name in enumerate(("a", "b", "a", "b"))]
    assert sessions_of(Trace("t", SIZE, tuple(named))) == [[0, 2], [1, 3]]


def test_statistics_add_up() -> None:
    """Ratios, rates and sizes of a trace that can be counted by hand."""
    stats = trace_stats(trace_of((0, (1, 2)), (10, (1, 2, 3, 4)), (20, (5, 6))))
    assert (stats.requests, stats.duration_s, stats.requests_per_s) == (3, 20, 0.15)
    assert (stats.blocks, stats.hit_ratio_blocks, stats.hit_ratio_tokens) == (8, 0.25, 0.25)
    assert stats.requests_with_reuse == pytest.approx(1 / 3)
    assert (stats.working_set_tokens, stats.sessions) == (60, 2)
    assert stats.session_turns.max == 2
    assert stats.think_s == spread([10.0])
    assert stats.lru_hit_ratio[10] == 0.125  # a cache of one block keeps the first
    assert stats.hottest[0].saved_tokens == 20


@pytest.mark.parametrize(("name", "ratio", "requests"), [("conversation", 0.366, 12_031), ("synthetic", 0.640, 3_993)])
def test_published_traces_show_their_known_hit_ratios(name: str, ratio: float, requests: int) -> None:
    """Mooncake's traces, where they are at hand."""
    path = PUBLISHED / f"{name}_trace.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    trace = read_trace(path)
    reuse = measure_reuse(trace)
    assert len(trace) == requests
    assert sum(reuse.hits) / reuse.uses.total() == pytest.approx(ratio, abs=0.0005)
