"""Router: the one object that holds a router's state, and through which everything enters. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kv_events.view import WorkerView
from radix.keys import Hashes
from radix.tree import DEFAULT_MAX_BLOCKS, DEFAULT_MAX_BLOCKS_PER_WORKER
from rhizome.errors import Conflict, Duplicate, InvalidRequest, Overloaded, RhizomeError, Unavailable
from router.candidates import Candidates, queues_s
from router.decision import Comparison, Decision, NobodyChosen, Overlap
from router.fleet import LEASE_S, Fleet, Member, ModelCard, Role, WorkerInfo, WorkerReport
from router.holding import HOLD_S, STALE_S, STALL_S, Held, Holding
from router.index import Index
from router.load import Load, Reservation
from router.policies import DEFAULT_POLICY, Policy, Prompt, make_policy
from router.table import Column, Floats, Slots, WorkerTable
from router.timing import PRIOR, StepCosts, WorkerTiming, average

MIN_RETRY_S, MAX_RETRY_S = 0.1, 10.0


@dataclass(frozen=True, slots=True, eq=False)
class RouteRequest:
    """What a decision needs to know of a request. The prompt itself is not among it."""

    request_id: str
    model: str
    prompt_tokens: int  # at least 1
    hashes: Hashes  # of the prompt's full blocks
    sequences: int = 1  # choices
    policy: str = ""  # the router's
    session: str = ""
    priority: int = 0
    bypass_prefix_cache: bool = False
    streamed: bool = True  # the answer passes through this router, which will call first_token and finish


@dataclass(slots=True)
class PredictionCounts:
    """How good the predicted times to first token were, over all requests whose first token was seen."""

    requests: int = 0
    predicted_s: float = 0.0
    observed_s: float = 0.0
    absolute_error_s: float = 0.0

    def add(self, predicted_s: float, observed_s: float) -> None:
        """One more first token."""
        self.requests += 1
        self.predicted_s += predicted_s
        self.observed_s += observed_s
        self.absolute_error_s += abs(predicted_s - observed_s)


class Router:
    """Fleet, index, loads and timings, kept consistent with each other.

    `now` is a monotonic clock in seconds and must not go back. With `validate` every invariant is checked after each
    change (for tests: it visits everything).
    """

    def __init__(
        self,
        *,
        policy: str = DEFAULT_POLICY,
        lease_s: float = LEASE_S,
        max_blocks: int = DEFAULT_MAX_BLOCKS,
        max_blocks_per_worker: int = DEFAULT_MAX_BLOCKS_PER_WORKER,
        validate: bool = False,
    ) -> None:
        self._default_policy = policy
        self._policies: dict[str, Policy] = {policy: make_policy(policy)}
        self.fleet = Fleet(lease_s)
        self.index = Index(max_blocks, max_blocks_per_worker)
        self._table = WorkerTable()
        self.load = Load(self._table)
        self._holding = Holding()
        self.predictions = PredictionCounts()
        self.observed: dict[
            str, str
        ] = {}  # workers that are indexed and get no requests -> where their events are read
        self._timings: dict[str, WorkerTiming] = {}
        self._priors: dict[str, StepCosts] = {}  # by model: what its workers have shown, as of the latest expire
        self._able_slots: dict[str, tuple[Slots, ModelCard]] = {}  # by model; forgotten when a member changes
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
        self._able_slots.clear()

    def heartbeat(self, worker_id: str, epoch: int, report: WorkerReport, now: float) -> bool:
        """Renew a lease and take the worker's report in. Returns whether it is draining. Raises Conflict, NotServed."""
        known = self.fleet.find(worker_id)
        if known is not None and known.unreachable:
            self._able_slots.clear()
        member = self.fleet.heartbeat(worker_id, epoch, report, now)
        for request in self.load.report(worker_id, report, now):
            self.predictions.add(request.predicted_ttft_s, now - request.routed_at)
        if self._timings[worker_id].observe(report, self._prior(member.info.model.name)):
            self._write_costs(worker_id, self._timings[worker_id].costs)
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
        self._refresh_priors()
        self._checked()
        return expired

    def set_draining(self, worker_id: str, draining: bool) -> None:
        """Stop routing to a worker, or take that back; a new incarnation starts undrained. Raises NotServed."""
        self.fleet.get(worker_id).draining = draining
        self._able_slots.clear()

    def set_unreachable(self, worker_id: str, epoch: int) -> None:
        """A request could not get through: send no more until the worker is heard of again.

        Else a dead worker, idle as it looks, would draw every request until its lease has run out. Unknown ones are
        ignored.
        """
        member = self.fleet.find(worker_id, epoch)
        if member is not None:
            member.unreachable = True
            self._able_slots.clear()

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
        self._timings[info.worker_id] = WorkerTiming()
        self._write_costs(info.worker_id, self._prior(info.model.name))
        self.load.add_worker(info.worker_id, slot)

    def _write_costs(self, worker_id: str, costs: StepCosts) -> None:
        self._table.set(self.index.slot(worker_id), Column.PREFILL_STEP_S, costs)

    def _forget(self, worker_id: str) -> None:
        self._able_slots.clear()
        if worker_id in self._timings:
            slot = self.index.slot(worker_id)
            for policy in self._policies.values():
                policy.forget(slot)
        self.index.drop(worker_id)
        self.load.drop_worker(worker_id)
        self._timings.pop(worker_id, None)

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
        return self._placed(request, self._compare(request, now), now)

    def submit(self, request: RouteRequest, now: float) -> Decision | None:
        """The same, or None: the request is held until the worker that is best for it is nearly free, and `dispatch`
        tells where it goes. Raises like `route`."""
        self._check_not_held(request)
        comparison = self._compare(request, now)
        holds = self._policy(request).holds and not self._holding.is_full
        if not holds or (not self._holding and _nearly_free(comparison)):
            return self._placed(request, comparison, now)
        self.load.check_room(request.request_id)
        rows = comparison.rows
        self._holding.add(Held(request, now, rows, comparison.scores - rows.queue_s, float(rows.prefill_s.min()), now))
        return None

    def _check_not_held(self, request: RouteRequest) -> None:
        if request.request_id in self._holding:
            raise Duplicate(f"request {request.request_id} is in flight already")

    @property
    def held(self) -> int:
        """Requests that are held."""
        return len(self._holding)

    def dispatch(self, now: float) -> list[tuple[str, Decision | RhizomeError]]:
        """Where held requests go now, or why they cannot, by request id.

        To be called after every change while any are held, and every PATIENCE_S (router.holding).
        """
        gone: list[tuple[str, Decision | RhizomeError]] = []
        for model in self._holding.models():
            try:
                slots, _ = self._able(model)
            except RhizomeError as error:
                gone += [(held.request.request_id, error) for held in self._holding.in_order(model, now)]
            else:
                gone += self._dispatch(model, slots, now)
        for request_id, _ in gone:
            self._holding.let_go(request_id, now)
        self._checked()
        return gone

    def _dispatch(self, model: str, slots: Slots, now: float) -> list[tuple[str, Decision | RhizomeError]]:
        """One after the other in order of rank: each counts on the worker that is best for it once those before it have
        been served there, and goes if that one is nearly free now."""
        gone: list[tuple[str, Decision | RhizomeError]] = []
        queue_s = queues_s(self._table.of(slots), now)
        stalled = now - self._holding.moved_at > STALL_S
        for held in self._holding.in_order(model, now):
            if queue_s.min() > HOLD_S and not stalled:
                break
            if len(held.own) != len(slots) or now - held.compared_at > STALE_S:
                self._compare_again(held, now)
            best = int(np.argmin(held.own + queue_s))
            if queue_s[best] <= HOLD_S or stalled:
                try:
                    comparison = self._compare(held.request, now)
                    if stalled or _nearly_free(comparison):
                        decision = self._placed(held.request, comparison, now, now - held.since)
                        gone.append((held.request.request_id, decision))
                        best, stalled = comparison.chosen, False
                except Overloaded:  # all workers are full, or the router is
                    break
            queue_s[best] += held.rows.prefill_s[best]
        return gone

    def _compare_again(self, held: Held, now: float) -> None:
        slots, card = self._able(held.request.model)
        held.rows = self._candidates(held.request, slots, card.block_size, now)
        scores = self._policy(held.request).scores(_prompt(held.request), held.rows)
        held.own, held.work_s = scores - held.rows.queue_s, float(held.rows.prefill_s.min())
        held.compared_at = now

    def explain(self, request: RouteRequest, now: float) -> Decision:
        """What route would decide; reserves nothing. Raises the same, Duplicate apart."""
        return self._decision(request, self._compare(request, now), 0.0)

    def _policy(self, request: RouteRequest) -> Policy:
        name = request.policy or self._default_policy
        if name not in self._policies:
            self._policies[name] = make_policy(name)
        return self._policies[name]

    def _compare(self, request: RouteRequest, now: float) -> Comparison:
        policy = self._policy(request)
        slots, card = self._able(request.model)
        rows = self._candidates(request, slots, card.block_size, now)
        scores = policy.scores(_prompt(request), rows)
        room = rows.in_flight < rows.max_in_flight
        if not room.all():
            scores = np.where(room, scores, np.inf)
            if not room.any():
                raise _all_full(rows, self.index.slot_names)
        least = scores[room].min()  # a policy that looks at some workers only may have found none with room
        tied = np.flatnonzero((scores <= policy.tie(float(least))) & room)
        chosen = int(tied[0])
        if len(tied) > 1:
            order = np.lexsort((rows.last_routed[tied], rows.in_flight[tied], -rows.free_blocks[tied]))
            chosen = int(tied[order[0]])
        return Comparison(rows, scores, chosen, len(tied) > 1, self.index.slot_names, policy.unit)

    def _candidates(self, request: RouteRequest, slots: Slots, block_size: int, now: float) -> Candidates:
        held_blocks = self._depths(request)[:, slots]
        return Candidates(slots, self._table.of(slots), request.prompt_tokens, block_size, held_blocks, now)

    def _depths(self, request: RouteRequest) -> Floats:
        if request.bypass_prefix_cache:
            return np.zeros((2, len(self.index.slot_names)))
        return self.index.match(request.hashes)

    def _decision(self, request: RouteRequest, comparison: Comparison, held_s: float) -> Decision:
        rows, row = comparison.rows, comparison.chosen
        info = self.fleet.get(self.index.slot_names[rows.slots[row]]).info
        return Decision(
            request_id=request.request_id,
            worker_id=info.worker_id,
            epoch=info.epoch,
            address=info.address,
            policy=self._policy(request).name,
            prompt_tokens=request.prompt_tokens,
            cached_tokens=int(rows.cached_tokens[row]),
            predicted_ttft_s=float(rows.ttft_s[row]),
            held_s=held_s,
            explanation=comparison,
            observed=self._overlaps(request, rows.block_size) if self.observed else (),
        )

    def _placed(self, request: RouteRequest, comparison: Comparison, now: float, held_s: float = 0.0) -> Decision:
        decision = self._decision(request, comparison, held_s)
        rows, row = comparison.rows, comparison.chosen
        tokens = int(rows.prefill_tokens[row])
        self.load.reserve(
            Reservation(
                request_id=request.request_id,
                worker_id=decision.worker_id,
                prefill_tokens=tokens,
                blocks=rows.prompt_blocks,
                prompt_tokens=request.prompt_tokens,
                sequences=request.sequences,
                predicted_ttft_s=decision.predicted_ttft_s,
                routed_at=now,
                tokens_s=float(rows.tokens_s(row)),
                prefill_s=float(rows.prefill_s[row]),
                streamed=request.streamed,
            )
        )
        self._policy(request).placed(_prompt(request), rows, row)
        self._checked()
        return decision

    def explain_observed(self, request: RouteRequest, block_size: int) -> Decision:
        """What observed workers hold of a request for a model that no worker serves: nobody is chosen."""
        why = f"no worker can be chosen: none is registered for model {request.model}, observed ones get no requests"
        return Decision(
            request_id=request.request_id,
            worker_id="",
            epoch=0,
            address="",
            policy="",
            prompt_tokens=request.prompt_tokens,
            cached_tokens=0,
            predicted_ttft_s=0.0,
            held_s=0.0,
            explanation=NobodyChosen(why),
            observed=self._overlaps(request, block_size),
        )

    def _overlaps(self, request: RouteRequest, block_size: int) -> tuple[Overlap, ...]:
        depths = self._depths(request)[1]
        most = (request.prompt_tokens - 1) // block_size  # the last token is computed in any case
        return tuple(
            Overlap(worker_id, min(int(depths[self.index.slot(worker_id)]), most) * block_size)
            for worker_id in self.observed
        )

    def first_token(self, request_id: str, now: float) -> None:
        """The first token passed through; what is not known, or not new, is ignored."""
        request = self.load.prefilled(request_id, now)
        if request is not None:
            self.predictions.add(request.predicted_ttft_s, now - request.routed_at)
        self._checked()

    def finish(self, request_id: str, now: float) -> None:
        """The request has ended, whatever way, or is given up while it is held; an unknown one is ignored."""
        if not self._holding.remove(request_id):
            self.load.release(request_id, now)
        self._checked()

    # How a decision is prepared.

    def _able(self, model: str) -> tuple[Slots, ModelCard]:
        """Workers that take requests for a model, by slot, and its card."""
        known = self._able_slots.get(model)
        if known is None:
            card = self.fleet.card(model)
            slots = sorted(self.index.slot(member.info.worker_id) for member in self._members_able(card.name))
            known = self._able_slots[model] = np.array(slots, np.intp), card
        return known

    def _members_able(self, model: str) -> list[Member]:
        members = self.fleet.serving(model)
        able = [member for member in members if _takes_requests(member)]
        if not able:
            partial = sum(member.info.role is not Role.BOTH for member in members)
            draining = sum(member.draining for member in members)
            starting = sum(not member.ready for member in members)
            unreachable = sum(member.unreachable for member in members)
            raise Unavailable(
                f"no worker takes requests for model {model}: of {len(members)} registered, {draining} draining, "
                f"{starting} starting, {unreachable} unreachable, {partial} of role prefill or decode (not both)"
            )
        return able

    def _prior(self, model: str) -> StepCosts:
        return self._priors.get(model, PRIOR)

    def _refresh_priors(self) -> None:
        timings: dict[str, list[WorkerTiming]] = {}
        for member in self.fleet.members():
            timings.setdefault(member.info.model.name, []).append(self._timings[member.info.worker_id])
        self._priors = {model: average(known) for model, known in timings.items()}
        for member in self.fleet.members():
            if not self._timings[member.info.worker_id].measured:
                self._write_costs(member.info.worker_id, self._prior(member.info.model.name))

    # Invariants.

    def _checked(self) -> None:
        if self._validate:
            self.validate()

    def validate(self) -> None:
        """Assert that fleet, index, loads and timings speak of the same workers, and each one's own invariants."""
        names = [member.info.worker_id for member in self.fleet.members()]
        assert sorted(self._timings) == sorted(names)
        self.load.check(names)
        self.index.check([*names, *self.observed])


