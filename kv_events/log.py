"""EventLog: a worker's account of its own cache. It numbers, digests and keeps the last batches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from kv_events import wire
from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventBatch, Snapshot, tier_of
from radix.held import HeldBlocks
from radix.tree import Tier
from rhizome.errors import Conflict, Trimmed

DEFAULT_CAPACITY = 4096
"""Batches: 40 s of 10 ms steps."""

MAX_KEPT_WEIGHT = 2**22
"""Hashes and tokens in all kept batches: about 32 MB. Replaying more than that costs more than a snapshot."""


class LoggedBatch:
    """A batch, its weight in hashes and tokens and, once somebody wants to send it, its wire form: made once, shared
    by all."""

    __slots__ = ("_payload", "batch", "weight")

    def __init__(self, batch: EventBatch, weight: int, payload: bytes | None = None) -> None:
        """`payload`: the wire form, where it is there already."""
        self.batch = batch
        self.weight = weight
        self._payload = payload

    @property
    def payload(self) -> bytes:
        """kv_events.wire, in the map encoding."""
        if self._payload is None:  # two threads may both get here, and make the same bytes
            self._payload = wire.encode(self.batch)
        return self._payload


class EventLog:
    """The worker side of an event stream.

    The engine's thread appends; others read and subscribe, from any thread. Subscribers are only told that something is
    new and pull it from the ring: one that stalls costs nothing, and finds itself trimmed when it comes back.
    """

    def __init__(self, worker: str, epoch: int, block_size: int, capacity: int = DEFAULT_CAPACITY) -> None:
        """`epoch` at least 1, larger than at any former start; `block_size` in tokens; `capacity` in batches."""
        if not 1 <= len(worker.encode()) <= wire.MAX_STRING_BYTES:
            raise ValueError(f"worker is {worker!r}: 1 to {wire.MAX_STRING_BYTES} bytes are allowed")
        for name, value, limit in (("epoch", epoch, wire.MAX_COUNT), ("block_size", block_size, wire.MAX_BLOCK_SIZE)):
            if not 1 <= value <= limit:
                raise ValueError(f"{name} is {value}: 1 to {limit} are allowed")
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}: at least 1 batch")
        self.worker = worker
        self.epoch = epoch
        self.block_size = block_size
        self._lock = threading.Lock()  # over all below but the callbacks
        self._held = HeldBlocks()  # bounded by the block pool
        self._ring: list[LoggedBatch | None] = [None] * capacity  # batch seq at seq % capacity
        self._first_seq = 0
        self._next_seq = 0
        self._weight = 0
        self._closed = False
        self._callbacks: tuple[Callable[[], None], ...] = ()

    def append(self, events: Sequence[Event], ts: float) -> EventBatch:
        """Log what one step did, in order; `ts` is wall time in seconds. Never blocks on anybody.

        A store of a block that is held, or a removal of one that is not, is told on and changes nothing. Raises
        TypeError or ValueError, and logs nothing, for events that do not hold block hashes.
        """
        events = tuple(events)
        weight = sum(map(self._checked_weight, events))
        small = weight <= wire.MAX_HASHES_PER_EVENT and len(events) <= wire.MAX_EVENTS_PER_BATCH
        sendable = small or wire.fits(events)
        with self._lock:
            for event in events:
                self._apply(event)
            batch = EventBatch(self.worker, self.epoch, self._next_seq, events, self._held.digest, ts)
            self._keep(LoggedBatch(batch, weight), sendable)
        self._signal()
        return batch

    @property
    def first_seq(self) -> int:
        """The sequence number of the oldest batch that is kept; that of the next one where none is."""
        return self._first_seq

    @property
    def next_seq(self) -> int:
        """The sequence number of the next batch."""
        return self._next_seq

    @property
    def digest(self) -> bytes:
        """Of all blocks that the worker holds."""
        with self._lock:
            return self._held.digest

    @property
    def closed(self) -> bool:
        """Whether the worker has said goodbye."""
        return self._closed

    @property
    def subscribers(self) -> int:
        """How many callbacks are subscribed."""
        return len(self._callbacks)

    def __len__(self) -> int:
        """Blocks held, in any tier."""
        return len(self._held)

    def read(self, seq: int, limit: int) -> list[LoggedBatch]:
        """At most `limit` batches from `seq` on. Raises Trimmed when that is not kept any more, Conflict when it is
        past the next one: whoever asks knows another stream."""
        with self._lock:
            if seq < self._first_seq:
                raise Trimmed(f"{self.worker}: events are kept from {self._first_seq} on, {seq} was asked for")
            if seq > self._next_seq:
                raise Conflict(f"{self.worker}: the next event is {self._next_seq}, {seq} was asked for")
            end = min(seq + limit, self._next_seq)
            kept = [self._ring[at % len(self._ring)] for at in range(seq, end)]
        return [entry for entry in kept if entry is not None]

    def since(self, seq: int) -> list[EventBatch]:
        """All batches from `seq` on. Raises like `read`."""
        return [entry.batch for entry in self.read(seq, len(self._ring))]

    def check_epoch(self, epoch: int) -> None:
        """Raise Conflict unless this is the log's epoch, or 0."""
        if epoch not in (0, self.epoch):
            raise Conflict(f"{self.worker}: this is epoch {self.epoch}, {epoch} was asked for")

    def snapshot(self) -> Snapshot:
        """All blocks held. Appends wait for a copy of memory (about 1 ms for 100,000 blocks), not for the sorting."""
        with self._lock:
            held, next_seq = self._held.copy(), self._next_seq
        blocks, parents, masks = held.columns()
        on_device_alone = bool((masks == 1 << Tier.DEVICE).all())
        return Snapshot(
            worker=self.worker,
            epoch=self.epoch,
            next_seq=next_seq,
            digest=held.digest,
            block_size=self.block_size,
            block_hashes=blocks,
            parent_hashes=parents,
            tier_masks=None if on_device_alone else masks,
        )

    def subscribe(self, callback: Callable[[], None]) -> None:
        """Have `callback` called after each append, in the appending thread: it must only pass a signal on. One that
        raises is unsubscribed."""
        with self._lock:
            self._callbacks += (callback,)

    def unsubscribe(self, callback: Callable[[], None]) -> None:
        """Take a callback back; unknown ones are ignored."""
        with self._lock:
            self._callbacks = tuple(other for other in self._callbacks if other is not callback)

    def close(self) -> None:
        """The worker leaves: subscriptions end once they have delivered what is kept."""
        self._closed = True
        self._signal()

    def _checked_weight(self, event: Event) -> int:
        """Hashes and tokens of an event that a worker can log. Raises TypeError or ValueError for another."""
        match event:
            case BlockStored():
                if not 0 <= event.parent_hash <= wire.MAX_HASH:
                    raise ValueError(f"parent_hash is {event.parent_hash}: 0 to 2^64 - 1 are allowed")
                return self._held.check(event.block_hashes) + (0 if event.token_ids is None else len(event.token_ids))
            case BlockRemoved():
                return self._held.check(event.block_hashes)
            case AllBlocksCleared():
                return 0
            case _:
                raise TypeError(f"{event!r} is not an event that a worker can log")

    def _apply(self, event: Event) -> None:
        match event:
            case BlockStored():
                self._held.store(event.block_hashes, event.parent_hash, tier_of(event.medium))
            case BlockRemoved():
                self._held.remove(event.block_hashes, tier_of(event.medium))
            case AllBlocksCleared():
                self._held.clear()

    def _keep(self, entry: LoggedBatch, sendable: bool) -> None:
        if self._next_seq - self._first_seq == len(self._ring):
            self._trim_one()
        self._ring[self._next_seq % len(self._ring)] = entry
        self._next_seq += 1
        self._weight += entry.weight
        while self._first_seq < self._next_seq and (self._weight > MAX_KEPT_WEIGHT or not sendable):
            self._trim_one()  # a batch too large to send trims all: whoever needs it takes a snapshot

    def _trim_one(self) -> None:
        at = self._first_seq % len(self._ring)
        entry = self._ring[at]
        assert entry is not None
        self._ring[at] = None
        self._weight -= entry.weight
        self._first_seq += 1

    def _signal(self) -> None:
        for callback in self._callbacks:
            try:
                callback()
            except Exception:  # a subscriber's trouble is not the engine's
                self.unsubscribe(callback)
