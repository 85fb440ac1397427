"""What every routing policy keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rhizome.errors import InvalidRequest
from router.policy import POLICIES, TIE_S, TIE_SHARE, Candidate, PredictedTtft, RoundRobin, find_policy

TIMES = st.sampled_from([0.0, 0.01, 0.0105, 0.5]) | st.floats(0, 100)

CANDIDATES = st.lists(
    st.builds(
        Candidate,
        worker_id=st.just(""),
        cached_tokens=st.integers(0, 100),
        prefill_tokens=st.integers(1, 100),
        queued_prefill_tokens=st.integers(0, 1000),
        running=st.integers(0, 10),
        in_flight=st.integers(0, 3),
        max_in_flight=st.just(16),
        free_blocks=st.integers(0, 3),
        last_routed=st.integers(0, 3),
        queue_s=TIMES,
        prefill_s=TIMES,
        decode_s=TIMES,
    ),
    min_size=1,
    max_size=6,
).map(lambda found: [replace(candidate, worker_id=f"w{number}") for number, candidate in enumerate(found)])


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(candidates=CANDIDATES)
def test_a_policy_chooses_one_of_the_candidates_and_says_why(name: str, candidates: list[Candidate]) -> None:
    """The same question has the same answer: policies keep no state."""
    policy = find_policy(name)
    chosen, why = policy.choose(candidates)
    assert chosen in candidates
    assert why
    assert policy.choose(candidates) == (chosen, why)


@given(candidates=CANDIDATES)
def test_predicted_ttft_is_never_beaten_by_more_than_a_tie(candidates: list[Candidate]) -> None:
    """Within the tie: nobody has more free blocks; at equal blocks nobody has less in flight, or waited longer."""
    chosen, _ = PredictedTtft().choose(candidates)
    best_s = min(candidate.predicted_ttft_s for candidate in candidates)
    limit_s = best_s + max(TIE_S, TIE_SHARE * best_s)
    assert chosen.predicted_ttft_s <= limit_s
    for rival in candidates:
        if rival.predicted_ttft_s <= limit_s:
            assert (-chosen.free_blocks, chosen.in_flight, chosen.last_routed) <= (
                -rival.free_blocks,
                rival.in_flight,
                rival.last_routed,
            )


@given(candidates=CANDIDATES)
def test_round_robin_takes_who_waited_longest(candidates: list[Candidate]) -> None:
    """Whatever the prediction."""
    chosen, _ = RoundRobin().choose(candidates)
    assert chosen.last_routed == min(candidate.last_routed for candidate in candidates)


def test_reasons_speak_of_the_nearest_rival() -> None:
    """Alone, clearly best, or within a tie."""
    first = Candidate("w0", 0, 10, 0, 0, 0, 16, free_blocks=5, last_routed=0, queue_s=0, prefill_s=0.1, decode_s=0)
    policy = PredictedTtft()
    assert policy.choose([first]) == (first, "no other worker can take it")
    worse = replace(first, worker_id="w1", queue_s=1.0)
    assert policy.choose([worse, first]) == (first, "next best w1: 1.100 s")
    fuller = replace(first, worker_id="w1", free_blocks=4)
    assert policy.choose([fuller, first]) == (first, "within a tie (w1: 0.100 s) it has the most free blocks, 5")
    busier = replace(first, worker_id="w1", in_flight=1)
    assert policy.choose([busier, first])[1].endswith("it has the fewest sequences in flight, 0")
    later = replace(first, worker_id="w1", last_routed=9)
    assert policy.choose([later, first])[1].endswith("it was not chosen for the longest")


def test_an_unknown_policy_is_refused_with_those_that_are() -> None:
    """By name."""
    with pytest.raises(InvalidRequest, match="predicted-ttft, round-robin"):
        find_policy("best")
