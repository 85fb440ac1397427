"""Router: the one object that holds a router's state, and through which everything enters. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from kv_events.view import WorkerView
from radix.tree import DEFAULT_MAX_BLOCKS, DEFAULT_MAX_BLOCKS_PER_WORKER
from rhizome.errors import Conflict, Duplicate, InvalidRequest, RhizomeError
from router.choice import Choice, prompt_of
from router.decision import Comparison, Decision
from router.disagg import LOCAL_PREFILL_S
from router.fleet import LEASE_S, Fleet, ModelCard, WorkerInfo, WorkerReport
from router.fleet_timing import FleetTiming
from router.index import Index
from router.late_binding import LateBinding
from router.load import Load, Reservation
from router.objective import Objective
from router.policies import DEFAULT_POLICY
from router.prediction import Predicted
from router.request import RouteRequest
from router.table import Column, Floats, WorkerTable
from router.timing import PRIOR, StepCosts

__all__ = ["RouteRequest", "Router"]


class Router:
    """Fleet, index, loads and timings, kept consistent with each other.

    `now` is a monotonic clock in seconds and must not go back. With `validate` every invariant is checked after each
    change (for tests: it visits everything).
    """

    def __init__(
        self,
        *,
        policy: str = DEFAULT_POLICY,
        objective: Objective | None = None,
        lease_s: float = LEASE_S,
        max_blocks: int = DEFAULT_MAX_BLOCKS,
        max_blocks_per_worker: int = DEFAULT_MAX_BLOCKS_PER_WORKER,
        prior: StepCosts = PRIOR,
        seed: int | None = None,
        local_prefill_s: float = LOCAL_PREFILL_S,
        validate: bool = False,
    ) -> None:
        self.fleet = Fleet(lease_s)
        self.index = Index(max_blocks, max_blocks_per_worker)
        self._table = WorkerTable()
        self.load = Load(self._table)
        self.timing = FleetTiming(self._table, prior)
        # Workers that are indexed and get no requests -> where their events are read.
        self.observed: dict[str, str] = {}
        objective = objective or Objective()
        self._choice = Choice(
            self.fleet,
            self.index,
            self._table,
            held_blocks=self._depths,
            observed=self.observed,
            policy=policy,
            objective=objective,
            foreign_share=self.load.foreign_share,
            seed=seed,
            local_prefill_s=local_prefill_s,
        )
        self._late = LateBinding(self._choice, self._table, self._placed, objective)
        self._validate = validate

    # Workers come and go.

    def register(self, info: WorkerInfo, now: float) -> bool:
        """Give a worker its lease; true when it is new here, or a new incarnation: whatever was kept of it is gone.

        A new one serves after set_ready. Raises what Fleet.register raises, and Conflict for an observed worker's id.
        """
        if info.worker_id in self.observed:
            raise Conflict(f"worker {info.worker_id}: a worker of this name is observed here, and does not join")
        fresh = self.fleet.register(info, now)
        if fresh:
            self._forget(info.worker_id)
            self.index.add(info.worker_id)
            self._add(info)
        self._checked()
        return fresh

    def set_ready(self, worker_id: str, epoch: int) -> None:
        """Its prompts can be tokenized: requests may go there. Raises NotServed."""
        self.fleet.get(worker_id, epoch).ready = True
        self._choice.members_changed()

    def heartbeat(self, worker_id: str, epoch: int, report: WorkerReport, now: float) -> bool:
        """Renew a lease and take the worker's report in. Returns whether it is draining. Raises Conflict, NotServed."""
        known = self.fleet.find(worker_id)
        if known is not None and known.unreachable:
            self._choice.members_changed()
        member = self.fleet.heartbeat(worker_id, epoch, report, now)
        self.load.report(worker_id, report, now)
        self.timing.observe(worker_id, report, now)
        if 0 < report.fetch_token_s < 1 and member.info.transfer_offers:  # as measured; from the wire, so bounded
            self._table.set(self.index.slot(worker_id), Column.FETCH_TOKEN_S, (report.fetch_token_s,))
        self._checked()
        return member.draining

    def deregister(self, worker_id: str, epoch: int) -> None:
        """A worker leaves. Raises NotServed unless that very incarnation is registered."""
        self.fleet.remove(worker_id, epoch)
        self._forget(worker_id)
        self._checked()

    def expire(self, now: float) -> list[WorkerInfo]:
        """To be called some times a lease: drops workers whose lease ran out, and direct requests that fell silent.

        Returns the workers that were dropped.
        """
        expired = self.fleet.expire(now)
        for info in expired:
            self._forget(info.worker_id)
        self.load.expire(now)
        self._checked()
        return expired

    def set_draining(self, worker_id: str, draining: bool) -> None:
        """Stop routing to a worker, or take that back; a new incarnation starts undrained. Raises NotServed."""
        self.fleet.get(worker_id).draining = draining
        self._choice.members_changed()

    def set_unreachable(self, worker_id: str, epoch: int) -> None:
        """A request could not get through: send no more until the worker is heard of again.

        Else a dead worker, idle as it looks, would draw every request until its lease has run out. Unknown ones are
        ignored.
        """
        member = self.fleet.find(worker_id, epoch)
        if member is not None:
            member.unreachable = True
            self._choice.members_changed()

    def observe(self, worker_id: str, events_url: str) -> None:
        """Index a worker that does not register: it gets a view, and no requests. Raises InvalidRequest for a name that
        is taken."""
        if worker_id in self.observed or self.fleet.find(worker_id):
            raise InvalidRequest("observe", worker_id, "a name that no other worker has")
        self.observed[worker_id] = events_url
        self.index.add(worker_id)
        self._checked()

    def view(self, worker_id: str) -> WorkerView:
        """The consumer of a registered or observed worker's events. Not to be fed once the worker was dropped or
        replaced."""
        return self.index.view(worker_id)

    def _add(self, info: WorkerInfo) -> None:
        slot = self.index.slot(info.worker_id)
        self._table.add(slot)
        self._table.set(slot, Column.BLOCKS_TOTAL, (info.blocks_total, info.max_running + info.max_waiting))
        self._table.set(slot, Column.BUDGET, (info.max_batched_tokens,))
        self._table.set(slot, Column.FETCH_TOKEN_S, (info.fetch_token_s,))
        self.timing.add(info.worker_id, info.model.name, slot)
        self.load.add_worker(info.worker_id, slot)

    def _forget(self, worker_id: str) -> None:
        self._choice.members_changed()
        if worker_id in self.timing:
            self._choice.forget(self.index.slot(worker_id))
        self.index.drop(worker_id)
        self.load.drop_worker(worker_id)
        self.timing.drop(worker_id)

    # Requests come and go.

    def card(self, model: str) -> ModelCard:
        """The card of a model ("": the only one served). Raises NotServed, Unavailable, InvalidRequest."""
        return self.fleet.card(model)

    def route(self, request: RouteRequest, now: float) -> Decision:
        """Choose a worker and reserve the request's load there, in one step.

        Raises NotServed for an unknown model, Unavailable where none of its workers may take requests, Overloaded
        where all are full, Duplicate for a request id in flight, InvalidRequest for an unknown policy.
        """
        self._check_not_held(request)
        return self._placed(request, self._choice.compare(request, now), now)

    def submit(self, request: RouteRequest, now: float) -> Decision | None:
        """The same, or None: the request is held until the worker that is best for it is nearly free, and `dispatch`
        tells where it goes. Raises like `route`."""
        self._check_not_held(request)
        comparison = self._choice.compare(request, now)
        if not self._late.to_hold(request, comparison):
            return self._placed(request, comparison, now)
        self.load.check_room(request.request_id)
        self._late.hold(request, comparison, now)
        return None

    def _check_not_held(self, request: RouteRequest) -> None:
        if request.request_id in self._late:
            raise Duplicate(f"request {request.request_id} is in flight already")

    @property
    def held(self) -> int:
        """Requests that are held."""
        return len(self._late)

    def dispatch(self, now: float) -> list[tuple[str, Decision | RhizomeError]]:
        """Where held requests go now, or why they cannot, by request id.

        To be called after every change while any are held, and every PATIENCE_S (router.holding).
        """
        gone = self._late.dispatch(now)
        self._checked()
        return gone

    def explain(self, request: RouteRequest, now: float) -> Decision:
        """What route would decide; reserves nothing. Raises the same, Duplicate apart."""
        decision = self._choice.decision(request, self._choice.compare(request, now), 0.0)
        if decision.begins:
            next_one = self._choice.compare_to_go_on(request, now, decision.worker_id)
            decision.goes_on = self._choice.decision(request, next_one, 0.0).worker_id
        return decision

    def _depths(self, request: RouteRequest) -> Floats:
        if request.bypass_prefix_cache:
            return np.zeros((2, len(self.index.slot_names)))
        return self.index.match(request.hashes)

    def hand_over(self, request: RouteRequest, now: float, lender: str = "", without: Collection[str] = ()) -> Decision:
        """The worker that had the request has done its part, or is gone: choose who goes on, but for `without`, and
        move the request's load there. The prompt's blocks can be pulled from the `lender`.

        Raises NotServed, Unavailable, Overloaded; then no load is left.
        """
        self.load.release(request.request_id, now)
        comparison = self._choice.compare_to_go_on(request, now, lender, without)
        decision = self._choice.decision(request, comparison, 0.0)
        if lender and decision.fetched_tokens:
            decision.fetch_from = lender
        self._reserve(request, comparison, decision, now)
        self._checked()
        return decision

    def _placed(self, request: RouteRequest, comparison: Comparison, now: float, held_s: float = 0.0) -> Decision:
        decision = self._choice.decision(request, comparison, held_s)
        self._reserve(request, comparison, decision, now)
        self._choice.policy(request).placed(prompt_of(request), comparison.rows, comparison.chosen)
        self._checked()
        return decision

    def _reserve(self, request: RouteRequest, comparison: Comparison, decision: Decision, now: float) -> None:
        best = comparison.best
        self.load.reserve(
            Reservation(
                request_id=request.request_id,
                worker_id=decision.worker_id,
                prefill_tokens=int(best[Predicted.PREFILL_TOKENS]),
                blocks=comparison.rows.prompt_blocks,
                prompt_tokens=request.prompt_tokens,
                sequences=request.sequences,
                predicted_ttft_s=decision.predicted_ttft_s,
                routed_at=now,
                tokens_s=best[Predicted.TOKENS_S],
                prefill_s=best[Predicted.PREFILL_S],
                streamed=request.streamed,
            )
        )

    def explain_observed(self, request: RouteRequest, block_size: int) -> Decision:
        """What observed workers hold of a request for a model that no worker serves: nobody is chosen."""
        return self._choice.nobody(request, block_size)

    def first_token(self, request_id: str, now: float) -> None:
        """The first token passed through; what is not known, or not new, is ignored."""
        request = self.load.prefilled(request_id, now)
        if request is not None:
            self.timing.first_token(request.worker_id, request.predicted_ttft_s, now - request.routed_at)
        self._checked()

    def finish(self, request_id: str, now: float) -> None:
        """The request has ended, whatever way, or is given up while it is held; an unknown one is ignored."""
        if not self._late.remove(request_id):
            self.load.release(request_id, now)
        self._checked()

    # Invariants.

    def _checked(self) -> None:
        if self._validate:
            self.validate()

    def validate(self) -> None:
        """Assert that fleet, index, loads and timings speak of the same workers, and each one's own invariants."""
        names = [member.info.worker_id for member in self.fleet.members()]
        self.timing.check(names)
        self.load.check(names)
        self.index.check([*names, *self.observed])
