"""Text out of tokens, and where an answer ends."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.support.memory_runner import LetterDecoder
from worker.answer import Answer, FinishReason
from worker.plan import SamplingParams

EOS = 25  # the letter z


def play(tokens: list[int], params: SamplingParams) -> tuple[list[str], FinishReason | None]:
    """Push tokens until the answer ends; the pieces and the reason."""
    answer = Answer(params, LetterDecoder(), frozenset({EOS}), params.max_tokens)
    pieces = []
    for token in tokens:
        piece, reason = answer.push(token)
        pieces.append(piece)
        if reason is not None:
            return pieces, reason
    return pieces, None


def letters(text: str) -> list[int]:
    return [ord(letter) - 97 for letter in text]


def test_a_possible_stop_string_is_held_back_and_delivered_when_it_was_none() -> None:
    """Text that may belong to a stop string is not shown before that is known."""
    params = SamplingParams(max_tokens=99, stop=("cde",))
    pieces, reason = play(letters("abcdxcde"), params)
    assert pieces == ["a", "b", "", "", "cdx", "", "", ""]
    assert reason is FinishReason.STOP


def test_the_length_limit_delivers_what_was_held_back() -> None:
    """Nothing that was generated is lost when the answer is cut."""
    pieces, reason = play(letters("abc"), SamplingParams(max_tokens=3, stop=("cd",)))
    assert "".join(pieces) == "abc"
    assert reason is FinishReason.LENGTH


def test_the_end_token_is_no_text() -> None:
    """An end-of-sequence token ends the answer and shows nothing, but releases what was held back."""
    pieces, reason = play([*letters("ab"), EOS], SamplingParams(max_tokens=9, stop=("bc",)))
    assert "".join(pieces) == "ab"
    assert reason is FinishReason.STOP


def test_ignore_eos_takes_it_as_text() -> None:
    """With ignore_eos the model's own end is a token like another."""
    pieces, _ = play([*letters("ab"), EOS, 0], SamplingParams(max_tokens=9, ignore_eos=True))
    assert "".join(pieces) == "abza"


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    max_tokens=st.integers(1, 30),
)
def test_the_text_is_what_stands_before_the_first_stop_string(text: str, stops: list[str], max_tokens: int) -> None:
    """However the pieces fall: the pieces' sum is the text up to the earliest-ending stop string, or all of it."""
    params = SamplingParams(max_tokens=max_tokens, stop=tuple(stops))
    pieces, reason = play(letters(text), params)
    kept = text[:max_tokens]
    ends = [(at, kept[:at].find(stop)) for at in range(len(kept) + 1) for stop in stops if kept[:at].endswith(stop)]
    if ends:
        first = min(end for end, _ in ends)
        assert "".join(pieces) == kept[: min(start for end, start in ends if end == first)]
        assert reason is FinishReason.STOP
    elif len(kept) == max_tokens:
        assert "".join(pieces) == kept
        assert reason is FinishReason.LENGTH
    else:
        assert kept.startswith("".join(pieces))
        assert reason is None
