"""What the demo plays: fleets, one after the other, and on each the modes in which conversations are served. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from deploy.fleet.config import FleetConfig, Model, Resources, Routers, WorkerGroup

KV_AWARE = "predicted-ttft"
LITTLE = Resources(cpus=0.1)  # of a Ray cluster's count of CPUs: the demo fits beside whatever else runs there


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to serve the conversations."""

    name: str
    policy: str = KV_AWARE
    bypass_prefix_cache: bool = False


@dataclass(frozen=True, slots=True)
class Stage:
    """A fleet, and what is played on it."""

    fleet: FleetConfig
    modes: tuple[Mode, ...]


ROUTING = (
    Mode("kv-aware"),
    Mode("round-robin", "round-robin"),
    Mode("cache-off", "round-robin", bypass_prefix_cache=True),
)


def routing_stages(name: str, workers: int, *, insecure: bool = False) -> list[Stage]:
    """One fleet: KV-aware, round-robin and without a cache. `name` is the fleet's."""
    return [Stage(_fleet(name, insecure, WorkerGroup(name="worker", count=workers, resources=LITTLE)), ROUTING)]


def disagg_stages(name: str, workers: int, *, insecure: bool = False) -> list[Stage]:
    """So many workers (at least 2) that do everything; then as many, of which one computes the prompts of all."""
    prefill = WorkerGroup(role="prefill", resources=LITTLE)
    decode = WorkerGroup(role="decode", count=workers - 1, resources=LITTLE)
    return [
        Stage(
            _fleet(name, insecure, WorkerGroup(name="worker", count=workers, resources=LITTLE)),
            (Mode("aggregated"),),
        ),
        Stage(_fleet(name, insecure, prefill, decode), (Mode("disaggregated"),)),
    ]


def _fleet(name: str, insecure: bool, *workers: WorkerGroup) -> FleetConfig:
    apart = any(group.role == "prefill" for group in workers)
    return FleetConfig(
        name=name,
        model=Model(tiny=True),
        insecure=insecure,
        # However short a prompt is, the prefill worker's part is to be seen.
        routers=Routers(port=0, local_prefill_ms=0 if apart else None, resources=LITTLE),
        workers=list(workers),
    )
