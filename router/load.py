"""What each worker still has to do: this router's own reservations, and what the worker reports beyond them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rhizome.errors import Duplicate, Overloaded
from router.fleet import WorkerReport

MAX_IN_FLIGHT = 65_536  # requests over all workers, some 300 bytes each
SILENCE_LIMIT_S = 60.0  # a ticket's lifetime: a direct request not heard of for so long is left to the reports


@dataclass(slots=True)
class Reservation:
    """One request on its worker, from the decision to its end."""

    request_id: str
    worker_id: str
    prefill_tokens: int  # still to be computed
    blocks: int  # of its prompt
    sequences: int
    predicted_ttft_s: float
    routed_at: float
    streamed: bool  # passes through this router, which so learns its end; else only the worker tells
    heard_at: float = 0.0
    prefilled: bool = False
    in_report: bool = False  # the worker's latest report counts its blocks as in use
    settled: bool = False  # routed before the latest report: the next one knows of it

    def __post_init__(self) -> None:
        self.heard_at = self.routed_at


@dataclass(slots=True)
class WorkerLoad:
    """One worker's load. Sums are kept beside the reservations so that a decision reads, not adds."""

    reservations: dict[str, Reservation] = field(default_factory=dict)  # in order of arrival
    own_prefill_tokens: int = 0
    own_sequences: int = 0
    own_decoding: int = 0
    pending_blocks: int = 0  # of requests that the worker's report does not count yet
    foreign_prefill_tokens: int = 0  # of other routers and direct clients
    foreign_sequences: int = 0
    blocks_in_use: int = 0
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
        self.own_sequences += sign * reservation.sequences
        self.own_decoding += sign * reservation.sequences * reservation.prefilled
        self.pending_blocks += sign * reservation.blocks * (not reservation.in_report)


class Load:
    """The loads of all workers, and every request in flight by its id."""

    def __init__(self) -> None:
        self._workers: dict[str, WorkerLoad] = {}
        self._in_flight: dict[str, Reservation] = {}
        self._serial = 0

    def __len__(self) -> int:
        return len(self._in_flight)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._in_flight

    def add_worker(self, worker_id: str) -> None:
        """Start with an empty load."""
        self._workers[worker_id] = WorkerLoad()

    def drop_worker(self, worker_id: str) -> None:
        """Forget its load. A streamed request stays in flight until its stream has ended too."""
        load = self._workers.pop(worker_id, None)
        for request in load.reservations.values() if load else ():
            if not request.streamed:
                del self._in_flight[request.request_id]

    def of(self, worker_id: str) -> WorkerLoad:
        """The load of a worker that was added."""
        return self._workers[worker_id]

    def reserve(self, request: Reservation) -> None:
        """Count a request as its worker's. Raises Duplicate, Overloaded at MAX_IN_FLIGHT."""
        if request.request_id in self._in_flight:
            raise Duplicate(f"request {request.request_id} is in flight already")
        if len(self._in_flight) >= MAX_IN_FLIGHT:
            raise Overloaded(f"{MAX_IN_FLIGHT} requests are in flight, the most that this router keeps")
        self._serial += 1
        load = self._workers[request.worker_id]
        load.last_routed = self._serial
        load.reservations[request.request_id] = self._in_flight[request.request_id] = request
        load.count(request)

    def prefilled(self, request_id: str, now: float) -> Reservation | None:
        """The first token is there. Returns the reservation the first time, None when it is not new or not known."""
        request = self._in_flight.get(request_id)
        if request is None or request.prefilled:
            return None
        load = self._load_of(request)
        if load:
            load.count(request, -1)
        request.prefilled, request.prefill_tokens, request.heard_at = True, 0, now
        if load:
            load.count(request)
        return request

    def release(self, request_id: str) -> Reservation | None:
        """The request has ended; None when it is not known."""
        request = self._in_flight.pop(request_id, None)
        if request is not None and (load := self._load_of(request)):
            load.count(request, -1)
            del load.reservations[request_id]
        return request

    def _load_of(self, request: Reservation) -> WorkerLoad | None:
        """The load that counts this very reservation: its worker may be gone, or a new incarnation."""
        load = self._workers.get(request.worker_id)
        return load if load and load.reservations.get(request.request_id) is request else None

    def report(self, worker_id: str, report: WorkerReport, now: float) -> list[Reservation]:
        """Square the load with the worker's own word; returns the requests whose first token it announces."""
        load = self._workers[worker_id]
        known = load.reservations
        begun = [self.prefilled(name, now) for name in report.prefilled_request_ids if name in known]
        for name in report.finished_request_ids:
            if name in known and not known[name].streamed:  # a stream's end is known better from the stream
                self.release(name)
        self._mark_progress(load, report.prefill_tokens_outstanding)
        load.foreign_prefill_tokens = max(0, report.prefill_tokens_outstanding - load.own_prefill_tokens)
        load.foreign_sequences = max(0, report.running + report.waiting - load.own_sequences)
        load.blocks_in_use = report.blocks_in_use
        return [request for request in begun if request]

    def _mark_progress(self, load: WorkerLoad, outstanding: int) -> None:
        """Requests that the worker surely has cannot have more left than all that it reports: the oldest are ahead."""
        settled = sum(request.prefill_tokens for request in load.reservations.values() if request.settled)
        excess = settled - outstanding
        for request in load.reservations.values():
            load.count(request, -1)
            if request.settled and excess > 0:
                done = min(excess, request.prefill_tokens)
                request.prefill_tokens -= done
                excess -= done
            request.settled = True
            request.in_report = request.prefilled
            load.count(request)

    def expire(self, now: float) -> list[Reservation]:
        """Release direct requests that nobody has spoken of for SILENCE_LIMIT_S; running ones stay in the reports."""
        silent = [
            request
            for request in self._in_flight.values()
            if not request.streamed and request.heard_at + SILENCE_LIMIT_S <= now
        ]
        for request in silent:
            self.release(request.request_id)
        return silent

    def check(self, worker_ids: Sequence[str]) -> None:
        """Assert the invariants: sums equal their parts, nothing is kept for a worker that is gone."""
        assert sorted(self._workers) == sorted(worker_ids)
        kept: dict[str, Reservation] = {}
        for load in self._workers.values():
            fresh = WorkerLoad()
            for request in load.reservations.values():
                assert request.prefill_tokens >= 0
                assert not (request.prefilled and request.prefill_tokens)
                fresh.count(request)
            for name in ("own_prefill_tokens", "own_sequences", "own_decoding", "pending_blocks"):
                assert getattr(load, name) == getattr(fresh, name), name
            assert load.foreign_prefill_tokens >= 0
            assert load.foreign_sequences >= 0
            kept |= load.reservations
        for name, request in self._in_flight.items():
            assert kept.get(name) is request or (request.streamed and name not in kept)
        assert kept.keys() <= self._in_flight.keys()
