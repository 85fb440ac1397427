"""How long a worker's steps take, learned from the counters in its own reports."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from router.fleet import WorkerReport

WINDOW_S = 30.0  # what was seen that long ago counts 1/e: a slow first step is forgiven, a new pace noticed
PRIOR_WEIGHT_S = 0.005  # the prior counts as this much observed time
MAX_STEP_S = 60.0  # a longer step is a stopped clock, not a measurement


@dataclass(frozen=True, slots=True)
class StepCosts:
    """A prefill step of t tokens takes `prefill_step_s + t * prefill_token_s`, a decode step `decode_step_s`."""

    prefill_step_s: float
    prefill_token_s: float
    decode_step_s: float

    def prefill_s(self, tokens: int, max_batched_tokens: int) -> float:
        """Seconds to prefill `tokens`, in as few steps as the budget of a step allows."""
        return steps_of(tokens, max_batched_tokens) * self.prefill_step_s + tokens * self.prefill_token_s


PRIOR = StepCosts(prefill_step_s=0.02, prefill_token_s=2e-4, decode_step_s=0.05)
"""Before anything is known. Slower than most: routing suffers far more from a prediction too low than too high."""


def steps_of(tokens: int, max_batched_tokens: int) -> int:
    """Steps that a prefill of so many tokens takes."""
    return -(-tokens // max_batched_tokens)


class WorkerTiming:
    """One worker's step costs: least squares over its reports, older ones fading, pulled towards a prior.

    Minimises sum(fade/y * (y - step*s - token*t)^2) + w * ((step/step0 - 1)^2 + (token/token0 - 1)^2) over reports of
    s steps, t tokens and y seconds. Two terms, not tokens a second: a worker with good cache hits makes many small
    prefills, and would look slow by that ratio.
    """

    def __init__(self) -> None:
        self._last: WorkerReport | None = None
        self._last_at = 0.0
        # Faded sums of s*s/y, s*t/y, t*t/y, s, t over prefill; of s*s/y and s over decode.
        self._prefill = [0.0] * 5
        self._decode = [0.0] * 2
        self.measured = False
        self.costs = PRIOR

    def observe(self, report: WorkerReport, prior: StepCosts, now: float) -> None:
        """Take the difference to the previous report in; one that makes no sense is left out."""
        last, self._last = self._last, report
        fade = math.exp(-max(0.0, now - self._last_at) / WINDOW_S)
        self._last_at = now
        self._prefill = [value * fade for value in self._prefill]
        self._decode = [value * fade for value in self._decode]
        if last is None:
            last = WorkerReport()  # counters start at zero
        self._add_prefill(
            report.prefill_steps - last.prefill_steps,
            report.prefill_tokens - last.prefill_tokens,
            report.prefill_s - last.prefill_s,
        )
        self._add_decode(report.decode_steps - last.decode_steps, report.decode_s - last.decode_s)
        self.costs = self._fit(prior)

    def _add_prefill(self, steps: int, tokens: int, seconds: float) -> None:
        if 0 < steps <= tokens and _sensible(seconds, steps):
            weight = _weight(seconds)
            terms = (steps * steps / seconds, steps * tokens / seconds, tokens * tokens / seconds, steps, tokens)
            self._prefill = [value + weight * term for value, term in zip(self._prefill, terms, strict=True)]
            self.measured = True

    def _add_decode(self, steps: int, seconds: float) -> None:
        if steps > 0 and _sensible(seconds, steps):
            weight = _weight(seconds)
            self._decode = [self._decode[0] + weight * steps * steps / seconds, self._decode[1] + weight * steps]

    def _fit(self, prior: StepCosts) -> StepCosts:
        step0, token0, decode0 = prior.prefill_step_s, prior.prefill_token_s, prior.decode_step_s
        ss, st, tt, s, t = self._prefill
        ss, tt = ss + PRIOR_WEIGHT_S / step0**2, tt + PRIOR_WEIGHT_S / token0**2
        s, t = s + PRIOR_WEIGHT_S / step0, t + PRIOR_WEIGHT_S / token0
        determinant = ss * tt - st * st  # never negative; next to zero where all steps had the same size
        if determinant <= 1e-12 * ss * tt or (step_s := (s * tt - t * st) / determinant) <= 0:
            step_s, token_s = 0.0, t / tt
        elif (token_s := (t * ss - s * st) / determinant) <= 0:
            step_s, token_s = s / ss, 0.0
        decode_ss, decode_s = self._decode
        decode_step_s = (decode_s + PRIOR_WEIGHT_S / decode0) / (decode_ss + PRIOR_WEIGHT_S / decode0**2)
        return StepCosts(step_s, token_s, decode_step_s)


def _sensible(seconds: float, steps: int) -> bool:
    return math.isfinite(seconds) and 0 < seconds <= MAX_STEP_S * steps


def _weight(seconds: float) -> float:
    # A worker's whole past may come in one report (a router that restarted): it counts no more than a window.
    return min(1.0, WINDOW_S / seconds)


def average(timings: Iterable[WorkerTiming]) -> StepCosts:
    """The mean of those that were measured, else PRIOR; never zero, as it serves as a prior."""
    known = [timing.costs for timing in timings if timing.measured]
    if not known:
        return PRIOR
    return StepCosts(
        max(1e-6, sum(costs.prefill_step_s for costs in known) / len(known)),
        max(1e-9, sum(costs.prefill_token_s for costs in known) / len(known)),
        max(1e-6, sum(costs.decode_step_s for costs in known) / len(known)),
    )
