"""The model of step times: leaps agree with steps, and more work never takes less time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.step_time import HARDWARE, StepTimeModel

MODELS = st.sampled_from(
    [*(hardware.steps for hardware in HARDWARE.values()), StepTimeModel(1.0, 0.5, 0.1, 1e-3, 1e-2, 1e-5, 1e-6)]
)


@given(model=MODELS, decoding=st.integers(1, 256), context=st.integers(0, 3_000_000), steps=st.integers(1, 60))
def test_a_leap_takes_what_its_steps_take(model: StepTimeModel, decoding: int, context: int, steps: int) -> None:
    """One after the other, each with a token more in every context; also beyond the peak of the parabola."""
    each = sum(model.step_s(decoding, context + step * decoding) for step in range(steps))
    assert model.decode_s(decoding, context, steps) == pytest.approx(each)


@given(model=MODELS, decoding=st.integers(1, 256), context=st.integers(0, 3_000_000), more=st.integers(1, 10_000))
def test_more_context_never_takes_less(model: StepTimeModel, decoding: int, context: int, more: int) -> None:
    """Sequences that share blocks have more context together than the device holds: no step becomes free by that."""
    assert model.step_s(decoding, context + more) >= model.step_s(decoding, context) > 0
