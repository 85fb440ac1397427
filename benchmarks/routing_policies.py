"""Our routing policy beside those of others, on the same simulated fleet: time to first token, robustness, rate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

from benchmarks.report import AT_LEAST, Figure, Row, row
from benchmarks.routing_plan import BOUND, DEFAULTS, OTHERS, OURS, POLICIES, TUNED, Plan, known_saturation, title
from deploy.simulate import results
from deploy.simulate.fleet import Fleet, Network
from deploy.simulate.plan import REFERENCE_POLICY
from deploy.simulate.results import Case, Setting
from deploy.simulate.sweep import Sweep
from deploy.traces.trace import Trace
from worker.step_time import HARDWARE

MODEL = HARDWARE["70b-4xh100"]
FULL_LOAD, MOST_LOAD = 1.0, 0.8
DISTURBED = Network(event_delay_s=0.5, event_loss=0.05)
REQUESTS_PER_S = 1_000.0

MEAN, P99, SHORT_P99 = "ttft_mean_s", "ttft_p99_s", "ttft_short_p99_s"

At = tuple[int, float]  # workers, load
Ran = dict[tuple[str, int, float], results.Row]  # by policy, workers, load

# The goals as ratios: how many times better ours must be at least.
AGAINST_DEFAULTS, AGAINST_TUNED, SHORT = 1.667, 1.111, 4.0
BESIDE_BEST, DISTURBED_LOSS = 0.952, 0.909
GAP, GAP_HOST_TIER = 0.833, 0.909
CARRIED = 1.3


def setting_of(trace: Trace) -> Setting:
    """The fleet that all policies run on."""
    return Setting(trace, MODEL, Network())


def saturations(plan: Plan, trace: Trace, find: bool) -> dict[int, float]:
    """The speed that saturates round-robin, by workers. Raises InvalidRequest where none does."""
    speeds = {workers: math.nan if find else known_saturation(plan, trace, workers) for workers in plan.workers}
    wanted = [(REFERENCE_POLICY, workers) for workers, speed in speeds.items() if math.isnan(speed)]
    if wanted:
        found = Sweep(setting_of(trace), plan.jobs).saturations(wanted)
        speeds |= {workers: speed for (_, workers), speed in found.items()}
    return speeds


def speed_rows(plan: Plan, trace: Trace) -> list[Row]:
    """Simulated requests in a second of this process's time. Nothing else of ours runs meanwhile."""
    workers = plan.speed_workers
    known = known_saturation(plan, trace, workers)
    speed = 1.0 if math.isnan(known) else known
    scaled = trace.scaled(speed)
    start = time.process_time()
    Fleet(scaled, MODEL, workers=workers, policy=OURS).run()
    rate = len(trace) / (time.process_time() - start)
    what = f"{title(trace)} N{workers} simulated requests"
    note = f"a second of process time on one core; {len(trace)} requests, speed {speed:.4g}"
    return [row(what, "requests/s", Figure(rate), goal=REQUESTS_PER_S, goal_is=AT_LEAST, note=note)]


def policy_rows(plan: Plan, trace: Trace, speeds: dict[int, float]) -> list[Row]:
    """All policies at all loads, ours with a host tier and blocks fetched from peers, and ours disturbed."""
    setting = setting_of(trace)
    plain = _ran(plan, setting, POLICIES, speeds, plan.loads)
    host = _ran(plan, replace(setting, host_tier=True, peer_fetch=True), (OURS,), speeds, _at(plan, MOST_LOAD))
    disturbed = _ran(plan, replace(setting, network=DISTURBED), (OURS,), speeds, plan.loads)
    rows: list[Row | None] = []
    for workers in plan.workers:
        for load in plan.loads:
            rows += _rows_at(title(trace), workers, load, plain, host, disturbed)
    return [each for each in rows if each is not None]


