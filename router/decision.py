"""Decision: where a request goes, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from router.candidates import Candidate, Candidates
from router.table import Floats


@dataclass(frozen=True, slots=True)
class Overlap:
    """What a worker that gets no requests holds of a prompt."""

    worker_id: str
    cached_tokens: int


class Explanation(Protocol):
    """Why, for people; made when it is asked for."""

    def candidates(self, most: int | None = None) -> tuple[Candidate, ...]: ...
    @property
    def reason(self) -> str: ...


@dataclass(frozen=True, slots=True)
class NobodyChosen:
    """Why no worker could be."""

    reason: str

    def candidates(self, most: int | None = None) -> tuple[Candidate, ...]:  # noqa: ARG002
        """None."""
        return ()


@dataclass(slots=True, eq=False)  # a frozen one takes ten times as long to make
class Comparison:
    """All candidates of a choice with their scores. Not to be changed."""

    rows: Candidates
    best: list[float]  # the chosen one's value in each row
    scores: Floats  # (workers,); the least won, infinite where there was no room
    chosen: int  # row
    tied: bool  # others scored as well
    names: Sequence[str]  # by slot
    unit: str
    apart: bool = False  # chosen at random, as other routers decide by the same reports

    def candidates(self, most: int | None = None) -> tuple[Candidate, ...]:
        """The chosen one, then the others, best first; all of them, or so many."""
        others = [row for row in np.argsort(self.scores, kind="stable").tolist() if row != self.chosen]
        return tuple(self.rows.row(row, self.names, self.scores) for row in (self.chosen, *others)[:most])

    @property
    def reason(self) -> str:
        """A sentence."""
        chosen, *others = self.candidates(2)
        others = [other for other in others if other.score < np.inf]
        told = f"{chosen.worker_id}: {chosen.predicted_ttft_s:.3f} s predicted, {chosen.cached_tokens} of "
        told += f"{self.rows.prompt_tokens} prompt tokens cached"
        if chosen.fetched_tokens:
            told += f", {chosen.fetched_tokens} of them at {self.names[self.rows.source()]}"
        told += f"; score {chosen.score:.4g}{self.unit}, "
        if not others:
            return told + "no other worker can take it"
        nearest = f"{others[0].worker_id}: {others[0].score:.4g}{self.unit}"
        if not self.tied:
            return told + f"next best {nearest}"
        if self.apart:
            return told + f"at random of those about as good ({nearest}): other routers know the same of them"
        return told + f"within a tie ({nearest}): most free blocks, fewest in flight, not chosen for the longest"


@dataclass(slots=True)  # not frozen: as above
class Decision:
    """Where a request goes, why, and what the other candidates would have meant. Not to be changed."""

    request_id: str
    worker_id: str
    epoch: int
    address: str
    policy: str
    prompt_tokens: int
    cached_tokens: int  # those that are to be fetched included
    predicted_ttft_s: float
    held_s: float  # how long the router kept it back
    explanation: Explanation
    observed: tuple[Overlap, ...] = ()
    fetched_tokens: int = 0  # of the cached ones, what pays to fetch ...
    fetch_from: str = ""  # ... from this worker
    begins: bool = False  # the worker answers the first token only; who goes on is decided then
    goes_on: str = ""  # who it would be now, where that was asked for

    @property
    def reason(self) -> str:
        """A sentence for people."""
        return self.explanation.reason

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The chosen one is the first."""
        return self.explanation.candidates()

    def nearest(self) -> tuple[Candidate, ...]:
        """The chosen one and the next best: to make all of many takes longer than the decision did."""
        return self.explanation.candidates(2)
