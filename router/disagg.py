"""Prefill apart from decode: who may compute a prompt, and who goes on with its answer. Pure arithmetic over rows.

A prefill worker answers the first token only, and lends the prompt's blocks to the worker that goes on. Decode workers
compute what is short themselves, and everything while no prefill worker has room.
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

Rows = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Roles:
    """Of able workers, shape (workers,) each."""

    prefill: Rows  # begins answers, and never goes on with one
    decode: Rows  # goes on with answers, and begins them where that is short

    def assign(self, rows: Candidates, scores: Floats, *, splits: bool, in_seconds: bool, local_s: float) -> Floats:
        """The scores of who computes the prompt. Who must not has no room for it. `splits`: the answer may move."""
        room = rows.in_flight < rows.max_in_flight
        takers = ~self.prefill & can_pull(rows) & room
        if not (splits and takers.any() and (self.prefill & room).any()):
            return _without_room(rows, scores, self.prefill)
        if in_seconds:  # until the second token can come
            scores = scores + np.where(self.prefill, float(_pull_s(rows)[takers].min()), 0.0)
        return _without_room(rows, scores, self.decode & (rows.prefill_s > local_s))


def roles_of(workers: Sequence[WorkerInfo]) -> Roles | None:
    """None where all are of role both."""
    if all(worker.role is Role.BOTH for worker in workers):
        return None
    prefill, decode = (np.array([worker.role is role for worker in workers]) for role in (Role.PREFILL, Role.DECODE))
    return Roles(prefill, decode)


def can_pull(rows: Candidates) -> Rows:
    """Who can take blocks from others."""
    can: Rows = rows.rows[Column.FETCH_TOKEN_S] > 0
    return can


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
