"""Rows of the index benchmark: workers that leave a full tree, and what lookups notice of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from time import perf_counter_ns
from typing import Any

import numpy as np

from benchmarks.index_plan import OURS, Bench, Samples, turns
from benchmarks.measure import pin
from benchmarks.our_index import Index
from benchmarks.report import AT_MOST, Row
from benchmarks.workload import Workload

DROP_LIMIT_MS = 20.0
GAP_LIMIT_MS = 1.0


def drop_rows(bench: Bench, indexes: Mapping[str, Index], workload: Workload, size: str) -> tuple[list[Row], set[int]]:
    """How long a drop takes, and how long a thread that looks up meanwhile waits for its answer; the workers dropped.

    The two are measured apart: who drops beside a busy thread also waits for the interpreter's lock.
    """
    times, gaps, idle = Samples(), Samples(), Samples()
    drops = bench.plan.drops
    leaving = np.random.default_rng(2).permutation(workload.workers)[: 2 * drops].tolist()
    for repeat, worker in enumerate(leaving[:drops]):
        for side, index in turns(indexes, repeat):
            start = perf_counter_ns()
            index.drop(worker)
            times.add(side, (perf_counter_ns() - start) / 1e6)
    prompts = [workload.prompt(session) for session in range(0, workload.sessions, workload.sessions // 200 + 1)]
    queries = {side: [index.query(prompt) for prompt in prompts] for side, index in indexes.items()}
    pin(bench.cores)
    for repeat, worker in enumerate(leaving[drops:]):
        for side, index in turns(indexes, repeat):
            span_s = times.values[side][repeat] / 1e3
            idle.add(side, _longest_gap_ms(index, queries[side], time.sleep, span_s))
            gaps.add(side, _longest_gap_ms(index, queries[side], index.drop, worker))
    pin(bench.cores[-1:])
    what = f"drop one of {workload.workers} at {size}"
    worst = Samples({side: [max(values)] for side, values in gaps.values.items()})
    note = (
        f"worst of {drops} drops, ours {_list(gaps, OURS)}; as long without a drop {_list(idle, OURS)}; "
        f"{len(bench.cores)} cores"
    )
    return [
        bench.row(what, "ms", times, DROP_LIMIT_MS, AT_MOST),
        bench.row(f"{what} lookup gap", "ms", worst, GAP_LIMIT_MS, AT_MOST, note),
    ], set(leaving)


def _list(samples: Samples, side: str) -> str:
    return " ".join(f"{value:.2g}" for value in sorted(samples.values[side]))


def _longest_gap_ms(index: Index, queries: Sequence[Any], act: Callable[[Any], None], argument: Any) -> float:
    """The longest time between two answers that a thread gets while `act(argument)` runs."""
    stop, running = threading.Event(), threading.Event()
    stamps: list[int] = []

    def look_up() -> None:
        for query in cycle(queries):
            index.match_times([query])
            stamps.append(perf_counter_ns())
            if len(stamps) == 100:
                running.set()
            if stop.is_set():
                return

    reader = threading.Thread(target=look_up)
    reader.start()
    running.wait()
    start = perf_counter_ns()
    act(argument)
    end = perf_counter_ns()
    stop.set()
    reader.join()
    at = np.array(stamps)
    between = slice(max(0, int(np.searchsorted(at, start)) - 1), int(np.searchsorted(at, end)) + 1)
    return float(np.diff(at[between]).max(initial=0)) / 1e6
