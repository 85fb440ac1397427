"""Requests that wait in the router until their best worker is nearly free: late binding."""

from __future__ import annotations

from dataclasses import dataclass

from router.candidates import Candidates
from router.request import RouteRequest
from router.table import Floats

HOLD_S = 0.15
"""A worker with less than that to compute before a request is nearly free: enough not to run dry on the way."""
AGE_WEIGHT = 0.1
"""A request goes before another that has so much less work, in seconds, for each second that it has waited longer."""
STALE_S = 0.5
"""Terms of a held request are predicted again after that, and when it goes."""
MAX_HELD = 4096
"""Requests; further ones go to workers at once."""
MAX_CONSIDERED = 64
"""Of these, the first in order, at a time: the others cannot go before them."""
STALL_S = 5.0
"""Where none has gone for so long, the first goes to its best worker, free or not: others may keep all of them busy."""
PATIENCE_S = 0.05
"""Held requests are looked at again after that, whatever is heard."""


@dataclass(slots=True, eq=False)
class Held:
    """A request that waits, and what it means on each worker."""

    request: RouteRequest
    since: float
    rows: Candidates
    own: Floats  # (workers,): its score on each, queues apart
    work_s: float  # its own prefill where that is least
    compared_at: float


class Holding:
    """Held requests by id. The shortest work goes first, and age makes up for length."""

    def __init__(self) -> None:
        self._held: dict[str, Held] = {}
        self.moved_at = 0.0  # when one went last, or the first of those here came

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._held

    @property
    def is_full(self) -> bool:
        """Whether no more are held."""
        return len(self._held) >= MAX_HELD

    def add(self, held: Held) -> None:
        """Hold one that is not held yet."""
        if not self._held:
            self.moved_at = held.since
        self._held[held.request.request_id] = held

    def remove(self, request_id: str) -> bool:
        """It is given up; false for one that is not held."""
        return self._held.pop(request_id, None) is not None

    def let_go(self, request_id: str, now: float) -> None:
        """It goes."""
        del self._held[request_id]
        self.moved_at = now

    def models(self) -> list[str]:
        """The models that requests are held for, as they name them."""
        return list(dict.fromkeys(held.request.model for held in self._held.values()))

    def in_order(self, model: str, now: float) -> list[Held]:
        """Those of a model that may go first."""
        held = [held for held in self._held.values() if held.request.model == model]
        held.sort(key=lambda each: (each.request.priority, each.work_s - AGE_WEIGHT * (now - each.since)))
        return held[:MAX_CONSIDERED]
