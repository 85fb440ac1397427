"""Rows of the event benchmark: from a worker's append over a bus into the router's tree."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import Any

import numpy as np

from benchmarks.events_plan import BATCH_BLOCKS, Bench
from benchmarks.events_processes import PATIENCE_S, Engine, answer, process, publish, redis_server, shared_count
from benchmarks.index_plan import OURS, Samples
from benchmarks.report import Row
from benchmarks.workload import BLOCK_SIZE
from kv_events.bus import Resync
from kv_events.bus.follow import follow
from kv_events.bus.url import open_source, publishing
from kv_events.events import EventBatch
from kv_events.log import EventLog
from kv_events.view import WorkerView
from radix import make_tree

AHEAD = 2048  # batches that a worker may be ahead of the router: half of what its log keeps
PACED_SHARE = 0.1

NOTES = {
    "memory": "one process: the router's loop and the engine's thread share a core, and nothing is encoded",
    "grpc": "two processes",
    "zmq": "two processes",
    "redis": "three processes: worker, redis-server, router; entries pipelined",
}
URLS = {"memory": "memory://bench", "grpc": "grpc://127.0.0.1:0", "zmq": "zmq://127.0.0.1:0", "redis": ""}

Tell = Callable[[float, float | None], Coroutine[Any, Any, int]]
"""Has the worker run for some seconds, at so many batches/s or (None) as fast as goes; its next number, when done."""


class TimedView(WorkerView):
    """Notes how old each batch is when the tree has it, and says how far it is."""

    def __init__(self, applied: Any) -> None:
        super().__init__("worker-0", 0, make_tree())
        self.lags_us: list[float] = []
        self._applied_count = applied

    def offer(self, batch: EventBatch) -> Resync:
        """See WorkerView."""
        needed = super().offer(batch)
        self.lags_us.append((time.monotonic() - batch.ts) * 1e6)
        self._applied_count.value = batch.seq + 1
        return needed


def transport_rows(bench: Bench, transport: str) -> list[Row]:
    """Batches/s, and lag at a tenth of that."""
    with ExitStack() as stack:
        url = URLS[transport]
        if transport == "redis":
            url = f"{stack.enter_context(redis_server(bench.other_cores))[1]}/bench"
        rates, lags, resyncs = asyncio.run(_measure(bench, url))
    note = NOTES[transport] + (f"; {resyncs} resyncs" if resyncs else "")
    rate = float(np.median(rates.values[OURS]))
    paced = f"at {PACED_SHARE:.0%} of that rate, {PACED_SHARE * rate:,.0f} batches/s"
    blocks = Samples()
    for each in rates.values[OURS]:
        blocks.add(OURS, each * BATCH_BLOCKS / 1e6)
    rows = [
        bench.row(f"bus {transport}", "batches/s", rates, note=f"batches of {BATCH_BLOCKS} blocks; {note}"),
        bench.row(f"bus {transport} blocks", "M blocks/s", blocks, note="the same, in blocks"),
    ]
    for quantile in (50, 99):
        samples = Samples()
        samples.add(OURS, float(np.percentile(lags, quantile)))
        rows.append(bench.row(f"bus {transport} lag p{quantile}", "us", samples, note=f"append to tree, {paced}"))
    return rows


async def _measure(bench: Bench, url: str) -> tuple[Samples, list[float], int]:
    plan, applied = bench.plan, shared_count()
    rates = Samples()
    async with _worker(bench, url, applied) as (where, tell), open_source(where) as source:
        view = TimedView(applied)
        following = asyncio.create_task(follow(source, view))
        try:
            await _until(view, await tell(plan.settle_s, 100.0))
            for _ in range(plan.flood_rounds):
                flooding = asyncio.create_task(tell(plan.settle_s + plan.flood_s, None))
                await asyncio.sleep(plan.settle_s)
                start, before = time.monotonic(), view.counts.applied
                await asyncio.sleep(0.9 * plan.flood_s)
                rates.add(OURS, (view.counts.applied - before) / (time.monotonic() - start))
                await _until(view, await flooding)
            rate = PACED_SHARE * float(np.median(rates.values[OURS]))
            await _until(view, await tell(plan.settle_s, rate))  # queues hold duplicates from the floods
            view.lags_us.clear()
            await _until(view, await tell(plan.paced_s, rate))
            lags = list(view.lags_us)
        finally:
            following.cancel()
            with suppress(asyncio.CancelledError):
                await following
    assert view.synced, "the view is not in step"
    return rates, lags, view.counts.resyncs - 1


async def _until(view: TimedView, next_seq: int) -> None:
    """Until the view is that far."""
    async with asyncio.timeout(PATIENCE_S):
        while view.position()[1] < next_seq:
            await asyncio.sleep(0.01)


@asynccontextmanager
async def _worker(bench: Bench, url: str, applied: Any) -> AsyncIterator[tuple[str, Tell]]:
    """Where it publishes, and how to tell it what to do."""
    if url.startswith("memory:"):
        log = EventLog("worker-0", 1, BLOCK_SIZE)
        engine = Engine(log, applied, AHEAD)

        async def tell_thread(duration_s: float, batches_per_s: float | None) -> int:
            return await asyncio.to_thread(engine.run, duration_s, batches_per_s)

        async with publishing(log, url) as where:
            yield where, tell_thread
        return
    with process(publish, url, applied, AHEAD, cores=bench.other_cores) as (_, connection):

        async def tell_process(duration_s: float, batches_per_s: float | None) -> int:
            connection.send((duration_s, batches_per_s))
            next_seq: int = await asyncio.to_thread(answer, connection)
            return next_seq

        yield await asyncio.to_thread(answer, connection), tell_process
