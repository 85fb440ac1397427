"""The index's speed beside its peer's: `python -m benchmarks.index [--quick] [--json FILE]`, or `make bench-index`.

Hashing, stored and removed events, matches, memory, dropped workers and threads; what the peer is: see peer_index.
Both sides run in this process, on one core but for the rows of threads (the peer's index lives on a thread of its own,
and is faster when that shares the caller's core), and take turns, repeat by repeat. Figures are medians of repeats.
Garbage collection is off. All payloads and queries are made before the clock starts.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.index_events import event_rows
from benchmarks.index_hash import hash_rows
from benchmarks.index_limits import limit_rows
from benchmarks.index_match import match_rows
from benchmarks.index_memory import memory_rows
from benchmarks.index_plan import FULL, QUICK, Bench, Plan
from benchmarks.index_threads import thread_rows
from benchmarks.index_views import view_rows
from benchmarks.measure import cores, pin
from benchmarks.peer_index import INSTALL, peer_name
from benchmarks.report import Row, machine, print_table, write_json
from radix import BACKEND, BACKEND_REASON


def run(bench: Bench, say: Callable[[str], None]) -> list[Row]:
    """All rows of the plan; `say` is told of each part that ends."""
    rows: list[Row] = []
    for name, part in _parts(bench):
        start = time.perf_counter()
        rows += part()
        gc.collect()
        say(f"{name}: {time.perf_counter() - start:.1f} s")
    matches = [each for each in rows if each.what.startswith("match ")]
    return rows + limit_rows(bench, matches)


def _parts(bench: Bench) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    yield "hash", partial(hash_rows, bench)
    for workers in bench.plan.event_workers:
        yield f"events W{workers}", partial(event_rows, bench, workers)
    if bench.plan.large_entries:
        yield "events at the large size", partial(event_rows, bench, 64, large=True)
    yield "views", partial(view_rows, bench)
    yield "matches", partial(match_rows, bench)
    yield "memory", partial(memory_rows, bench)
    yield "threads", partial(thread_rows, bench)


def main(arguments: list[str] | None = None, plan: Plan | None = None) -> int:
    """The command. Ends with 2 on bad usage, else 0, whether or not the goals are met."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.index", description="The index's speed beside its peer's."
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats, within a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        parser.error("this benchmark needs Linux: it pins threads to cores and reads /proc")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")
    say = partial(print, file=sys.stderr, flush=True)
    peer = peer_name()
    if not peer:
        say(f"The peer is not installed, so only our own rows come. To have it: {INSTALL}, or make bench-index")
    if BACKEND != "native":
        say(f"The native core is not there ({BACKEND_REASON}): these are the figures of the reference in Python.")
    bench = Bench(plan or (QUICK if options.quick else FULL), peer, tuple(cores()))
    facts: dict[str, Any] = {**machine(), "index": BACKEND, "quick": options.quick}
    gc.disable()
    pin(bench.cores[-1:])
    try:
        rows = run(bench, say)
    finally:
        pin(bench.cores)
        gc.enable()
    print_table("index" + (" (quick)" if options.quick else ""), rows)
    if options.json:
        write_json(options.json, "index", facts, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
