"""Late binding: a request goes to a worker when that is nearly free, and those held go in the order of Holding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rhizome.errors import Overloaded, RhizomeError
from router.choice import Able, Choice
from router.decision import Comparison, Decision
from router.holding import HOLD_S, STALE_S, STALL_S, Held, Holding
from router.objective import Objective
from router.prediction import Predicted, queues_s
from router.request import RouteRequest
from router.table import Column, WorkerTable

Place = Callable[[RouteRequest, Comparison, float, float], Decision]
"""Reserves the load of a request that was compared, at a time, having been held for so long. Raises Overloaded."""


class LateBinding:
    """The requests that are held, and when each goes where."""

    def __init__(self, choice: Choice, table: WorkerTable, place: Place, objective: Objective) -> None:
        self._choice = choice
        self._table = table
        self._place = place
        self._holding = Holding(objective)

    def __len__(self) -> int:
        return len(self._holding)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._holding

    def to_hold(self, request: RouteRequest, comparison: Comparison) -> bool:
        """Whether a request that was just compared is to be held."""
        if not self._choice.policy(request).holds or self._holding.is_full:
            return False
        return bool(self._holding) or not _nearly_free(comparison)

    def hold(self, request: RouteRequest, comparison: Comparison, now: float) -> None:
        """Hold one that is not held yet."""
        rows = comparison.rows
        self._holding.add(Held(request, now, rows, comparison.scores - rows.queue_s, float(rows.prefill_s.min()), now))

    def remove(self, request_id: str) -> bool:
        """It is given up; false for one that is not held."""
        return self._holding.remove(request_id)

    def dispatch(self, now: float) -> list[tuple[str, Decision | RhizomeError]]:
        """Who goes where now, or why they cannot; by request id. They are held no more."""
        gone: list[tuple[str, Decision | RhizomeError]] = []
        for model in self._holding.models():
            try:
                able = self._choice.able(model)
            except RhizomeError as error:
                gone += [(held.request.request_id, error) for held in self._holding.in_order(model, now)]
            else:
                gone += self._dispatch(model, able, now)
        for request_id, _ in gone:
            self._holding.let_go(request_id, now)
        return gone

    def _dispatch(self, model: str, able: Able, now: float) -> list[tuple[str, Decision | RhizomeError]]:
        """One after the other in order of rank: each counts on the worker that is best for it once those before it have
        been served there, and goes if that one is nearly free now."""
        gone: list[tuple[str, Decision | RhizomeError]] = []
        queue_s = queues_s(self._table.values, able.slots, now)
        # With roles some workers are idle beside a queue: they help where those before a request make that better.
        ahead_s = None if able.roles is None else np.zeros(len(able.slots))
        stalled = now - self._holding.moved_at > STALL_S
        if queue_s.min() > HOLD_S and not stalled:
            return gone
        for held in self._holding.in_order(model, now):
            if queue_s.min() > HOLD_S and not stalled:
                break
            if len(held.own) != len(able.slots) or now - held.compared_at > STALE_S:
                self._compare_again(held, now)
            best, placed = int(np.argmin(held.own + queue_s)), False
            if queue_s[best] <= HOLD_S or stalled:
                try:
                    comparison = self._choice.compare(held.request, now, now - held.since, ahead_s)
                    placed = stalled or _nearly_free(comparison)
                    if placed:
                        decision = self._place(held.request, comparison, now, now - held.since)
                        gone.append((held.request.request_id, decision))
                        best, stalled = comparison.chosen, False
                except Overloaded:  # all workers are full, or the router is
                    break
            queue_s[best] += held.rows.prefill_s[best]
            if ahead_s is not None and not placed:
                ahead_s[best] += held.rows.prefill_s[best]
        return gone

    def _compare_again(self, held: Held, now: float) -> None:
        held.rows, scores = self._choice.scored(held.request, now, now - held.since)
        held.own, held.work_s = scores - held.rows.queue_s, float(held.rows.prefill_s.min())
        held.compared_at = now
        self._holding.compared(held)


def _nearly_free(comparison: Comparison) -> bool:
    """Whether the chosen worker will begin with the request soon; an idle one takes what it would never have room for,
    and refuses it."""
    best = comparison.best
    if not best[Column.SEQUENCES]:
        return True
    joins = best[Predicted.WAITING] > 0 and best[Predicted.PREFILL_S] > HOLD_S
    return best[Predicted.QUEUE_S] <= HOLD_S and not best[Predicted.MEMORY_S] and not joins
