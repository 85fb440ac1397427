"""What the routing benchmark measures at which size, and on which traces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.traces.synthesize import synthesize
from deploy.traces.trace import Trace, read_trace
from deploy.traces.workload import PRESETS

ROOT = Path(__file__).parents[1]
FOUND = tuple(ROOT.parent / "shared" / "traces" / f"{name}_trace.jsonl" for name in ("conversation", "synthetic"))
GENERATED = {"chat": 1.0, "agent": 0.5}
"""Presets that are short of KV memory rather than prefill, and their shares of Plan.generated."""

OURS, DEFAULTS, TUNED, BOUND = "predicted-ttft", "dynamo", "dynamo-p16", "bound"
OTHERS = (DEFAULTS, TUNED, "sglang", "llm-d", "lmetric")
"""Policies of others: never to be much worse than the best of them."""
POLICIES = (OURS, *OTHERS, BOUND)


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes. Loads are shares of the speed at which round-robin is saturated."""

    workers: tuple[int, ...] = (8, 16)
    loads: tuple[float, ...] = (0.5, 0.8, 1.0)
    requests: int | None = None  # the trace's first ones; None: all
    traces: int | None = None  # the first ones of those known
    generated: int = 4_000  # requests of a trace that is made here
    # Known: by trace, for each worker; as --find-saturation finds them on 8, the conversation's on 16.
    saturations: tuple[tuple[str, float], ...] = (
        ("conversation", 3.13 / 16),
        ("synthetic", 0.9162 / 8),
        ("preset-chat", 10.5 / 8),
        ("preset-agent", 0.8344 / 8),
    )
    carried: bool = True  # search the rate that the policies carry, too
    speed_workers: int = 16
    jobs: int = 2

    decision_workers: int = 64
    decision_entries: int = 1_000_000
    decision_tokens: int = 8_192
    decision_prompts: int = 510  # distinct ones
    decisions: int = 20_000
    warm_up: int = 1_000  # decisions that do not count

    route_decisions: int = 4_000  # over the network, at decision_workers and decision_tokens
    route_warm_up: int = 400
    route_prompts: int = 64
    route_repeats: int = 3


FULL = Plan()
_FIRST_SYNTHETIC = ("synthetic", 1.493 / 8)  # of its first 1,500 requests at 8 workers, as --find-saturation finds it
QUICK = Plan(
    workers=(8,),
    loads=(0.8, 1.0),
    traces=1,
    requests=1_000,
    generated=1_000,
    carried=False,
    decisions=5_000,
    route_decisions=600,
    route_repeats=1,
    saturations=(("conversation", 3.13 / 16), _FIRST_SYNTHETIC),
)


def traces(plan: Plan, files: Sequence[Path]) -> list[Trace]:
    """The files given, else the published traces where they are found and generated ones. Raises InvalidRequest."""
    known = [read_trace(path) for path in files or FOUND if files or path.is_file()][: plan.traces]
    if not files and (plan.traces is None or len(known) < plan.traces):
        known += [
            synthesize(PRESETS[name], round(share * plan.generated), seed=1, name=f"preset-{name}")
            for name, share in GENERATED.items()
        ]
    return (
        known[: plan.traces] if plan.requests is None else [trace.head(plan.requests) for trace in known[: plan.traces]]
    )


def title(trace: Trace) -> str:
    """What rows call a trace."""
    return trace.name.removesuffix("_trace")


def known_saturation(plan: Plan, trace: Trace, workers: int) -> float:
    """The speed that saturates round-robin; NaN where it has to be found."""
    return dict(plan.saturations).get(title(trace), math.nan) * workers
