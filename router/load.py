"""What each worker still has to do: this router's own reservations, and what the worker reports beyond them.

Each change is written through to the table that decisions read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rhizome.errors import Duplicate, Overloaded
from router.fleet import WorkerReport
from router.table import Column, WorkerTable

MAX_IN_FLIGHT = 65_536  # requests over all workers, some 300 bytes each
RESIDENCE_S = 10.0  # that a request's blocks are in use, before any is known
RESIDENCE_SHARE = 0.05  # that a request's end counts in the mean
SILENCE_LIMIT_S = 60.0  # a ticket's lifetime: a direct request not heard of for so long is left to the reports


@dataclass(slots=True)
class Reservation:
    """One request on its worker, from the decision to its end."""

    request_id: str
    worker_id: str
    prefill_tokens: int  # still to be computed
    blocks: int  # of its prompt
    prompt_tokens: int
    sequences: int
    predicted_ttft_s: float
    routed_at: float
    tokens_s: float  # predicted for the prefill tokens, steps apart
    prefill_s: float  # the same with the steps
    streamed: bool  # passes through this router, which so learns its end; else only the worker tells
    heard_at: float = 0.0
    prefilled: bool = False
    in_report: bool = False  # the worker's latest report counts its blocks as in use
    settled: bool = False  # routed before the latest report: the next one knows of it

    pending_blocks: int = 0  # of its blocks, what the latest report does not count as in use yet

    def __post_init__(self) -> None:
        self.heard_at = self.routed_at
        self.pending_blocks = self.blocks


@dataclass(slots=True)
class WorkerLoad:
    """One worker's load. Sums are kept beside the reservations so that a decision reads, not adds."""

    slot: int
    reservations: dict[str, Reservation] = field(default_factory=dict)  # in order of arrival
    queue: dict[str, Reservation] = field(default_factory=dict)  # those without a first token, in order of arrival
    unreported: dict[str, Reservation] = field(default_factory=dict)  # those that are not in_report
    head_since: float = 0.0  # when the first of them began, as far as known
    own_prefill_tokens: int = 0
    own_tokens_s: float = 0.0
    own_sequences: int = 0
    own_decoding: int = 0
    own_context: int = 0  # tokens of those decoding: their prompts
    pending_blocks: int = 0  # of requests that the worker's report does not count yet
    foreign_prefill_tokens: int = 0  # of other routers and direct clients
    foreign_sequences: int = 0
    blocks_in_use: int = 0
    released_blocks: int = 0  # of requests that ended since the report which counts them as in use
    residence_s: float = RESIDENCE_S  # mean time from the decision to the end of a request
    last_routed: int = 0  # serial of the latest decision for this worker

    @property
    def queued_prefill_tokens(self) -> int:
        """Prompt tokens that are computed before a request that comes now."""
        return self.own_prefill_tokens + self.foreign_prefill_tokens

    @property
    def sequences(self) -> int:
        """Sequences running or waiting there."""
        return self.own_sequences + self.foreign_sequences

    @property
    def decoding(self) -> int:
        """Sequences past their prefill; the foreign ones are taken to be."""
        return self.own_decoding + self.foreign_sequences

    def count(self, reservation: Reservation, sign: int = 1) -> None:
        """Add a reservation to the sums, or with sign -1 take it out."""
        self.own_prefill_tokens += sign * reservation.prefill_tokens
        self.own_tokens_s += sign * reservation.tokens_s
        self.own_sequences += sign * reservation.sequences
        decoding = reservation.sequences * reservation.prefilled
        self.own_decoding += sign * decoding
        self.own_context += sign * decoding * reservation.prompt_tokens
        self.pending_blocks += sign * reservation.pending_blocks


