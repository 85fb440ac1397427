"""Replayer: a recording's streams as worker logs again, with the numbers that were recorded. No I/O, no clock.

A log begins with a snapshot of the recording and goes on with its batches, so they get the epochs and sequence numbers
that they had, and the digests, which are made anew, have to come out as recorded. Where a worker started anew, or the
recorder lost batches and took a snapshot, the stream goes on in another log: for whoever reads it where it is published
the worker has started anew, or trimmed what was lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from kv_events.columns import changes_to
from kv_events.cursor import Apply, EventCursor
from kv_events.events import BlockStored, EventBatch, Snapshot, UnknownEvent
from kv_events.inspect.recording import Record, RecordKind
from kv_events.log import DEFAULT_CAPACITY, EventLog
from radix.digest import EMPTY_DIGEST
from rhizome.errors import InvalidRequest


class ReplayLog(EventLog):
    """An EventLog that stands where a snapshot was taken: its next batch has the snapshot's next_seq."""

    def __init__(self, snapshot: Snapshot, capacity: int = DEFAULT_CAPACITY) -> None:
        """Raises ValueError for a snapshot that no worker can have sent."""
        super().__init__(snapshot.worker, snapshot.epoch, snapshot.block_size, capacity)
        self._first_seq = self._next_seq = snapshot.next_seq
        changes = changes_to(snapshot)
        parts = pairwise([0, *changes.ends.tolist()])
        for (start, end), parent, tier in zip(parts, changes.parents.tolist(), changes.tiers.tolist(), strict=True):
            self._held.store(changes.hashes[start:end], parent, tier)


class Differs(NamedTuple):
    """A batch, or a snapshot, after which the replayed digest is not the recorded one."""

    epoch: int
    seq: int
    recorded: bytes
    replayed: bytes


@dataclass(slots=True)
class ReplayedStream:
    """How far a stream was replayed."""

    name: str
    log: EventLog | None = None  # None before its first snapshot or batch
    logs: int = 0
    batches: int = 0
    differences: int = 0
    first_difference: Differs | None = None
    recorded_digest: bytes = EMPTY_DIGEST  # of the last batch, or the snapshot after it

    @property
    def equal(self) -> bool:
        """Whether every digest came out as recorded, and the last one too."""
        return self.differences == 0 and (self.log is None or self.log.digest == self.recorded_digest)


class Replayer:
    """Turns records into logs, stream by stream."""

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        """`capacity` of each log, in batches."""
        self.streams: dict[str, ReplayedStream] = {}
        self._cursors: dict[str, EventCursor] = {}
        self._capacity = capacity

    def take(self, record: Record) -> ReplayedStream | None:
        """Replay a record. Returns its stream where that goes on in a new log, which must be published in the place of
        the former one before the next record; else None. Raises WireError where the record cannot be read."""
        if record.kind not in (RecordKind.BATCH, RecordKind.SNAPSHOT):
            return None
        stream = self.streams.setdefault(record.worker, ReplayedStream(record.worker))
        cursor = self._cursors.setdefault(record.worker, EventCursor())
        logs = stream.logs
        if record.kind is RecordKind.SNAPSHOT:
            self._restore(stream, cursor, record.snapshot())
        else:
            self._offer(stream, cursor, record.batch())
        return stream if stream.logs > logs else None

    def _restore(self, stream: ReplayedStream, cursor: EventCursor, snapshot: Snapshot) -> None:
        position = snapshot.epoch, snapshot.next_seq
        if position < cursor.position or (position == cursor.position and _stands_at(stream.log, snapshot)):
            return
        self._begin(stream, snapshot)
        for joined in cursor.restored(*position):
            self._append(stream, joined.batch)

    def _offer(self, stream: ReplayedStream, cursor: EventCursor, batch: EventBatch) -> None:
        if stream.log is not None and batch.worker != stream.log.worker:
            return
        for instruction in cursor.offer(batch):
            if isinstance(instruction, Apply):
                self._append(stream, instruction.batch)

    def _append(self, stream: ReplayedStream, batch: EventBatch) -> None:
        if stream.log is None or stream.log.epoch != batch.epoch:  # no snapshot: it begins with the worker
            self._begin(stream, _nothing(batch, stream.log))
        assert stream.log is not None
        assert (stream.log.epoch, stream.log.next_seq) == (batch.epoch, batch.seq)
        stream.log.append([event for event in batch.events if not isinstance(event, UnknownEvent)], batch.ts)
        stream.batches += 1
        stream.recorded_digest = batch.digest
        _compare(stream, batch.epoch, batch.seq, batch.digest)

    def _begin(self, stream: ReplayedStream, snapshot: Snapshot) -> None:
        stream.log = ReplayLog(snapshot, self._capacity)
        stream.logs += 1
        stream.recorded_digest = snapshot.digest
        _compare(stream, snapshot.epoch, snapshot.next_seq, snapshot.digest)


class Pace:
    """When a record is due, at a speed."""

    def __init__(self, speed: float) -> None:
        """Times real time; infinity for as fast as can be. Raises InvalidRequest."""
        if not speed > 0:
            raise InvalidRequest("speed", speed, "a number above 0, or max")
        self._speed = speed
        self._first_ns: int | None = None

    def due_s(self, time_ns: int) -> float:
        """Seconds after the first record; records must be asked for in their order."""
        if self._first_ns is None:
            self._first_ns = time_ns
        return 0.0 if math.isinf(self._speed) else (time_ns - self._first_ns) / 1e9 / self._speed


def _compare(stream: ReplayedStream, epoch: int, seq: int, recorded: bytes) -> None:
    assert stream.log is not None
    if stream.log.digest != recorded:
        stream.differences += 1
        if stream.first_difference is None:
            stream.first_difference = Differs(epoch, seq, recorded, stream.log.digest)


def _stands_at(log: EventLog | None, snapshot: Snapshot) -> bool:
    return log is not None and log.digest == snapshot.digest


def _nothing(first: EventBatch, former: EventLog | None) -> Snapshot:
    """What a worker holds that has just started."""
    sizes = [event.block_size for event in first.events if isinstance(event, BlockStored) and event.block_size]
    block_size = former.block_size if former else next(iter(sizes), 1)
    nothing = np.empty(0, dtype=np.uint64)
    return Snapshot(first.worker, first.epoch, 0, EMPTY_DIGEST, block_size, nothing, nothing)
