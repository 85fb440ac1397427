"""The embedded cluster: a fleet's routers and workers as processes on this machine, watched and restarted."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from deploy.fleet.control import READY_TIMEOUT_S, FleetControl, caught_up, joined
from deploy.fleet.plan import TINY, FleetPlan, RouterServer, Server, WorkerServer
from deploy.fleet.service import serving_control
from kv_events.bus.url import parse_bus_url
from rhizome.errors import Unavailable
from rhizome.ticket import SECRET_VARIABLE
from rhizome.v1 import launcher_pb2
from rhizome.v1.router_pb2 import WorkerEntry
from router.client import Client

_log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 10.0
FIRST_RESTART_DELAY_S = 0.2
STABLE_S = 30.0  # a child that lived for so long is restarted at once again
LONGEST_RESTART_DELAY_S = 10.0


@dataclass(slots=True)
class Child:
    """One process of the cluster, and how to start it again."""

    server: Server
    arguments: list[str]
    process: Process | None = None
    address: str = ""
    restarts: int = 0
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    watch: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.server.name

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def status(self) -> launcher_pb2.ServerStatus:
        """What the launcher knows of it."""
        return launcher_pb2.ServerStatus(
            name=self.name,
            group=self.server.group_name,
            role=self.server.role,
            state=launcher_pb2.SERVER_STATE_SERVING if self.ready.is_set() else launcher_pb2.SERVER_STATE_STARTING,
            host=socket.gethostname(),
            pid=self.process.pid if self.process else 0,
            address=self.address,
            restarts=self.restarts,
        )


class LocalCluster:
    """`async with LocalCluster(plan) as cluster:` leaves nothing running, however it ends.

    Children hold the read end of a pipe whose write end is ours: when this process dies, even by SIGKILL, they see
    the end of the pipe and stop.
    """

    def __init__(
        self,
        plan: FleetPlan,
        *,
        model_dir: Path | None = None,
        worker_arguments: Sequence[str] = (),
        on_event: Callable[[str], None] = _log.info,
    ) -> None:
        """`model_dir` is where a tiny model was made; `worker_arguments` are added to those of the plan.

        `on_event` is told, in words, of starts, deaths and restarts.
        """
        self.plan = plan
        self._model_dir = model_dir
        self._worker_arguments = list(worker_arguments)
        self._on_event = on_event
        cores = os.cpu_count() or 1
        self._threads = max(1, cores // max(1, len(plan.workers)))
        self._environment = (
            os.environ
            | plan.logins.environment(os.environ)
            | {
                SECRET_VARIABLE: os.environ.get(SECRET_VARIABLE) or secrets.token_hex(32),
                "OMP_NUM_THREADS": str(self._threads),
            }
        )
        self._watching = False
        self.routers = [Child(router, router.arguments()) for router in plan.routers]
        self.workers = [Child(worker, []) for worker in plan.workers]

    @property
    def router(self) -> Child:
        """The first router."""
        return self.routers[0]

    @property
    def address(self) -> str:
        """The first router's host:port."""
        return self.router.address

    @property
    def router_addresses(self) -> list[str]:
        """Of all routers."""
        return [router.address for router in self.routers]

    async def __aenter__(self) -> LocalCluster:
        try:
            await self._start_routers(self.routers)
            await self._start_workers(self.workers)
            self._watching = True
            for child in (*self.routers, *self.workers):
                child.watch = asyncio.create_task(self._watch(child))
        except BaseException:
            await self.stop()
            raise
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
        self._watching = False
        await asyncio.gather(*(_unwatch(child) for child in (*self.workers, *self.routers)))
        await asyncio.gather(*map(_end, self.workers))
        await asyncio.gather(*map(_end, self.routers))

    # What deploy.fleet.control asks of a launcher.

    kind = "local"

    async def servers(self) -> list[launcher_pb2.ServerStatus]:
        """Every process."""
        return [child.status() for child in (*self.routers, *self.workers)]

    def address_of(self, name: str) -> str:
        """A process's host:port; empty where it has not served yet."""
        return next((child.address for child in (*self.routers, *self.workers) if child.name == name), "")

    async def add(self, servers: Sequence[Server]) -> None:
        """Start servers of a plan. Raises Unavailable when one does not start; none of them is left then."""
        routers = [Child(server, server.arguments()) for server in servers if isinstance(server, RouterServer)]
        workers = [Child(server, []) for server in servers if isinstance(server, WorkerServer)]
        try:
            await self._start_routers(routers)
            await caught_up([child.address for child in routers], self.router_addresses, READY_TIMEOUT_S)
            await self._start_workers(workers)
        except BaseException:
            await asyncio.gather(*map(_end, (*routers, *workers)))
            raise
        self.routers += routers
        self.workers += workers
        for child in (*routers, *workers):
            child.watch = asyncio.create_task(self._watch(child))

    async def remove(self, names: Sequence[str]) -> None:
        """End processes, which are not started again."""
        leaving = [child for child in (*self.routers, *self.workers) if child.name in names]
        await asyncio.gather(*map(_unwatch, leaving))
        await asyncio.gather(*map(_end, leaving))
        self.routers = [child for child in self.routers if child not in leaving]
        self.workers = [child for child in self.workers if child not in leaving]

    async def _start_routers(self, children: Sequence[Child]) -> None:
        await asyncio.gather(*map(self._start, children))
        for child in children:
            # A router that restarts keeps its port, so that workers and clients find it again.
            child.arguments.append(f"--port={child.address.rpartition(':')[2]}")

    async def _start_workers(self, children: Sequence[Child]) -> None:
        for child in children:
            assert isinstance(child.server, WorkerServer)
            settings = child.server.settings(self.router_addresses, model_dir=self._model_dir, threads=self._threads)
            child.arguments = [*child.server.arguments(settings), *self._worker_arguments]
        await asyncio.gather(*map(self._start, children))
        await self._until_joined(children)

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

    async def _until_joined(self, workers: Sequence[Child]) -> None:
        """Wait until every router takes requests for the workers. Raises Unavailable when a process ends before."""
        ends = {asyncio.create_task(_exit_code(child)): child for child in (*self.routers, *workers)}
        names = [child.name for child in workers]
        joining = asyncio.create_task(joined(self.router_addresses, names, READY_TIMEOUT_S))
        try:
            await asyncio.wait({joining, *ends}, return_when=asyncio.FIRST_COMPLETED)
            for end, child in ends.items():
                if end.done() and not self._watching:
                    raise _not_started(child)
            await joining
        finally:
            for task in (joining, *ends):
                task.cancel()
            await asyncio.gather(joining, *ends, return_exceptions=True)

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


