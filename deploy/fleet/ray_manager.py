"""The actor that holds a fleet's plan on a Ray cluster: starts and ends the servers' actors, knows where they are.

When its own node is lost Ray starts it elsewhere, and it learns the fleet from the named actors that there are. The
fleet serves on meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deploy.fleet.config import ROUTERS
from deploy.fleet.control import READY_TIMEOUT_S, FleetControl, caught_up, joined
from deploy.fleet.plan import FleetPlan, RouterServer, Server, WorkerServer
from deploy.fleet.ray_server import Environment, FleetServer, Start, server_options
from rhizome.errors import RhizomeError, Unavailable
from rhizome.v1 import launcher_pb2

_log = logging.getLogger(__name__)

DESCRIBE_TIMEOUT_S = 2.0
STOP_TIMEOUT_S = 10.0
STABLE_S = 30.0  # a server that lived for so long is restarted at once again
LONGEST_RESTART_DELAY_S = 10.0
MAX_MESSAGES = 1000
POLL_S = 0.1


@dataclass(slots=True)
class Record:
    """One server's actor, and what it has said."""

    server: Server
    actor: Any  # a handle of FleetServer
    starts: int = 0
    quick_ends: int = 0
    started_s: float = 0.0
    address: str = ""
    problem: str = ""
    last: launcher_pb2.ServerStatus = field(default_factory=launcher_pb2.ServerStatus)

    def start(self, now_s: float) -> float:
        """Its process begins; for how long it has to wait first, as it has ended again and again."""
        lived_s = now_s - self.started_s
        self.quick_ends = self.quick_ends + 1 if self.starts and lived_s < STABLE_S else 0
        self.starts += 1
        self.started_s = now_s
        return 0.0 if self.quick_ends < 2 else min(0.2 * 2.0 ** min(self.quick_ends, 10), LONGEST_RESTART_DELAY_S)


