"""Policies that know nothing of prefixes, and those that follow a session or a prefix blindly."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b
from random import Random

import numpy as np

from router.candidates import Candidates
from router.policies.base import Policy, Prompt
from router.table import Floats

MAX_SESSIONS = 2**18  # remembered, the latest used: some 100 bytes each
PREFIX_BLOCKS = 4  # that prefix-hash and sticky go by where a request names no session: tells system prompts apart
LOAD_FACTOR = 1.25  # bounded loads (Mirrokni et al., SODA 2018)


class RandomChoice(Policy):
    """Any worker."""

    name = "random"

    def scores(self, prompt: Prompt, candidates: Candidates) -> Floats:
        """See Policy: by the request's name, so that asking twice answers alike."""
        return np.array([_rank(prompt.request_id, slot) for slot in candidates.slots.tolist()])


class RoundRobin(Policy):
    """The worker that was not chosen for the longest."""

    name = "round-robin"

    def scores(self, prompt: Prompt, candidates: Candidates) -> Floats:
        """See Policy."""
        return candidates.last_routed


class LeastLoaded(Policy):
    """The fewest requests in flight."""

    name = "least-loaded"

    def scores(self, prompt: Prompt, candidates: Candidates) -> Floats:
        """See Policy."""
        return candidates.in_flight


class PowerOfTwo(Policy):
    """The less loaded of two that the request's name picks (Mitzenmacher, 2001)."""

    name = "power-of-two"

    def scores(self, prompt: Prompt, candidates: Candidates) -> Floats:
        """See Policy."""
        scores = np.full(len(candidates), np.inf)
        picked = Random(prompt.request_id).sample(range(len(candidates)), min(2, len(candidates)))  # noqa: S311
        scores[picked] = candidates.in_flight[picked]
        return scores


class Sticky(Policy):
    """A session's worker while it lives, else the least loaded."""

    name = "sticky"

    def __init__(self) -> None:
        self._workers: OrderedDict[str | int, int] = OrderedDict()  # by session: slot

    def scores(self, prompt: Prompt, candidates: Candidates) -> Floats:
        """See Policy."""
        slot = self._workers.get(_session(prompt))
        return candidates.in_flight if slot is None else np.where(candidates.slots == slot, -1.0, candidates.in_flight)

    def placed(self, prompt: Prompt, candidates: Candidates, row: int) -> None:
        """See Policy."""
        session = _session(prompt)
        self._workers[session] = int(candidates.slots[row])
        self._workers.move_to_end(session)
        if len(self._workers) > MAX_SESSIONS:
            self._workers.popitem(last=False)

    def forget(self, slot: int) -> None:
        """See Policy."""
        for session in [session for session, its in self._workers.items() if its == slot]:
            del self._workers[session]


class PrefixHash(Policy):
    """Rendezvous hashing of the prompt's first blocks, passing over workers that have LOAD_FACTOR times the mean."""

    name = "prefix-hash"

    def scores(self, prompt: Prompt, candidates: Candidates) -> Floats:
        """See Policy."""
        key = str(_session(Prompt(prompt.request_id, prompt.hashes)))
        ranks: Floats = np.array([_rank(key, slot) for slot in candidates.slots.tolist()])
        mean = (candidates.in_flight.sum() + 1) / len(candidates)
        full: Floats = np.where(candidates.in_flight + 1 > LOAD_FACTOR * mean, 1.0, 0.0)
        return ranks + full  # ranks are below 1


def _session(prompt: Prompt) -> str | int:
    if prompt.session:
        return prompt.session
    return int(prompt.hashes[min(PREFIX_BLOCKS, len(prompt.hashes)) - 1]) if len(prompt.hashes) else prompt.request_id


def _rank(key: str, slot: int) -> float:
    """A random number in [0, 1) that depends on both alone."""
    return int.from_bytes(blake2b(f"{key}/{slot}".encode(), digest_size=6).digest(), "big") / 2**48
