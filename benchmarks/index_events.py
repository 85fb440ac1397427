"""Rows of the index benchmark: events stored and removed, on trees that grow from nothing to their full size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain
from time import perf_counter_ns

import numpy as np

from benchmarks.index_drops import drop_rows
from benchmarks.index_match import session_rows
from benchmarks.index_plan import ORDERS, PEER, REFERENCE, Bench, Samples, size, turns
from benchmarks.our_index import Index, OurIndex
from benchmarks.report import Row, number
from benchmarks.workload import Run, Workload, chunks, removals, stores
from radix.reference import ReferenceTree

STORE_GOALS = {1: 10.0, 16: 5.0, 64: 4.0}  # by blocks an event
REMOVE_GOALS = {1: 10.0, 16: 4.0, 64: 3.0}
FILL_BLOCKS = 64  # an event, where it is not measured
REFERENCE_SESSIONS = 32  # of a group

Events = list[tuple[int, bytes]]


def event_rows(bench: Bench, workers: int, *, large: bool = False) -> list[Row]:
    """All that is measured on one pair of trees. `large`: the large size, most of which is filled unmeasured."""
    plan = bench.plan
    entries = plan.large_entries if large else plan.entries
    workload = Workload(workers, entries, plan.prefixes)
    indexes = bench.indexes()
    label, sessions = f"{size(entries)} W{workers}", range(workload.sessions)
    timed = _Timed(bench, indexes, workload)
    rows = []

    shared = timed.feed(chunks(workload.prefixes(), plan.chunk_sessions), _stored)
    measured = sessions
    if large:
        measured = sessions[-plan.large_sessions :]
        longest = timed.fill(sessions[: -plan.large_sessions])
        rows.append(bench.row(f"longest stored event to {label} E{FILL_BLOCKS}", "us", longest, note="growth included"))
    reference = _reference(bench, workload) if workers == 64 and not large else {}
    for blocks, samples in timed.feed(timed.groups(measured), _stored).items():
        goal = STORE_GOALS.get(blocks)
        note = "decoding included" + reference.get(("store", blocks), "")
        rows.append(bench.row(f"store {label} E{blocks}", "M blocks/s", samples, goal, note=note))
    if not large:
        for blocks, samples in shared.items():
            what = f"store shared W{workers} E{blocks}"
            rows.append(bench.row(what, "M blocks/s", samples, note="prefixes, each on up to 4 workers"))

    gone: set[int] = set()
    if workers == 64:
        rows += session_rows(bench, indexes, workload, size(entries))
        if large or not plan.large_entries:
            drops, gone = drop_rows(bench, indexes, workload, size(entries))
            rows += drops

    third = len(measured) // 3
    anywhere = timed.rng.permutation(workload.sessions - third)[: 2 * third].tolist()
    for order, part in zip(ORDERS, (measured[-third:], anywhere[:third], anywhere[third:]), strict=True):
        for blocks, samples in timed.feed(timed.groups(part, without=gone), _removed, order).items():
            refused = timed.refused.get(blocks, 0.0)
            note = ORDERS[order] + (f"; the peer refuses {refused:.0%} of the events" if refused else "")
            note += reference.get((order, blocks), "")
            what = f"remove {label} E{blocks} {order}"
            rows.append(bench.row(what, "M blocks/s", samples, REMOVE_GOALS.get(blocks), note=note))
    return rows


def _reference(bench: Bench, workload: Workload) -> dict[tuple[str, int], str]:
    """What our reference does of the same in a small tree, as words for the note."""
    timed = _Timed(bench, {REFERENCE: OurIndex(ReferenceTree())}, workload)
    sizes = len(bench.plan.event_blocks)
    groups = [group[:REFERENCE_SESSIONS] for group in timed.groups(range(3 * sizes * bench.plan.chunk_sessions))]
    stored, removed = timed.feed(groups, _stored), timed.feed(groups, _removed)
    return {
        (what, blocks): f"; our reference {number(float(np.median(samples.values[REFERENCE])))}"
        for what, by_size in (("store", stored), ("tail", removed))
        for blocks, samples in by_size.items()
    }


class _Timed:
    """Feeds both sides the same events in turn, and times it."""

    def __init__(self, bench: Bench, indexes: dict[str, Index], workload: Workload) -> None:
        self.rng = np.random.default_rng(workload.workers)
        self.refused: dict[int, float] = {}  # the peer's share of refused events in the last `feed`, by their size
        self._plan = bench.plan
        self._indexes = indexes
        self._workload = workload

    def groups(self, sessions: Sequence[int], without: Collection[int] = ()) -> Iterator[list[Run]]:
        """The sessions' blocks, one repeat's together, but for those on workers that are gone."""
        for group in chunks(sessions, self._plan.chunk_sessions):
            runs = [run for run in map(self._workload.session, group) if run.worker not in without]
            if runs:
                yield runs

    def feed(
        self,
        groups: Iterable[Sequence[Run]],
        events_of: Callable[[Index, Run, int], Events],
        order: str = "tail",
    ) -> dict[int, Samples]:
        """Blocks a us, by blocks an event: the sizes take turns, so all meet the tree at each size that it has."""
        sizes = self._plan.event_blocks
        samples = {blocks: Samples() for blocks in sizes}
        refused, offered = dict.fromkeys(sizes, 0), dict.fromkeys(sizes, 0)
        for repeat, runs in enumerate(groups):
            blocks = sizes[repeat % len(sizes)]
            total = sum(len(run.hashes) for run in runs)
            for side, index in turns(self._indexes, repeat // len(sizes)):
                events = self._arrange([events_of(index, run, blocks) for run in runs], order)
                start = perf_counter_ns()
                bad = index.feed(events)
                samples[blocks].add(side, total * 1e3 / (perf_counter_ns() - start))
                if side == PEER:
                    refused[blocks] += bad
                    offered[blocks] += len(events)
        self.refused = {blocks: refused[blocks] / offered[blocks] for blocks in sizes if offered[blocks]}
        return {blocks: each for blocks, each in samples.items() if each.values}

    def fill(self, sessions: Sequence[int]) -> Samples:
        """Grow the trees. Gives the longest event in us."""
        longest: dict[str, int] = defaultdict(int)
        for runs in self.groups(sessions):
            for side, index in self._indexes.items():
                events = [event for run in runs for event in _stored(index, run, FILL_BLOCKS)]
                longest[side] = max(longest[side], *index.feed_times(events))
        return Samples({side: [value / 1e3] for side, value in longest.items()})

    def _arrange(self, events: list[Events], order: str) -> Events:
        if order == "mixed":
            turns_of = self.rng.permutation(np.repeat(np.arange(len(events)), [len(each) for each in events]))
            left = [iter(each) for each in events]
            return [next(left[turn]) for turn in turns_of.tolist()]
        flat = list(chain.from_iterable(events))
        return [flat[index] for index in self.rng.permutation(len(flat)).tolist()] if order == "random" else flat


def _stored(index: Index, run: Run, blocks: int) -> Events:
    return [(each.worker, index.stored(each.hashes, each.parent)) for each in stores(run, blocks)]


def _removed(index: Index, run: Run, blocks: int) -> Events:
    return [(run.worker, index.removed(hashes)) for hashes in removals(run, blocks)]
