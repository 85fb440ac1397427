"""How routing scales: `python -m benchmarks.routing_scale [--quick] [--json FILE]`, or `make bench-routing-scale`.

What a decision, a report and an event cost one router by the number of workers, in its own time and memory; then
simulated fleets of 8 to 1,024 workers behind 1 to 16 routers that learn of each other's decisions from the workers'
reports alone, at the same load for each worker. router/SCALE.md tells what follows.
"""

from __future__ import annotations

import argparse
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

from benchmarks.measure import cores, pin
from benchmarks.report import Figure, Row, figure, machine, print_table, row, write_json
from benchmarks.routing_decision import BLOCKS, MODEL, REPORT, decision_rows
from benchmarks.routing_plan import FULL, OURS, Plan
from deploy.simulate import results
from deploy.simulate.fleet import Network
from deploy.simulate.results import Case, Setting
from deploy.simulate.sweep import Sweep
from deploy.traces.synthesize import synthesize
from deploy.traces.workload import PRESETS
from kv_events.events import BlockStored, EventBatch
from kv_events.log import EventLog
from radix import BACKEND
from radix.keys import Hashes
from router.core import Router
from router.fleet import ModelCard, WorkerInfo
from router.request import RouteRequest
from worker.step_time import HARDWARE

BLOCK_SIZE = 16
SPEED_PER_WORKER = 2.667 / 8  # of the preset "rag": what saturates round-robin on 8 workers
REQUESTS_PER_WORKER, MOST_REQUESTS = 40, 24_000
REPEATS = 5
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ScalePlan:
    """Sizes. Fleets are (workers, routers); the first of each size has one router."""

    workers: tuple[int, ...] = (8, 64, 256, 1024)
    decisions: int = 10_000
    entries: int = 1_000_000
    batches: int = 5_000  # events of 16 blocks
    requests: int = 20_000  # in flight
    least_requests: int = 1_000  # of a fleet's trace
    fleets: tuple[tuple[int, int], ...] = (
        *((8, routers) for routers in (1, 2, 4, 8)),
        *((32, routers) for routers in (1, 4, 16)),
        *((128, routers) for routers in (1, 4, 16)),
        (1024, 1),
    )


QUICK = ScalePlan(
    workers=(8, 64, 1024),
    decisions=5_000,
    entries=200_000,
    batches=1_000,
    requests=2_000,
    fleets=((8, 1), (8, 4), (32, 1), (32, 4)),
)


def run(plan: ScalePlan, jobs: int, say: Say) -> list[Row]:
    """All rows."""
    rows: list[Row] = []
    allowed = cores()
    pin(allowed[-1:])
    try:
        for workers in plan.workers:
            say(f"decisions among {workers} workers")
            rows += _decision_rows(plan, workers)
        say("reports, events, memory")
        rows += [*_report_rows(plan), _event_row(plan), *_memory_rows(plan)]
    finally:
        pin(allowed)
    return [*rows, *_fleet_rows(plan, jobs, say)]


# One router.


def _decision_rows(plan: ScalePlan, workers: int) -> Iterator[Row]:
    """The benchmark of a decision, and its rate."""
    sizes: Plan = replace(
        FULL,
        decision_workers=workers,
        decision_entries=plan.entries,
        decisions=plan.decisions,
        warm_up=5 * workers,  # until as many requests are in flight as will be
    )
    found = decision_rows(sizes)
    for each in found[:2]:  # p50 and p99
        yield replace(each, goal=None, goal_is=None, met=None, ratio=None)
    median = found[0].ours
    note = "1 / the median decision: hashing and submit, without the network"
    yield row(f"decisions {sizes.decision_tokens} tokens W{workers}", "decisions/s", Figure(1e6 / median), note=note)


def _router(workers: int) -> Router:
    router = Router(policy=OURS, lease_s=1e9)
    card = ModelCard(MODEL, 1 << 17, 1 << 17, BLOCK_SIZE, "")
    for number in range(workers):
        name = f"worker-{number}"
        router.register(WorkerInfo(name, 1, f"{name}:1", card, BLOCKS, 256, 4096, 8192), 0.0)
        router.set_ready(name, 1)
    return router


def _us(work: Callable[[], None], count: int) -> float:
    """Microseconds of this process for each of `count` things that `work` does."""
    start = process_time()
    work()
    return (process_time() - start) / count * 1e6


