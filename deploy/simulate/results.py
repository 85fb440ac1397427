"""What a simulated run comes to: a row of numbers, and the document of all rows. Pure."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.simulate.fleet import Fleet, Network, Outcome
from deploy.simulate.split_fleet import Split
from deploy.traces.trace import Trace, trace_line
from router.objective import Objective
from worker.step_time import Hardware

SHORT_TOKENS = 8192
"""Of a prompt: its uncached work is short then, whatever is cached, within one step's budget. A long prompt whose start
was seen before is no short work: what is left of its blocks in a finite cache, and where, is the policy's doing, and
every policy's p99 would be that of prompts that were pushed out."""

FORMAT = 1
"""Of results.json."""

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must keep to count as good: seconds to its first token, and from token to token in the mean."""

    ttft_s: float = 5.0
    itl_s: float = 0.1


@dataclass(frozen=True, slots=True)
class Case:
    """One run of a sweep."""

    policy: str
    workers: int
    speed: float
    load: float | None = None  # speed as a share of round-robin's saturation, where it was asked for so
    split: Split | None = None  # of the workers; None: all are of role both


@dataclass(frozen=True, slots=True)
class Setting:
    """What all runs of a sweep share."""

    trace: Trace  # at speed 1
    hardware: Hardware
    network: Network
    routers: int = 1
    host_tier: bool = False
    peer_fetch: bool = False
    seed: int = 0
    slo: Slo = Slo()
    objective: Objective | None = None  # of predicted-ttft; None: the least TTFT
    prior_error: float | None = None  # routers begin with so many times the true step times; None: with their own


@dataclass(frozen=True, slots=True)
class Row:
    """A run in numbers. Times in seconds, over the requests that were answered; NaN where there is nothing to tell of.

    ttft: from the request's arrival at the router to its first token there. ttft_short: of requests whose work is short
    (`short_work`: by the trace alone, so the same ones for every policy). itl: from token to token, each request's
    mean, over requests of two tokens or more. hit_ratio: share of the prompts' tokens that were cached when their
    prefill began. prefill_saved: share that was not computed, what preemptions had computed again taken off (the
    bound's gifts are saved). fetched_share: share that came from other workers. handed_over: share of requests that one
    worker began and another went on with; `roles` are the workers' then. goodput: share of all requests, refused
    ones included, that kept the SLO. imbalance: largest by mean of the workers' time in steps. prediction_error:
    |predicted - observed| TTFT, the prediction as of the decision and what was held until then. held: share of requests
    that the router held back, and the mean time of these. duration: virtual time until the last request ended. wall and
    requests_per_s: this machine's time, and requests in a second of it; all else is the same whenever it is run.
    """

    policy: str
    workers: int
    roles: str  # empty: all of role both
    routers: int
    speed: float
    load: float | None
    hardware: str
    requests: int
    rate_per_s: float
    refused: int
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    short_requests: int
    ttft_short_mean_s: float
    ttft_short_p99_s: float
    itl_mean_s: float
    itl_p99_s: float
    e2e_mean_s: float
    hit_ratio: float
    prefill_saved: float
    fetched_share: float
    handed_over: float
    goodput: float
    imbalance: float
    preemptions: int
    prediction_error_p50_s: float
    prediction_error_p90_s: float
    held_share: float
    held_mean_s: float
    duration_s: float
    wall_s: float
    requests_per_s: float

    @property
    def label(self) -> str:
        """What rows of one fleet and speed differ in."""
        return f"{self.policy}, {self.roles}" if self.roles else self.policy

    def to_json(self) -> dict[str, Any]:
        """By name; null for NaN."""
        return {name: _number(value) for name, value in asdict(self).items()}


MACHINE_FIELDS = ("wall_s", "requests_per_s")
"""Of a Row: what differs from one time to the next."""


def row_of(fleet: Fleet, setting: Setting, case: Case, wall_s: float) -> Row:
    """The row of a finished fleet."""
    outcomes = fleet.outcomes
    done = [outcome for outcome in outcomes if not outcome.refused]
    ttft = ttfts(outcomes)
    short = ttfts([outcome for outcome, is_short in zip(outcomes, short_work(setting.trace), strict=True) if is_short])
    itl = _itls(done)
    held = _column(done, "routed_at") - _column(done, "arrived_at")
    error = np.abs(_column(done, "predicted_ttft_s") - ttft)
    good = (ttft <= setting.slo.ttft_s) & ~(itl > setting.slo.itl_s)  # one token has no time between tokens
    prompt_tokens, computed = _prompt_tokens(fleet), _computed_tokens(fleet)
    trace = fleet.trace
    return Row(
        policy=case.policy,
        workers=case.workers,
        roles="" if case.split is None else str(case.split),
        routers=setting.routers,
        speed=case.speed,
        load=case.load,
        hardware=setting.hardware.name,
        requests=len(outcomes),
        rate_per_s=len(outcomes) / trace.duration_s if trace.duration_s else math.nan,
        refused=len(outcomes) - len(done),
        ttft_mean_s=_mean(ttft),
        ttft_p50_s=_percentile(ttft, 50),
        ttft_p90_s=_percentile(ttft, 90),
        ttft_p99_s=_percentile(ttft, 99),
        short_requests=len(short),
        ttft_short_mean_s=_mean(short),
        ttft_short_p99_s=_percentile(short, 99),
        itl_mean_s=_mean(itl[~np.isnan(itl)]),
        itl_p99_s=_percentile(itl[~np.isnan(itl)], 99),
        e2e_mean_s=_mean(_column(done, "finished_at") - _column(done, "arrived_at")),
        hit_ratio=_share(sum(worker.scheduler.cached_prompt_tokens for worker in fleet.workers), prompt_tokens),
        prefill_saved=1 - _share(computed, prompt_tokens),
        fetched_share=_share(sum(outcome.fetched_tokens for outcome in done), sum(o.prompt_tokens for o in done)),
        handed_over=_share(sum(outcome.begun_by >= 0 for outcome in done), len(done)),
        goodput=_share(int(good.sum()), len(outcomes)),
        imbalance=_imbalance([_busy_s(fleet, number) for number in range(len(fleet.workers))]),
        preemptions=sum(worker.scheduler.preemptions for worker in fleet.workers),
        prediction_error_p50_s=_percentile(error, 50),
        prediction_error_p90_s=_percentile(error, 90),
        held_share=_share(int((held > 0).sum()), len(done)),
        held_mean_s=_mean(held[held > 0]),
        duration_s=fleet.now,
        wall_s=wall_s,
        requests_per_s=len(outcomes) / wall_s if wall_s else math.nan,
    )


def ttfts(outcomes: Sequence[Outcome]) -> Values:
    """Seconds to the first token of those that were answered, in order of arrival."""
    done = [outcome for outcome in outcomes if not outcome.refused]
    return _column(done, "first_token_at") - _column(done, "arrived_at")


def short_work(trace: Trace) -> list[bool]:
    """Whether each request's uncached work is short in any case: a prompt of at most SHORT_TOKENS."""
    return [request.input_tokens <= SHORT_TOKENS for request in trace.requests]


def header_of(setting: Setting) -> dict[str, Any]:
    """What the numbers depend on, the code apart."""
    trace = setting.trace
    digest = hashlib.blake2b(digest_size=16)
    for request in trace.requests:
        digest.update(trace_line(request, trace.block_size))
    return {
        "format": FORMAT,
        "trace": {
            "name": trace.name,
            "requests": len(trace),
            "duration_s": trace.duration_s,
            "block_size": trace.block_size,
            "digest": digest.hexdigest(),
        },
        "hardware": asdict(setting.hardware),
        "network": asdict(setting.network),
        "routers": setting.routers,
        "host_tier": setting.host_tier,
        "peer_fetch": setting.peer_fetch,
        "seed": setting.seed,
        "slo": asdict(setting.slo),
        "objective": asdict(setting.objective) if setting.objective else None,
        "prior_error": setting.prior_error,
    }


SATURATION_FIELDS = (
    "format",
    "trace",
    "hardware",
    "network",
    "routers",
    "host_tier",
    "peer_fetch",
    "seed",
    "objective",
    "prior_error",
)
"""Of a header: what saturation depends on."""


def document(header: dict[str, Any], saturation: dict[tuple[str, int], float], rows: Sequence[Row]) -> dict[str, Any]:
    """results.json. `saturation`: speed by policy and workers."""
    found = [
        {"policy": policy, "workers": workers, "speed": speed}
        for (policy, workers), speed in sorted(saturation.items())
    ]
    return {**header, "saturation": found, "rows": [row.to_json() for row in rows]}


def known_saturation(former: object, header: dict[str, Any]) -> dict[tuple[str, int], float]:
    """What a former document says of saturation, where it is of the same setting; else nothing."""
    if not isinstance(former, dict) or any(former.get(name) != header[name] for name in SATURATION_FIELDS):
        return {}
    known = {}
    for entry in former.get("saturation", ()):
        try:
            known[str(entry["policy"]), int(entry["workers"])] = float(entry["speed"])
        except (KeyError, TypeError, ValueError):
            return {}
    return known


def _column(outcomes: Sequence[Outcome], name: str) -> Values:
    return np.array([getattr(outcome, name) for outcome in outcomes], np.float64)


def _itls(done: Sequence[Outcome]) -> Values:
    """NaN for a single token."""
    between = _column(done, "output_tokens") - 1
    seconds = _column(done, "finished_at") - _column(done, "first_token_at")
    itls: Values = np.divide(seconds, between, out=np.full(len(done), np.nan), where=between > 0)
    return itls


def _prompt_tokens(fleet: Fleet) -> int:
    return sum(worker.scheduler.prompt_tokens for worker in fleet.workers)


def _computed_tokens(fleet: Fleet) -> int:
    return sum(worker.status().times.prefill_tokens for worker in fleet.workers)


def _busy_s(fleet: Fleet, number: int) -> float:
    times = fleet.workers[number].status().times
    return times.prefill_s + times.decode_s


def _imbalance(busy: Sequence[float]) -> float:
    total = sum(busy)
    return max(busy) * len(busy) / total if total else 1.0


def _mean(values: Values) -> float:
    return float(values.mean()) if len(values) else math.nan


def _percentile(values: Values, percent: float) -> float:
    return float(np.percentile(values, percent)) if len(values) else math.nan


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
