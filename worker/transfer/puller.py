"""The puller's side: which way to take, what counts, when to give up."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import takewhile

from rhizome.errors import InvalidRequest, RhizomeError
from rhizome.transfer_ticket import KEY_BYTES, TransferTicket, read_signed
from worker.transfer.deadline import Deadline
from worker.transfer.digests import bound
from worker.transfer.errors import OutOfTime, Refused, TransferFailed
from worker.transfer.memory import BlockMemory
from worker.transfer.messages import Grant
from worker.transfer.transports import Batch, Channel, Offer, Transport

MAX_IDLE_CHANNELS = 64  # to as many holders as a worker pulls from in turn
IDLE_S = 30.0  # less than holders wait
RELEASE_S = 0.2


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way that was tried: how many blocks it brought, and what ended it ("": nothing)."""

    transport: str
    blocks: int
    error: str


@dataclass(frozen=True, slots=True)
class PullResult:
    """What came of a pull: the first `blocks` of those `wanted` lie in their slots, verified; the other slots are as
    they were, or zero. `reason` says why not all came; "" if they did. Slots in the memory's `in_flight` (`nixl` only,
    and only after a deadline) may still be written: they are not to be used before they left it."""

    blocks: int
    wanted: int
    size_bytes: int
    seconds: float
    attempts: tuple[Attempt, ...]
    reason: str

    @property
    def transport(self) -> str:
        """What brought the last of them, or was tried last; "" if nothing was."""
        brought = [attempt.transport for attempt in self.attempts if attempt.blocks] or [
            attempt.transport for attempt in self.attempts
        ]
        return brought[-1] if brought else ""


@dataclass(slots=True)
class TransportCounts:
    """Since the start, of one transport."""

    pulls: int = 0
    failed: int = 0
    blocks: int = 0
    size_bytes: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class _Progress:
    """Of one pull."""

    arrived: int = 0
    touched: bool = False  # something may have been written beyond what arrived
    attempts: list[Attempt] = field(default_factory=list)


