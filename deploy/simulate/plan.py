"""What `rhizome simulate` is asked for, every value checked before anything is run. Pure."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from deploy.simulate.fleet import BOUND, Network
from deploy.simulate.results import Case, Setting, Slo
from deploy.simulate.split_fleet import Split
from deploy.traces.trace import Trace
from rhizome.errors import InvalidRequest
from router.objective import Objective
from router.policies import POLICIES
from worker.step_time import Hardware

SIMULATED_POLICIES = (*POLICIES, BOUND)
DEFAULT_POLICIES = ("predicted-ttft", "dynamo", "sglang", "llm-d", "lmetric", "round-robin")
REFERENCE_POLICY = "round-robin"
"""Loads are shares of the speed that saturates it."""

OBJECTIVES = ("ttft", "slo")
ROLES = ("prefill", "decode", "both")

MAX_WORKERS = 4096
MAX_ROUTERS = 256
MAX_JOBS = 256
MAX_DELAY_S = 3600.0
MIN_INTERVAL_S = 0.001  # heartbeats of a simulated hour: 3.6 million a worker
MIN_SPEED, MAX_SPEED = 1e-3, 1e6
MIN_LOAD, MAX_LOAD = 1e-2, 100.0
MAX_SEED = 2**63 - 1

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Asked:
    """Lists as they stand on the command line."""

    workers: str
    policy: str
    speed: str | None = None
    load: str | None = None
    find_saturation: str | None = None
    roles: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be run: at speeds, at loads, or in search of saturation."""

    workers: tuple[int, ...]
    policies: tuple[str, ...]
    speeds: tuple[float, ...] = ()
    loads: tuple[float, ...] = ()
    saturate: tuple[str, ...] = ()  # policies
    split: Split | None = None  # to be run beside equal workers, wherever it is of as many

    @property
    def saturations(self) -> list[tuple[str, int]]:
        """What has to be found first, or alone: policy and workers."""
        policies = self.saturate or ((REFERENCE_POLICY,) if self.loads else ())
        return [(policy, workers) for workers in self.workers for policy in policies]

    def cases(self, saturation: dict[tuple[str, int], float]) -> list[Case]:
        """The runs, in the order of the rows: by workers, speed and policy."""
        if self.saturate:
            return []
        return [
            Case(policy, workers, speed, load, split)
            for workers in self.workers
            for speed, load in self._speeds(workers, saturation)
            for policy in self.policies
            for split in self._splits(workers, policy)
        ]

    def _splits(self, workers: int, policy: str) -> list[Split | None]:
        if self.split is None or self.split.workers != workers or policy == BOUND:  # all of that lies in one cache
            return [None]
        return [None, self.split]

    def _speeds(self, workers: int, saturation: dict[tuple[str, int], float]) -> Sequence[tuple[float, float | None]]:
        if self.loads:
            return [(load * saturation[REFERENCE_POLICY, workers], load) for load in self.loads]
        return [(speed, None) for speed in self.speeds]


def plan_of(asked: Asked) -> Plan:
    """Raises InvalidRequest."""
    given = {"--speed": asked.speed, "--load": asked.load, "--find-saturation": asked.find_saturation}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise InvalidRequest(", ".join(named), ", ".join(str(given[name]) for name in named), "one of them at a time")
    workers = _distinct(
        "--workers", [_whole("--workers", part, 1, MAX_WORKERS) for part in _parts("--workers", asked.workers)]
    )
    plan = Plan(workers, _policies("--policy", asked.policy))
    if asked.roles is not None:
        plan = replace(plan, split=_split_of(asked.roles, plan.workers))
    if asked.find_saturation is not None:
        if asked.roles is not None:
            raise InvalidRequest("--roles", asked.roles, "not with --find-saturation: what saturates is equal workers")
        return replace(plan, saturate=_policies("--find-saturation", asked.find_saturation))
    if asked.load is not None:
        return replace(plan, loads=_numbers("--load", asked.load, MIN_LOAD, MAX_LOAD))
    speed = "1" if asked.speed is None else asked.speed
    return replace(plan, speeds=_numbers("--speed", speed, MIN_SPEED, MAX_SPEED))


