"""Rows of the index benchmark: matches, one query a call, the result read as Python uses it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from benchmarks.index_plan import OURS, PEER, REFERENCE, Bench, Plan, Samples, turns
from benchmarks.our_index import Index, OurIndex
from benchmarks.report import Row, number
from benchmarks.workload import Run, Workload, chain_at, stores
from radix.keys import ROOT_HASH, Hashes
from radix.reference import ReferenceTree

GOALS = {32: 5.0, 128: 8.0, 512: 15.0, 4_096: 50.0}  # by blocks
STORE_BLOCKS = 64  # an event
ODD_BLOCKS = 512  # the one length at which the kinds that follow are measured, too
SPREAD, HOLED = "spread", "holed"
SPREAD_STEP = 8
WORDS = {
    SPREAD: ", each holder to another depth",
    HOLED: ", held in full by workers that keep a child of a lost block elsewhere",
}


class Chain(NamedTuple):
    """A query, and how many leading pieces of `step` blocks each worker holds of it."""

    hashes: Hashes
    step: int
    pieces: dict[int, int]


def session_rows(bench: Bench, indexes: Mapping[str, Index], workload: Workload, size: str) -> list[Row]:
    """Whole prompts of the workload's sessions: 32 shared and 64 private blocks."""
    plan = bench.plan
    chosen = np.random.default_rng(3).integers(workload.sessions, size=(plan.match_rounds, plan.match_samples))
    samples = Samples(), Samples()
    for repeat, part in enumerate(chosen.tolist()):
        prompts = [workload.prompt(session) for session in part]
        for side, index in turns(indexes, repeat):
            _add(samples, side, index.match_times([index.query(prompt) for prompt in prompts]))
    return _rows(bench, f"96 {size}", samples, None, "32 shared and 64 private blocks; other sessions each time")


def match_rows(bench: Bench) -> list[Row]:
    """Chains of each length and kind, held by each number of workers, in a tree that holds `entries` beside them."""
    plan = bench.plan
    indexes = bench.indexes()
    workload = Workload(plan.match_workers, plan.entries, plan.prefixes)
    feed_runs(indexes, workload.prefixes())
    feed_runs(indexes, map(workload.session, range(workload.sessions)))
    return [
        each
        for holders in plan.match_holders
        for blocks in plan.match_blocks
        for each in _cell(bench, indexes, blocks, holders)
    ]


def feed_runs(indexes: Mapping[str, Index], runs: Iterable[Run]) -> None:
    """Store without timing it."""
    left = iter(runs)
    while group := list(islice(left, 1024)):
        for index in indexes.values():
            parts = [part for run in group for part in stores(run, STORE_BLOCKS)]
            index.feed([(part.worker, index.stored(part.hashes, part.parent)) for part in parts])


