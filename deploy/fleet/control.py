"""A running fleet is looked at and changed: what `status`, `scale` and `down` do, whichever launcher runs it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

import grpc

from deploy.fleet.config import ROUTERS
from deploy.fleet.plan import FleetPlan, Server
from rhizome.errors import Conflict, InvalidRequest, Unavailable
from rhizome.v1 import launcher_pb2
from rhizome.v1.router_pb2 import WorkerEntry
from router.client import Client

T = TypeVar("T")

POLL_S = 0.1
DRAIN_S = 30.0  # for answers to end, unless told otherwise
MAX_DRAIN_S = 3600.0
READY_TIMEOUT_S = 120.0  # loading a checkpoint included


class Launcher(Protocol):
    """What runs the servers of a fleet."""

    plan: FleetPlan

    @property
    def kind(self) -> str:
        """local or ray."""

    @property
    def router_addresses(self) -> list[str]:
        """Of all routers."""

    async def servers(self) -> list[launcher_pb2.ServerStatus]:
        """Every router and worker."""

    def address_of(self, name: str) -> str:
        """A server's host:port; empty where it has not served yet."""

    async def add(self, servers: Sequence[Server]) -> None:
        """Start servers; returns when all routers know all workers. Raises Unavailable; none of them is left then."""

    async def remove(self, names: Sequence[str]) -> None:
        """End servers for good."""


class FleetControl:
    """One change at a time; a caller that goes away leaves none half done."""

    def __init__(self, launcher: Launcher, on_event: Callable[[str], None]) -> None:
        self._launcher = launcher
        self._on_event = on_event
        self._changing = asyncio.Lock()
        self._changes: set[asyncio.Task[Any]] = set()
        self.ready = False
        """Whether the fleet has started: it can be changed from then on."""
        self.ended = asyncio.Event()
        """Set when the fleet is to end: its workers are drained."""

    async def status(self) -> launcher_pb2.FleetStatus:
        """Every server, as the launcher knows it."""
        launcher = self._launcher
        return launcher_pb2.FleetStatus(
            name=launcher.plan.config.name, launcher=launcher.kind, servers=await launcher.servers()
        )

    async def scale(self, group: str, count: int, drain_s: float) -> launcher_pb2.FleetStatus:
        """Have so many workers in a group, or routers: the last ones leave, new ones come after them.

        Raises InvalidRequest, Conflict while the fleet starts or ends, Unavailable where a server does not start.
        """
        _check_drain(drain_s)
        self._launcher.plan.scaled(group, count)  # refused at once, not after a change that is under way
        await self._finished(self._scale(group, count, drain_s))
        return await self.status()

    async def shutdown(self, drain_s: float) -> None:
        """Drain all workers and set `ended`. Raises InvalidRequest, Conflict."""
        _check_drain(drain_s)
        await self._finished(self._shutdown(drain_s))

    async def _scale(self, group: str, count: int, drain_s: float) -> None:
        async with self._changing:
            self._check_serving()
            launcher = self._launcher
            before, plan = launcher.plan.servers, launcher.plan.scaled(group, count)
            old, new = {server.name for server in before}, {server.name for server in plan.servers}
            if added := [server for server in plan.servers if server.name not in old]:
                self._on_event(f"{group}: starting {', '.join(server.name for server in added)}")
                await launcher.add(added)
            if leaving := [server.name for server in before if server.name not in new]:
                self._on_event(f"{group}: draining {', '.join(leaving)}")
                await (self._drain_routers if group == ROUTERS else self._drain)(leaving, drain_s)
                await launcher.remove(leaving)
            launcher.plan = plan
            self._on_event(f"{group}: {count}" if group == ROUTERS else f"{group}: {count} workers")

    async def _shutdown(self, drain_s: float) -> None:
        async with self._changing:
            self._check_serving()
            await self._drain([worker.name for worker in self._launcher.plan.workers], drain_s)
            self.ended.set()

    async def _drain(self, workers: Sequence[str], drain_s: float) -> None:
        self._say_unless(await drained(self._launcher.router_addresses, workers, drain_s), drain_s)

    async def _drain_routers(self, routers: Sequence[str], drain_s: float) -> None:
        addresses = [address for name in routers if (address := self._launcher.address_of(name))]
        self._say_unless(await drained(addresses, None, drain_s), drain_s)

    def _say_unless(self, done: bool, drain_s: float) -> None:
        if not done:
            self._on_event(f"after {drain_s:g} s answers are still under way; they end now")

    def _check_serving(self) -> None:
        if not self.ready or self.ended.is_set():
            state = "ends" if self.ended.is_set() else "starts"
            raise Conflict(f"fleet {self._launcher.plan.config.name} {state}: it cannot be changed now")

    async def _finished(self, change: Coroutine[Any, Any, T]) -> T:
        task = asyncio.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return await asyncio.shield(task)