async def _unwatch(child: Child) -> None:
    if child.watch is not None:
        child.watch.cancel()
        await asyncio.gather(child.watch, return_exceptions=True)


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


async def run_cluster(plan: FleetPlan) -> None:
    """A fleet until it is cancelled, or ended by `rhizome down`. Raises InvalidRequest for a name that is taken."""
    with ExitStack() as stack:
        model_dir = None
        if plan.config.model.tiny:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rhizome-"))
            # Making a checkpoint needs torch; a cluster of a given one does not.
            from worker.tiny_model import make_tiny_model

            model_dir = make_tiny_model(Path(folder) / TINY)
        cluster = LocalCluster(plan, model_dir=model_dir, on_event=_say)
        control = FleetControl(cluster, _say)
        stopped = asyncio.Event()
        named = "name" in plan.config.model_fields_set
        serving = serving_control(control, plan.config.name, named=named, stopped=stopped.wait, on_event=_say)
        async with serving as name:
            async with cluster:
                control.ready = True
                await _announce(cluster, name)
                try:
                    await control.ended.wait()
                finally:
                    _say("stopping")
            stopped.set()


async def _announce(cluster: LocalCluster, name: str) -> None:
    async with Client(cluster.address) as client:
        for line in event_lines(await client.workers()):
            _say(line)
    if name != cluster.plan.config.name:
        _say(f"fleet {name}, as {cluster.plan.config.name} runs here already: rhizome status --fleet {name}")
    _say(f"ready: rhizome chat --router {cluster.address}   (Ctrl-C ends the cluster)")


def event_lines(workers: Iterable[WorkerEntry]) -> list[str]:
    """Where each worker's events can be read, with the ports that were free and without passwords."""
    told = ((entry.worker_id, entry.events_url) for entry in workers if entry.events_url)
    return [f"{worker}: events at {parse_bus_url(url)}" for worker, url in sorted(told)]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
