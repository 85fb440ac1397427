"""The native core predicts, scores and chooses as the Python modules say, on any table."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radix.backend import native
from router.choice import choose_reference
from router.policies.predicted import EVEN_FULL, FULL_WEIGHT, MOST_PUSHED_S, scores_reference
from router.prediction import FETCH_START_S, HEAD_LEFT, HOST_SHARE, ROWS, predict_reference, queues_s_reference
from router.table import Column, Floats, Slots
from tests.support.candidates import PlainQuestion, PlainWorker, plain_questions

pytestmark = pytest.mark.skipif(native is None, reason="there is no native core to compare with")


def native_rows(
    question: PlainQuestion, values: Floats, held: Floats, slots: Slots, sources: Slots | None = None
) -> Floats:
    assert native is not None
    rows: Floats = native.predict(
        values,
        slots,
        held,
        question.prompt_tokens,
        question.block_size,
        question.now,
        HEAD_LEFT,
        HOST_SHARE,
        FETCH_START_S,
        sources,
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


@given(question=plain_questions(), data=st.data())
def test_both_fetch_from_who_takes_no_requests(question: PlainQuestion, data: st.DataObject) -> None:
    """Some of the workers are sources alone."""
    values, held, sources = question.table()
    slots = sources[: data.draw(st.integers(0, len(sources)))]
    asked = (question.prompt_tokens, question.block_size, question.now)
    expected = predict_reference(values, slots, held, *asked, sources)
    np.testing.assert_allclose(native_rows(question, values, held, slots, sources), expected, rtol=1e-12, atol=1e-12)


@given(question=plain_questions())
def test_both_know_the_same_queues(question: PlainQuestion) -> None:
    """By themselves as in a prediction."""
    assert native is not None
    values, _, slots = question.table()
    expected = queues_s_reference(values, slots, question.now)
    np.testing.assert_allclose(native.queues_s(values, slots, question.now, HEAD_LEFT), expected, atol=1e-12)
    np.testing.assert_allclose(question.candidates().queue_s, expected, atol=1e-12)


@given(question=plain_questions())
def test_both_score_alike(question: PlainQuestion) -> None:
    """The default policy's rule."""
    assert native is not None
    candidates = question.candidates()
    found = native.predicted_ttft_scores(candidates.rows, FULL_WEIGHT, EVEN_FULL, MOST_PUSHED_S)
    np.testing.assert_allclose(found, scores_reference(candidates), rtol=1e-12, atol=1e-12)


@given(question=plain_questions(), data=st.data())
def test_both_choose_the_same(question: PlainQuestion, data: st.DataObject) -> None:
    """Within a tie most free blocks, then fewest in flight, then not chosen for the longest, then the first: nobody who
    is full, though all others be infinitely bad. Scores are left as they were."""
    assert native is not None
    candidates = question.candidates()
    few = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 30.0, np.inf])
    scores = np.array(data.draw(st.lists(few, min_size=len(candidates), max_size=len(candidates))))
    width = data.draw(st.sampled_from([0.0, 0.5, 2.0]))
    before = scores.copy()
    expected = choose_reference(candidates, scores, lambda least: least + width)
    found = native.choose(candidates.rows, scores, lambda least: least + width)
    assert scores.tolist() == before.tolist()
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert found[1:] == expected[1:]
        assert found[0].tolist() == expected[0].tolist()


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


def test_what_is_no_score_is_refused() -> None:
    """One number for each worker; and a tie takes the least in."""
    assert native is not None
    rows = PlainQuestion((PlainWorker(slot=0), PlainWorker(slot=2))).candidates().rows
    for wrong in (np.zeros(3), np.zeros(2, int), np.zeros(4)[::2], [0.0, 0.0]):
        with pytest.raises(TypeError, match="scores"):
            native.choose(rows, wrong, lambda least: least)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="rows"):
        native.choose(rows[1:], np.zeros(2), lambda least: least)
    with pytest.raises(TypeError, match="rows"):
        native.predicted_ttft_scores(rows[:, :1], 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="tie"):
        native.choose(rows, np.zeros(2), lambda least: least - 1)
    with pytest.raises(ZeroDivisionError):
        native.choose(rows, np.zeros(2), lambda least: 1 / least)