class RayLauncher:
    """deploy.fleet.control's launcher, in the manager's process."""

    kind = "ray"

    def __init__(self, plan: FleetPlan, namespace: str, environment: Environment) -> None:
        self.plan = plan
        self._namespace = namespace
        self._environment = environment
        self._records: dict[str, Record] = {}

    @property
    def router_addresses(self) -> list[str]:
        """Of all routers that have served."""
        return [record.address for record in self._routers() if record.address]

    async def servers(self) -> list[launcher_pb2.ServerStatus]:
        """Every actor, by its own words; one that says nothing is starting, or waits for its place."""
        records = list(self._records.values())
        return list(await asyncio.gather(*map(self._described, records)))

    async def start(self) -> None:
        """Start routers and workers. Raises Unavailable when one does not start; what was started remains."""
        await self._start(self.plan.servers)
        await joined(self.router_addresses, [worker.name for worker in self.plan.workers], READY_TIMEOUT_S)

    def address_of(self, name: str) -> str:
        """A server's host:port; empty where it has not served yet."""
        record = self._records.get(name)
        return record.address if record else ""

    async def add(self, servers: Sequence[Server]) -> None:
        """Start servers, and wait until all routers know all workers. Raises Unavailable; none of them is left then."""
        before = self.router_addresses
        try:
            await self.servers()  # where they are now
            await self._start(servers)
            routers = [self.address_of(server.name) for server in servers if isinstance(server, RouterServer)]
            await caught_up(routers, before, READY_TIMEOUT_S)
            workers = [server.name for server in servers if isinstance(server, WorkerServer)]
            await joined(self.router_addresses, workers, READY_TIMEOUT_S)
        except BaseException:
            await self.remove([server.name for server in servers])
            raise

    async def _start(self, servers: Sequence[Server]) -> None:
        routers = [server for server in servers if isinstance(server, RouterServer)]
        load = Counter(record.last.node for record in self._routers() if record.last.node)
        for router, node in zip(routers, _nodes_for(routers, load), strict=True):
            # Back on its node with its port it is found again; elsewhere if the node is gone.
            self._create(router, NodeAffinitySchedulingStrategy(node, soft=True) if node else "DEFAULT")
        for server in servers:
            if isinstance(server, WorkerServer):
                self._create(server, "SPREAD")
        await self._until_serving([server.name for server in servers])

    async def remove(self, names: Sequence[str]) -> None:
        """End actors for good: in order, by force after a grace."""
        leaving = [record for name in names if (record := self._records.pop(name, None))]
        await asyncio.gather(*map(_end, leaving))

    async def stop(self) -> None:
        """End all of them, workers first: they take their leave."""
        await self.remove([name for name, record in self._records.items() if isinstance(record.server, WorkerServer)])
        await self.remove(list(self._records))

    async def recover(self) -> None:
        """Learn the fleet from the actors that there are."""
        found = {
            each["name"]
            for each in ray.util.list_named_actors(all_namespaces=True)
            if each["namespace"] == self._namespace
        }
        for group in self.plan.config.workers:
            self.plan = self.plan.scaled(group.name, _count(found, group.name))
        if self.plan.config.registry:
            self.plan = self.plan.scaled(ROUTERS, max(1, _count(found, "router")))
        for server in self.plan.servers:
            if server.name in found:
                self._records[server.name] = Record(server, ray.get_actor(server.name, self._namespace))
        for record, status in zip(self._records.values(), await self.servers(), strict=True):
            record.address, record.starts = status.address, status.restarts + 1

    # What servers say.

    async def starting(self, name: str) -> Start:
        """A server's process begins. A worker waits until all routers have served."""
        record = self._records.get(name)
        if record is None:
            raise Unavailable(f"{name} is not part of this fleet")
        delay_s = record.start(time.monotonic())
        if isinstance(record.server, RouterServer):
            port = int(record.address.rpartition(":")[2] or record.server.port)
            return Start(port, restarts=record.starts - 1, delay_s=delay_s)
        while not self.plan.config.registry and not all(router.address for router in self._routers()):
            await asyncio.sleep(POLL_S)
        return Start(routers=tuple(self.router_addresses), restarts=record.starts - 1, delay_s=delay_s)

    async def serving(self, name: str, address: str) -> None:
        """A server serves; where a router has moved the workers hear of it."""
        record = self._records.get(name)
        if record is None:
            return
        moved = record.address not in ("", address)
        record.address, record.problem = address, ""
        if moved and isinstance(record.server, RouterServer) and not self.plan.config.registry:
            for worker in self._records.values():
                worker.actor.set_routers.remote(self.router_addresses)

    async def failed(self, name: str, problem: str) -> None:
        """A server ends."""
        if record := self._records.get(name):
            record.problem = problem

    def _routers(self) -> Iterable[Record]:
        return [record for record in self._records.values() if isinstance(record.server, RouterServer)]

    def _create(self, server: Server, strategy: Any) -> None:
        actor_class = ray.remote(FleetServer).options(**server_options(server, self._namespace, strategy))
        self._records[server.name] = Record(server, actor_class.remote(server, self._namespace, self._environment))

    async def _until_serving(self, names: Sequence[str]) -> None:
        records = [self._records[name] for name in names]
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while waiting := [record for record in records if not record.address]:
            for record in waiting:
                if record.problem:
                    raise Unavailable(f"{record.server.name} did not start: {record.problem}")
            if time.monotonic() > deadline_s:
                raise Unavailable(f"not started after {READY_TIMEOUT_S:g} s: {', '.join(map(_waits_for, waiting))}")
            await asyncio.sleep(POLL_S)

    async def _described(self, record: Record) -> launcher_pb2.ServerStatus:
        status = launcher_pb2.ServerStatus()
        try:
            status.ParseFromString(await asyncio.wait_for(record.actor.describe.remote(), DESCRIBE_TIMEOUT_S))
            record.last = status
        except (TimeoutError, ray.exceptions.RayError):
            status.CopyFrom(record.last)  # where it last was
            status.name, status.role = record.server.name, record.server.role
            status.group = record.server.group_name
            started = launcher_pb2.SERVER_STATE_STARTING
            status.state = started if record.starts else launcher_pb2.SERVER_STATE_PENDING
            status.address = record.address
        status.problem = record.problem
        return status


