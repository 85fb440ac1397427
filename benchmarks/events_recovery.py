"""Rows of the event benchmark: a router that starts anew beside a fleet that has long been at work."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from typing import NamedTuple

from benchmarks.events_plan import Bench
from benchmarks.events_processes import answer, process, publish_many, redis_server
from benchmarks.index_plan import OURS, Samples
from benchmarks.report import Row
from benchmarks.workload import Workload
from kv_events.bus.follow import follow
from kv_events.bus.url import open_source
from kv_events.view import WorkerView
from radix import make_tree
from radix.keys import Hashes
from radix.tree import PrefixTree

TRANSPORTS = ("grpc", "redis")
PROMPTS = 1024
LOOK_S = 0.002  # between two looks at how far it is, where the loop is free
DECISIONS = 16  # a look
PATIENCE_S = 120.0


class Prompt(NamedTuple):
    """A session's blocks, and the one worker that holds them all. (Others may hold the prefix that it shares.)"""

    hashes: Hashes
    worker: int


class Recovered(NamedTuple):
    """How it went."""

    seconds: float
    entries: int
    right: float  # share of decisions that come at any time while it goes on
    longest_wait_s: float  # of a decision for the loop


def recovery_rows(bench: Bench, transport: str) -> list[Row]:
    """From the first call of a router that knows nothing until its view of each worker has the worker's digest."""
    plan = bench.plan
    workload = Workload(plan.workers, plan.recovery_blocks, plan.recovery_prefixes)
    runs = [*workload.prefixes(), *map(workload.session, range(workload.sessions))]
    sessions = random.Random(1).sample(range(workload.sessions), min(PROMPTS, workload.sessions))
    prompts = [Prompt(workload.prompt(session), workload.session(session).worker) for session in sessions]
    seconds, shares, entries, longest_wait_s = Samples(), Samples(), 0, 0.0
    with ExitStack() as stack:
        urls = [f"{transport}://127.0.0.1:0"] * plan.workers
        if transport == "redis":
            _, server = stack.enter_context(redis_server(bench.other_cores))
            urls = [f"{server}/worker-{worker}" for worker in range(plan.workers)]
        fleet = process(publish_many, urls, runs, cores=bench.other_cores)
        _, connection = stack.enter_context(fleet)
        published = answer(connection)
        for _ in range(plan.recovery_rounds):
            recovered = asyncio.run(_recover(published, prompts))
            seconds.add(OURS, recovered.seconds)
            shares.add(OURS, 100 * recovered.right)
            entries = recovered.entries
            longest_wait_s = max(longest_wait_s, recovered.longest_wait_s)
    fleet_size = f"{plan.workers} workers, {entries / 1e6:.2f}M blocks, all in one process"
    right = (
        "prompts come evenly over the recovery and go to the deepest match, or anywhere without one; right: the one of "
        f"{plan.workers} workers that holds the whole prompt; none waits longer than {1e3 * longest_wait_s:.0f} ms"
    )
    return [
        bench.row(f"recovery {transport}", "s", seconds, note=f"{fleet_size}; until every view's digest is right"),
        bench.row(f"recovery {transport} right", "%", shares, note=right),
    ]


async def _recover(published: Sequence[tuple[str, bytes, int]], prompts: Sequence[Prompt]) -> Recovered:
    tree = make_tree()
    views = [WorkerView(f"worker-{worker}", worker, tree) for worker in range(len(published))]
    async with AsyncExitStack() as stack:
        sources = [await stack.enter_async_context(open_source(url)) for url, _, _ in published]
        start = time.monotonic()
        tasks = [asyncio.create_task(follow(*pair)) for pair in zip(sources, views, strict=True)]
        try:
            now, right_s, longest_wait_s = start, 0.0, 0.0
            while not all(_is_right(view, digest) for view, (_, digest, _) in zip(views, published, strict=True)):
                assert now - start < PATIENCE_S, "the router does not recover"
                await asyncio.sleep(LOOK_S)
                before, now = now, time.monotonic()  # who came meanwhile is answered now
                share = sum(_decides_right(tree, prompt, len(views)) for prompt in random.sample(prompts, DECISIONS))
                right_s += (now - before) * share / DECISIONS
                longest_wait_s = max(longest_wait_s, now - before)
            seconds = now - start
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert all(view.position()[1] == next_seq for view, (_, _, next_seq) in zip(views, published, strict=True))
        return Recovered(seconds, len(tree), right_s / seconds, longest_wait_s)


def _is_right(view: WorkerView, digest: bytes) -> bool:
    return view.synced and view.digest == digest


def _decides_right(tree: PrefixTree, prompt: Prompt, workers: int) -> bool:
    depths = tree.match(prompt.hashes).as_dict()
    if not depths:
        return random.randrange(workers) == prompt.worker
    deepest = max(depths.values())
    return random.choice([worker for worker, depth in depths.items() if depth == deepest]) == prompt.worker