def _prompt(request: RouteRequest) -> Prompt:
    return Prompt(request.request_id, request.hashes, request.session, request.priority)


def _nearly_free(comparison: Comparison) -> bool:
    """Whether the chosen worker will begin with the request soon; an idle one takes what it would never have room for,
    and refuses it."""
    rows, row = comparison.rows, comparison.chosen
    if not rows.in_flight[row]:
        return True
    joins = rows.waiting[row] > 0 and rows.prefill_s[row] > HOLD_S
    return bool(rows.queue_s[row] <= HOLD_S and not rows.memory_s[row] and not joins)


def _takes_requests(member: Member) -> bool:
    return member.ready and not member.draining and not member.unreachable and member.info.role is Role.BOTH


def _all_full(rows: Candidates, names: Sequence[str]) -> Overloaded:
    loads = list(zip(rows.slots.tolist(), rows.in_flight.tolist(), rows.max_in_flight.tolist(), strict=True))
    counts = ", ".join(f"{names[slot]} {in_flight:.0f} of {most:.0f}" for slot, in_flight, most in loads[:8])
    return Overloaded(
        f"all {len(rows)} workers are full (sequences in flight: {counts})",
        retry_after_s=min(MAX_RETRY_S, max(MIN_RETRY_S, float(rows.ttft_s.min()))),
    )