class FleetManager:
    """The actor. What its methods raise comes back as (code, message): Ray would lose the class of our errors."""

    def __init__(self, plan: FleetPlan, namespace: str, environment: Environment) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._messages: list[str] = []
        self._launcher = RayLauncher(plan, namespace, environment)
        self._control = FleetControl(self._launcher, self._say)
        self._recovered = asyncio.Event()
        if ray.get_runtime_context().was_current_actor_reconstructed:
            self._recovery = asyncio.get_running_loop().create_task(self._recover())
        else:
            self._recovered.set()

    async def deploy(self) -> tuple[str, Any]:
        """Start everything; returns the routers' addresses. If it fails, nothing is left."""
        try:
            await self._launcher.start()
        except RhizomeError as error:
            await self._launcher.stop()
            return error.code, str(error)
        self._control.ready = True
        return "", self._launcher.router_addresses

    async def status(self) -> tuple[str, Any]:
        """A FleetStatus."""
        await self._recovered.wait()
        return await _answered(self._status())

    async def scale(self, group: str, count: int, drain_s: float) -> tuple[str, Any]:
        """Change a group's size, or the routers' number; a FleetStatus."""
        await self._recovered.wait()
        return await _answered(self._scale(group, count, drain_s))

    async def shutdown(self, drain_s: float) -> tuple[str, Any]:
        """Drain and end all servers; this actor is to be killed then."""
        await self._recovered.wait()
        return await _answered(self._shutdown(drain_s))

    async def abandon(self) -> None:
        """End all servers at once, in whatever state they are."""
        await self._launcher.stop()

    async def messages(self, seen: int) -> list[str]:
        """What has happened beyond the first `seen` messages."""
        return self._messages[seen:]

    async def starting(self, name: str) -> Start:
        """A server begins."""
        await self._recovered.wait()
        return await self._launcher.starting(name)

    async def serving(self, name: str, address: str) -> None:
        """A server serves."""
        await self._recovered.wait()
        self._say(f"{name} serves on {address}")
        await self._launcher.serving(name, address)

    async def failed(self, name: str, problem: str) -> None:
        """A server ends."""
        self._say(f"{name} ends: {problem}")
        await self._launcher.failed(name, problem)

    async def _status(self) -> bytes:
        return (await self._control.status()).SerializeToString()

    async def _scale(self, group: str, count: int, drain_s: float) -> bytes:
        return (await self._control.scale(group, count, drain_s)).SerializeToString()

    async def _shutdown(self, drain_s: float) -> None:
        await self._control.shutdown(drain_s)
        await self._launcher.stop()

    async def _recover(self) -> None:
        await self._launcher.recover()
        self._control.ready = True
        self._recovered.set()
        self._say("the manager is back")

    def _say(self, text: str) -> None:
        _log.info("%s", text)
        if len(self._messages) < MAX_MESSAGES:  # they are read while the fleet starts
            self._messages.append(text)


async def _answered(work: Coroutine[Any, Any, Any]) -> tuple[str, Any]:
    try:
        return "", await work
    except RhizomeError as error:
        return error.code, str(error)


async def _end(record: Record) -> None:
    if record.address:  # else there is nobody who could
        try:
            await asyncio.wait_for(record.actor.stop.remote(), STOP_TIMEOUT_S)
        except (TimeoutError, ray.exceptions.RayError) as error:
            _log.info("%s did not end in order: %s", record.server.name, type(error).__name__)
    ray.kill(record.actor, no_restart=True)


def _count(names: Iterable[str], group: str) -> int:
    """How many servers there are of a group: one more than the last one's number."""
    numbers = (name.removeprefix(f"{group}-") for name in names if name.startswith(f"{group}-"))
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)


def _needed(server: Server) -> dict[str, float]:
    resources = server.resources
    needed = {"CPU": resources.cpus, "GPU": resources.gpus, **resources.custom}
    return {name: amount for name, amount in needed.items() if amount}


def _waits_for(record: Record) -> str:
    if record.starts:
        return record.server.name
    needed = " and ".join(f"{amount:g} {name}" for name, amount in _needed(record.server).items())
    return f"{record.server.name} (no machine has {needed} free)"


def _nodes_for(routers: Sequence[RouterServer], load: Counter[str]) -> list[str]:
    """A node for each router, spread over those that are large enough; empty where Ray has to find one.

    `load`: how many routers there are already, by node; the new ones are added.
    """
    known = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [node for node in known if node["Alive"]]
    chosen = []
    for router in routers:
        needed = _needed(router)
        fitting = [
            node["NodeID"] for node in nodes if all(node["Resources"].get(name, 0) >= needed[name] for name in needed)
        ]
        node = min(fitting, key=lambda each: load[each], default="")
        load[node] += 1
        chosen.append(node)
    return chosen