def pools(plan: Plan, blocks: int, holders: int) -> dict[str, list[Chain]]:
    """Queries that all holders hold in full, half, or not at all.

    Of one length there are two more. "spread": each holder holds to another depth. "holed": full, while every worker
    keeps a block elsewhere whose parent it has lost, so nothing can be told from the ends of a path alone.
    """
    step = min(STORE_BLOCKS, blocks // 2)
    held = {"full": blocks // step, "half": blocks // step // 2, "none": 0}
    most = min(plan.pool_chains, plan.pool_blocks // blocks, plan.pool_entries // (blocks * holders))
    rng = np.random.default_rng(blocks + holders)
    made: dict[str, list[Chain]] = {}
    for kind in (*held, SPREAD, HOLED) if blocks == ODD_BLOCKS else held:
        made[kind] = []
        for index in range(max(plan.pool_least, most)):
            hashes = chain_at(len(made) << 20 | index, blocks)
            workers = rng.permutation(plan.match_workers)[:holders].tolist()
            if kind == SPREAD:
                depths = rng.integers(1, blocks // SPREAD_STEP, size=holders, endpoint=True).tolist()
                made[kind].append(Chain(hashes, SPREAD_STEP, dict(zip(workers, depths, strict=True))))
            else:
                pieces = held.get(kind, held["full"])
                made[kind].append(Chain(hashes, step, {worker: pieces for worker in workers if pieces}))
    return made


def store_chains(indexes: Mapping[str, Index], chains: Iterable[Chain]) -> None:
    """Each piece to all who hold it."""
    for chain in chains:
        run = Run(0, ROOT_HASH, chain.hashes[: chain.step * max(chain.pieces.values(), default=0)])
        for index in indexes.values():
            payloads = [index.stored(part.hashes, part.parent) for part in stores(run, chain.step)]
            index.feed([(worker, piece) for worker, held in chain.pieces.items() for piece in payloads[:held]])


def _remove_chains(indexes: Mapping[str, Index], chains: Iterable[Chain]) -> None:
    for chain in chains:
        run = Run(0, ROOT_HASH, chain.hashes[: chain.step * max(chain.pieces.values(), default=0)])
        for index in indexes.values():
            payloads = [index.removed(part.hashes[::-1]) for part in stores(run, chain.step)]
            index.feed([(worker, piece) for worker, held in chain.pieces.items() for piece in payloads[:held][::-1]])


def _make_holes(bench: Bench, indexes: Mapping[str, Index]) -> None:
    """Every worker loses the first of two blocks."""
    pair = chain_at(1 << 23, 2)
    for index in indexes.values():
        stored, removed = index.stored(pair, ROOT_HASH), index.removed(pair[:1])
        index.feed([(worker, payload) for worker in range(bench.plan.match_workers) for payload in (stored, removed)])


def _fill_holes(bench: Bench, indexes: Mapping[str, Index]) -> None:
    for index in indexes.values():
        removed = index.removed(chain_at(1 << 23, 2)[1:])
        index.feed([(worker, removed) for worker in range(bench.plan.match_workers)])


def _cell(bench: Bench, indexes: dict[str, Index], blocks: int, holders: int) -> list[Row]:
    """One length on one number of holders: the kinds of hits, and the sides, in turn."""
    plan = bench.plan
    kinds = pools(plan, blocks, holders)
    sides = dict(indexes)
    if holders == min(plan.match_holders):
        sides[REFERENCE] = OurIndex(ReferenceTree())
    for chains in kinds.values():
        store_chains(sides, chains)
    queries = {
        (kind, side): [index.query(chain.hashes) for chain in chains]
        for kind, chains in kinds.items()
        for side, index in sides.items()
    }
    for (kind, side), asked in queries.items():
        chain = kinds[kind][0]
        expected = {worker: held * chain.step for worker, held in chain.pieces.items()}
        assert sides[side].depths(asked[0]) == expected, f"{side} answers otherwise: {blocks} {kind} H{holders}"

    times = {kind: (Samples(), Samples()) for kind in kinds}
    as_dict = {kind: Samples() for kind in kinds}
    rng = np.random.default_rng(blocks)
    for repeat in range(plan.match_rounds):
        for kind, chains in kinds.items():
            if kind == HOLED:
                _make_holes(bench, sides)
            order = rng.integers(len(chains), size=plan.match_samples).tolist()
            for side, index in turns(sides, repeat):
                chosen = [queries[kind, side][at] for at in order]
                _add(times[kind], side, index.match_times(chosen))
                if side == OURS:
                    as_dict[kind].add(OURS, float(np.median(index.dict_times(chosen))) / 1e3)
            if kind == HOLED:
                _fill_holes(bench, sides)
    for chains in kinds.values():
        _remove_chains(indexes, chains)

    rows = []
    for kind, chains in kinds.items():
        name = f"{blocks} {kind} H{holders}"
        as_dict[kind].values[PEER] = times[kind][0].values[PEER]
        goal = GOALS.get(blocks) if kind not in (SPREAD, HOLED) else None
        note = f"{len(chains)} chains" + WORDS.get(kind, "")
        rows += _rows(bench, name, times[kind], goal, note)
        rows.append(bench.row(f"match p50 {name} as_dict", "us", as_dict[kind], note="ours as a dict too"))
    return rows


def _add(samples: tuple[Samples, Samples], side: str, times: Sequence[int]) -> None:
    for each, quantile in zip(samples, (50, 99), strict=True):
        each.add(side, float(np.percentile(times, quantile)) / 1e3)


def _rows(bench: Bench, name: str, samples: tuple[Samples, Samples], goal: float | None, note: str) -> list[Row]:
    rows = []
    for each, quantile in zip(samples, ("p50", "p99"), strict=True):
        reference = each.figure(REFERENCE)
        told = f"{note}; our reference {number(reference.median)}" if reference else note
        rows.append(bench.row(f"match {quantile} {name}", "us", each, goal, note=told))
    return rows
