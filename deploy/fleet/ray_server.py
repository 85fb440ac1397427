"""One router or worker in a Ray actor: its gRPC server runs on the actor's own event loop, on its node's address.

Ray places the actor, names it, and starts it again when it ends. Requests and events do not pass through Ray.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from deploy.fleet.plan import TINY, RouterServer, Server
from deploy.processes import running_worker
from deploy.router_list import RouterList
from rhizome.ticket import fleet_secret
from rhizome.v1 import launcher_pb2
from router.service import running_router

_log = logging.getLogger(__name__)

MANAGER = "manager"
RETRY_S = 0.5
TELL_TIMEOUT_S = 5.0


class Environment(dict[str, str]):
    """Variables that an actor sets for itself, the fleet's secret among them: Ray's own way logs them."""

    def __repr__(self) -> str:
        return f"Environment({', '.join(self)})"


@dataclass(frozen=True)
class Start:
    """What a server is told when it starts."""

    port: int = 0  # of a router; 0: a free one
    routers: tuple[str, ...] = ()  # that a worker joins
    restarts: int = 0
    delay_s: float = 0.0  # to wait first: it has ended again and again


class FleetServer:
    """The actor. Its process ends when its server fails, for Ray to start it anew."""

    def __init__(self, server: Server, namespace: str, environment: Environment) -> None:
        os.environ.update(environment)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._server = server
        self._namespace = namespace
        self._routers = RouterList()
        self._start = Start()
        self._address = ""
        self._stopping = asyncio.Event()
        self._serving = asyncio.get_running_loop().create_task(self._serve())

    async def describe(self) -> bytes:
        """A ServerStatus."""
        state = launcher_pb2.SERVER_STATE_SERVING if self._address else launcher_pb2.SERVER_STATE_STARTING
        context = ray.get_runtime_context()
        status = launcher_pb2.ServerStatus(
            name=self._server.name,
            group=self._server.group_name,
            role=self._server.role,
            state=state,
            host=_node_address(),
            pid=os.getpid(),
            node=context.get_node_id(),
            address=self._address,
            restarts=self._start.restarts,
        )
        return status.SerializeToString()

    async def set_routers(self, addresses: Sequence[str]) -> None:
        """A router has moved."""
        if self._start.routers:
            self._routers.set(addresses)

    async def stop(self) -> None:
        """End the server in order: a worker leaves its routers. The actor remains, to be killed."""
        self._stopping.set()
        await asyncio.gather(self._serving, return_exceptions=True)

    async def _serve(self) -> None:
        try:
            self._start = await self._told_by_manager("starting")
            await asyncio.sleep(self._start.delay_s)
            async with self._running() as address:
                self._address = address
                _log.info("%s serves on %s", self._server.name, address)
                telling = asyncio.create_task(self._told_by_manager("serving", address))
                try:
                    await self._stopping.wait()
                finally:
                    telling.cancel()
                    self._address = ""
        except Exception as error:
            _log.error("%s ends: %s", self._server.name, error)
            with suppress(Exception):
                await asyncio.wait_for(self._told_by_manager("failed", str(error)), TELL_TIMEOUT_S)
            os._exit(1)

    async def _told_by_manager(self, method: str, *words: str) -> Any:
        """What the manager answers, if it must be, once it has come back itself."""
        while True:
            try:
                manager = ray.get_actor(MANAGER, self._namespace)
                return await getattr(manager, method).remote(self._server.name, *words)
            except (ValueError, ray.exceptions.RayError):  # not there yet, or not any more
                await asyncio.sleep(RETRY_S)

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[str]:
        host, server = _node_address(), self._server
        if isinstance(server, RouterServer):
            fleet = server.fleet
            local_ms = fleet.routers.local_prefill_ms
            optional: dict[str, Any] = {} if local_ms is None else {"local_prefill_s": local_ms / 1000}
            serving = running_router(
                host,
                self._start.port,
                policy=fleet.routers.policy,
                secret=fleet_secret(),
                insecure=fleet.insecure,
                registry=fleet.registry or "",
                **optional,
            )
            async with serving as address:
                yield address
            return
        with tempfile.TemporaryDirectory(prefix="rhizome-") as folder:
            model_dir = await asyncio.to_thread(_tiny_model, Path(folder)) if server.model.tiny else None
            threads = max(1, int(server.resources.cpus))
            settings = server.settings(self._start.routers, host=host, model_dir=model_dir, threads=threads)
            self._routers.set(settings.routers)
            async with running_worker(settings, self._routers) as address:
                yield address


def _node_address() -> str:
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def _tiny_model(folder: Path) -> Path:
    """The same one wherever it is made."""
    from worker.tiny_model import make_tiny_model

    return make_tiny_model(folder / TINY)


def server_options(server: Server, namespace: str, strategy: Any) -> Mapping[str, Any]:
    """How Ray is to run a server's actor."""
    resources = server.resources
    return {
        "name": server.name,
        "namespace": namespace,
        "lifetime": "detached",
        "num_cpus": resources.cpus,
        "num_gpus": resources.gpus,
        "resources": dict(resources.custom),
        "max_restarts": -1,
        "scheduling_strategy": strategy,
    }
