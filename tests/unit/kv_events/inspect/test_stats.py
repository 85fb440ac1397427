"""The numbers of a stream, against a model that keeps everything and adds it up anew each time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_events import wire
from kv_events.events import BlockStored, EventBatch
from kv_events.inspect import stats as stats_module
from kv_events.inspect.stats import LAG_BATCHES, StreamStats, size_about
from kv_events.log import EventLog
from radix.keys import ROOT_HASH
from radix.tree import CLEAR, REMOVE, STORE
from tests.support.prefix_trees import columns
from tests.support.recordings import Fleet, blocks

FORMER = 3  # removed blocks that are remembered in these tests
WINDOW_S = 4.0
STEP_S = WINDOW_S / 20

Rows = list[tuple[int, int, int, list[int]]]


def batch(ts: float) -> EventBatch:
    return EventBatch("w", 1, 0, (), bytes(16), ts)


@dataclass
class Model:
    """What happened, as a list; blocks are small numbers."""

    stored_at: list[float] = field(default_factory=list)
    removed_at: list[float] = field(default_factory=list)
    received: list[tuple[float, float, int]] = field(default_factory=list)  # at, ts, bytes
    lifetimes: list[float] = field(default_factory=list)
    repeats: int = 0
    returns: int = 0
    tiers: dict[int, set[int]] = field(default_factory=dict)  # of the blocks that are held
    since: dict[int, float] = field(default_factory=dict)
    former: list[int] = field(default_factory=list)
    first: float | None = None

    def saw(self, at: float) -> None:
        self.first = at if self.first is None else self.first

    def applied(self, rows: Rows, at: float) -> None:
        self.saw(at)
        for kind, tier, _, hashes in rows:
            if kind == CLEAR:
                for block in list(self.tiers):
                    self.go(block, at)
                self.former = self.former[-FORMER:]
            for block in hashes if kind != CLEAR else []:
                if kind == STORE:
                    self.store(block, tier, at)
                elif tier in self.tiers.get(block, ()):
                    self.tiers[block].remove(tier)
                    if not self.tiers[block]:
                        self.go(block, at)
            if kind == REMOVE:
                self.former = self.former[-FORMER:]

    def store(self, block: int, tier: int, at: float) -> None:
        if tier in self.tiers.get(block, ()):
            self.repeats += 1
        elif block in self.tiers:
            self.tiers[block].add(tier)
        else:
            self.tiers[block] = {tier}
            self.since[block] = at
            self.stored_at.append(at)
            if block in self.former:
                self.former.remove(block)
                self.returns += 1

    def go(self, block: int, at: float) -> None:
        del self.tiers[block]
        self.removed_at.append(at)
        self.former.append(block)
        if block in self.since:
            self.lifetimes.append(at - self.since.pop(block))

    def replaced(self, held: dict[int, set[int]], at: float) -> None:
        self.saw(at)
        self.tiers = {block: set(tiers) for block, tiers in held.items()}
        self.since = {block: since for block, since in self.since.items() if block in held}
        self.former = [block for block in self.former if block not in held]

    def per_second(self, times: list[float], amounts: list[int], now: float) -> float:
        """Over the current step and the 19 before it, of steps counted from the first sight."""
        assert self.first is not None
        current = math.floor((now - self.first) / STEP_S)
        begin = max(0, current - 19) * STEP_S
        inside = [
            n for at, n in zip(times, amounts, strict=True) if math.floor((at - self.first) / STEP_S) > current - 20
        ]
        return sum(inside) / max(now - self.first - begin, STEP_S)


rows = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from([STORE, STORE, REMOVE]),
            st.integers(0, 2),
            st.just(ROOT_HASH),
            st.lists(st.integers(1, 8), min_size=1, max_size=4, unique=True),
        ),
        st.just((CLEAR, 0, ROOT_HASH, [])),
    ),
    max_size=4,
)
held = st.dictionaries(st.integers(1, 8), st.sets(st.integers(0, 2), min_size=1), max_size=6)
waits = st.integers(0, 40).map(lambda n: n / 16)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("batch"), waits, rows),
        st.tuples(st.just("snapshot"), waits, held),
        st.tuples(st.just("restart"), waits, st.none()),
    ),
    min_size=1,
    max_size=25,
)


@settings(max_examples=200)
@given(operations, waits)
def test_the_numbers_are_what_their_definitions_say(steps: list, wait: float) -> None:
    """Any course of batches, snapshots and restarts, with the clock that a user has."""
    model = Model()
    before, stats_module.FORMER_BLOCKS = stats_module.FORMER_BLOCKS, FORMER
    try:
        stats, now = StreamStats(WINDOW_S), 100.0
        for what, waited, argument in steps:
            now += waited
            if what == "batch":
                stats.received(batch(now - 1.5), now, 10)
                model.received.append((now, now - 1.5, 10))
                stats.applied(columns(*argument), now)
                model.applied(argument, now)
            elif what == "snapshot":
                changes = [(STORE, tier, 0, [block]) for block, tiers in argument.items() for tier in tiers]
                stats.replaced(columns(*changes), now)
                model.replaced(argument, now)
            else:
                stats.cleared(now)
                model.applied([(CLEAR, 0, 0, [])], now)
        _compare(stats, model, now + wait)
    finally:
        stats_module.FORMER_BLOCKS = before


def _compare(stats: StreamStats, model: Model, now: float) -> None:
    numbers = stats.numbers(now)
    ones = [1] * len(model.stored_at)
    assert numbers.seconds == now - (model.first or 0)
    assert numbers.batches == len(model.received)
    assert numbers.size_bytes == 10 * len(model.received)
    assert numbers.blocks == len(model.tiers)
    assert numbers.tier_blocks == tuple(sum(tier in tiers for tiers in model.tiers.values()) for tier in range(3))
    assert (numbers.stored, numbers.removed) == (len(model.stored_at), len(model.removed_at))
    assert (numbers.repeats, numbers.returns) == (model.repeats, model.returns)
    assert numbers.stored_per_s == pytest.approx(model.per_second(model.stored_at, ones, now))
    removed = model.per_second(model.removed_at, [1] * len(model.removed_at), now)
    assert numbers.removed_per_s == pytest.approx(removed)
    received = [at for at, _, _ in model.received]
    assert numbers.batches_per_s == pytest.approx(model.per_second(received, [1] * len(received), now))
    assert numbers.bytes_per_s == pytest.approx(model.per_second(received, [10] * len(received), now))
    expected = 60 * removed / len(model.tiers) if model.tiers else None
    assert numbers.churn_per_min == (expected if expected is None else pytest.approx(expected))
    mean = sum(model.lifetimes) / len(model.lifetimes) if model.lifetimes else None
    assert numbers.mean_lifetime_s == (mean if mean is None else pytest.approx(mean))
    told = len(model.stored_at) + model.repeats
    assert numbers.reuse == ((model.repeats + model.returns) / told if told else None)
    assert (numbers.lag_p50_s is None) == (not model.received)


def test_lag_is_told_by_quantiles_of_the_last_batches() -> None:
    """The smallest lag that half, or 99 of 100, do not exceed; older batches are forgotten."""
    stats = StreamStats()
    assert stats.numbers(0.0).lag_p99_s is None
    for n in range(100):
        stats.received(batch(1000.0 + n), 1000.0 + n + (n + 1) / 128, 1)
    numbers = stats.numbers(1100.0)
    assert (numbers.lag_p50_s, numbers.lag_p99_s) == (50 / 128, 99 / 128)
    for n in range(LAG_BATCHES):
        stats.received(batch(2000.0 + n), 2000.25 + n, 1)
    numbers = stats.numbers(4000.0)
    assert (numbers.lag_p50_s, numbers.lag_p99_s) == (0.25, 0.25)


def test_rates_without_a_window_are_means_over_everything() -> None:
    """As for a recording: two batches in four seconds, however long ago."""
    stats = StreamStats(None)
    for at in (10.0, 14.0):
        stats.received(batch(at), at, 100)
        stats.applied(columns((STORE, 0, 0, [int(at)])), at)
    numbers = stats.numbers(14.0)
    assert (numbers.batches_per_s, numbers.bytes_per_s, numbers.stored_per_s) == (0.5, 50.0, 0.5)
    assert stats.numbers(18.0).batches_per_s == 0.25


def test_a_clock_that_goes_back_breaks_nothing() -> None:
    """What it says is taken for the last time that was seen."""
    stats = StreamStats()
    for at in (10.0, 5.0, 11.0):
        stats.received(batch(at), at, 1)
    stats.applied(columns((STORE, 0, 0, [1])), 3.0)
    stats.applied(columns((REMOVE, 0, 0, [1])), 12.0)
    numbers = stats.numbers(0.0)
    assert numbers.seconds == 2.0
    assert numbers.mean_lifetime_s == 1.0


def test_no_more_blocks_are_kept_than_the_tree_takes() -> None:
    """A cap; and removed blocks are forgotten, too."""
    stats = StreamStats(max_blocks=100)
    stats.applied(columns((STORE, 0, 0, list(range(1, 1000)))), 1.0)
    assert stats.numbers(1.0).blocks == 100
    assert stats.numbers(1.0).stored == 100
    before, stats_module.FORMER_BLOCKS = stats_module.FORMER_BLOCKS, 10
    try:
        stats.applied(columns((REMOVE, 0, 0, list(range(1, 1000)))), 1.0)
    finally:
        stats_module.FORMER_BLOCKS = before
    assert len(stats._former) == 10


@pytest.mark.parametrize("window_s", [0.0, -1.0, math.inf, math.nan])
def test_a_window_is_a_time(window_s: float) -> None:
    """Named with its limit."""
    with pytest.raises(ValueError, match="window_s is "):
        StreamStats(window_s)


def test_sizes_that_are_not_told_are_about_right() -> None:
    """Within a fifth of what the wire makes, decoded or not, more or less as tokens are small or large numbers."""
    for _, one in Fleet().steps(200):
        exact = len(wire.encode(one))
        for batch_ in (one, wire.decode(wire.encode(one))):
            assert 0.8 < size_about(batch_) / exact < 1.25
    log = EventLog("w0", 1, 16)
    tokens = np.random.default_rng(1).integers(0, 150_000, 64 * 16).astype(np.uint32)
    hashes = np.random.default_rng(1).integers(1, 2**63, 64).astype(np.uint64)
    large = log.append([BlockStored(hashes, 0, 16, tokens)], 0.0)
    assert size_about(large) == pytest.approx(len(wire.encode(large)), rel=0.33)
    assert size_about(log.append([BlockStored(blocks(1), 0, 16)], 0.0)) < 300