def _report_rows(plan: ScalePlan) -> Iterator[Row]:
    for workers in plan.workers:
        router = _router(workers)
        clock = iter(range(10**9))

        def report(router: Router = router, workers: int = workers, clock: Iterator[int] = clock) -> None:
            for number in range(2_000):
                tick = next(clock)
                done = tick // workers + 1  # steps of that worker
                said = replace(REPORT, prefill_steps=done, prefill_tokens=4096 * done, prefill_s=0.3 * done)
                router.heartbeat(f"worker-{number % workers}", 1, said, tick / (2 * workers))

        for _ in range(1 + workers // 200):  # until what steps cost is known
            report()
        cost = figure(_us(report, 2_000) for _ in range(REPEATS))
        yield row(
            f"report W{workers}", "us", cost, note="of a worker to one router, without the network; making it included"
        )


def _event_row(plan: ScalePlan) -> Row:
    """Decoded batches into a view: the tree, the digest and the worker's own set of blocks."""
    costs = []
    for repeat in range(REPEATS):
        router = _router(1)
        view, batches = router.view("worker-0"), list(_batches(plan.batches, repeat))

        def offer(offered: Callable[[EventBatch], Any] = view.offer, batches: list[EventBatch] = batches) -> None:
            for batch in batches:
                offered(batch)

        costs.append(_us(offer, plan.batches * BLOCK_SIZE))
    rate = figure(1e6 / cost for cost in costs)
    return row("events applied", "blocks/s", rate, note="decoded batches of one stored event of 16 blocks, to one view")


def _batches(count: int, seed: int) -> Iterator[EventBatch]:
    log = EventLog("worker-0", 1, BLOCK_SIZE)
    for hashes in _hashes(count, 16, seed):
        log.append([BlockStored(hashes, 0, BLOCK_SIZE)], 0.0)
        yield log.read(log.next_seq - 1, 1)[0].batch


def _hashes(prompts: int, blocks: int, seed: int) -> Sequence[Hashes]:
    return list(np.random.default_rng(seed).integers(1, 1 << 63, (prompts, blocks), dtype=np.uint64))


def _memory_rows(plan: ScalePlan) -> Iterator[Row]:
    most = max(plan.workers)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    router = _router(most)
    each = (tracemalloc.get_traced_memory()[0] - before) / most
    yield row("memory of a worker", "bytes", Figure(each), note=f"Python's, of {most}; its blocks apart")
    asked = [RouteRequest(str(n), MODEL, 8192, hashes) for n, hashes in enumerate(_hashes(plan.requests, 1, 1))]
    before = tracemalloc.get_traced_memory()[0]
    for number, request in enumerate(asked):
        router.route(request, number * 1e-3)
    each = (tracemalloc.get_traced_memory()[0] - before) / plan.requests
    yield row("memory of a request in flight", "bytes", Figure(each), note=f"Python's, of {plan.requests}")
    tracemalloc.stop()


# Fleets.


def _fleet_rows(plan: ScalePlan, jobs: int, say: Say) -> Iterator[Row]:
    alone: dict[int, results.Row] = {}
    for workers, routers in plan.fleets:
        say(f"{workers} workers behind {routers} routers")
        count = min(MOST_REQUESTS, max(plan.least_requests, REQUESTS_PER_WORKER * workers))
        trace = synthesize(PRESETS["rag"], count, seed=1, name="rag")
        setting = Setting(trace, HARDWARE["70b-4xh100"], Network(), routers=routers)
        case = Case(OURS, workers, SPEED_PER_WORKER * workers)
        found = Sweep(setting, jobs).runs([case])[0].row
        alone.setdefault(workers, found)
        yield from _compared(found, alone[workers])


def _compared(found: results.Row, alone: results.Row) -> Iterator[Row]:
    note = (
        f"hits {found.hit_ratio:.1%} (one router: {alone.hit_ratio:.1%}), imbalance {found.imbalance:.2f} "
        f"({alone.imbalance:.2f}), held {found.held_share:.0%}, {found.requests} requests, {found.refused} refused"
    )
    several = found.routers > 1
    for what, field in (("mean", "ttft_mean_s"), ("p99", "ttft_p99_s")):
        peer = Figure(getattr(alone, field)) if several else None
        name = f"rag {what} TTFT W{found.workers} R{found.routers}"
        yield row(name, "s", Figure(getattr(found, field)), peer, peer_name="one router", note=note)


def main(arguments: list[str] | None = None, plan: ScalePlan | None = None) -> int:
    """The command. Ends with 2 on bad usage, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing_scale", description="How routing scales.")
    parser.add_argument("--quick", action="store_true", help="fewer workers, routers and requests")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        parser.error("this benchmark needs Linux: it pins threads to cores")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")
    chosen = plan or (QUICK if options.quick else ScalePlan())
    rows = run(chosen, 1, lambda text: print(text, file=sys.stderr, flush=True))
    facts: dict[str, Any] = {**machine(), "index": BACKEND, "quick": options.quick}
    print_table("routing at scale" + (" (quick)" if options.quick else ""), rows)
    if options.json:
        write_json(options.json, "routing_scale", facts, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
