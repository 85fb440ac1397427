"""Fitting step times: what was put in comes out, and nothing negative ever does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.step_fit import TERMS, Work, fit_steps, non_negative_least_squares
from worker.step_time import HARDWARE, StepTimeModel

TRUE = HARDWARE["70b-4xh100"].steps


def prefill(model: StepTimeModel, start: int, new: int, decoding: int = 0, context: int = 0) -> Work:
    """One step with a chunk, as an engine counts it."""
    seconds = model.step_s(decoding, context, [(start, new)])
    return Work(1, new, new * (start + new / 2), decoding, context + decoding, seconds)


def decode(model: StepTimeModel, decoding: int, context: int, steps: int = 10) -> Work:
    """Decode steps in a row, as an engine counts them."""
    total = steps * context + decoding * steps * (steps + 1) // 2
    counted = {"decode_steps": steps, "decode_tokens": steps * decoding, "decode_context": total}
    return Work(**counted, decode_s=model.decode_s(decoding, context, steps))


def works(model: StepTimeModel) -> list[Work]:
    chunks = [prefill(model, start, new) for start in (0, 4000, 30_000) for new in (10, 500, 8000)]
    decodes = [decode(model, batch, batch * each) for batch in (1, 8, 64) for each in (50, 5000)]
    return [*chunks, *decodes, prefill(model, 100, 900, 30, 40_000)]


def test_a_models_own_times_give_the_model_back() -> None:
    """All six terms, from sums over steps alone."""
    fit = fit_steps(works(TRUE), [prefill(TRUE, 777, 333, 7, 999)])
    for name in TERMS:
        assert getattr(fit.model, name) == pytest.approx(getattr(TRUE, name), rel=1e-6), name
    assert fit.error_p90 < 1e-9
    assert [term.name for term in fit.terms] == list(TERMS)
    assert all(term.largest_share > 0.05 and term.error_p90 is not None for term in fit.terms)


def test_noise_leaves_predictions_close() -> None:
    """Times that are off by 5% either way: steps that were not measured are predicted within 10%."""
    random = np.random.default_rng(1)
    noisy = [
        Work(**{name: value * (random.uniform(0.95, 1.05) if name.endswith("_s") else 1) for name, value in pairs})
        for work in works(TRUE) * 5
        for pairs in [[(name, getattr(work, name)) for name in Work.__dataclass_fields__]]
    ]
    held_out = [prefill(TRUE, 2000, 3000), prefill(TRUE, 0, 100, 20, 20_000), decode(TRUE, 30, 60_000)]
    assert fit_steps(noisy, held_out).error_p90 < 0.1


def test_a_term_that_nothing_shows_says_so() -> None:
    """Short prompts alone tell nothing of decodes."""
    fit = fit_steps([prefill(TRUE, 0, new) for new in (10, 100, 1000)], [prefill(TRUE, 0, 50)])
    unseen = {term.name: term for term in fit.terms}["decode_step_s"]
    assert (unseen.seconds, unseen.largest_share, unseen.error_p50, unseen.error_p90) == (0, 0, None, None)


def test_nothing_measured_is_an_error() -> None:
    """Rather than a model of zeros."""
    with pytest.raises(ValueError, match="nothing was measured"):
        fit_steps([Work()], [Work()])


@given(rows=st.integers(1, 12), columns=st.integers(1, 6), seed=st.integers(0, 10_000), empty=st.booleans())
def test_the_least_squares_are_the_least_and_not_negative(rows: int, columns: int, seed: int, empty: bool) -> None:
    """The conditions of Karush, Kuhn and Tucker: nothing improves it but by going negative."""
    random = np.random.default_rng(seed)
    matrix = random.normal(size=(rows, columns)) * 10.0 ** random.integers(-6, 3, columns)
    if empty:
        matrix[:, 0] = 0
    target = random.normal(size=rows)
    found = non_negative_least_squares(matrix, target)
    assert (found >= 0).all()
    gradient = matrix.T @ (target - matrix @ found) / np.maximum(np.linalg.norm(matrix, axis=0), 1e-300)
    assert (gradient <= 1e-6).all()
    assert np.abs(gradient[found > 0]).max(initial=0) <= 1e-6
