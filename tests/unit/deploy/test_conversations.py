"""The demo's yardstick: the most that any cache could have held."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deploy.conversations import TurnTokens, most_cached_tokens, user_message


def test_a_turn_finds_its_own_history_and_other_sessions_only_of_earlier_rounds() -> None:
    """Blocks of 2: in the first round nothing is there; in the second all full blocks of what came before."""
    turns = [
        TurnTokens(1, 1, (1, 2, 3), (4, 5)),
        TurnTokens(2, 1, (1, 2, 9), (9, 9)),
        TurnTokens(1, 2, (1, 2, 3, 4, 5, 6), (7,)),
        TurnTokens(2, 2, (1, 2, 3, 4, 5), (7,)),
    ]
    most = most_cached_tokens(turns, 2)
    assert most == {(1, 1): 0, (2, 1): 0, (1, 2): 4, (2, 2): 4}


def test_the_last_token_of_a_prompt_is_always_computed_and_that_of_an_answer_never() -> None:
    """A prompt that is cached to its end counts without its last block; an answer's last token has no KV."""
    turns = [TurnTokens(1, 1, (1, 2), (3, 4)), TurnTokens(1, 2, (1, 2), (3,)), TurnTokens(1, 3, (1, 2, 3, 4, 5), (6,))]
    most = most_cached_tokens(turns, 2)
    assert most[1, 2] == 0
    assert most[1, 3] == 2


@given(st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=8), st.integers(0, 2)), max_size=6))
def test_it_is_what_comparing_every_prefix_gives(drawn: list[tuple[list[int], int]]) -> None:
    """Against the plainest reading: the longest block-wise common prefix with any earlier round."""
    turns = [TurnTokens(session, turn, tuple(prompt), (0, 1)) for session, (prompt, turn) in enumerate(drawn)]
    most = most_cached_tokens(turns, 2)
    for entry in turns:
        best = 0
        for other in turns:
            if other.turn < entry.turn:
                held = other.prompt + other.answer[:-1]
                common = next(
                    (at for at, (a, b) in enumerate(zip(entry.prompt, held, strict=False)) if a != b),
                    min(len(entry.prompt), len(held)),
                )
                best = max(best, min(common, len(entry.prompt) - 1) // 2 * 2)
        assert most[entry.session, entry.turn] == best


def test_every_message_is_its_own() -> None:
    """Sessions share the system prompt and nothing after it, so what is reused is known."""
    messages = {user_message(session, turn) for session in range(20) for turn in range(20)}
    assert len(messages) == 400
