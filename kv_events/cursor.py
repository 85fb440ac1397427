"""EventCursor: puts one worker's batches in order, whatever the network did to them. No I/O, no clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from kv_events.events import BlockRemoved, BlockStored, EventBatch
from kv_events.wire import DecodedEvents

MAX_WAITING = 256
"""Batches kept ahead of a gap. Past that they are let go: the replay that fills the gap brings them again."""

MAX_WAITING_WEIGHT = 2**20
"""Hashes and tokens in them, or 8 bytes of payload each: 8 MiB, and 512 MiB should 64 workers have gaps at once. A step
of 1,024 blocks of 16 tokens, told with its tokens, is more than an engine computes; 60 of those may wait."""


@dataclass(frozen=True, slots=True, eq=False)
class Apply:
    """The next batch in order."""

    batch: EventBatch


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A batch that was applied, or is waiting, already."""


@dataclass(frozen=True, slots=True)
class StaleEpoch:
    """A batch of an incarnation of the worker that is over: it must not be applied."""


@dataclass(frozen=True, slots=True)
class DropBlocks:
    """The worker started anew: what its former incarnation held is gone."""

    epoch: int


@dataclass(frozen=True, slots=True)
class NeedReplay:
    """Batches from `from_seq` on are missing."""

    epoch: int
    from_seq: int


@dataclass(frozen=True, slots=True)
class NeedSnapshot:
    """Nothing is known of this epoch, and its first batches are missing."""


Instruction: TypeAlias = Apply | Duplicate | StaleEpoch | DropBlocks | NeedReplay | NeedSnapshot


class EventCursor:
    """Where one worker's stream stands. Takes batches in any order and returns what to do, in order.

    NeedReplay and NeedSnapshot are said again with each batch that does not close the gap, so that an answer which
    got lost costs nothing but time.
    """

    def __init__(self, max_waiting: int = MAX_WAITING, max_weight: int = MAX_WAITING_WEIGHT) -> None:
        self._max_waiting = max_waiting
        self._max_weight = max_weight
        self._epoch = 0
        self._next_seq = 0
        self._waiting: dict[int, EventBatch] = {}
        self._weight = 0  # of what waits
        self._let_go = 0  # the position after the last batch that was let go; 0: none was, or they have come again

    @property
    def position(self) -> tuple[int, int]:
        """(epoch, next_seq); (0, 0) when nothing is known."""
        return self._epoch, self._next_seq

    @property
    def has_gap(self) -> bool:
        """Whether batches are missing before one that has come."""
        return bool(self._waiting or self._let_go)

    def advance(self, batch: EventBatch) -> bool:
        """Whether the batch is the one to apply now, and nothing waits: it is taken as applied. The common case of
        `offer`, which is for all others."""
        if batch.seq != self._next_seq or batch.epoch != self._epoch or self._waiting or self._let_go:
            return False
        self._next_seq += 1
        return True

    def offer(self, batch: EventBatch) -> tuple[Instruction, ...]:
        """Take the next batch from the network."""
        if batch.epoch < self._epoch:
            return (StaleEpoch(),)
        if batch.epoch > self._epoch:
            self._start(batch.epoch, 0)
            return DropBlocks(batch.epoch), *self._place(batch)
        return self._place(batch)

    def restored(self, epoch: int, next_seq: int) -> tuple[Apply, ...]:
        """A snapshot was taken over: go on from there. Returns the waiting batches that join on.

        The others are let go: they come again, and one whose number was damaged on the way would wait for ever. The
        position may go back, when the snapshot is older than what was applied. `epoch` must not be an old one.
        """
        assert epoch >= self._epoch, f"a snapshot of epoch {epoch} after one of epoch {self._epoch}"
        waiting = self._waiting if epoch == self._epoch else {}
        self._start(epoch, next_seq)
        self._waiting = waiting
        joined = self._joined()
        self._start(epoch, self._next_seq)
        return joined

    def _start(self, epoch: int, next_seq: int) -> None:
        self._epoch = epoch
        self._next_seq = next_seq
        self._waiting = {}
        self._weight = self._let_go = 0

    def _place(self, batch: EventBatch) -> tuple[Instruction, ...]:
        if batch.seq < self._next_seq:
            return (Duplicate(),)
        if batch.seq == self._next_seq:
            self._next_seq += 1
            return Apply(batch), *self._joined()
        gap = NeedReplay(self._epoch, self._next_seq) if self._next_seq else NeedSnapshot()
        if batch.seq in self._waiting:
            return Duplicate(), gap
        weight = _weight(batch)
        if len(self._waiting) < self._max_waiting and self._weight + weight <= self._max_weight:
            self._waiting[batch.seq] = batch
            self._weight += weight
        else:
            self._let_go = max(self._let_go, batch.seq + 1)
        return (gap,)

    def _joined(self) -> tuple[Apply, ...]:
        joined = []
        while (batch := self._waiting.pop(self._next_seq, None)) is not None:
            joined.append(Apply(batch))
            self._weight -= _weight(batch)
            self._next_seq += 1
        if self._let_go <= self._next_seq:
            self._let_go = 0
        return tuple(joined)


def _weight(batch: EventBatch) -> int:
    """How much of the bound a batch takes; the same whenever it is asked for."""
    events = batch.events
    if isinstance(events, DecodedEvents):  # holds its payload, and each hash once more
        return events.size_bytes // 8 + len(events.changes.hashes)
    weight = len(events)
    for event in events:
        if isinstance(event, BlockStored | BlockRemoved):
            weight += len(event.block_hashes)
        if isinstance(event, BlockStored) and event.token_ids is not None:
            weight += len(event.token_ids)
    return weight
