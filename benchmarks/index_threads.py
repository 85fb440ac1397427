"""Rows of the index benchmark: threads that look up while another one feeds events at a steady pace."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from itertools import count, cycle, islice
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np

from benchmarks.index_match import feed_runs, pools, store_chains
from benchmarks.index_plan import OURS, Bench, Samples, turns
from benchmarks.measure import pin
from benchmarks.our_index import Index
from benchmarks.report import AT_LEAST, AT_MOST, Row, number
from benchmarks.workload import Run, Workload, chain_at, removals, stores
from radix.keys import ROOT_HASH

BATCH = 32  # queries of ours in one call: enough that the work outweighs taking the interpreter's lock again
BLOCKS, HOLDERS = 512, 8  # of the queries
WORKERS = 64
PACE = 200_000  # blocks a second
EVENT_BLOCKS = 16
TICK_S = 0.001
LIVE_SESSIONS = 1_000  # the writer's own: it stores one and removes the oldest
SCALING_GOAL = 1.7
P99_LIMIT_US = 50.0


class Outcome(NamedTuple):
    """What a run of readers and writer gave."""

    lookups: float  # a us, of all readers
    p50_us: float  # of a call
    p99_us: float
    written: float  # M blocks/s


def thread_rows(bench: Bench) -> list[Row]:
    """One and two readers beside the writer, on all cores: ours with BATCH queries a call, the peer with one."""
    plan = bench.plan
    pin(bench.cores)
    indexes = bench.indexes()
    workload = Workload(WORKERS, plan.entries, plan.prefixes)
    feed_runs(indexes, workload.prefixes())
    feed_runs(indexes, map(workload.session, range(workload.sessions)))
    chains = pools(plan, BLOCKS, HOLDERS)["full"]
    store_chains(indexes, chains)
    queries = {side: [index.query(chain.hashes) for chain in chains] for side, index in indexes.items()}
    writers = {side: Writer(index) for side, index in indexes.items()}

    lookups = {readers: Samples() for readers in (1, 2)}
    calls = {(readers, quantile): Samples() for readers in (1, 2) for quantile in (50, 99)}
    scaling, written = Samples(), Samples()
    for repeat in range(plan.thread_rounds):
        for side, index in turns(indexes, repeat):
            for readers in (1, 2):
                batch = BATCH if side == OURS else 1
                outcome = _run(index, _batches(queries[side], batch), readers, writers[side], plan.thread_seconds)
                lookups[readers].add(side, outcome.lookups)
                calls[readers, 50].add(side, outcome.p50_us)
                calls[readers, 99].add(side, outcome.p99_us)
                written.add(side, outcome.written)
            scaling.add(side, lookups[2].values[side][-1] / lookups[1].values[side][-1])
    sweep = []
    for batch in plan.thread_batches:
        outcome = _run(indexes[OURS], _batches(queries[OURS], batch), 2, writers[OURS], plan.thread_seconds)
        note = f"p50 {number(outcome.p50_us)}, p99 {number(outcome.p99_us)} us a call"
        sweep.append(
            bench.row(f"threads 2 readers batch {batch}", "M lookups/s", Samples({OURS: [outcome.lookups]}), note=note)
        )
    pin(bench.cores[-1:])
    pace = ", ".join(f"{side} {np.median(values):.2f}" for side, values in written.values.items())
    setting = f"{BLOCKS} blocks, {HOLDERS} holders; ours {BATCH} queries a call, the peer one"
    beside = f"a writer at {PACE / 1e6:g} M blocks/s (reached: {pace}); {len(bench.cores)} cores"
    rows = [bench.row("threads 1 reader", "M lookups/s", lookups[1], note=f"{setting}; {beside}")]
    rows.append(bench.row("threads 2 readers", "x", scaling, SCALING_GOAL, AT_LEAST, f"over one reader; {beside}"))
    rows.append(bench.row("threads 2 readers lookups", "M lookups/s", lookups[2], note=setting))
    for readers in (1, 2):
        name = f"threads {readers} reader{'s' * (readers - 1)}"
        limit = P99_LIMIT_US if readers == 2 else None
        rows.append(bench.row(f"{name} p50 {BLOCKS}", "us", calls[readers, 50], note="a call"))
        rows.append(bench.row(f"{name} p99 {BLOCKS}", "us", calls[readers, 99], limit, AT_MOST, "a call"))
    return rows + sweep


def _batches(queries: Sequence[Any], batch: int) -> list[list[Any]]:
    """As many calls as there are queries, each with `batch` of them."""
    return [[queries[(first + index) % len(queries)] for index in range(batch)] for first in range(len(queries))]


def _events(index: Index) -> Iterator[tuple[int, bytes]]:
    """A stream without end: a session stored, the oldest one of LIVE_SESSIONS removed."""
    for new in count():
        run = _session(new)
        yield from [(part.worker, index.stored(part.hashes, part.parent)) for part in stores(run, EVENT_BLOCKS)]
        if new >= LIVE_SESSIONS:
            run = _session(new - LIVE_SESSIONS)
            yield from [(run.worker, index.removed(hashes)) for hashes in removals(run, EVENT_BLOCKS)]


def _session(number: int) -> Run:
    return Run(number % WORKERS, ROOT_HASH, chain_at(1 << 24 | number, 64))


class Writer:
    """Feeds an index at PACE, and goes on where it stopped: an event left out would leave holes."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._stream = _events(index)
        self._ready: list[tuple[int, bytes]] = []

    def prepare(self, seconds: float) -> None:
        """Make the payloads for a run."""
        self._ready += islice(self._stream, int(PACE * seconds) // EVENT_BLOCKS - len(self._ready))

    def write(self, seconds: float) -> int:
        """Feed in steps of TICK_S. Returns how many blocks that were."""
        start = time.perf_counter()
        written = 0
        while (elapsed := time.perf_counter() - start) < seconds:
            due = min(len(self._ready), int(elapsed * PACE / EVENT_BLOCKS))
            self._index.feed(self._ready[written:due])
            written = due
            time.sleep(TICK_S)
        del self._ready[:written]
        return written * EVENT_BLOCKS


def _run(index: Index, batches: Sequence[Sequence[Any]], readers: int, writer: Writer, seconds: float) -> Outcome:
    writer.prepare(seconds)
    stop = threading.Event()
    ready = threading.Barrier(readers + 1)
    times: list[list[int]] = [[] for _ in range(readers)]

    def read(reader: int) -> None:
        mine = times[reader]
        first = reader * len(batches) // readers
        ready.wait()
        for batch in cycle([*batches[first:], *batches[:first]]):
            start = perf_counter_ns()
            index.lookup(batch)
            mine.append(perf_counter_ns() - start)
            if stop.is_set():
                return

    threads = [threading.Thread(target=read, args=(reader,)) for reader in range(readers)]
    for thread in threads:
        thread.start()
    ready.wait()
    start = perf_counter_ns()
    written = writer.write(seconds)
    took_us = (perf_counter_ns() - start) / 1e3
    stop.set()
    for thread in threads:
        thread.join()
    calls = np.concatenate([np.array(each) for each in times])
    p50, p99 = np.percentile(calls, (50, 99)).tolist()
    return Outcome(len(calls) * len(batches[0]) / took_us, p50 / 1e3, p99 / 1e3, written / took_us)
