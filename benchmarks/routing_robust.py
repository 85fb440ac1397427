"""Our routing policy where what it knows is late, in part lost, or wrong: what that costs in time to first token."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.report import Figure, Row, row
from benchmarks.routing_plan import OURS, Plan, title
from benchmarks.routing_policies import DISTURBED, DISTURBED_LOSS, FULL_LOAD, setting_of
from deploy.simulate import results
from deploy.simulate.results import Case, Setting
from deploy.simulate.sweep import Sweep
from deploy.traces.trace import Trace

WRONG = (0.5, 2.0)
"""Times the true step times: what routers take them for until they have learned."""


def robust_rows(plan: Plan, trace: Trace, speeds: dict[int, float]) -> list[Row]:
    """Mean TTFT at the highest load, beside the same fleet whose router knows the step times from the start and whose
    events are neither late nor lost."""
    if FULL_LOAD not in plan.loads:
        return []
    setting = setting_of(trace)
    plain = _ran(plan, replace(setting, prior_error=1.0), speeds)
    rows = []
    for factor in WRONG:
        wrong = replace(setting, prior_error=factor)
        for what, tried in (("", wrong), (", events late and lost", replace(wrong, network=DISTURBED))):
            ran = _ran(plan, tried, speeds)
            for workers in plan.workers:
                text = f"{title(trace)} N{workers} load {FULL_LOAD:g} step times x{factor:g}{what}"
                ours, peer = (Figure(each[workers].ttft_mean_s) for each in (ran, plain))
                note = f"mean TTFT, speed {ran[workers].speed:.4g}"
                rows.append(row(text, "s", ours, peer, peer_name="undisturbed", goal=DISTURBED_LOSS, note=note))
    return rows


def _ran(plan: Plan, setting: Setting, speeds: dict[int, float]) -> dict[int, results.Row]:
    cases = [Case(OURS, workers, FULL_LOAD * speeds[workers], FULL_LOAD) for workers in plan.workers]
    return {run.case.workers: run.row for run in Sweep(setting, plan.jobs).runs(cases)}
