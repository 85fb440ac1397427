"""The choice of a worker: who may take a request, what it means on each, and who is best. Reserves nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from radix.backend import native
from rhizome.errors import Overloaded, Unavailable
from router.candidates import Candidates
from router.decision import Comparison, Decision, NobodyChosen, Overlap
from router.disagg import LOCAL_PREFILL_S, Roles, roles_of, to_go_on
from router.fleet import Fleet, Member, ModelCard, Role
from router.index import Index
from router.objective import Objective
from router.policies import Policy, Prompt, make_policy
from router.prediction import Predicted
from router.request import RouteRequest
from router.table import Floats, Slots, WorkerTable

MIN_RETRY_S, MAX_RETRY_S = 0.1, 10.0
ALONE = 0.05  # a router to which no more of the sequences in flight are foreign decides as if there was no other


@dataclass(frozen=True, slots=True)
class Able:
    """The workers that take requests for a model."""

    slots: Slots
    card: ModelCard
    roles: Roles | None  # None: all of role both
    sources: Slots  # who lends others what it holds: those that drain, too


class Choice:
    """Reads fleet, index and table, which the Router keeps consistent; of its own it has the policies."""

    def __init__(
        self,
        fleet: Fleet,
        index: Index,
        table: WorkerTable,
        *,
        held_blocks: Callable[[RouteRequest], Floats],
        observed: Mapping[str, str],
        policy: str,
        objective: Objective,
        foreign_share: Callable[[], float],
        seed: int | None,
        local_prefill_s: float = LOCAL_PREFILL_S,
    ) -> None:
        """`held_blocks` gives leading blocks of a prompt by slot, shape (2, slots): on the device, and in any tier;
        `foreign_share` that of the sequences in flight which other routers have sent. See `choose_apart` for `seed`.
        Decode workers compute prompts themselves that take at most `local_prefill_s`."""
        self._fleet = fleet
        self._index = index
        self._table = table
        self._held_blocks = held_blocks
        self._observed = observed
        self._objective = objective
        self._foreign_share = foreign_share
        self._random = Random(seed)  # noqa: S311 - so that routers differ
        self._default_policy = policy
        self._policies: dict[str, Policy] = {policy: make_policy(policy)}
        self._local_prefill_s = local_prefill_s
        self._able: dict[str, Able] = {}  # by model; forgotten when a member changes

    def policy(self, request: RouteRequest) -> Policy:
        """The request's, or the router's. Raises InvalidRequest for an unknown one."""
        name = request.policy or self._default_policy
        if name not in self._policies:
            self._policies[name] = make_policy(name)
        return self._policies[name]

    # Who may take requests.

    def members_changed(self) -> None:
        """Some member came, went, or takes requests now and did not before, or the other way."""
        self._able.clear()

    def forget(self, slot: int) -> None:
        """The worker of that slot is gone."""
        for policy in self._policies.values():
            policy.forget(slot)

    def able(self, model: str) -> Able:
        """Workers that take requests for a model. Raises NotServed, Unavailable."""
        known = self._able.get(model)
        if known is None:
            card = self._fleet.card(model)
            workers = {self._index.slot(member.info.worker_id): member.info for member in self._members_able(card.name)}
            slots = sorted(workers)
            roles = roles_of([workers[slot] for slot in slots])
            lending = [self._index.slot(each.info.worker_id) for each in self._fleet.serving(card.name) if _lends(each)]
            known = self._able[model] = Able(np.array(slots, np.intp), card, roles, np.array(lending, np.intp))
        return known

    def _members_able(self, model: str) -> list[Member]:
        members = self._fleet.serving(model)
        able = [member for member in members if _takes_requests(member)]
        if all(member.info.role is Role.PREFILL for member in able):
            prefill = sum(member.info.role is Role.PREFILL for member in members)
            draining = sum(member.draining for member in members)
            starting = sum(not member.ready for member in members)
            unreachable = sum(member.unreachable for member in members)
            raise Unavailable(
                f"no worker takes requests for model {model}: of {len(members)} registered, {draining} draining, "
                f"{starting} starting, {unreachable} unreachable, {prefill} of role prefill, which only begin answers"
            )
        return able

    # What it means on each, and who is best.

    def compare(
        self, request: RouteRequest, now: float, waited_s: float = 0.0, ahead_s: Floats | None = None
    ) -> Comparison:
        """All candidates with their scores, and the chosen one.

        `waited_s`: since its arrival; `ahead_s`: work for each that goes before it and is not there yet. Raises
        NotServed, Unavailable, InvalidRequest, and Overloaded where all are full.
        """
        policy = self.policy(request)
        rows, scores = self.scored(request, now, waited_s)
        scores = scores if ahead_s is None else scores + ahead_s
        share = self._foreign_share() if policy.holds else 0.0  # its scores are seconds
        apart = share > ALONE
        if apart:
            best = choose_apart(rows, scores, policy.tie, share, self._random)
        else:
            best = choose(rows, scores, policy.tie)
        if best is None:
            raise _all_full(rows, self._index.slot_names)
        scores, chosen, tied = best
        return Comparison(rows, rows.at(chosen), scores, chosen, tied, self._index.slot_names, policy.unit, apart)

    def scored(self, request: RouteRequest, now: float, waited_s: float) -> tuple[Candidates, Floats]:
        """All candidates, and their scores, whether they have room or not. Raises like `compare`, Overloaded apart."""
        able = self.able(request.model)
        rows = self._candidates(request, able, now)
        policy = self.policy(request)
        scores = policy.scores(prompt_of(request), rows)
        if self._objective and policy.holds:  # its scores are seconds
            scores = scores + self._objective.cost_s(rows, request.sequences, waited_s)
        if able.roles is not None:
            scores = able.roles.assign(
                rows, scores, splits=_splits(request), in_seconds=policy.holds, local_s=self._local_prefill_s
            )
        return rows, scores

    def compare_to_go_on(
        self, request: RouteRequest, now: float, lender: str = "", without: Collection[str] = ()
    ) -> Comparison:
        """Who may go on with an answer that was begun elsewhere, and who is best, but for `without`. Those that have a
        way to the `lender` get the prompt's blocks there; others compute it again.

        Raises NotServed, Unavailable, Overloaded.
        """
        able = self.able(request.model)
        rows = self._candidates(request, able, now)
        names = [self._index.slot_names[slot] for slot in able.slots.tolist()]
        pulls = np.zeros(len(rows), np.bool_)
        if able.roles is not None and lender in names:
            pulls = able.roles.pulls_from(names.index(lender))
        scores = to_go_on(rows, pulls)
        if able.roles is not None:
            scores = able.roles.whole(rows, scores)
        if without:
            rows.max_in_flight[np.isin(names, list(without))] = 0.0
        best = choose(rows, scores, lambda least: least)
        if best is None:
            raise _all_full(rows, self._index.slot_names)
        scores, chosen, tied = best
        return Comparison(rows, rows.at(chosen), scores, chosen, tied, self._index.slot_names, " s", False)

    def _candidates(self, request: RouteRequest, able: Able, now: float) -> Candidates:
        return Candidates(
            able.slots,
            self._table.values,
            request.prompt_tokens,
            able.card.block_size,
            self._held_blocks(request),
            now,
            able.sources,
        )

    # What is told of it.

    def decision(self, request: RouteRequest, comparison: Comparison, held_s: float) -> Decision:
        """The chosen worker and why."""
        rows, best = comparison.rows, comparison.best
        names = self._index.slot_names
        info = self._fleet.get(names[rows.slots.item(comparison.chosen)]).info
        fetched_tokens = int(best[Predicted.FETCHED_TOKENS])
        return Decision(
            request_id=request.request_id,
            worker_id=info.worker_id,
            epoch=info.epoch,
            address=info.address,
            policy=self.policy(request).name,
            prompt_tokens=request.prompt_tokens,
            cached_tokens=int(best[Predicted.CACHED_TOKENS]),
            predicted_ttft_s=best[Predicted.TTFT_S],
            held_s=held_s,
            explanation=comparison,
            observed=self._overlaps(request, rows.block_size) if self._observed else (),
            fetched_tokens=fetched_tokens,
            fetch_from=names[rows.source()] if fetched_tokens else "",
            begins=info.role is Role.PREFILL,
        )

    def nobody(self, request: RouteRequest, block_size: int) -> Decision:
        """What observed workers hold of a request for a model that no worker serves."""
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
        depths = self._held_blocks(request)[1]
        most = (request.prompt_tokens - 1) // block_size  # the last token is computed in any case
        return tuple(
            Overlap(worker_id, min(int(depths[self._index.slot(worker_id)]), most) * block_size)
            for worker_id in self._observed
        )


Best = tuple[Floats, int, bool] | None
"""The scores, infinite where there is no room; the chosen row; whether others tied. None: all are full."""


def choose_reference(rows: Candidates, scores: Floats, tie: Callable[[float], float]) -> Best:
    """See choose."""
    room = rows.in_flight < rows.max_in_flight
    if not room.any():
        return None
    least = float(scores[room].min())  # a policy that looks at some workers only may have found none with room
    tied = np.flatnonzero((scores <= tie(least)) & room)
    order = np.lexsort((rows.last_routed[tied], rows.in_flight[tied], -rows.free_blocks[tied]))
    return scores if room.all() else np.where(room, scores, np.inf), int(tied[order[0]]), len(tied) > 1


def choose(rows: Candidates, scores: Floats, tie: Callable[[float], float]) -> Best:
    """The one with the least score; within a tie (Policy.tie) as said there. The native core does it in one pass."""
    if native is None:
        return choose_reference(rows, scores, tie)
    best: Best = native.choose(rows.rows, scores, tie)
    return best


def choose_apart(rows: Candidates, scores: Floats, tie: Callable[[float], float], share: float, random: Random) -> Best:
    """One at random of those that are worse than the best by no more than a prefill, of which the share that others may
    be sending there just now.

    Routers know of each other's decisions by reports only. Between two of them all see the same worker as the best.
    """
    room = rows.in_flight < rows.max_in_flight
    if not room.any():
        return None
    limit = tie(float(scores[room].min())) + share * float(rows.prefill_s.min())
    near = np.flatnonzero((scores <= limit) & room)
    return scores if room.all() else np.where(room, scores, np.inf), random.choice(near.tolist()), len(near) > 1


def prompt_of(request: RouteRequest) -> Prompt:
    """What policies see of a request."""
    return Prompt(request.request_id, request.hashes, request.session, request.priority)


def _takes_requests(member: Member) -> bool:
    able = member.ready and not member.draining and not member.unreachable
    return able and (member.info.role is not Role.PREFILL or bool(member.info.transfer_offers))


def _lends(member: Member) -> bool:
    """Whether a worker gives others what it holds."""
    return member.ready and not member.unreachable and bool(member.info.transfer_offers)


def _splits(request: RouteRequest) -> bool:
    """Whether its answer may begin at one worker and go on at another."""
    return request.streamed and request.sequences == 1 and not request.bypass_prefix_cache


def _all_full(rows: Candidates, names: Sequence[str]) -> Overloaded:
    loads = list(zip(rows.slots.tolist(), rows.in_flight.tolist(), rows.max_in_flight.tolist(), strict=True))
    counts = ", ".join(f"{names[slot]} {in_flight:.0f} of {most:.0f}" for slot, in_flight, most in loads[:8])
    return Overloaded(
        f"all {len(rows)} workers are full (sequences in flight: {counts})",
        retry_after_s=min(MAX_RETRY_S, max(MIN_RETRY_S, float(rows.ttft_s.min()))),
    )
