"""Which of the candidates serves a request. Policies see every candidate's predicted terms and keep no state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rhizome.errors import InvalidRequest

TIE_S = 0.001
TIE_SHARE = 0.02


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that could serve the request, and what is predicted for it there."""

    worker_id: str
    cached_tokens: int  # of the prompt, by the router's tree
    prefill_tokens: int  # of the prompt, to be computed
    queued_prefill_tokens: int  # computed before it
    running: int  # sequences decoding
    in_flight: int  # sequences, running or waiting
    max_in_flight: int
    free_blocks: int  # free or evictable, less those promised to requests on their way
    last_routed: int  # serial of the latest decision for this worker; 0: never
    queue_s: float
    prefill_s: float
    decode_s: float

    @property
    def predicted_ttft_s(self) -> float:
        """Seconds from now to the first token."""
        return self.queue_s + self.prefill_s + self.decode_s


@dataclass(frozen=True, slots=True)
class Overlap:
    """What a worker that gets no requests holds of a prompt."""

    worker_id: str
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes, why, and what the other candidates would have meant (the chosen one is the first)."""

    request_id: str
    worker_id: str
    epoch: int
    address: str
    policy: str
    reason: str
    prompt_tokens: int
    candidates: tuple[Candidate, ...]
    observed: tuple[Overlap, ...] = ()


class Policy(Protocol):
    """A rule of choice; tests/contract/test_policy.py holds what every one of them keeps."""

    name: str

    def choose(self, candidates: Sequence[Candidate]) -> tuple[Candidate, str]:
        """One of at least one candidate, and why, as the end of a sentence for people."""
        ...


class PredictedTtft:
    """The least predicted time to the first token.

    Near-ties go to the worker with the most free blocks, then the fewest sequences, then the one not chosen for the
    longest: broken by index, ties overload the first worker.
    """

    name = "predicted-ttft"

    def choose(self, candidates: Sequence[Candidate]) -> tuple[Candidate, str]:
        """See Policy."""
        best_s = min(candidate.predicted_ttft_s for candidate in candidates)
        limit_s = best_s + max(TIE_S, TIE_SHARE * best_s)
        tied = [candidate for candidate in candidates if candidate.predicted_ttft_s <= limit_s]
        chosen = min(tied, key=lambda candidate: (-candidate.free_blocks, candidate.in_flight, candidate.last_routed))
        others = sorted(
            (candidate for candidate in candidates if candidate is not chosen),
            key=lambda candidate: candidate.predicted_ttft_s,
        )
        if not others:
            return chosen, "no other worker can take it"
        nearest = f"{others[0].worker_id}: {others[0].predicted_ttft_s:.3f} s"
        if len(tied) == 1:
            return chosen, f"next best {nearest}"
        return chosen, f"within a tie ({nearest}) {_advantage(chosen, tied)}"


def _advantage(chosen: Candidate, tied: Sequence[Candidate]) -> str:
    rivals = [candidate for candidate in tied if candidate is not chosen]
    if all(rival.free_blocks < chosen.free_blocks for rival in rivals):
        return f"it has the most free blocks, {chosen.free_blocks}"
    if all((-rival.free_blocks, rival.in_flight) > (-chosen.free_blocks, chosen.in_flight) for rival in rivals):
        return f"it has the fewest sequences in flight, {chosen.in_flight}"
    return "it was not chosen for the longest"


class RoundRobin:
    """The worker that was not chosen for the longest."""

    name = "round-robin"

    def choose(self, candidates: Sequence[Candidate]) -> tuple[Candidate, str]:
        """See Policy."""
        return min(candidates, key=lambda candidate: (candidate.last_routed, candidate.worker_id)), "its turn"


POLICIES: dict[str, Policy] = {policy.name: policy for policy in (PredictedTtft(), RoundRobin())}


def find_policy(name: str) -> Policy:
    """The policy of that name. Raises InvalidRequest."""
    try:
        return POLICIES[name]
    except KeyError:
        raise InvalidRequest("policy", name, f"one of {', '.join(sorted(POLICIES))}") from None
