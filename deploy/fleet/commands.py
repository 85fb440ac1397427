"""`rhizome up`, `status`, `scale`, `down` and `config check`: what the command line asks for, carried out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol

from pydantic import ValidationError

from deploy.fleet.config import ROUTERS, FleetConfig, Model, Refused, Routers, WorkerGroup
from deploy.fleet.plan import FleetPlan, check_own
from deploy.served_model import DEFAULT_HARDWARE, chosen_hardware
from rhizome.errors import InvalidRequest
from rhizome.v1 import launcher_pb2

DEFAULT_WORKERS = 2
DEFAULT_PORT = 7700


class Control(Protocol):
    """A running fleet, wherever its launcher is."""

    async def status(self) -> launcher_pb2.FleetStatus:
        """Every server."""

    async def scale(self, group: str, count: int, drain_s: float) -> launcher_pb2.FleetStatus:
        """Returns when it is done."""

    async def shutdown(self, drain_s: float) -> None:
        """Returns when all servers have ended."""


def fleet_of_options(
    *,
    model: Path | None,
    workers: int | None,
    port: int | None,
    kv_cache_mib: int | None,
    simulated: bool,
    hardware: str | None,
    time_scale: float | None,
    events: Sequence[str],
) -> FleetConfig:
    """The fleet that `rhizome up` starts without a file: one router, workers that are alike. Raises InvalidRequest."""
    chosen_hardware(hardware, simulated=simulated, time_scale=time_scale, model=model, kv_cache_mib=kv_cache_mib)
    count = DEFAULT_WORKERS if workers is None else workers
    for url in events:
        check_own(url, count)
    try:
        if simulated:
            scale = 1.0 if time_scale is None else time_scale
            served = Model(simulated=hardware or DEFAULT_HARDWARE, time_scale=scale)
        else:
            served = Model(tiny=True) if model is None else Model(path=model)
        return FleetConfig(
            model=served,
            routers=Routers(port=DEFAULT_PORT if port is None else port),
            workers=[WorkerGroup(name="worker", count=count, kv_cache_mib=kv_cache_mib, events=list(events))],
        )
    except ValidationError as error:
        raise _refused(error) from None


def _refused(error: ValidationError) -> InvalidRequest:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, Refused):
        return InvalidRequest(cause.field, cause.value, cause.limit)
    return InvalidRequest(".".join(map(str, first["loc"])), first["input"], first["msg"])


def run_up(plan: FleetPlan, ray: str | None) -> None:
    """Start a fleet. On this machine it lives as long as this call; on a Ray cluster it stays."""
    if ray is not None:
        ray_cluster().deploy_on_ray(plan, ray)
        return
    from deploy.local import run_cluster
    from deploy.processes import until_signal

    asyncio.run(until_signal(run_cluster(plan)))


def ray_cluster() -> ModuleType:
    """Ray is imported for what needs it. Raises InvalidRequest where it is not there."""
    try:
        from deploy.fleet import ray_cluster as module
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise InvalidRequest("--ray", None, "only with Ray: pip install 'rhizome[ray]'") from None
    return module


async def _control(fleet: str | None, ray: str | None) -> Control:
    if ray is not None:
        control: Control = ray_cluster().ray_control(fleet, ray)
        return control
    from deploy.fleet.service import the_fleet

    return await the_fleet(fleet)


def run_status(fleet: str | None, ray: str | None, *, as_json: bool) -> None:
    """Show a fleet. Raises NotServed where none runs."""
    from deploy.fleet.show import ask_routers, show_fleet

    async def show() -> None:
        status = await (await _control(fleet, ray)).status()
        show_fleet(status, await ask_routers(status), as_json=as_json)

    asyncio.run(show())


def run_scale(group: str, count: int, fleet: str | None, ray: str | None, *, drain_s: float) -> str:
    """Change a group's size, or the routers' number; returns what became of it."""

    async def scale() -> launcher_pb2.FleetStatus:
        return await (await _control(fleet, ray)).scale(group, count, drain_s)

    status = asyncio.run(scale())
    return f"{group}: {sum(server.group == group for server in status.servers)}{'' if group == ROUTERS else ' workers'}"


def run_down(fleet: str | None, ray: str | None, *, drain_s: float) -> None:
    """Drain and end a fleet."""

    async def down() -> None:
        await (await _control(fleet, ray)).shutdown(drain_s)

    asyncio.run(down())


def checked(plan: FleetPlan, file: Path) -> str:
    """What `rhizome config check` says of a file that fits."""
    groups = ", ".join(
        f"{group.name} {group.count}" + (f" ({group.role})" if group.role != group.name else "")
        for group in plan.config.workers
    )
    return f"{file}: fits: {len(plan.routers)} routers, {len(plan.workers)} workers: {groups}"
