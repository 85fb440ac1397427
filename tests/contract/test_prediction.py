"""The native core predicts what router.prediction says, on any table."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from radix.backend import native
from router.prediction import HEAD_LEFT, HOST_SHARE, ROWS, predict_reference, queues_s_reference
from router.table import Column, Floats, Slots
from tests.support.candidates import PlainQuestion, PlainWorker, plain_questions

pytestmark = pytest.mark.skipif(native is None, reason="there is no native core to compare with")


def native_rows(question: PlainQuestion, values: Floats, held: Floats, slots: Slots) -> Floats:
    assert native is not None
    rows: Floats = native.predict(
        values, slots, held, question.prompt_tokens, question.block_size, question.now, HEAD_LEFT, HOST_SHARE
    )
    return rows


@given(question=plain_questions())
def test_both_predict_the_same(question: PlainQuestion) -> None:
    """Row by row, up to rounding (a compiler may fuse a product and a sum)."""
    values, held, slots = question.table()
    expected = predict_reference(values, slots, held, question.prompt_tokens, question.block_size, question.now)
    found = native_rows(question, values, held, slots)
    assert found.shape == expected.shape == (ROWS, len(slots))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@given(question=plain_questions())
def test_both_know_the_same_queues(question: PlainQuestion) -> None:
    """By themselves as in a prediction."""
    assert native is not None
    values, _, slots = question.table()
    expected = queues_s_reference(values, slots, question.now)
    np.testing.assert_allclose(native.queues_s(values, slots, question.now, HEAD_LEFT), expected, atol=1e-12)
    np.testing.assert_allclose(question.candidates().queue_s, expected, atol=1e-12)


def test_what_is_no_table_is_refused() -> None:
    """Nothing is read beyond an array's end, and nothing taken for what it is not."""
    question = PlainQuestion((PlainWorker(slot=0), PlainWorker(slot=2)))
    values, held, slots = question.table()
    for wrong in (values[:-1], values.astype(np.float32), values[:, ::2], values[0], values.T, "values"):
        with pytest.raises(TypeError, match="values"):
            native_rows(question, wrong, held, slots)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="held_blocks"):
        native_rows(question, values, held[:1], slots)
    with pytest.raises(TypeError, match="slots"):
        native_rows(question, values, held, slots.astype(np.int32))
    for slot in (-1, 3):
        with pytest.raises(ValueError, match=f"slot is {slot}: there are 3"):
            native_rows(question, values, held, np.array([0, slot], np.intp))
    with pytest.raises(ValueError, match="slot is 0: there are 0"):
        native_rows(question, values, held[:, :0].copy(), slots)
    assert native_rows(question, values, held, slots[:0]).shape == (ROWS, 0)
    assert len(values) == len(Column)
