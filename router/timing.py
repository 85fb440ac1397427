"""How long a worker's steps take, learned from the counters in its own reports."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from router.fleet import WorkerReport
from router.table import Floats

WINDOW_S = 60.0  # of observed time: what lies that far back counts 1/e
PRIOR_WEIGHT_S = 0.02  # each term of the prior counts as this much observed time
LEAST_OF_PRIOR = 0.02  # no term is taken to be less than this share of the prior's
OUTLIER = 4.0  # an observation counts at most so many times, and at least one such part, of what was expected
REFIT_S = 1.0  # of observed time, and at first sooner, between fits
MAX_STEP_S = 60.0  # a longer step is a stopped clock, not a measurement
MAX_WORK_S = 1e9  # of one term, as the prior has it: more in one report is no measurement either


class StepCosts(NamedTuple):
    """Seconds of a step: `prefill_step_s` where it holds prefill, else `decode_step_s`, and for each
    new prompt token, each pair of such a token and one before it, each decoding sequence, each token of their contexts.
    """

    prefill_step_s: float
    token_s: float
    attention_s: float
    decode_step_s: float
    sequence_s: float
    context_s: float

    def prefill_s(self, tokens: int, budget: int, cached: int = 0) -> float:
        """Seconds to prefill `tokens` after `cached` ones alone, in as few steps as a step's budget allows."""
        return steps_of(tokens, budget) * self.prefill_step_s + self.tokens_s(tokens, cached)

    def tokens_s(self, tokens: int, cached: int) -> float:
        """The same without what each step costs by itself."""
        return tokens * (self.token_s + self.attention_s * (cached + tokens / 2))


PRIOR = StepCosts(0.02, 2e-4, 4e-9, 0.04, 2e-4, 1e-7)
"""Before anything is known. Slower than most: routing suffers far more from a prediction too low than too high."""

_SCALE = np.array(PRIOR)
_TERMS = len(PRIOR)


def steps_of(tokens: int, budget: int) -> int:
    """Steps that a prefill of so many tokens takes."""
    return -(-tokens // budget)


class WorkerTiming:
    """One worker's step costs: least squares over its reports, older ones fading, pulled towards a prior.

    Each report gives two observations: the seconds of its steps with prefill, and of those without, beside how much of
    each term they held. They are weighted by 1 / the time that was expected, so that long steps do not drown short ones
    (the weights of a quasi-Poisson regression: Wedderburn, 1974), and cut to within OUTLIER of it, so that one stall
    changes little, while a new pace is found in a few reports. Terms are counted in what the prior gives for them: the
    prior is then one more observation of each term. None becomes negative (an active set of bounds).
    """

    def __init__(self) -> None:
        self._last = WorkerReport()  # counters start at zero
        self._normal = np.zeros((_TERMS, _TERMS))
        self._moment = np.zeros(_TERMS)
        self._costs = np.array(PRIOR)
        self._unfitted_s = 0.0
        self._observed_s = 0.0
        self.costs = PRIOR

    @property
    def measured(self) -> bool:
        """Whether anything was observed."""
        return self._observed_s > 0

    def observe(self, report: WorkerReport, prior: StepCosts) -> bool:
        """Take the difference to the previous report in; one that makes no sense is left out. True: costs changed."""
        last, self._last = self._last, report
        prefill = _sensible(report.prefill_s - last.prefill_s, report.prefill_steps - last.prefill_steps)
        decode = _sensible(report.decode_s - last.decode_s, report.decode_steps - last.decode_steps)
        tokens = report.prefill_tokens - last.prefill_tokens
        if prefill and tokens > 0:
            attention = report.prefill_attention - last.prefill_attention
            decodes = report.prefill_decodes - last.prefill_decodes
            context = report.prefill_context - last.prefill_context
            steps = report.prefill_steps - last.prefill_steps
            self._add((steps, tokens, attention, 0, decodes, context), prefill)
        if decode:
            decodes = report.decode_tokens - last.decode_tokens
            context = report.decode_context - last.decode_context
            self._add((0, 0, 0, report.decode_steps - last.decode_steps, decodes, context), decode)
        if self._unfitted_s < min(REFIT_S, 0.2 * self._observed_s) or not self._unfitted_s:
            return False
        self._unfitted_s = 0.0
        self.costs = self._fit(prior)
        self._costs = np.array(self.costs)
        return True

    def _add(self, work: tuple[float, ...], seconds: float) -> None:
        terms = np.array(work) * _SCALE
        if not (terms.min() >= 0 and terms.max() <= MAX_WORK_S):
            return
        expected = max(float(np.dot(work, self._costs)), 1e-6)
        if self._observed_s > 1.0:
            seconds = min(max(seconds, expected / OUTLIER), expected * OUTLIER)
        # A worker's whole past may come in one report (a router that restarted): it counts no more than a window.
        weight = min(1.0, WINDOW_S / max(seconds, expected))
        fade = math.exp(-weight * seconds / WINDOW_S)
        self._normal *= fade
        self._moment *= fade
        self._normal += np.outer(terms, terms) * (weight / expected)
        self._moment += terms * (seconds * weight / expected)
        self._observed_s += seconds
        self._unfitted_s += seconds

    def _fit(self, prior: StepCosts) -> StepCosts:
        target = np.array(prior) / _SCALE
        normal = self._normal + np.diag(PRIOR_WEIGHT_S / target)
        moment = self._moment + PRIOR_WEIGHT_S
        least = LEAST_OF_PRIOR * target
        found: Floats = least.copy()
        free = np.ones(_TERMS, bool)
        while free.any():
            rest = moment[free] - normal[np.ix_(free, ~free)] @ least[~free]
            found[free] = np.linalg.solve(normal[np.ix_(free, free)], rest)
            low = free & (found < least)
            if not low.any():
                break
            found[low] = least[low]
            free &= ~low
        return StepCosts(*(found * _SCALE).tolist())


def _sensible(seconds: float, steps: int) -> float:
    """The seconds, or 0 where they cannot be what so many steps took."""
    return seconds if steps > 0 and math.isfinite(seconds) and 0 < seconds <= MAX_STEP_S * steps else 0.0


def average(timings: Iterable[WorkerTiming]) -> StepCosts:
    """The mean of those that were measured, else PRIOR; no term is zero, as it serves as a prior."""
    known = np.array([timing.costs for timing in timings if timing.measured])
    if not len(known):
        return PRIOR
    return StepCosts(*np.maximum(known.mean(axis=0), 1e-12).tolist())
