"""What a fleet's file may say: its model, routers and groups of workers, with defaults and limits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from deploy.processes import WILDCARDS
from deploy.transfers import DEFAULT_TRANSPORTS, TRANSPORTS, check_transport
from kv_events.bus.redis_registry import parse_registry_url
from kv_events.bus.url import parse_bus_url
from rhizome.errors import InvalidRequest
from rhizome.rpc import check_bind_host
from router.policies import POLICIES

ROUTERS = "routers"  # their group's name
MAX_ROUTERS = 16
MAX_GROUP = 512  # workers
MAX_GROUPS = 64


class Refused(ValueError):
    """An InvalidRequest in the only words that pydantic collects. `value` is as it may be shown: without passwords."""

    def __init__(self, error: InvalidRequest) -> None:
        super().__init__(str(error))
        self.field = error.field
        self.value = error.value
        self.limit = error.limit


def _collected(check: Callable[[str], str]) -> AfterValidator:
    """A check that raises InvalidRequest, as a validator."""

    def validate(value: str) -> str:
        try:
            return check(value)
        except InvalidRequest as error:
            raise Refused(error) from None

    return AfterValidator(validate)


def _name(value: str) -> str:
    """A part of process ids, actors' names and addresses: letters, digits, dashes, at most 40."""
    if not 1 <= len(value) <= 40 or not value.replace("-", "").isalnum() or not value.isascii():
        raise InvalidRequest("name", value, "1 to 40 letters, digits and dashes")
    return value


def _policy(value: str) -> str:
    if value not in POLICIES:
        raise InvalidRequest("policy", value, f"one of {', '.join(POLICIES)}")
    return value


def _registry(value: str) -> str:
    return parse_registry_url(value).url


def _events(value: str) -> str:
    parse_bus_url(value.replace("{worker}", "w"))
    return value


Name = Annotated[str, _collected(_name)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Model(_Part):
    """What is served: exactly one of the three."""

    path: Annotated[Path | None, Field(strict=False)] = None
    """Folder of a Hugging Face checkpoint, which each worker's machine must have there."""
    tiny: bool = False
    """A small one, made when the fleet starts: for trying things out on one machine."""
    simulated: str | None = None
    """Hardware whose step times are taken: 70b-4xh100, 8b-1xh100 or a TOML file."""
    time_scale: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Simulated hardware runs so many times faster."""
    name: str | None = None
    """As clients call it; default: the folder's or the hardware's."""

    @model_validator(mode="after")
    def _one(self) -> Model:
        given = [name for name in ("path", "tiny", "simulated") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"exactly one of path, tiny and simulated is needed, not {' and '.join(given) or 'none'}")
        return self


class Resources(_Part):
    """What each process takes of its machine, for Ray to place it; the embedded launcher has one machine."""

    cpus: Annotated[float, Field(ge=0, le=4096)] = 1.0
    gpus: Annotated[float, Field(ge=0, le=64)] = 0.0
    custom: dict[str, Annotated[float, Field(gt=0)]] = {}


class Routers(_Part):
    """All of them follow all workers; several need a registry, or know each worker by its `--router`."""

    count: Annotated[int, Field(ge=1, le=MAX_ROUTERS)] = 1
    port: Annotated[int, Field(ge=0, le=65535)] = 7700
    """Of the first, the others have the next ones; 0: free ones."""
    policy: Annotated[str, _collected(_policy)] = "predicted-ttft"
    local_prefill_ms: Annotated[float | None, Field(ge=0, le=60_000)] = None
    """Decode workers compute prompts themselves that take no longer; default: the router's (see its --help)."""
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _ports(self) -> Routers:
        if self.port and self.port + self.count - 1 > 65535:
            raise ValueError(f"port {self.port} leaves no room for {self.count} routers below 65536")
        return self


class WorkerGroup(_Part):
    """Workers that are alike: NAME-0, NAME-1, ..."""

    role: Literal["both", "prefill", "decode"] = "both"
    name: Name = ""
    """Default: the role."""
    count: Annotated[int, Field(ge=0, le=MAX_GROUP)] = 1
    block_size: Annotated[int, Field(ge=1, le=1024)] = 16
    kv_cache_mib: Annotated[int | None, Field(ge=1)] = None
    max_model_len: Annotated[int | None, Field(ge=1)] = None
    max_batched_tokens: Annotated[int | None, Field(ge=1)] = None
    max_running: Annotated[int | None, Field(ge=1)] = None
    max_waiting: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    threads: Annotated[int | None, Field(ge=1, le=1024)] = None
    events: Annotated[list[Annotated[str, _collected(_events)]], Field(max_length=8)] = []
    event_token_ids: bool = False
    transports: Annotated[list[Annotated[str, _collected(check_transport)]], Field(max_length=len(TRANSPORTS))] = []
    """For KV blocks from and for other workers, the best first; default: the worker's."""
    resources: Resources = Resources()

    @model_validator(mode="after")
    def _ways(self) -> WorkerGroup:
        for name in self.transports:
            if self.transports.count(name) > 1:
                raise ValueError(f"transports names {name} twice")
        return self

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: object) -> object:
        if isinstance(given, dict) and "name" not in given:
            return {**given, "name": given.get("role", "both")}
        return given


class FleetConfig(_Part):
    """A whole fleet."""

    name: Name = "rhizome"
    model: Model
    host: str = "127.0.0.1"
    """What servers bind; on Ray the node's own address is taken instead."""
    insecure: bool = False
    """Serve off-host in the clear."""
    registry: Annotated[str, _collected(_registry)] | None = None
    """redis://host:port/FLEET, where routers find the workers; default: each worker knows all routers."""
    routers: Routers = Routers()
    workers: Annotated[list[WorkerGroup], Field(min_length=1, max_length=MAX_GROUPS)]

    @model_validator(mode="after")
    def _consistent(self) -> FleetConfig:
        names = [group.name for group in self.workers]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two groups of workers are called {name}: give each a name")
            if name in ("router", ROUTERS):
                raise ValueError(f"no group of workers may be called {name}: the routers are router-0, router-1, ...")
        if self.model.simulated is None and "time_scale" in self.model.model_fields_set and self.model.time_scale != 1:
            raise ValueError("model.time_scale is only for simulated hardware")
        if self.model.simulated is not None and any(group.kv_cache_mib is not None for group in self.workers):
            raise ValueError("kv_cache_mib is not for simulated workers: the hardware says how much KV it holds")
        if self.host in WILDCARDS:
            raise ValueError(f"host {self.host} is a wildcard: give the address by which others reach this machine")
        try:
            check_bind_host(self.host, insecure=self.insecure)
        except InvalidRequest as error:
            raise Refused(error) from None
        roles = {group.role for group in self.workers if group.count}
        if ("prefill" in roles) != ("decode" in roles) and "both" not in roles:
            raise ValueError("prefill workers need decode workers, and the other way, or some of role both")
        if len({group.block_size for group in self.workers}) > 1:
            raise ValueError("all workers of a model need the same block_size")
        begin, go_on = (
            [
                set(group.transports or DEFAULT_TRANSPORTS)
                for group in self.workers
                if group.count and group.role in role
            ]
            for role in (("prefill",), ("decode", "both"))
        )
        for ways in begin:
            if not any(ways & others for others in go_on):
                raise ValueError(
                    f"no worker can pull from prefill workers by {', '.join(sorted(ways))}: see transports"
                )
        return self
