"""The embedded cluster: a router and its workers as processes on loopback, watched and restarted."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import signal
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from deploy.processes import WORKER_PLACE
from kv_events.bus.url import parse_bus_url
from rhizome.errors import InvalidRequest, Unavailable
from rhizome.ticket import SECRET_VARIABLE
from rhizome.v1.router_pb2 import WorkerEntry
from router.client import Client

_log = logging.getLogger(__name__)

READY_TIMEOUT_S = 120.0  # loading a checkpoint included
STOP_TIMEOUT_S = 10.0
FIRST_RESTART_DELAY_S = 0.2
STABLE_S = 30.0  # a child that lived for so long is restarted at once again
LONGEST_RESTART_DELAY_S = 10.0


@dataclass(slots=True)
class Child:
    """One process of the cluster, and how to start it again."""

    name: str
    arguments: list[str]
    process: Process | None = None
    address: str = ""
    restarts: int = 0
    ready: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid


class LocalCluster:
    """`async with LocalCluster(model) as cluster:` leaves nothing running, however it ends.

    Children hold the read end of a pipe whose write end is ours: when this process dies, even by SIGKILL, they see
    the end of the pipe and stop.
    """

    def __init__(
        self,
        model_dir: Path | None,
        workers: int = 2,
        *,
        port: int = 0,
        worker_arguments: Sequence[str] = (),
        on_event: Callable[[str], None] = _log.info,
    ) -> None:
        """Without `model_dir` the `worker_arguments` say what is served: simulated hardware.

        `port` is the router's (0: a free one). `on_event` is told, in words, of starts, deaths and restarts.
        """
        self._model_dir = model_dir
        self._worker_arguments = list(worker_arguments)
        self._on_event = on_event
        cores = os.cpu_count() or 1
        threads = max(1, cores // workers)
        self._environment = os.environ | {
            SECRET_VARIABLE: os.environ.get(SECRET_VARIABLE) or secrets.token_hex(32),
            "OMP_NUM_THREADS": str(threads),
        }
        self._threads = threads
        self._tasks: list[asyncio.Task[None]] = []
        self.router = Child("router", ["router", "--port", str(port)])
        self.workers = [Child(f"worker-{index}", []) for index in range(workers)]

    @property
    def address(self) -> str:
        """The router's host:port."""
        return self.router.address

    async def __aenter__(self) -> LocalCluster:
        try:
            await self._start(self.router)
            for worker in self.workers:
                worker.arguments = [
                    *("worker", "--id", worker.name),
                    *(() if self._model_dir is None else ("--model", str(self._model_dir))),
                    *("--router", self.address, "--threads", str(self._threads)),
                    *self._worker_arguments,
                ]
            # A router that restarts keeps its port, so that workers and clients find it again.
            self.router.arguments = ["router", "--port", self.address.rpartition(":")[2]]
            await asyncio.gather(*(self._start(worker) for worker in self.workers))
            await self._joined()
        except BaseException:
            await self.stop()
            raise
        self._tasks = [asyncio.create_task(self._watch(child)) for child in (self.router, *self.workers)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def restarted(self, child: Child) -> None:
        """Wait until a child that has died serves again."""
        restarts = child.restarts
        async with asyncio.timeout(READY_TIMEOUT_S):
            while child.restarts == restarts:
                await asyncio.sleep(0.02)
            await child.ready.wait()

    async def stop(self) -> None:
        """End every process: workers first, so that they can take their leave; by force after a grace."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        await asyncio.gather(*(_end(worker) for worker in self.workers))
        await _end(self.router)

    async def _start(self, child: Child) -> None:
        """Start a child and wait until it serves. Raises Unavailable when it ends before."""
        child.ready.clear()
        command = (sys.executable, "-m", "deploy.cli", "--log-level=warning", *child.arguments, "--supervised")
        # A session of its own: Ctrl-C reaches this process alone, which then ends the children in order.
        child.process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, env=self._environment, start_new_session=True
        )
        assert child.process.stdout is not None
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                line = await child.process.stdout.readline()
                if not line:
                    await child.process.wait()
        except TimeoutError:
            line = b""
        if not line:
            await _end(child)
            raise _not_started(child)
        child.address = str(json.loads(line)["address"])
        child.ready.set()
        self._on_event(f"{child.name} serves on {child.address} (pid {child.pid})")

    async def _joined(self) -> None:
        """Wait until the router takes requests for every worker. Raises Unavailable when a process ends before."""
        ends = {asyncio.create_task(_exit_code(child)): child for child in (self.router, *self.workers)}
        async with Client(self.address) as client:
            joined = asyncio.create_task(client.wait_ready(len(self.workers), timeout_s=READY_TIMEOUT_S))
            try:
                await asyncio.wait({joined, *ends}, return_when=asyncio.FIRST_COMPLETED)
                for end, child in ends.items():
                    if end.done():
                        raise _not_started(child)
                await joined
            except TimeoutError as error:
                raise Unavailable(str(error)) from error
            finally:
                for task in (joined, *ends):
                    task.cancel()
                await asyncio.gather(joined, *ends, return_exceptions=True)

    async def _watch(self, child: Child) -> None:
        """Start a child again whenever it ends; one that keeps dying is tried ever more rarely."""
        delay_s = FIRST_RESTART_DELAY_S
        while True:
            started = time.monotonic()
            code = await _exit_code(child)
            lived_s = time.monotonic() - started
            delay_s = FIRST_RESTART_DELAY_S if lived_s > STABLE_S else min(2 * delay_s, LONGEST_RESTART_DELAY_S)
            self._on_event(f"{child.name} ended (exit code {code}); restarting it in {delay_s:.1f} s")
            child.ready.clear()
            child.restarts += 1
            await asyncio.sleep(delay_s)
            try:
                await self._start(child)
            except (Unavailable, OSError, ValueError) as error:
                self._on_event(f"{child.name}: {error}")


async def _exit_code(child: Child) -> int:
    assert child.process is not None
    return await child.process.wait()


def _not_started(child: Child) -> Unavailable:
    code = child.process.returncode if child.process else None
    return Unavailable(f"{child.name} did not start (exit code {code}); its own words are above")


async def _end(child: Child) -> None:
    process = child.process
    if process is None:
        return
    if process.returncode is None:
        # os.kill, for process.terminate() may itself reap a child that has just ended, and its exit code is lost.
        os.kill(process.pid, signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            os.kill(process.pid, signal.SIGKILL)
            await process.wait()
    if process.stdin is not None:
        process.stdin.close()


async def run_cluster(
    model_dir: Path | None,
    workers: int,
    port: int,
    *,
    worker_arguments: Sequence[str],
    events: Sequence[str] = (),
    simulated: bool = False,
) -> None:
    """A cluster until it is cancelled. Without a checkpoint a tiny one is made for the time, unless it is `simulated`.

    `events`: bus URLs at which every worker publishes. Raises InvalidRequest for one that they would share.
    """
    for url in events:
        check_own(url, workers)
    with tempfile.TemporaryDirectory(prefix="rhizome-") as folder:
        if model_dir is None and not simulated:
            # Making a checkpoint needs torch; a cluster of a given one does not.
            from worker.tiny_model import make_tiny_model

            model_dir = Path(folder) / "tiny"
            make_tiny_model(model_dir)
        arguments = [*worker_arguments, *(f"--events={url}" for url in events)]
        async with LocalCluster(model_dir, workers, port=port, worker_arguments=arguments, on_event=_say) as cluster:
            if events:
                async with Client(cluster.address) as client:
                    for line in event_lines(await client.workers()):
                        _say(line)
            _say(f"ready: rhizome chat --router {cluster.address}   (Ctrl-C ends the cluster)")
            try:
                await asyncio.Event().wait()
            finally:
                _say("stopping")


def event_lines(workers: Iterable[WorkerEntry]) -> list[str]:
    """Where each worker's events can be read, with the ports that were free and without passwords."""
    told = ((entry.worker_id, entry.events_url) for entry in workers if entry.events_url)
    return [f"{worker}: events at {parse_bus_url(url)}" for worker, url in sorted(told)]


def check_own(url: str, workers: int) -> None:
    """Raise InvalidRequest unless each of so many workers on one host would have a port or a stream of its own."""
    bus = parse_bus_url(url)
    if workers == 1:
        return
    if bus.scheme in ("grpc", "zmq") and (bus.port or bus.replay_port):
        raise InvalidRequest("events_url", str(bus), f"port 0, as {workers} workers need one each")
    if bus.scheme.startswith("redis") and WORKER_PLACE not in bus.name:
        limit = f"a stream with {WORKER_PLACE} in its name, as {workers} workers need one each"
        raise InvalidRequest("events_url", str(bus), limit)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
