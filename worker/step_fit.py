"""Fits a model of step times to what an engine counted: non-negative least squares of relative errors. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from worker.step_time import StepTimeModel

TERMS = ("prefill_step_s", "decode_step_s", "sequence_s", "context_token_s", "token_s", "attention_s")
SEEN = 0.05  # a term with at least this share of a measurement's time is seen in it

Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Work:
    """What an engine did in a while, and how long it took: the growth of rhizome.v1.WorkerStatus's counters."""

    prefill_steps: int = 0
    prefill_tokens: int = 0
    prefill_attention: float = 0.0
    prefill_decodes: int = 0
    prefill_context: int = 0
    prefill_s: float = 0.0
    decode_steps: int = 0
    decode_tokens: int = 0
    decode_context: int = 0
    decode_s: float = 0.0

    def __sub__(self, other: Work) -> Work:
        """The growth since `other`."""
        names = [field.name for field in fields(Work)]
        return Work(**{name: getattr(self, name) - getattr(other, name) for name in names})

    @property
    def seconds(self) -> float:
        return self.prefill_s + self.decode_s


@dataclass(frozen=True, slots=True)
class TermFit:
    """One coefficient. Errors are relative, over the measurements that show it; none where no measurement does."""

    name: str
    seconds: float
    largest_share: float  # of any measurement's time
    error_p50: float | None
    error_p90: float | None


@dataclass(frozen=True, slots=True)
class StepFit:
    """A fitted model, how well it fits what it was fitted to, and how well it predicts the rest."""

    model: StepTimeModel
    terms: tuple[TermFit, ...]
    error_p50: float  # relative, over what was not fitted; of prefill or of decode steps, whichever is worse
    error_p90: float


def fit_steps(fitted: Sequence[Work], held_out: Sequence[Work]) -> StepFit:
    """Fit the model's terms, but for its square one, to `fitted`; errors are those of `held_out`.

    Each while gives one equation for its prefill steps and one for its decode steps, however many these are: the model
    is linear in what is counted. Raises ValueError without a measurement in each list.
    """
    work, seconds = _equations(fitted)
    unseen_work, unseen_seconds = _equations(held_out)
    if not len(seconds) or not len(unseen_seconds):
        raise ValueError("nothing was measured")
    values = non_negative_least_squares(work / seconds[:, None], np.ones(len(seconds)))
    shares = work * values / seconds[:, None]
    errors = np.abs(shares.sum(axis=1) - 1)
    terms = tuple(
        TermFit(name, float(value), float(share.max()), *_quantiles(errors[share >= SEEN]))
        for name, value, share in zip(TERMS, values, shares.T, strict=True)
    )
    errors = np.abs(unseen_work @ values / unseen_seconds - 1)
    prefill = unseen_work[:, 0] > 0
    p50, p90 = np.max([np.quantile(errors[kind], (0.5, 0.9)) for kind in (prefill, ~prefill) if kind.any()], axis=0)
    model = StepTimeModel(**dict(zip(TERMS, values.tolist(), strict=True)))
    return StepFit(model, terms, float(p50), float(p90))


def non_negative_least_squares(matrix: Matrix, target: Matrix) -> Matrix:
    """The x >= 0, shape (columns,), that minimises |matrix @ x - target|, with matrix of shape (rows, columns).

    The active-set method of Lawson and Hanson (Solving Least Squares Problems, 1974, chapter 23).
    """
    norms = np.linalg.norm(matrix, axis=0)
    norms[norms == 0] = 1
    scaled = matrix / norms
    tolerance = 1e-10 * max(1.0, float(np.linalg.norm(target)))
    found = np.zeros(matrix.shape[1])
    free = np.zeros(matrix.shape[1], dtype=bool)
    for _ in range(10 * matrix.shape[1]):
        gradient = np.where(free, -np.inf, scaled.T @ (target - scaled @ found))
        best = int(gradient.argmax())
        if gradient[best] <= tolerance:
            break
        free[best] = True
        while True:
            wanted = np.zeros_like(found)
            wanted[free] = np.linalg.lstsq(scaled[:, free], target, rcond=None)[0]
            below = free & (wanted <= 0)
            if not below.any():
                break
            gap = found[below] - wanted[below]
            step = np.divide(found[below], gap, out=np.zeros_like(gap), where=gap > 0).min()
            found = np.maximum(0, found + step * (wanted - found))
            free &= found > tolerance
        found = wanted
    result: Matrix = found / norms
    return result


def _equations(works: Sequence[Work]) -> tuple[Matrix, Matrix]:
    """How often each term was counted, shape (equations, terms), and the seconds of each equation."""
    rows, seconds = [], []
    for work in works:
        # The counters' context includes the decoded token itself, the model's does not.
        if work.prefill_s > 0:
            context = work.prefill_context - work.prefill_decodes
            counted = (work.prefill_steps, 0, work.prefill_decodes, context)
            rows.append((*counted, work.prefill_tokens, work.prefill_attention))
            seconds.append(work.prefill_s)
        if work.decode_s > 0:
            context = work.decode_context - work.decode_tokens
            rows.append((0, work.decode_steps, work.decode_tokens, context, 0, 0.0))
            seconds.append(work.decode_s)
    return np.array(rows, np.float64).reshape(-1, len(TERMS)), np.array(seconds)


def _quantiles(errors: Matrix) -> tuple[float | None, float | None]:
    if not len(errors):
        return None, None
    return float(np.quantile(errors, 0.5)), float(np.quantile(errors, 0.9))
