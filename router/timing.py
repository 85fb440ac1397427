"""How long a worker's steps take, learned from the counters in its own reports."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from router.fleet import WorkerReport

WINDOW_S = 30.0  # what was seen that long ago counts 1/e: a slow first step is forgiven, a new pace noticed
PRIOR_WEIGHT_S = 0.005  # the prior counts as this much observed time
LEAST_OF_PRIOR = 0.1
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

    Fits y = step * s + token * t over reports of s steps, t tokens and y seconds, each weighted by 1 / the time that
    was expected for it, so that long steps do not drown short ones (the weights of a quasi-Poisson regression:
    Wedderburn, 1974). Two terms, not tokens a second: a worker with good cache hits makes many small prefills, and
    would look slow by that ratio. The prior is two more observations, of one term each.
    """

    def __init__(self) -> None:
        self._last = WorkerReport()  # counters start at zero
        self._last_at = 0.0
        self._prefill = [0.0] * 5  # faded sums of s*s, s*t, t*t, s*y, t*y, all weighted
        self._decode = [0.0] * 2  # faded sums of steps, seconds
        self.measured = False
        self.costs = PRIOR

    def observe(self, report: WorkerReport, prior: StepCosts, now: float) -> None:
        """Take the difference to the previous report in; one that makes no sense is left out."""
        last, self._last = self._last, report
        fade = math.exp(-max(0.0, now - self._last_at) / WINDOW_S)
        self._last_at = now
        expected = _at_least(self.costs, prior)
        self._prefill = [value * fade for value in self._prefill]
        self._decode = [value * fade for value in self._decode]
        self._add_prefill(
            report.prefill_steps - last.prefill_steps,
            report.prefill_tokens - last.prefill_tokens,
            report.prefill_s - last.prefill_s,
            expected,
        )
        self._add_decode(report.decode_steps - last.decode_steps, report.decode_s - last.decode_s)
        self.costs = self._fit(prior, expected)

    def _add_prefill(self, steps: int, tokens: int, seconds: float, expected: StepCosts) -> None:
        if 0 < steps <= tokens and _sensible(seconds, steps):
            weight = _share(seconds) / (steps * expected.prefill_step_s + tokens * expected.prefill_token_s)
            terms = (steps * steps, steps * tokens, tokens * tokens, steps * seconds, tokens * seconds)
            self._prefill = [value + weight * term for value, term in zip(self._prefill, terms, strict=True)]
            self.measured = True

    def _add_decode(self, steps: int, seconds: float) -> None:
        if steps > 0 and _sensible(seconds, steps):
            share = _share(seconds)
            self._decode = [self._decode[0] + share * steps, self._decode[1] + share * seconds]

    def _fit(self, prior: StepCosts, expected: StepCosts) -> StepCosts:
        steps, tokens = PRIOR_WEIGHT_S / prior.prefill_step_s, PRIOR_WEIGHT_S / prior.prefill_token_s
        ss, st, tt, sy, ty = self._prefill
        ss, sy = ss + steps / expected.prefill_step_s, sy + PRIOR_WEIGHT_S / expected.prefill_step_s
        tt, ty = tt + tokens / expected.prefill_token_s, ty + PRIOR_WEIGHT_S / expected.prefill_token_s
        determinant = ss * tt - st * st  # never negative; next to zero where all steps had the same size
        if determinant <= 1e-12 * ss * tt or (step_s := (sy * tt - ty * st) / determinant) <= 0:
            step_s, token_s = 0.0, ty / tt
        elif (token_s := (ty * ss - sy * st) / determinant) <= 0:
            step_s, token_s = sy / ss, 0.0
        decode_steps, decode_s = self._decode
        decode_step_s = (decode_s + PRIOR_WEIGHT_S) / (decode_steps + PRIOR_WEIGHT_S / prior.decode_step_s)
        return StepCosts(step_s, token_s, decode_step_s)


def _at_least(costs: StepCosts, prior: StepCosts) -> StepCosts:
    """As weights are divided by these, none may be next to nothing."""
    return StepCosts(
        max(costs.prefill_step_s, LEAST_OF_PRIOR * prior.prefill_step_s),
        max(costs.prefill_token_s, LEAST_OF_PRIOR * prior.prefill_token_s),
        costs.decode_step_s,
    )


def _sensible(seconds: float, steps: int) -> bool:
    return math.isfinite(seconds) and 0 < seconds <= MAX_STEP_S * steps


def _share(seconds: float) -> float:
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