class Puller:
    """One worker's pulls into its pool. Any number of threads may pull at once, into different slots."""

    def __init__(
        self,
        memory: BlockMemory,
        transports: Sequence[Transport],
        *,
        secret: bytes = b"",
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`transports`: the best one first."""
        self.memory = memory
        self.transports = tuple(transports)
        self.counts = {transport.name: TransportCounts() for transport in transports}
        self._secret = secret
        self._clock, self._wall_clock = clock, wall_clock
        self._lock = threading.Lock()
        self._idle: OrderedDict[tuple[Offer, int], tuple[Channel, float]] = OrderedDict()  # the longest unused first
        self._channels = 0

    def pull(
        self, ticket: bytes, keys: Sequence[bytes], slots: Sequence[int], deadline: Deadline | float
    ) -> PullResult:
        """Pull the blocks of these keys, a run of the ticket's, into slots of the pool that nobody else uses.

        Blocks until all came, or no way is left, or the deadline (an object, or seconds) passed. What the other side
        does ends in the result; raises InvalidRequest for slots that are not the pool's, each once, as many as keys.
        """
        self.memory.check_blocks("slots", slots)
        if len(slots) != len(keys) or not keys:
            raise InvalidRequest("slots", len(slots), f"one for each of {len(keys)} keys")
        if not isinstance(deadline, Deadline):
            deadline = Deadline(deadline, self._clock)
        started, progress = self._clock(), _Progress()
        try:
            reason = self._pull(ticket, keys, slots, deadline, progress)
        finally:
            # Attention multiplies what it masks by 0: a broken number would survive in a slot's next use.
            if progress.touched:
                self.memory.zero(slots[progress.arrived :])
        return PullResult(
            progress.arrived,
            len(keys),
            progress.arrived * self.memory.layout.block_bytes,
            self._clock() - started,
            tuple(progress.attempts),
            reason if progress.arrived < len(keys) else "",
        )

    def release(self, ticket: bytes) -> None:
        """Nothing will be pulled under this ticket. Should that not reach its holder, the lease ends by itself."""
        with suppress(RhizomeError):
            read = read_signed(self._secret, ticket, int(self._wall_clock() * 1000))
            for transport, offer in self.ways(read.offers)[:1]:
                self._release(transport, offer, read.lease_id)

    def ways(self, offers: Sequence[str]) -> list[tuple[Transport, Offer]]:
        """What both ends have, the best first."""
        parsed = []
        for url in offers:
            with suppress(InvalidRequest):
                parsed.append(Offer.parse(url))
        return [
            (transport, offer)
            for transport in self.transports
            for offer in parsed
            if offer.transport == transport.name and transport.reaches(offer)
        ]

    def close(self) -> None:
        """Close unused channels; later pulls open new ones."""
        with self._lock:
            idle = [channel for channel, _ in self._idle.values()]
            self._idle.clear()
        for channel in idle:
            channel.close()

    def _pull(
        self, data: bytes, keys: Sequence[bytes], slots: Sequence[int], deadline: Deadline, progress: _Progress
    ) -> str:
        """Why not all came."""
        try:
            ticket = read_signed(self._secret, data, int(self._wall_clock() * 1000))
            first, count = _run(ticket, keys)
        except RhizomeError as error:
            return str(error)
        reason = f"no way to {ticket.holder}: it offers {', '.join(ticket.offers) or 'nothing'}"
        broken: tuple[Transport, Offer] | None = None
        for transport, offer in self.ways(ticket.offers):
            before, started = progress.arrived, self._clock()
            failure: RhizomeError | None = None
            try:
                wanted = _Wanted(data, first + before, keys[before:count], slots[before:count])
                held = self._take(transport, offer, wanted, deadline, progress)
                reason = f"{ticket.holder} has only {before + held} of {len(keys)} blocks under this ticket"
            except (TransferFailed, Refused, OutOfTime) as error:
                failure, reason = error, f"{transport.name}: {error}"
            self._count(transport, progress, progress.arrived - before, self._clock() - started, failure)
            if failure is None:
                return reason
            broken = (transport, offer)
            if not isinstance(failure, TransferFailed):
                break
        if broken is not None:
            self._release(*broken, ticket.lease_id)
        return reason

    def _take(
        self, transport: Transport, offer: Offer, wanted: _Wanted, deadline: Deadline, progress: _Progress
    ) -> int:
        """Fetch over one way. How many of the blocks the holder has."""
        channel, grant = self._open(transport, offer, wanted, deadline)
        try:
            progress.touched, at = True, 0
            with closing(channel.fetch(grant, self.memory, wanted.slots, deadline)) as batches:
                for batch in batches:
                    _verify(batch, wanted.keys[at : at + len(batch.told)], progress)
                    at += len(batch.told)
            channel.release(grant.lease_id)
        except BaseException:
            channel.close()
            raise
        self._keep(offer, channel)
        return grant.count

    def _open(self, transport: Transport, offer: Offer, wanted: _Wanted, deadline: Deadline) -> tuple[Channel, Grant]:
        """A channel that was granted the blocks: one that was used before, if it still works."""
        for channel in (self._unused(offer), None):
            if channel is None:
                channel, again = transport.connect(offer, deadline), False
            else:
                again = True
            try:
                return channel, channel.open(
                    wanted.ticket, wanted.first, len(wanted.slots), self.memory.layout, deadline
                )
            except BaseException as error:
                channel.close()
                if not again or not isinstance(error, TransferFailed):
                    raise
        raise AssertionError("a new channel was granted, or raised")

    def _release(self, transport: Transport, offer: Offer, lease_id: bytes) -> None:
        """Over a way of its own: the one that broke is not to be trusted. If it fails, the lease ends by itself."""
        with suppress(TransferFailed, Refused, OutOfTime):
            channel = transport.connect(offer, Deadline(RELEASE_S))
            with closing(channel):
                channel.release(lease_id)

    def _unused(self, offer: Offer) -> Channel | None:
        with self._lock:
            for key in reversed(self._idle):
                if key[0] == offer:
                    channel, since = self._idle.pop(key)
                    break
            else:
                return None
        if self._clock() - since < IDLE_S:
            return channel
        channel.close()
        return None

    def _keep(self, offer: Offer, channel: Channel) -> None:
        dropped: Channel | None = None
        with self._lock:
            self._channels += 1
            self._idle[offer, self._channels] = (channel, self._clock())
            if len(self._idle) > MAX_IDLE_CHANNELS:
                dropped = self._idle.popitem(last=False)[1][0]
        if dropped is not None:
            dropped.close()

    def _count(
        self, transport: Transport, progress: _Progress, blocks: int, seconds: float, error: RhizomeError | None
    ) -> None:
        progress.attempts.append(Attempt(transport.name, blocks, "" if error is None else str(error)))
        with self._lock:
            counts = self.counts[transport.name]
            counts.pulls += 1
            counts.failed += error is not None
            counts.blocks += blocks
            counts.size_bytes += blocks * self.memory.layout.block_bytes
            counts.seconds += seconds


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is asked of one way."""

    ticket: bytes
    first: int
    keys: Sequence[bytes]
    slots: Sequence[int]


def _verify(batch: Batch, keys: Sequence[bytes], progress: _Progress) -> None:
    """Count the blocks that arrived as they were told, up to one that did not: raises TransferFailed for that."""
    if batch.found is None:
        progress.arrived += len(batch.told)
        return
    for told, found in zip(batch.told, bound(batch.found, keys), strict=True):
        if told != found:
            raise TransferFailed(f"block {progress.arrived} arrived broken: {found:#x}, not {told:#x}")
        progress.arrived += 1


def _run(ticket: TransferTicket, keys: Sequence[bytes]) -> tuple[int, int]:
    """Where the keys begin in the ticket's, and how many of them follow each other there."""
    held, wanted = ticket.keys, b"".join(keys)
    at = held.find(keys[0])
    while at % KEY_BYTES:  # and -1 is not a multiple
        at = held.find(keys[0], at + 1) if at >= 0 else len(held)
    if at >= len(held):
        raise InvalidRequest("keys", keys[0].hex(), "a block of this ticket")
    if held.startswith(wanted, at):
        return at // KEY_BYTES, len(keys)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(keys, ticket.key_list()[at // KEY_BYTES :], strict=False))
    return at // KEY_BYTES, sum(1 for _ in same)