def carried_rows(plan: Plan, trace: Trace) -> list[Row]:
    """The request rate that keeps the mean TTFT within five times the unloaded one, at the most workers."""
    workers = max(plan.workers)
    found = Sweep(setting_of(trace), plan.jobs).saturations([(OURS, workers), (DEFAULTS, workers)])
    rate = len(trace) / trace.duration_s
    ours, theirs = (Figure(rate * found[policy, workers]) for policy in (OURS, DEFAULTS))
    what = f"{title(trace)} N{workers} rate carried"
    note = "at a mean TTFT of 5 times the unloaded one"
    return [row(what, "requests/s", ours, theirs, peer_name=DEFAULTS, goal=CARRIED, note=note)]


def _at(plan: Plan, load: float) -> tuple[float, ...]:
    return (load,) if load in plan.loads else ()


def _ran(
    plan: Plan, setting: Setting, policies: tuple[str, ...], speeds: dict[int, float], loads: tuple[float, ...]
) -> Ran:
    cases = [
        Case(policy, workers, load * speeds[workers], load)
        for workers in plan.workers
        for load in loads
        for policy in policies
    ]
    runs = Sweep(setting, plan.jobs).runs(cases) if cases else []
    return {(run.case.policy, run.case.workers, run.case.load or 0.0): run.row for run in runs}


def _rows_at(trace: str, workers: int, load: float, plain: Ran, host: Ran, disturbed: Ran) -> list[Row | None]:
    def of(ran: Ran, policy: str) -> results.Row:
        return ran[policy, workers, load]

    def against(
        what: str, peer: results.Row, goal: float, field: str = MEAN, ours: results.Row | None = None, name: str = ""
    ) -> Row | None:
        text = f"{trace} N{workers} load {load:g} {what}"
        return _compared(text, ours or of(plain, OURS), peer, field, goal, name or peer.policy)

    rows = []
    if load == FULL_LOAD:
        rows += [
            against("mean TTFT vs dynamo", of(plain, DEFAULTS), AGAINST_DEFAULTS),
            against("mean TTFT vs dynamo-p16", of(plain, TUNED), AGAINST_TUNED),
            against("short p99 vs dynamo", of(plain, DEFAULTS), SHORT, SHORT_P99),
        ]
    if load == MOST_LOAD:
        bound = of(plain, BOUND)
        rows += [
            against("gap to bound", bound, GAP),
            against("gap to bound host tier, peer fetch", bound, GAP_HOST_TIER, ours=of(host, OURS)),
        ]
    for name, field in (("mean", MEAN), ("p99", P99)):
        rows.append(against(f"{name} TTFT vs best other", _best(plain, workers, load, field), BESIDE_BEST, field))
    late = of(disturbed, OURS)
    return [*rows, against("disturbed", of(plain, OURS), DISTURBED_LOSS, ours=late, name="undisturbed")]


def _best(ran: Ran, workers: int, load: float, field: str) -> results.Row:
    rows = [ran[policy, workers, load] for policy in OTHERS]
    value: Callable[[results.Row], float] = lambda each: float(getattr(each, field))  # noqa: E731 - typed
    return min(rows, key=value)


def _compared(what: str, ours: results.Row, peer: results.Row, field: str, goal: float, peer_name: str) -> Row | None:
    """None where there is nothing to compare: no request of that kind."""
    values = float(getattr(ours, field)), float(getattr(peer, field))
    if not all(map(math.isfinite, values)):
        return None
    notes = [f"speed {ours.speed:.4g}"]
    if field == SHORT_P99:
        notes.append(f"{ours.short_requests} short requests")
    if ours.refused or peer.refused:
        notes.append(f"refused: {ours.refused}, peer {peer.refused}")
    if ours.preemptions or peer.preemptions:
        notes.append(f"preempted: {ours.preemptions}, peer {peer.preemptions}")
    mine, theirs = map(Figure, values)
    return row(what, "s", mine, theirs, peer_name=peer_name, goal=goal, note=", ".join(notes))
