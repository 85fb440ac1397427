"""The other processes of the event benchmark: workers that publish, readers that stall, Redis."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, aclosing, contextmanager
from itertools import cycle
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.events_plan import BATCH_BLOCKS
from benchmarks.measure import pin
from benchmarks.workload import BLOCK_SIZE, Run, chain_at, stores
from kv_events.bus.url import open_source, publishing
from kv_events.events import BlockRemoved, BlockStored, Event
from kv_events.log import EventLog
from radix.keys import ROOT_HASH

SESSIONS = 1024  # stored and removed in turn: 65,536 blocks at most
PATIENCE_S = 60.0

_spawning = get_context("spawn")  # a fork would take threads and sockets along


class Engine:
    """Stands for an engine: one batch of 16 blocks a step."""

    def __init__(self, log: EventLog, applied: Any = None, ahead: int = 0, sessions: int = SESSIONS) -> None:
        """A flood goes at most `ahead` batches before `applied.value`, the reader's position."""
        runs = [part for at in range(sessions) for part in stores(Run(0, ROOT_HASH, chain_at(at, 64)), BATCH_BLOCKS)]
        events: list[Event] = [BlockStored(run.hashes, run.parent, BLOCK_SIZE) for run in runs]
        events += [BlockRemoved(run.hashes[::-1].copy()) for run in reversed(runs)]
        self.log = log
        self._applied, self._ahead = applied, ahead
        self._next = cycle([(event,) for event in events])

    def step(self) -> None:
        """Append the next batch; its time is that of the machine's monotonic clock, which its readers share."""
        self.log.append(next(self._next), time.monotonic())

    def run(self, duration_s: float, batches_per_s: float | None) -> int:
        """Steps at a steady rate, or (None) a flood of them. Returns the log's next number."""
        start = time.monotonic()
        if batches_per_s is None:
            while time.monotonic() < start + duration_s:
                if self.log.next_seq - self._applied.value < self._ahead:
                    self.step()
                else:
                    time.sleep(0.0002)
            return self.log.next_seq
        for at in range(int(duration_s * batches_per_s)):
            left = start + at / batches_per_s - time.monotonic()
            if left > 0:
                time.sleep(left)
            self.step()
        return self.log.next_seq


def shared_count() -> Any:
    """An integer that two processes see."""
    return _spawning.RawValue("Q", 0)


@contextmanager
def process(target: Callable[..., Any], *arguments: Any, cores: Sequence[int] = ()) -> Iterator[tuple[int, Connection]]:
    """A process that runs target(connection, *arguments) on these cores, and the other end; killed when left."""
    here, there = _spawning.Pipe()
    child = _spawning.Process(target=_pinned, args=(target, there, arguments, tuple(cores)), daemon=True)
    child.start()
    there.close()
    try:
        assert child.pid is not None
        yield child.pid, here
    finally:
        here.close()
        child.kill()  # also where it is stopped
        child.join()


def _pinned(target: Callable[..., Any], there: Connection, arguments: tuple[Any, ...], cores: tuple[int, ...]) -> None:
    if cores:
        pin(cores)
    target(there, *arguments)


def answer(connection: Connection) -> Any:
    """What the other process says next. Raises TimeoutError, EOFError when it is gone."""
    if not connection.poll(PATIENCE_S):
        raise TimeoutError("a process of the benchmark does not answer")
    return connection.recv()


def publish(connection: Connection, url: str, applied: Any, ahead: int) -> None:
    """A worker's process. Says where it publishes, then runs as it is told, (s, batches/s), and says how far it is."""

    async def serve() -> None:
        log = EventLog("worker-0", 1, BLOCK_SIZE)
        engine = Engine(log, applied, ahead)
        async with publishing(log, url) as where:
            connection.send(where)
            while True:
                try:
                    duration_s, batches_per_s = await asyncio.to_thread(connection.recv)
                except EOFError:
                    return
                connection.send(await asyncio.to_thread(engine.run, duration_s, batches_per_s))

    asyncio.run(serve())


def publish_many(connection: Connection, urls: Sequence[str], runs: Sequence[Run]) -> None:
    """As many workers as URLs, holding what their runs say. Says where each publishes, and its digest."""

    async def serve() -> None:
        logs = [EventLog(f"worker-{worker}", 1, BLOCK_SIZE) for worker in range(len(urls))]
        for run in runs:
            logs[run.worker].append([BlockStored(run.hashes, run.parent, BLOCK_SIZE)], 0.0)
        async with AsyncExitStack() as stack:
            where = [await stack.enter_async_context(publishing(log, url)) for log, url in zip(logs, urls, strict=True)]
            connection.send([(url, log.digest, log.next_seq) for url, log in zip(where, logs, strict=True)])
            await asyncio.to_thread(connection.poll, None)  # until the other end closes

    asyncio.run(serve())


def read_and_stop(connection: Connection, url: str) -> None:
    """A reader's process: says so when it has read the newest batch, and reads no more. (Its starter stops it.)"""

    async def read() -> None:
        async with open_source(url) as source:
            snapshot = await source.snapshot()
            async with aclosing(source.subscribe(snapshot.epoch, snapshot.next_seq - 1)) as batches:
                await anext(batches)
                connection.send(True)
                await asyncio.Event().wait()

    asyncio.run(read())


@contextmanager
def stalled_readers(url: str, count: int, cores: Sequence[int]) -> Iterator[None]:
    """Subscribed processes that are stopped."""
    with ExitStack() as stack:
        readers = [stack.enter_context(process(read_and_stop, url, cores=cores)) for _ in range(count)]
        for pid, connection in readers:
            answer(connection)
            os.kill(pid, signal.SIGSTOP)
        yield


def has_redis() -> bool:
    """Whether redis-server is on the path."""
    return shutil.which("redis-server") is not None


@contextmanager
def redis_server(cores: Sequence[int]) -> Iterator[tuple[int, str]]:
    """A Redis of our own on loopback, without persistence: its pid and redis://host:port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"]
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(["redis-server", *options], cwd=folder, stdout=subprocess.DEVNULL)
        try:
            os.sched_setaffinity(server.pid, set(cores))
            _wait_for(port, server)
            yield server.pid, f"redis://127.0.0.1:{port}"
        finally:
            server.kill()
            server.wait()


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
            return
        except OSError:
            time.sleep(0.02)
    raise TimeoutError(f"redis-server does not listen on port {port}")