def _split_of(text: str, workers: Sequence[int]) -> Split:
    counts: dict[str, int] = {}
    for part in _parts("--roles", text):
        role, _, count = part.partition("=")
        if role not in ROLES or role in counts:
            raise InvalidRequest("--roles", text, f"ROLE=N, with each role once: {', '.join(ROLES)}")
        counts[role] = _whole(f"--roles {role}", count, 0, MAX_WORKERS)
    prefill, decode, both = (counts.get(role, 0) for role in ROLES)
    if not prefill or not decode + both:
        raise InvalidRequest("--roles", text, "workers that prefill, and others that decode")
    split = Split(prefill, decode, both)
    if split.workers not in workers:
        raise InvalidRequest("--roles", text, f"as many as --workers: {', '.join(map(str, workers))}")
    return split


def objective_of(name: str, slo: Slo) -> Objective | None:
    """What predicted-ttft is to keep. Raises InvalidRequest."""
    if name not in OBJECTIVES:
        raise InvalidRequest("--objective", name, f"one of {', '.join(OBJECTIVES)}")
    return Objective(slo.ttft_s, slo.itl_s) if name == "slo" else None


def setting_of(
    trace: Trace,
    hardware: Hardware,
    network: Network,
    *,
    routers: int,
    host_tier: bool,
    peer_fetch: bool = False,
    seed: int,
    slo: Slo,
    objective: str = "ttft",
) -> Setting:
    """Raises InvalidRequest."""
    _within("--routers", routers, 1, MAX_ROUTERS)
    _within("--seed", seed, 0, MAX_SEED)
    _within("--event-delay", network.event_delay_s, 0, MAX_DELAY_S)
    _within("--event-loss", network.event_loss, 0, 1)
    _within("--report-interval", network.report_interval_s, MIN_INTERVAL_S, MAX_DELAY_S)
    _within("--slo-ttft", slo.ttft_s, 0, MAX_DELAY_S)
    _within("--slo-itl", slo.itl_s, 0, MAX_DELAY_S)
    if hardware.kv_tokens < trace.block_size:
        limit = f"at least the {trace.block_size} tokens of one of the trace's blocks"
        raise InvalidRequest(f"hardware {hardware.name}: kv_tokens", hardware.kv_tokens, limit)
    if host_tier and hardware.host_kv_tokens < trace.block_size:
        limit = f"at least the {trace.block_size} tokens of one of the trace's blocks; without: --no-host-tier"
        raise InvalidRequest(f"hardware {hardware.name}: host_kv_tokens", hardware.host_kv_tokens, limit)
    if peer_fetch and not hardware.fetch_token_s:
        limit = "above 0, to fetch KV blocks from other workers; without: neither --peer-fetch nor --roles"
        raise InvalidRequest(f"hardware {hardware.name}: fetch_token_s", hardware.fetch_token_s, limit)
    return Setting(
        trace,
        hardware,
        network,
        routers=routers,
        host_tier=host_tier,
        peer_fetch=peer_fetch,
        seed=seed,
        slo=slo,
        objective=objective_of(objective, slo),
    )


def checked_jobs(jobs: int | None) -> int:
    """As many as there are CPUs where none are given. Raises InvalidRequest."""
    if jobs is None:
        return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, MAX_JOBS)
    return int(_within("--jobs", jobs, 1, MAX_JOBS))


def _parts(name: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise InvalidRequest(name, text, "values with commas between them")
    return parts


def _distinct(name: str, values: Sequence[T]) -> tuple[T, ...]:
    if len(set(values)) < len(values):
        raise InvalidRequest(name, ",".join(map(str, values)), "each value once")
    return tuple(values)


def _policies(name: str, text: str) -> tuple[str, ...]:
    if text == "all":
        return SIMULATED_POLICIES
    parts = _parts(name, text)
    for part in parts:
        if part not in SIMULATED_POLICIES:
            raise InvalidRequest(name, part, f"one of {', '.join(SIMULATED_POLICIES)}, or all")
    return _distinct(name, parts)


def _whole(name: str, text: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdigit()):
        raise InvalidRequest(name, text, f"a whole number from {low} to {high}")
    return int(_within(name, int(text[:20]), low, high))


def _numbers(name: str, text: str, low: float, high: float) -> tuple[float, ...]:
    values = []
    for part in _parts(name, text):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise InvalidRequest(name, part, f"a number from {low:g} to {high:g}")
        values.append(value)
    return _distinct(name, values)


def _within(name: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        raise InvalidRequest(name, value, f"{low:g} to {high:g}" if high < MAX_SEED else f"at least {low:g}")
    return value
