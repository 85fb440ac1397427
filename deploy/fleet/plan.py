"""A fleet's servers, one by one: names, settings and arguments of the processes that a configuration asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pydantic import ValidationError

from deploy.fleet.config import MAX_GROUP, MAX_ROUTERS, ROUTERS, FleetConfig, Model, Resources, WorkerGroup
from deploy.fleet.logins import Logins, without_logins
from deploy.processes import WORKER_PLACE, WorkerSettings
from deploy.served_model import chosen_hardware
from deploy.transfers import DEFAULT_TRANSPORTS
from kv_events.bus.url import parse_bus_url
from rhizome.errors import InvalidRequest

if TYPE_CHECKING:
    from worker.step_time import Hardware

TINY = "tiny"  # what the model that is made on the spot is called


@dataclass(frozen=True)
class RouterServer:
    """One router."""

    name: str
    port: int
    fleet: FleetConfig
    role = "router"
    group_name = ROUTERS

    @property
    def resources(self) -> Resources:
        return self.fleet.routers.resources

    def arguments(self) -> list[str]:
        """Of a `rhizome` process that is this router."""
        fleet = self.fleet
        local_ms = fleet.routers.local_prefill_ms
        return [
            "router",
            f"--host={fleet.host}",
            f"--port={self.port}",
            f"--policy={fleet.routers.policy}",
            *([] if local_ms is None else [f"--local-prefill-ms={local_ms:g}"]),
            *(["--insecure"] if fleet.insecure else []),
            *([f"--registry={fleet.registry}"] if fleet.registry else []),
        ]


@dataclass(frozen=True)
class WorkerServer:
    """One worker of a group."""

    name: str
    group: WorkerGroup
    fleet: FleetConfig
    hardware: Hardware | None

    @property
    def role(self) -> str:
        return self.group.role

    @property
    def group_name(self) -> str:
        return self.group.name

    @property
    def resources(self) -> Resources:
        return self.group.resources

    @property
    def model(self) -> Model:
        return self.fleet.model

    def settings(
        self, routers: Sequence[str], *, host: str = "", model_dir: Path | None = None, threads: int | None = None
    ) -> WorkerSettings:
        """Its settings, where all routers are at `routers`: `host` in place of the fleet's, `threads` unless the group
        says otherwise; `model_dir` is where a tiny model was made."""
        group, fleet = self.group, self.fleet
        return WorkerSettings(
            model_dir=model_dir if self.model.tiny else self.model.path,
            worker_id=self.name,
            routers=() if fleet.registry else tuple(routers),
            registry=fleet.registry or "",
            host=host or fleet.host,
            role=group.role,
            model_name=self.model.name or (TINY if self.model.tiny else None),
            block_size=group.block_size,
            kv_cache_mib=1024 if group.kv_cache_mib is None else group.kv_cache_mib,
            max_model_len=group.max_model_len,
            max_batched_tokens=group.max_batched_tokens,
            max_running=group.max_running,
            max_waiting=group.max_waiting,
            events=tuple(group.events),
            event_token_ids=group.event_token_ids,
            transports=tuple(group.transports) or DEFAULT_TRANSPORTS,
            threads=group.threads or threads,
            advertise=host or None,
            insecure=fleet.insecure,
            hardware=self.hardware,
            time_scale=self.model.time_scale,
        )

    def arguments(self, settings: WorkerSettings) -> list[str]:
        """Of a `rhizome` process with these settings."""
        given: dict[str, object] = {
            "id": settings.worker_id,
            "host": settings.host,
            "registry": settings.registry or None,
            "role": settings.role,
            "model-name": settings.model_name,
            "block-size": settings.block_size,
            "max-model-len": settings.max_model_len,
            "max-batched-tokens": settings.max_batched_tokens,
            "max-running": settings.max_running,
            "max-waiting": settings.max_waiting,
            "threads": settings.threads,
        }
        if self.hardware is None:
            given |= {"model": settings.model_dir, "kv-cache-mib": settings.kv_cache_mib}
        else:
            given |= {"hardware": self.model.simulated, "time-scale": settings.time_scale}
        switches = {
            "simulated": self.hardware is not None,
            "event-token-ids": settings.event_token_ids,
            "insecure": settings.insecure,
        }
        return [
            "worker",
            *(f"--{option}={value}" for option, value in given.items() if value is not None),
            *(f"--router={address}" for address in settings.routers),
            *(f"--events={url}" for url in settings.events),
            *(f"--transport={name}" for name in self.group.transports),
            *(f"--{switch}" for switch, on in switches.items() if on),
        ]


Server: TypeAlias = RouterServer | WorkerServer


@dataclass(frozen=True)
class FleetPlan:
    """Everything that a fleet consists of. Pure: what its machines hold is found out when it is started."""

    config: FleetConfig
    """Without logins: those are not for command lines and logs."""
    hardware: Hardware | None
    logins: Logins = field(default_factory=Logins)

    @property
    def routers(self) -> list[RouterServer]:
        """In order; of their ports the first is the configured one, or all are 0: free ones."""
        routers = self.config.routers
        return [
            RouterServer(f"router-{index}", routers.port and routers.port + index, self.config)
            for index in range(routers.count)
        ]

    @property
    def workers(self) -> list[WorkerServer]:
        """In order of the groups."""
        return [
            WorkerServer(f"{group.name}-{index}", group, self.config, self.hardware)
            for group in self.config.workers
            for index in range(group.count)
        ]

    @property
    def servers(self) -> list[Server]:
        """Routers, then workers."""
        return [*self.routers, *self.workers]

    def group(self, name: str) -> WorkerGroup:
        """Raises InvalidRequest for a name that none has."""
        for group in self.config.workers:
            if group.name == name:
                return group
        names = [ROUTERS, *(group.name for group in self.config.workers)]
        raise InvalidRequest("group", name, f"one of {', '.join(names)}")

    def scaled(self, name: str, count: int) -> FleetPlan:
        """The same with so many workers in a group, or so many routers. Raises InvalidRequest."""
        routers, groups = self.config.routers, self.config.workers
        if name == ROUTERS:
            self._check_routers(count)
            routers = routers.model_copy(update={"count": count})
        else:
            group = self.group(name)
            if not 0 <= count <= MAX_GROUP:
                raise InvalidRequest("count", count, f"0 to {MAX_GROUP}")
            groups = [each.model_copy(update={"count": count}) if each is group else each for each in groups]
        changed = self.config.model_copy(update={"routers": routers, "workers": groups})
        try:
            config = FleetConfig.model_validate(changed.model_dump())
        except ValidationError as error:
            raise InvalidRequest("count", count, error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        return replace(plan_fleet(config, self.hardware), logins=self.logins)

    def _check_routers(self, count: int) -> None:
        if not self.config.registry:
            limit = (
                "a group of workers: routers keep their number in a fleet without a registry, whose workers are told "
                "of them when they start; with registry: redis://HOST:PORT/NAME in its file they find each other"
            )
            raise InvalidRequest("group", ROUTERS, limit)
        if not 1 <= count <= MAX_ROUTERS:
            raise InvalidRequest("count", count, f"1 to {MAX_ROUTERS}")


def plan_fleet(config: FleetConfig, hardware: Hardware | None = None) -> FleetPlan:
    """The servers of a fleet; `hardware` where its file has been read before. Raises InvalidRequest."""
    model = config.model
    if hardware is None:
        hardware = chosen_hardware(
            model.simulated,
            simulated=model.simulated is not None,
            time_scale=model.time_scale if model.simulated else None,
            model=None,
            kv_cache_mib=None,
        )
    for group in config.workers:
        for url in group.events:
            check_own(url, group.count)
    shown, logins = without_logins(config)
    return FleetPlan(shown, hardware, logins)


def check_own(url: str, workers: int) -> None:
    """Raise InvalidRequest unless each of so many workers on one host would have a port or a stream of its own."""
    bus = parse_bus_url(url)
    if workers <= 1:
        return
    if bus.scheme in ("grpc", "zmq") and (bus.port or bus.replay_port):
        raise InvalidRequest("events_url", str(bus), f"port 0, as {workers} workers need one each")
    if bus.scheme.startswith("redis") and WORKER_PLACE not in bus.name:
        limit = f"a stream with {WORKER_PLACE} in its name, as {workers} workers need one each"
        raise InvalidRequest("events_url", str(bus), limit)
