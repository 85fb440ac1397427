"""Prefill apart from decode: who may compute a prompt, and who goes on with its answer. Pure arithmetic over rows.

A prefill worker answers the first token only, and lends the prompt's blocks to the worker that goes on. Decode workers
compute what is short themselves, and what is long where that holds up others less than to wait for a prefill worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.candidates import Candidates
from router.fleet import Role, WorkerInfo
from router.prediction import FETCH_START_S, Predicted
from router.table import Column, Floats

LOCAL_PREFILL_S = 0.05  # a pause that those beside it hardly see: a decode step or two
ANSWER_TOKENS = 200  # of an answer, about: so many steps of its decode worker matter to it
HELD_UP = 4  # answers at least that a long prompt on a decode worker holds up: more may come meanwhile
ONE_HOST = ("local", "shm")  # transports whose address begins with where they are

Rows = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Roles:
    """Of able workers, shape (workers,) each."""

    prefill: Rows  # only begins answers
    decode: Rows  # goes on with answers, and begins them where that is short or nobody else is soon free
    lends: Rows  # begins answers, and some of `pulls` has a way to its blocks
    pulls: Rows  # goes on, and has a way to blocks of some of `lends`
    _ways: list[frozenset[str]]  # that differ
    _kind: NDArray[np.intp]  # which of these each has

    def pulls_from(self, row: int) -> Rows:
        """Who can go on with what the worker of that row began, and take its blocks."""
        from_there = np.array([not ways.isdisjoint(self._ways[self._kind[row]]) for ways in self._ways])
        pulls: Rows = self.pulls & from_there[self._kind]
        return pulls

    def whole(self, rows: Candidates, scores: Floats) -> Floats:
        """The scores of who answers to the end, alone or from where another is gone: prefill workers have no room."""
        return _without_room(rows, scores, self.prefill)

    def assign(self, rows: Candidates, scores: Floats, *, splits: bool, in_seconds: bool, local_s: float) -> Floats:
        """The scores of who computes the prompt. Who must not has no room for it. `splits`: the answer may move."""
        free = np.maximum(rows.max_in_flight - rows.in_flight, 0.0)
        takers = self.pulls & (free > 0)
        to_come = rows.in_flight[self.prefill].sum()  # each will need a place
        if not (splits and (self.lends & (free > 0)).any() and free[takers].sum() > to_come):
            return self.whole(rows, scores)
        long, never = self.decode & (rows.prefill_s > local_s), self.prefill & ~self.lends
        if not in_seconds or not local_s:
            return _without_room(rows, scores, long | never)
        second_s = float(_pull_s(rows)[takers].min())  # until the second token can come
        held_up_s = rows.prefill_s * np.maximum(rows.decoding, HELD_UP)
        scores = scores + np.where(self.prefill, second_s, 0.0) + np.where(long, held_up_s, 0.0)
        return _without_room(rows, scores, never)


def roles_of(workers: Sequence[WorkerInfo]) -> Roles | None:
    """None where nobody is of role prefill or decode."""
    if all(worker.role is Role.BOTH for worker in workers):
        return None
    prefill, decode = (np.array([worker.role is role for worker in workers]) for role in (Role.PREFILL, Role.DECODE))
    numbers: dict[frozenset[str], int] = {}
    kind = np.array([numbers.setdefault(_ways(worker), len(numbers)) for worker in workers], np.intp)
    ways = list(numbers)
    pulls = ~prefill & np.array([worker.fetch_token_s > 0 for worker in workers])

    def meets(others: Rows) -> Rows:
        theirs = frozenset[str]().union(*(ways[at] for at in set(kind[others].tolist())))
        met: Rows = np.array([not each.isdisjoint(theirs) for each in ways])[kind]
        return met

    return Roles(prefill, decode, prefill & meets(pulls), pulls & meets(prefill), ways, kind)


def _ways(worker: WorkerInfo) -> frozenset[str]:
    """Transports that it serves, and pulls by. Two workers have a way to each other's blocks if they share one."""
    offers = (offer.partition("://") for offer in worker.transfer_offers)
    return frozenset(f"{name}://{at.partition('/')[0]}" if name in ONE_HOST else name for name, _, at in offers)


def to_go_on(rows: Candidates, pulls: Rows) -> Floats:
    """Turn rows for a whole prompt into those for an answer that was begun elsewhere, where its full blocks lie
    ready for `pulls`. Scores: the seconds that a worker's load adds until the answer ends, about.

    What steps take apart from load is left out: of equal workers it differs by chance, and answers would wander.
    """
    values, missing = rows.rows, _missing(rows)
    beside_s = values[Column.SEQUENCE_S] * rows.decoding + values[Column.CONTEXT_S] * values[Column.CONTEXT]
    step_s = values[Column.DECODE_STEP_S] + beside_s
    tail = rows.prompt_tokens % rows.block_size + 1  # what fills no block, and the first token
    for row, there in (
        (Predicted.CACHED_TOKENS, rows.prompt_tokens - tail + 1.0),
        (Predicted.FETCHED_TOKENS, missing),
        (Predicted.FETCH_S, _pull_s(rows)),
        (Predicted.PREFILL_TOKENS, float(tail)),
        (Predicted.TOKENS_S, tail * rows.token_s),
        (Predicted.PREFILL_S, tail * rows.token_s + step_s),
    ):
        values[row] = np.where(pulls, there, values[row])
    ready_s = np.maximum(np.maximum(rows.queue_s, rows.memory_s), values[Predicted.FETCH_S])
    values[Predicted.TTFT_S] = ready_s + rows.prefill_s + rows.decode_s
    scores: Floats = ready_s + ANSWER_TOKENS * beside_s + np.where(pulls, 0.0, rows.prefill_s)
    return scores


def _missing(rows: Candidates) -> Floats:
    """Tokens in full blocks of the prompt that each lacks."""
    full = rows.prompt_tokens // rows.block_size * rows.block_size
    missing: Floats = full - (rows.cached_tokens - rows.fetched_tokens)
    return missing


def _pull_s(rows: Candidates) -> Floats:
    """To take them all from a prefill worker."""
    missing = _missing(rows)
    return np.where(missing > 0, FETCH_START_S + missing * rows.rows[Column.FETCH_TOKEN_S], 0.0)


def _without_room(rows: Candidates, scores: Floats, forbidden: Rows) -> Floats:
    rows.rows[Column.MAX_SEQUENCES, forbidden] = 0.0
    return np.where(forbidden, np.inf, scores)
