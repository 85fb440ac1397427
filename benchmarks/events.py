"""The events' speed and cost: `python -m benchmarks.events [--quick] [--json FILE]`, or `make bench-events`.

Payloads into a tree beside msgspec and the peer's tree; a worker's batches over each transport into a router's tree;
what publishing costs an engine's step; how fast a router that starts anew is in step with a fleet. Decoding is measured
as benchmarks.index measures: one core, both sides in turn. Else this process is the router, pinned to the last core;
workers and Redis are processes on the others. Garbage collection is off in this one.
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

from benchmarks.events_decode import decode_rows, foreign_rows
from benchmarks.events_plan import FULL, QUICK, Bench, Plan
from benchmarks.events_processes import has_redis
from benchmarks.events_publisher import publisher_rows
from benchmarks.events_recovery import TRANSPORTS as RECOVERED
from benchmarks.events_recovery import recovery_rows
from benchmarks.events_transports import transport_rows
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
    return rows


def _parts(bench: Bench) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    yield "decode", partial(decode_rows, bench)
    yield "foreign", partial(foreign_rows, bench)
    for transport in bench.transports:
        yield f"bus {transport}", partial(transport_rows, bench, transport)
    yield "publisher", partial(publisher_rows, bench)
    for transport in bench.transports:
        if transport in RECOVERED:
            yield f"recovery {transport}", partial(recovery_rows, bench, transport)


def main(arguments: list[str] | None = None, plan: Plan | None = None) -> int:
    """The command. Ends with 2 on bad usage, else 0, whether or not the goals are met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.events", description="The events' speed and cost.")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, within a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        parser.error("this benchmark needs Linux: it pins processes to cores")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")
    say = partial(print, file=sys.stderr, flush=True)
    peer = _peer_name()
    if not peer:
        say(f"The peer or msgspec is not installed, so only our own rows come. To have them: {INSTALL} msgspec")
    if not has_redis():
        say("redis-server is not on the path: rows of Redis are left out (apt-get install redis-server)")
    if BACKEND != "native":
        say(f"The native core is not there ({BACKEND_REASON}): these are the figures of the reference in Python.")
    bench = Bench(plan or (QUICK if options.quick else FULL), peer, tuple(cores()), has_redis())
    facts: dict[str, Any] = {**machine(), "index": BACKEND, "quick": options.quick, "redis": has_redis()}
    gc.disable()
    pin(bench.cores[-1:])
    try:
        rows = run(bench, say)
    finally:
        pin(bench.cores)
        gc.enable()
    print_table("events" + (" (quick)" if options.quick else ""), rows)
    if options.json:
        write_json(options.json, "events", facts, rows)
    return 0


def _peer_name() -> str:
    try:
        import msgspec
    except ImportError:
        return ""
    peer = peer_name()
    return f"msgspec {msgspec.__version__}, {peer}" if peer else ""


if __name__ == "__main__":
    sys.exit(main())
