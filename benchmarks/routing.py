"""Our routing beside others': `python -m benchmarks.routing [--quick] [--json FILE] [--trace FILE]...`, or
`make bench-routing`.

Time to first token by policy on simulated fleets, all of the same workers and tree; how fast the simulator is; what a
decision costs, in process and over the network. Speeds are measured first, with nothing else of ours running; then
simulations run in processes of their own, in virtual time: how many at once changes no figure.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import cores, pin
from benchmarks.report import Row, machine, print_table, write_json
from benchmarks.routing_decision import decision_rows
from benchmarks.routing_plan import FULL, QUICK, Plan, title, traces
from benchmarks.routing_policies import carried_rows, policy_rows, saturations, speed_rows
from benchmarks.routing_robust import robust_rows
from benchmarks.routing_route import route_rows
from deploy.traces.trace import Trace
from radix import BACKEND, BACKEND_REASON
from rhizome.errors import InvalidRequest

Say = Callable[[str], None]


def run(plan: Plan, known: list[Trace], find: bool, say: Say) -> list[Row]:
    """All rows of the plan; `say` is told of each part that ends."""
    rows: list[Row] = []
    for name, part in _parts(plan, known, find, say):
        start = time.perf_counter()
        try:
            rows += part()
        except InvalidRequest as error:  # a trace that cannot be replayed, or saturates no fleet: others can
            say(f"{name}: left out: {error}")
            continue
        say(f"{name}: {time.perf_counter() - start:.1f} s")
    return rows


def _parts(plan: Plan, known: list[Trace], find: bool, say: Say) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    yield "decisions", partial(_on_one_core, partial(decision_rows, plan))
    if plan.route_decisions:
        yield "decisions over the network", partial(route_rows, plan)
    yield "simulator", partial(_on_one_core, partial(speed_rows, plan, known[0]))
    for trace in known:
        yield f"policies on {title(trace)}", partial(_policies, plan, trace, find, say)
        if plan.carried:
            yield f"rate carried on {title(trace)}", partial(carried_rows, plan, trace)


def _on_one_core(part: Callable[[], list[Row]]) -> list[Row]:
    allowed = cores()
    pin(allowed[-1:])
    try:
        return part()
    finally:
        pin(allowed)


def _policies(plan: Plan, trace: Trace, find: bool, say: Say) -> list[Row]:
    speeds = saturations(plan, trace, find)
    told = ", ".join(f"N={workers} {speed:.4g}" for workers, speed in speeds.items())
    say(f"{title(trace)}: speed that saturates round-robin: {told}")
    return policy_rows(plan, trace, speeds) + robust_rows(plan, trace, speeds)


def main(arguments: list[str] | None = None, plan: Plan | None = None) -> int:
    """The command. Ends with 2 on bad usage, else 0, whether or not the goals are met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing", description="Our routing beside others'.")
    parser.add_argument("--quick", action="store_true", help="8 workers, the first 1,000 requests of one trace")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    parser.add_argument(
        "--trace", type=Path, action="append", default=[], metavar="FILE", help="instead of those in ../shared/traces"
    )
    parser.add_argument(
        "--find-saturation", action="store_true", help="find what saturates round-robin where it is known, too"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="simulations at a time [default: one a CPU]")
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        parser.error("this benchmark needs Linux: it pins threads to cores")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs: {options.jobs}, must be at least 1")
    chosen = plan or replace(QUICK if options.quick else FULL, jobs=options.jobs or len(cores()))
    say = partial(print, file=sys.stderr, flush=True)
    if BACKEND != "native":
        say(f"The native core is not there ({BACKEND_REASON}): these are the figures of the reference in Python.")
    try:
        known = traces(chosen, options.trace)
    except (InvalidRequest, OSError) as error:
        parser.error(f"--trace: {error}")
    rows = run(chosen, known, options.find_saturation, say)
    facts: dict[str, Any] = {**machine(), "index": BACKEND, "quick": options.quick}
    print_table("routing" + (" (quick)" if options.quick else ""), rows)
    if options.json:
        write_json(options.json, "routing", facts, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
