"""How long a worker's steps take, learned from the counters in its own reports."""

from __future__ import annotations

import math
import operator
from collections import deque
from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np

from router.fleet import WorkerReport
from router.pace import LEAST, Pace, Terms, expected_s
from router.table import Floats

WINDOW_S = 60.0  # of expected time: what lies that far back counts 1/e
PRIOR_WEIGHT_S = 0.02  # each term of the prior counts as this much observed time
LEAST_OF_PRIOR = 0.02  # no term is taken to be less than this share of the prior's
RECENT = 32  # observations that each fit judges anew: an early stall is seen to be one by what came after it
ROUNDS = 3  # of judging and solving, in the first window
OUTLIER = 4.0  # an observation counts at most so many times what is expected: a stall only ever adds
OUTLIER_TRUST = 0.1  # and weighs so little where others of its kind took no such time
REFIT_S = 10.0  # of observed time, and at first sooner, between fits
IDLE_S = 0.5  # a report without any step makes what is known fade like so much work
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

_TERMS = len(PRIOR)


def steps_of(tokens: int, budget: int) -> int:
    """Steps that a prefill of so many tokens takes."""
    return -(-tokens // budget)


class WorkerTiming:
    """One worker's step costs: least squares over its reports, older ones fading, times the pace of the latest ones.

    Each report gives two observations: the seconds of its steps with prefill, and of those without, beside how much of
    each term they held. They are weighted by 1 / the time that is expected, so that long steps do not drown short ones
    (the weights of a quasi-Poisson regression: Wedderburn, 1974), and cut to OUTLIER times that, so that a stall, or a
    first step that compiles, changes little; both are done anew in each fit for the latest RECENT. Terms are counted in
    what PRIOR gives for them. The prior is one more observation of each term. None becomes negative (an active set of
    bounds). What lasts is learned in a window of work; what is new, in a few reports, by the pace of steps with prefill
    and of those without (router.pace).
    """

    def __init__(self, prior: StepCosts = PRIOR) -> None:
        self._last = WorkerReport()  # counters start at zero
        self._reports = 0
        self._recent: deque[tuple[Terms, float]] = deque()  # work, and seconds
        self._normal = np.zeros((_TERMS, _TERMS))  # of what came before
        self._moment = np.zeros(_TERMS)
        self._unfitted_s = 0.0
        self._observed_s = 0.0
        self._idle_s = 0.0
        self._paces = Pace(), Pace()  # of steps with prefill, and of those without
        self.start_from(prior)

    @property
    def measured(self) -> bool:
        """Whether anything was observed."""
        return self._observed_s > 0

    def start_from(self, prior: StepCosts) -> None:
        """Nothing was observed yet: this is known of others."""
        self.costs = prior
        self._learned = _in_priors(prior)

    @property
    def learned(self) -> StepCosts:
        """The costs without the pace."""
        return StepCosts(*map(float.__mul__, self._learned, PRIOR))

    @property
    def pace(self) -> tuple[float, float]:
        """How much longer than learned steps take now: those with prefill, and those without."""
        return self._paces[0].value, self._paces[1].value

    def observe(self, report: WorkerReport, prior: StepCosts) -> bool:
        """Take the difference to the previous report in; one that makes no sense is left out. True: costs changed."""
        last, self._last = self._last, report
        self._reports += 1
        prefill = _sensible(report.prefill_s - last.prefill_s, report.prefill_steps - last.prefill_steps)
        decode = _sensible(report.decode_s - last.decode_s, report.decode_steps - last.decode_steps)
        tokens = report.prefill_tokens - last.prefill_tokens
        if prefill and tokens > 0:
            attention = report.prefill_attention - last.prefill_attention
            decodes = report.prefill_decodes - last.prefill_decodes
            context = report.prefill_context - last.prefill_context
            steps = report.prefill_steps - last.prefill_steps
            self._add(self._paces[0], (steps, tokens, attention, 0, decodes, context), prefill)
        if decode:
            decodes = report.decode_tokens - last.decode_tokens
            context = report.decode_context - last.decode_context
            self._add(self._paces[1], (0, 0, 0, report.decode_steps - last.decode_steps, decodes, context), decode)
        if not prefill and not decode and self.measured:
            self._unfitted_s += IDLE_S
            self._idle_s += IDLE_S
        fit = self._unfitted_s >= min(REFIT_S, 0.2 * self._observed_s) and self._unfitted_s > 0
        if fit:
            self._learned = self._fit(np.array(_in_priors(prior)))
            self._unfitted_s = 0.0
            for pace in self._paces:
                pace.fitted(self._learned)
        changed = [pace.update(self._reports) for pace in self._paces]
        if not fit and not any(changed):
            return False
        costs, (prefill, decode) = self.learned, self.pace
        self.costs = StepCosts(*(prefill * term for term in costs[:3]), *(decode * term for term in costs[3:]))
        return True

    def _add(self, pace: Pace, work: tuple[float, ...], seconds: float) -> None:
        terms = tuple(map(operator.mul, work, PRIOR))
        expected = expected_s(terms, self._learned)
        if not (min(terms) >= 0 and max(terms) <= MAX_WORK_S and math.isfinite(expected)):
            return
        pace.add(self._reports, terms, seconds, expected)
        self._recent.append((terms, seconds))
        self._observed_s += min(seconds, OUTLIER * expected)
        self._unfitted_s += min(seconds, OUTLIER * expected)

    def _fit(self, prior: Floats) -> list[float]:
        older = max(0, len(self._recent) - RECENT)
        if self._idle_s >= REFIT_S:  # a worker that was slow, and so gets no work, is not to be known for it for ever
            older = len(self._recent)
            self._fade(self._idle_s)
            self._idle_s = 0.0
        costs = np.array(self._learned)
        if older:
            terms, seconds, weights = _weighed(self._recent, costs)
            self._fade(float(weights[:older] @ (terms[:older] @ costs) ** 2))
            self._normal, self._moment = self._with(terms[:older], seconds[:older], weights[:older])
            for _ in range(older):
                self._recent.popleft()
        for _ in range(ROUNDS if len(self._recent) >= LEAST and self._observed_s < WINDOW_S else 1):
            costs = _solution(*self._with(*_weighed(self._recent, costs)), prior)
        found: list[float] = costs.tolist()
        return found

    def _with(self, terms: Floats, seconds: Floats, weights: Floats) -> tuple[Floats, Floats]:
        """The normal equations with further observations."""
        weighted = terms.T * weights
        return self._normal + weighted @ terms, self._moment + weighted @ seconds

    def _fade(self, seconds: float) -> None:
        fade = math.exp(-seconds / WINDOW_S)
        self._normal *= fade
        self._moment *= fade


def _weighed(observed: Collection[tuple[Terms, float]], costs: Floats) -> tuple[Floats, Floats, Floats]:
    """Observations as rows of terms, their seconds, cut by what these costs let expect, and their weights."""
    terms = np.array([terms for terms, _ in observed]).reshape(-1, _TERMS)
    seconds = np.array([seconds for _, seconds in observed])
    expected: Floats = np.maximum(terms @ costs, 1e-6)
    ratio = seconds / expected
    most = np.full_like(expected, OUTLIER)
    # A worker's whole past may come in one report (a router that restarted): it counts no more than a window.
    weights: Floats = np.minimum(1.0, WINDOW_S / expected) / expected
    prefill = terms[:, 0] > 0
    for kind in (prefill, ~prefill):
        ratios = np.sort(ratio[kind])
        if len(ratios) >= LEAST:
            middle = float(ratios[len(ratios) // 2])  # the median; numpy's own takes as long as all else here
            most[kind] *= max(1.0, middle)  # where all of a kind take longer, none of them is a stall
            weights[kind & (ratio > OUTLIER * middle)] *= OUTLIER_TRUST
    return terms, np.minimum(seconds, most * expected), weights


def _solution(normal: Floats, moment: Floats, prior: Floats) -> Floats:
    """The least squares with the prior, no term below its least."""
    normal = normal + np.diag(PRIOR_WEIGHT_S / prior)
    moment = moment + PRIOR_WEIGHT_S
    least = LEAST_OF_PRIOR * prior
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
    return found


def _in_priors(costs: StepCosts) -> list[float]:
    """Terms counted in what PRIOR gives for them."""
    return [term / unit for term, unit in zip(costs, PRIOR, strict=True)]


def _sensible(seconds: float, steps: int) -> float:
    """The seconds, or 0 where they cannot be what so many steps took."""
    return seconds if steps > 0 and math.isfinite(seconds) and 0 < seconds <= MAX_STEP_S * steps else 0.0


def typical(timings: Iterable[WorkerTiming]) -> StepCosts | None:
    """Of those that were measured, each term's median; None where none was. No term is zero: it serves as a prior."""
    known = np.array([timing.learned for timing in timings if timing.measured])
    return StepCosts(*np.maximum(np.median(known, axis=0), 1e-12).tolist()) if len(known) else None