class Load:
    """The loads of all workers, and every request in flight by its id."""

    def __init__(self, table: WorkerTable) -> None:
        self._table = table
        self._workers: dict[str, WorkerLoad] = {}
        self._in_flight: dict[str, Reservation] = {}
        self._foreign_sequences = 0  # of all workers
        self._serial = 0

    def __len__(self) -> int:
        return len(self._in_flight)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._in_flight

    def add_worker(self, worker_id: str, slot: int) -> None:
        """Start with an empty load, at the table's `slot`."""
        self._workers[worker_id] = WorkerLoad(slot)
        self._write(self._workers[worker_id])

    def drop_worker(self, worker_id: str) -> None:
        """Forget its load. A streamed request stays in flight until its stream has ended too."""
        load = self._workers.pop(worker_id, None)
        self._foreign_sequences -= load.foreign_sequences if load else 0
        for request in load.reservations.values() if load else ():
            if not request.streamed:
                del self._in_flight[request.request_id]

    def of(self, worker_id: str) -> WorkerLoad:
        """The load of a worker that was added."""
        return self._workers[worker_id]

    def foreign_share(self) -> float:
        """Of what is in flight, by the latest reports, the share that others have sent: 0 to 1."""
        return self._foreign_sequences / max(1, self._foreign_sequences + len(self._in_flight))

    def check_room(self, request_id: str) -> None:
        """Raises Duplicate for a request in flight, Overloaded at MAX_IN_FLIGHT."""
        if request_id in self._in_flight:
            raise Duplicate(f"request {request_id} is in flight already")
        if len(self._in_flight) >= MAX_IN_FLIGHT:
            raise Overloaded(f"{MAX_IN_FLIGHT} requests are in flight, the most that this router keeps")

    def reserve(self, request: Reservation) -> None:
        """Count a request as its worker's. Raises like check_room."""
        self.check_room(request.request_id)
        self._serial += 1
        load = self._workers[request.worker_id]
        load.last_routed = self._serial
        if not load.queue:
            load.head_since = request.routed_at
        load.reservations[request.request_id] = self._in_flight[request.request_id] = request
        load.queue[request.request_id] = load.unreported[request.request_id] = request
        load.count(request)
        self._write(load)

    def prefilled(self, request_id: str, now: float) -> Reservation | None:
        """The first token is there. Returns the reservation the first time, None when it is not new or not known."""
        request = self._in_flight.get(request_id)
        if request is None or request.prefilled:
            return None
        load = self._load_of(request)
        if load:
            load.count(request, -1)
            del load.queue[request_id]
            load.head_since = now
        request.prefilled, request.prefill_tokens, request.tokens_s, request.heard_at = True, 0, 0.0, now
        if load:
            load.count(request)
            self._write(load)
        return request

    def release(self, request_id: str, now: float) -> Reservation | None:
        """The request has ended; None when it is not known."""
        request = self._in_flight.pop(request_id, None)
        if request is not None and (load := self._load_of(request)):
            load.count(request, -1)
            del load.reservations[request_id]
            if load.queue.pop(request_id, None) is not None:
                load.head_since = now
            if load.unreported.pop(request_id, None) is None:
                load.released_blocks += request.blocks
            if request.prefilled:
                load.residence_s += RESIDENCE_SHARE * (now - request.routed_at - load.residence_s)
            self._write(load)
        return request

    def _write(self, load: WorkerLoad) -> None:
        values, slot = self._table.values, load.slot
        if not load.queue:  # floats added and taken away leave crumbs
            load.own_tokens_s = 0.0
        foreign = load.foreign_prefill_tokens
        values[Column.QUEUED : Column.RESIDENCE_S + 1, slot] = (
            len(load.queue) + (foreign > 0),
            load.own_prefill_tokens + foreign,
            load.own_tokens_s + foreign * values[Column.TOKEN_S, slot],
            next(iter(load.queue.values())).prefill_s if load.queue else 0.0,
            load.head_since,
            load.sequences,
            load.decoding,
            load.own_context,
            load.pending_blocks,
            max(0, load.blocks_in_use - load.released_blocks),
            load.last_routed,
            load.residence_s,
        )

    def _load_of(self, request: Reservation) -> WorkerLoad | None:
        """The load that counts this very reservation: its worker may be gone, or a new incarnation."""
        load = self._workers.get(request.worker_id)
        return load if load and load.reservations.get(request.request_id) is request else None

    def report(self, worker_id: str, report: WorkerReport, now: float) -> None:
        """Square the load with the worker's own word."""
        load = self._workers[worker_id]
        known = load.reservations
        for name in report.prefilled_request_ids:
            if name in known:
                self.prefilled(name, now)
        for name in report.finished_request_ids:
            if name in known and not known[name].streamed:  # a stream's end is known better from the stream
                self.release(name, now)
        self._mark_progress(load, report.prefill_tokens_outstanding, now)
        load.foreign_prefill_tokens = max(0, report.prefill_tokens_outstanding - load.own_prefill_tokens)
        self._foreign_sequences -= load.foreign_sequences
        load.foreign_sequences = max(0, report.running + report.waiting - load.own_sequences)
        self._foreign_sequences += load.foreign_sequences
        load.blocks_in_use, load.released_blocks = report.blocks_in_use, 0
        self._write(load)

    def _mark_progress(self, load: WorkerLoad, outstanding: int, now: float) -> None:
        """Requests that the worker surely has cannot have more left than all that it reports: the oldest are ahead."""
        excess = sum(request.prefill_tokens for request in load.queue.values() if request.settled) - outstanding
        for request in load.queue.values():
            if request.settled and excess > 0 and request.prefill_tokens:
                done = min(excess, request.prefill_tokens)
                left = (request.prefill_tokens - done) / request.prefill_tokens
                load.count(request, -1)
                request.prefill_tokens -= done
                request.pending_blocks = int(left * request.pending_blocks)
                request.tokens_s, request.prefill_s = left * request.tokens_s, left * request.prefill_s
                load.count(request)
                load.head_since = now
                excess -= done
            request.settled = True
        for request in [request for request in load.unreported.values() if request.prefilled]:
            load.count(request, -1)
            request.in_report, request.pending_blocks = True, 0
            load.count(request)
            del load.unreported[request.request_id]

    def expire(self, now: float) -> list[Reservation]:
        """Release direct requests that nobody has spoken of for SILENCE_LIMIT_S; running ones stay in the reports."""
        silent = [
            request
            for request in self._in_flight.values()
            if not request.streamed and request.heard_at + SILENCE_LIMIT_S <= now
        ]
        for request in silent:
            self.release(request.request_id, now)
        return silent

    def check(self, worker_ids: Sequence[str]) -> None:
        """Assert the invariants: sums equal their parts, nothing is kept for a worker that is gone."""
        assert sorted(self._workers) == sorted(worker_ids)
        kept: dict[str, Reservation] = {}
        assert self._foreign_sequences == sum(load.foreign_sequences for load in self._workers.values())
        for load in self._workers.values():
            fresh = WorkerLoad(load.slot)
            for request in load.reservations.values():
                assert request.prefill_tokens >= 0
                assert not (request.prefilled and request.prefill_tokens)
                fresh.count(request)
                assert (request.request_id in load.queue) == (not request.prefilled)
                assert (request.request_id in load.unreported) == (not request.in_report)
            for name in ("own_prefill_tokens", "own_sequences", "own_decoding", "own_context", "pending_blocks"):
                assert getattr(load, name) == getattr(fresh, name), name
            assert load.foreign_prefill_tokens >= 0
            assert load.foreign_sequences >= 0
            kept |= load.reservations
        for name, request in self._in_flight.items():
            assert kept.get(name) is request or (request.streamed and name not in kept)
        assert kept.keys() <= self._in_flight.keys()
