"""Rows of the event benchmark: what publishing costs the engine's step."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from contextlib import AsyncExitStack, ExitStack, aclosing
from multiprocessing.connection import Connection

from benchmarks.events_plan import STEP_S, STEP_SHARE, Bench
from benchmarks.events_processes import Engine, answer, process, redis_server, stalled_readers
from benchmarks.index_plan import OURS, Samples
from benchmarks.report import AT_MOST, Row
from benchmarks.workload import BLOCK_SIZE
from kv_events.bus.url import open_source, publishing
from kv_events.log import EventLog

GOAL_US = STEP_SHARE * STEP_S * 1e6
BEHIND = 5_000  # batches that stalled readers are behind when the clock starts: more than a log keeps
DEAD = "redis://127.0.0.1:1/bench"  # nobody listens there


def publisher_rows(bench: Bench) -> list[Row]:
    """An append by itself; then in steps of 10 ms, beside stalled readers of each transport."""
    rows = [_append_row(bench), _unpublished_row(bench)]
    for transport in bench.transports:
        if transport != "redis":
            rows += _step_rows(bench, transport)
    if "redis" in bench.transports:
        rows += [_redis_row(bench, "alive"), _redis_row(bench, "stopped"), _redis_row(bench, "dead")]
    return rows


def _append_row(bench: Bench) -> Row:
    samples = Samples()
    engine = Engine(EventLog("worker-0", 1, BLOCK_SIZE))
    share = max(1, bench.plan.append_batches // 100)
    for _ in range(100):
        start = time.perf_counter_ns()
        for _ in range(share):
            engine.step()
        samples.add(OURS, (time.perf_counter_ns() - start) / share / 1e3)
    note = "a batch of 16 blocks, stored or removed, one after the other: numbered, digested and kept"
    return bench.row("append", "us", samples, note=note)


def _unpublished_row(bench: Bench) -> Row:
    """The same steps without a publisher: an append after 10 ms of other work, its code and data out of the caches."""
    with process(_steps, "", cores=bench.other_cores) as (_, connection):
        answer(connection)
        return _row(bench, "publish nothing", connection)


def _step_rows(bench: Bench, transport: str) -> list[Row]:
    """One worker, to which stalled readers are added."""
    url = "memory://bench" if transport == "memory" else f"{transport}://127.0.0.1:0"
    rows, there = [], 0
    with process(_steps, url, cores=bench.other_cores) as (_, connection), ExitStack() as stack:
        where = answer(connection)
        for count in bench.plan.stalled:
            in_process = count if transport == "memory" else 0
            if transport != "memory":
                stack.enter_context(stalled_readers(where, count - there, bench.cores[-1:]))
            there = count
            rows.append(_row(bench, f"publish {transport} {count} stalled", connection, in_process))
    return rows


def _redis_row(bench: Bench, state: str) -> Row:
    with ExitStack() as stack:
        url = DEAD
        if state != "dead":
            pid, server = stack.enter_context(redis_server(bench.cores[-1:]))
            url = f"{server}/bench"
        with process(_steps, url, cores=bench.other_cores) as (_, connection):
            answer(connection)
            if state == "stopped":
                time.sleep(bench.plan.settle_s)  # it has begun to publish
                os.kill(pid, signal.SIGSTOP)
            return _row(bench, f"publish redis {state}", connection)


def _row(bench: Bench, what: str, connection: Connection, readers: int = 0) -> Row:
    connection.send((bench.plan.steps, readers, bench.plan.settle_s))
    times_us, whole_us = answer(connection)
    samples = Samples()
    for each in times_us:
        samples.add(OURS, each)
    times_us.sort()
    note = f"in the step, its wait for other threads included; p99 {times_us[int(0.99 * len(times_us))]:.0f} us; "
    note += f"the whole process {whole_us:.0f} us of CPU a step"
    return bench.row(what, "us", samples, GOAL_US, AT_MOST, note)


def _steps(connection: Connection, url: str) -> None:
    """A worker's process: says where it publishes. Told (steps, readers, settle_s), it does so many steps beside so
    many stalled readers in this very process, and answers how long each step's append took."""
    logging.getLogger("kv_events").setLevel(logging.CRITICAL)  # that Redis is dead is known

    async def serve() -> None:
        log = EventLog("worker-0", 1, BLOCK_SIZE)
        engine = Engine(log)
        engine.step()
        async with AsyncExitStack() as stack:
            where = await stack.enter_async_context(publishing(log, url)) if url else ""
            connection.send(where)
            while True:
                try:
                    steps, readers, settle_s = await asyncio.to_thread(connection.recv)
                except EOFError:
                    return
                for _ in range(readers - log.subscribers):
                    source = await stack.enter_async_context(open_source(where))
                    batches = await stack.enter_async_context(aclosing(source.subscribe(0, log.first_seq)))
                    await anext(batches)
                connection.send(await asyncio.to_thread(_run, engine, steps, settle_s))

    asyncio.run(serve())


def _run(engine: Engine, steps: int, settle_s: float) -> tuple[list[float], float]:
    """Microseconds of each step's append, and of the process's CPU a step."""
    for _ in range(BEHIND):
        engine.step()
    time.sleep(settle_s)  # what can be sent is sent
    times_us = []
    start = time.process_time()
    for _ in range(steps):
        time.sleep(STEP_S)  # the engine computes, and Python's other threads may run
        begun = time.perf_counter_ns()
        engine.step()
        times_us.append((time.perf_counter_ns() - begun) / 1e3)
    return times_us, (time.process_time() - start) / steps * 1e6
