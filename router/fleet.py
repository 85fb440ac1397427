"""Who serves: the workers, each under a lease that its heartbeats renew. Synchronous; the clock is passed in."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import IntEnum

from rhizome.errors import Conflict, InvalidRequest, NotServed, Overloaded, Unavailable
from rhizome.transfer_ticket import check_offers
from rhizome.validate import check_name

LEASE_S = 3.0
HEARTBEATS_PER_LEASE = 6
MAX_WORKERS = 1024  # one match and one prediction visits each of them
MAX_MODELS_REMEMBERED = 256  # names only, to tell "gone for now" from "never heard of"


class Role(IntEnum):
    """What a worker does; the numbers are those of the wire."""

    BOTH = 1
    PREFILL = 2
    DECODE = 3


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a router must know about a model. Its workers agree in everything but max_model_len."""

    name: str
    max_model_len: int  # tokens, prompt and output together; a worker with less memory may take less
    vocab_size: int
    block_size: int  # tokens
    tokenizer_sha256: str


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """One incarnation of a worker, as it registered."""

    worker_id: str
    epoch: int
    address: str
    model: ModelCard
    blocks_total: int
    max_running: int  # sequences
    max_waiting: int  # sequences
    max_batched_tokens: int  # token budget of a step
    role: Role = Role.BOTH
    events_url: str = ""  # where its KV events are read; empty: at its address
    fetch_token_s: float = 0.0  # to pull a token's KV from another worker; 0: it cannot
    transfer_offers: tuple[str, ...] = ()  # where others may pull its blocks


@dataclass(frozen=True, slots=True)
class PullCounts:
    """What a worker pulled over one transport, since its start."""

    transport: str
    pulls: int = 0
    failed: int = 0  # that ended early, whatever they brought
    blocks: int = 0
    size_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """A worker's status (rhizome.v1.WorkerStatus without the wire). Seconds, steps and tokens count since its start."""

    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_in_use: int = 0
    blocks_cached: int = 0
    prefill_tokens_outstanding: int = 0
    prefill_steps: int = 0
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_steps: int = 0
    decode_tokens: int = 0
    decode_s: float = 0.0
    prefill_attention: float = 0.0
    prefill_decodes: int = 0
    prefill_context: int = 0
    decode_context: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    host_cached_prompt_tokens: int = 0
    next_event_seq: int = 0  # of its event log; 0: not told
    pulls: int = 0
    pulls_short: int = 0
    pulled_blocks: int = 0
    pulled_bytes: int = 0
    pull_transport: str = ""
    lent_blocks: int = 0
    pull_skipped_blocks: int = 0
    pull_counts: tuple[PullCounts, ...] = ()  # by transport, the best first
    fetch_token_s: float = 0.0  # to pull a token's KV, as measured; 0: not measured yet
    prefilled_request_ids: tuple[str, ...] = ()
    finished_request_ids: tuple[str, ...] = ()


@dataclass(slots=True)
class Member:
    """A registered worker and what changes about it."""

    info: WorkerInfo
    lease_until: float
    ready: bool = False  # the router can tokenize for it
    draining: bool = False
    unreachable: bool = False  # a request could not get through, and no heartbeat has come since
    report: WorkerReport | None = None


def parse_role(value: int) -> Role:
    """The role of a number from the wire. Raises InvalidRequest."""
    try:
        return Role(value)
    except ValueError:
        known = ", ".join(f"{role.value} ({role.name.lower()})" for role in Role)
        raise InvalidRequest("role", value, f"one of {known}") from None


def check_worker(info: WorkerInfo) -> None:
    """Raise InvalidRequest for a registration that no router could work with."""
    for field, name in (("worker_id", info.worker_id), ("model.name", info.model.name), ("address", info.address)):
        check_name(field, name)
    positive = {
        "epoch": info.epoch,
        "model.max_model_len": info.model.max_model_len,
        "model.vocab_size": info.model.vocab_size,
        "model.block_size": info.model.block_size,
        "blocks_total": info.blocks_total,
        "max_running": info.max_running,
        "max_batched_tokens": info.max_batched_tokens,
    }
    for field, number in positive.items():
        if number < 1:
            raise InvalidRequest(field, number, "at least 1")
    if not 0 <= info.fetch_token_s < 1:
        raise InvalidRequest("fetch_token_s", info.fetch_token_s, "0 to 1 second for a token")
    check_offers("transfer_offers", info.transfer_offers)


