"""Router: the one object that holds a router's state, and through which everything enters. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kv_events.view import WorkerView
from radix.keys import Hashes
from radix.tree import DEFAULT_MAX_BLOCKS, DEFAULT_MAX_BLOCKS_PER_WORKER
from rhizome.errors import Conflict, InvalidRequest, Overloaded, Unavailable
from router.fleet import LEASE_S, Fleet, Member, ModelCard, Role, WorkerInfo, WorkerReport
from router.index import Index
from router.load import Load, Reservation
from router.policy import Candidate, Decision, Overlap, PredictedTtft, find_policy
from router.timing import PRIOR, StepCosts, WorkerTiming, average, steps_of

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
        policy: str = PredictedTtft.name,
        lease_s: float = LEASE_S,
        max_blocks: int = DEFAULT_MAX_BLOCKS,
        max_blocks_per_worker: int = DEFAULT_MAX_BLOCKS_PER_WORKER,
        validate: bool = False,
    ) -> None:
        self._policy = find_policy(policy)
        self.fleet = Fleet(lease_s)
        self.index = Index(max_blocks, max_blocks_per_worker)
        self.load = Load()
        self.predictions = PredictionCounts()
        self.observed: dict[
            str, str
        ] = {}  # workers that are indexed and get no requests -> where their events are read
        self._timings: dict[str, WorkerTiming] = {}
        self._priors: dict[str, StepCosts] = {}  # by model: what its workers have shown, as of the latest expire
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
            self.load.add_worker(info.worker_id)
            self._timings[info.worker_id] = WorkerTiming()
        self._checked()
        return fresh

    def set_ready(self, worker_id: str, epoch: int) -> None:
        """Its prompts can be tokenized: requests may go there. Raises NotServed."""
        self.fleet.get(worker_id, epoch).ready = True

    def heartbeat(self, worker_id: str, epoch: int, report: WorkerReport, now: float) -> bool:
        """Renew a lease and take the worker's report in. Returns whether it is draining. Raises Conflict, NotServed."""
        member = self.fleet.heartbeat(worker_id, epoch, report, now)
        for request in self.load.report(worker_id, report, now):
            self.predictions.add(request.predicted_ttft_s, now - request.routed_at)
        self._timings[worker_id].observe(report, self._prior(member.info), now)
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

    def set_unreachable(self, worker_id: str, epoch: int) -> None:
        """A request could not get through: send no more until the worker is heard of again.

        Else a dead worker, idle as it looks, would draw every request until its lease has run out. Unknown ones are
        ignored.
        """
        member = self.fleet.find(worker_id, epoch)
        if member is not None:
            member.unreachable = True

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

    def _forget(self, worker_id: str) -> None:
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
        decision = self.explain(request)
        chosen = decision.candidates[0]
        card = self.fleet.get(chosen.worker_id).info.model
        reservation = Reservation(
            request_id=request.request_id,
            worker_id=chosen.worker_id,
            prefill_tokens=chosen.prefill_tokens,
            blocks=-(-request.prompt_tokens // card.block_size),
            sequences=request.sequences,
            predicted_ttft_s=chosen.predicted_ttft_s,
            routed_at=now,
            streamed=request.streamed,
        )
        self.load.reserve(reservation)
        self._checked()
        return decision

    def explain(self, request: RouteRequest) -> Decision:
        """What route would decide; reserves nothing. Raises the same, Duplicate apart."""
        policy = find_policy(request.policy) if request.policy else self._policy
        depths = {} if request.bypass_prefix_cache else self.index.match(request.hashes)
        card = self.fleet.card(request.model)
        candidates = [
            self._candidate(request.prompt_tokens, member, depths.get(member.info.worker_id, 0))
            for member in self._able(card.name)
        ]
        room = [candidate for candidate in candidates if candidate.in_flight < candidate.max_in_flight]
        if not room:
            raise _all_full(candidates)
        chosen, why = policy.choose(room)
        others = sorted((c for c in candidates if c is not chosen), key=lambda c: c.predicted_ttft_s)
        info = self.fleet.get(chosen.worker_id).info
        return Decision(
            request_id=request.request_id,
            worker_id=chosen.worker_id,
            epoch=info.epoch,
            address=info.address,
            policy=policy.name,
            reason=f"{chosen.worker_id}: {chosen.predicted_ttft_s:.3f} s predicted, {chosen.cached_tokens} of "
            f"{request.prompt_tokens} prompt tokens cached; {why}",
            prompt_tokens=request.prompt_tokens,
            candidates=(chosen, *others),
            observed=self._overlaps(request, depths, card.block_size),
        )

    def explain_observed(self, request: RouteRequest, block_size: int) -> Decision:
        """What observed workers hold of a request for a model that no worker serves: nobody is chosen."""
        return Decision(
            request_id=request.request_id,
            worker_id="",
            epoch=0,
            address="",
            policy="",
            reason=f"no worker can be chosen: none is registered for model {request.model}, observed ones get no "
            "requests",
            prompt_tokens=request.prompt_tokens,
            candidates=(),
            observed=self._overlaps(request, self.index.match(request.hashes), block_size),
        )

    def _overlaps(self, request: RouteRequest, depths: Mapping[str, int], block_size: int) -> tuple[Overlap, ...]:
        return tuple(
            Overlap(worker_id, _cached_tokens(request.prompt_tokens, depths.get(worker_id, 0), block_size))
            for worker_id in self.observed
        )

    def first_token(self, request_id: str, now: float) -> None:
        """The first token passed through; what is not known, or not new, is ignored."""
        request = self.load.prefilled(request_id, now)
        if request is not None:
            self.predictions.add(request.predicted_ttft_s, now - request.routed_at)
        self._checked()

    def finish(self, request_id: str) -> None:
        """The request has ended, whatever way; an unknown one is ignored."""
        self.load.release(request_id)
        self._checked()

    # How a decision is prepared.

    def _able(self, model: str) -> list[Member]:
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

    def _candidate(self, prompt_tokens: int, member: Member, depth: int) -> Candidate:
        info, load, timing = member.info, self.load.of(member.info.worker_id), self._timings[member.info.worker_id]
        costs = timing.costs if timing.measured else self._prior(info)
        cached = _cached_tokens(prompt_tokens, depth, info.model.block_size)
        prefill, queued, budget = prompt_tokens - cached, load.queued_prefill_tokens, info.max_batched_tokens
        return Candidate(
            worker_id=info.worker_id,
            cached_tokens=cached,
            prefill_tokens=prefill,
            queued_prefill_tokens=queued,
            running=load.decoding,
            in_flight=load.sequences,
            max_in_flight=info.max_running + info.max_waiting,
            free_blocks=max(0, info.blocks_total - load.blocks_in_use - load.pending_blocks),
            last_routed=load.last_routed,
            queue_s=costs.prefill_s(queued, budget),
            prefill_s=costs.prefill_s(prefill, budget),
            decode_s=steps_of(queued + prefill, budget) * costs.decode_step_s if load.decoding else 0.0,
        )

    def _prior(self, info: WorkerInfo) -> StepCosts:
        return self._priors.get(info.model.name, PRIOR)

    def _refresh_priors(self) -> None:
        timings: dict[str, list[WorkerTiming]] = {}
        for member in self.fleet.members():
            timings.setdefault(member.info.model.name, []).append(self._timings[member.info.worker_id])
        self._priors = {model: average(known) for model, known in timings.items()}

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


def _cached_tokens(prompt_tokens: int, depth: int, block_size: int) -> int:
    """Of a prompt whose first `depth` blocks are held: the last token is computed in any case, and blocks are reused
    whole."""
    return min(depth, (prompt_tokens - 1) // block_size) * block_size


def _takes_requests(member: Member) -> bool:
    return member.ready and not member.draining and not member.unreachable and member.info.role is Role.BOTH


def _all_full(candidates: Sequence[Candidate]) -> Overloaded:
    counts = ", ".join(f"{c.worker_id} {c.in_flight} of {c.max_in_flight}" for c in candidates[:8])
    soonest_s = min(candidate.predicted_ttft_s for candidate in candidates)
    return Overloaded(
        f"all {len(candidates)} workers are full (sequences in flight: {counts})",
        retry_after_s=min(MAX_RETRY_S, max(MIN_RETRY_S, soonest_s)),
    )