def _check_drain(drain_s: float) -> None:
    if not 0 <= drain_s <= MAX_DRAIN_S:
        raise InvalidRequest("drain_s", drain_s, f"0 to {MAX_DRAIN_S:g}")


async def joined(routers: Sequence[str], workers: Sequence[str], timeout_s: float) -> None:
    """Wait until every router knows all of the workers and takes requests. Raises Unavailable."""
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(*(_joined(router, set(workers)) for router in routers))
    except TimeoutError:
        limit = f"routers {', '.join(routers)} did not hear of {', '.join(workers)} within {timeout_s:g} s"
        raise Unavailable(limit) from None


async def _joined(router: str, workers: set[str]) -> None:
    async with Client(router) as client:
        while workers:
            try:
                if workers <= {entry.worker_id for entry in await client.workers()}:
                    return
            except grpc.aio.AioRpcError:
                pass  # it starts, or restarts
            await asyncio.sleep(POLL_S)


async def caught_up(routers: Sequence[str], known_at: Sequence[str], timeout_s: float) -> None:
    """Wait until each of `routers` knows the workers that the others know, at `known_at`. Raises Unavailable."""
    try:
        async with asyncio.timeout(timeout_s):
            for router in routers:
                while not await _workers(router) >= set().union(*[await _workers(each) for each in known_at]):
                    await asyncio.sleep(POLL_S)
    except TimeoutError:
        limit = f"routers {', '.join(routers)} did not hear of the fleet's workers within {timeout_s:g} s"
        raise Unavailable(limit) from None


async def _workers(router: str) -> set[str]:
    """What a router knows; none while it starts, or restarts."""
    async with Client(router) as client:
        try:
            return {entry.worker_id for entry in await client.workers()}
        except grpc.aio.AioRpcError:
            return set()


async def drained(routers: Sequence[str], workers: Sequence[str] | None, timeout_s: float) -> bool:
    """Have no router send anything more to the workers, and wait until they are idle; False when time ran out.

    A router that does not answer sends nothing either. Without `workers` it is the routers that leave: they send
    nothing to anybody, and what others have the workers do does not matter.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(*(_drained(router, None if workers is None else set(workers)) for router in routers))
    except TimeoutError:
        return False
    return True


async def _drained(router: str, workers: set[str] | None) -> None:
    async with Client(router) as client:
        while True:
            try:
                entries = [e for e in await client.workers() if workers is None or e.worker_id in workers]
                for entry in entries:
                    if not entry.draining:  # each time: a router may have restarted
                        await client.set_draining(entry.worker_id, True)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    return
                if error.code() is not grpc.StatusCode.NOT_FOUND:  # it has just left
                    raise
            else:
                # Of one that has only now been told its report may be older than its last request.
                told = all(entry.draining for entry in entries)
                if told and not any(e.in_flight or (workers is not None and _busy(e)) for e in entries):
                    return
            await asyncio.sleep(POLL_S)


def _busy(entry: WorkerEntry) -> bool:
    return bool(entry.status.running or entry.status.waiting)