class Fleet:
    """Members by worker id. Registers, renews, drains, expires; decides nothing."""

    def __init__(self, lease_s: float = LEASE_S) -> None:
        self.lease_s = lease_s
        self._members: dict[str, Member] = {}
        self._models_seen: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._members)

    def members(self) -> list[Member]:
        """Every member, in order of registration."""
        return list(self._members.values())

    def serving(self, model: str) -> list[Member]:
        """The members of a model, whatever their state."""
        return [member for member in self._members.values() if member.info.model.name == model]

    def get(self, worker_id: str, epoch: int | None = None) -> Member:
        """The member of that id (and incarnation). Raises NotServed."""
        member = self.find(worker_id, epoch)
        if member is None:
            incarnation = "" if epoch is None else f" of epoch {epoch}"
            raise NotServed(f"worker {worker_id}{incarnation} is not registered")
        return member

    def find(self, worker_id: str, epoch: int | None = None) -> Member | None:
        """The member of that id (and incarnation), if there is one."""
        member = self._members.get(worker_id)
        return member if member and epoch in (None, member.info.epoch) else None

    def card(self, model: str) -> ModelCard:
        """The card of a model, or of the only one where `model` is empty; its length is what every worker takes.

        Raises NotServed for a model never heard of, Unavailable where its workers are gone, InvalidRequest where an
        empty name could mean several.
        """
        cards: dict[str, ModelCard] = {}
        for member in self._members.values():
            card = member.info.model
            known = cards.setdefault(card.name, card)
            if card.max_model_len < known.max_model_len:
                cards[card.name] = card
        served = ", ".join(sorted(cards))
        if model in cards:
            return cards[model]
        if not cards:
            raise Unavailable("no worker is registered")
        if model == "":
            if len(cards) == 1:
                return next(iter(cards.values()))
            raise InvalidRequest("model", model, f"several are served, name one of: {served}")
        if model in self._models_seen:
            raise Unavailable(f"no worker is registered for model {model}; served now: {served}")
        shown = model if len(model) <= 100 else model[:97] + "..."
        raise NotServed(f"model {shown!r} is not served here; served: {served}")

    def register(self, info: WorkerInfo, now: float) -> bool:
        """Give `info` a lease; true for a new incarnation, whose predecessor's state must go, false for a renewal.

        Raises Conflict for an epoch older than the known one, for two workers under one id and epoch, and for a model
        card unlike the fleet's; Overloaded when the fleet is full; InvalidRequest.
        """
        check_worker(info)
        known = self._members.get(info.worker_id)
        if known is None and len(self._members) >= MAX_WORKERS:
            raise Overloaded(f"the fleet is full: {MAX_WORKERS} workers are registered", retry_after_s=self.lease_s)
        if known is not None and info.epoch < known.info.epoch:
            raise Conflict(f"worker {info.worker_id}: epoch {info.epoch} is older than the serving {known.info.epoch}")
        if known is not None and info.epoch == known.info.epoch:
            if info != known.info:
                raise Conflict(f"worker {info.worker_id}: epoch {info.epoch} is registered from {known.info.address}")
            known.lease_until = now + self.lease_s
            known.unreachable = False
            return False
        self._check_card(info)
        self._members.pop(info.worker_id, None)
        self._members[info.worker_id] = Member(info, now + self.lease_s)
        self._models_seen[info.model.name] = None
        while len(self._models_seen) > MAX_MODELS_REMEMBERED:
            del self._models_seen[next(iter(self._models_seen))]
        return True

    def _check_card(self, info: WorkerInfo) -> None:
        peers = [member.info for member in self.serving(info.model.name) if member.info.worker_id != info.worker_id]
        for peer in peers[:1]:
            for name in ("block_size", "vocab_size", "tokenizer_sha256"):
                own, theirs = getattr(info.model, name), getattr(peer.model, name)
                if own != theirs:
                    raise Conflict(
                        f"worker {info.worker_id}: {name} of model {info.model.name} is {own!r}, "
                        f"but {theirs!r} on {peer.worker_id}; one model's workers must agree"
                    )

    def heartbeat(self, worker_id: str, epoch: int, report: WorkerReport, now: float) -> Member:
        """Renew the lease. Raises Conflict for an older epoch, NotServed when the worker must register (again)."""
        member = self._members.get(worker_id)
        if member is not None and epoch < member.info.epoch:
            raise Conflict(f"worker {worker_id}: epoch {epoch} was replaced by {member.info.epoch}")
        member = self.get(worker_id, epoch)
        member.lease_until = now + self.lease_s
        member.report = report
        member.unreachable = False
        return member

    def renew(self, worker_ids: Collection[str], now: float) -> None:
        """Keep the leases of members of whom nothing can be heard; others are ignored."""
        for member in self._members.values():
            if member.info.worker_id in worker_ids:
                member.lease_until = max(member.lease_until, now + self.lease_s)

    def remove(self, worker_id: str, epoch: int) -> None:
        """Forget a member. Raises NotServed unless that very incarnation is registered."""
        self.get(worker_id, epoch)
        del self._members[worker_id]

    def expire(self, now: float) -> list[WorkerInfo]:
        """Forget and return those whose lease has run out."""
        expired = [member.info for member in self._members.values() if member.lease_until <= now]
        for info in expired:
            del self._members[info.worker_id]
        return expired
