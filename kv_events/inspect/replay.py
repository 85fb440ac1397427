"""Replayer: a recording's streams as worker logs again, with the numbers that were recorded. No I/O, no clock.

A log begins with a snapshot of the recording and goes on with its batches, which keep the epochs, sequence numbers and
digests that they had; the digest of what their events tell is made anew, and has to come out as recorded. Where a
worker started anew, or the recorder lost batches and took a snapshot, the stream goes on in another log: for whoever
reads it where it is published the worker has started anew, or trimmed what was lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from kv_events.columns import are_distinct, changes_of, changes_to
from kv_events.cursor import Apply, EventCursor
from kv_events.events import BlockStored, EventBatch, Snapshot
from kv_events.inspect.recording import Record, RecordKind
from kv_events.inspect.stats import size_about
from kv_events.log import DEFAULT_CAPACITY, EventLog, LoggedBatch
from kv_events.view import OLD_SNAPSHOTS
from radix.digest import EMPTY_DIGEST, SetDigest
from radix.tree import REMOVE, STORE, Changes, Tier
from rhizome.errors import InvalidRequest

_HASH_BYTES = 8


class ReplayLog(EventLog):
    """An EventLog that stands where a snapshot was taken, and goes on with batches that are numbered and digested."""

    def __init__(self, snapshot: Snapshot, capacity: int = DEFAULT_CAPACITY) -> None:
        """Raises ValueError for a snapshot that no worker can have sent."""
        super().__init__(snapshot.worker, snapshot.epoch, snapshot.block_size, capacity)
        self.start = snapshot
        self._first_seq = self._next_seq = snapshot.next_seq
        self._change(changes_to(snapshot))

    def append_recorded(self, batch: EventBatch, payload: bytes | None) -> None:
        """Log a batch as it was recorded, its digest included; it must be the next one. The log's own digest is of what
        the events tell. `payload`: the batch's wire form, where that is at hand."""
        assert (batch.worker, batch.epoch, batch.seq) == (self.worker, self.epoch, self._next_seq)
        entry = LoggedBatch(batch, size_about(batch) // _HASH_BYTES, payload)
        with self._lock:
            self._change(changes_of(batch.events))
            self._keep(entry, sendable=True)  # it was sent before
        self._signal()

    def _change(self, changes: Changes) -> None:
        parts = pairwise([0, *changes.ends.tolist()])
        rows = zip(changes.kinds.tolist(), parts, changes.parents.tolist(), changes.tiers.tolist(), strict=True)
        for kind, (start, end), parent, tier in rows:
            if kind == STORE:
                self._held.store(changes.hashes[start:end], parent, tier)
            elif kind == REMOVE:
                self._held.remove(changes.hashes[start:end], tier)
            else:
                self._held.clear()


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
    log: ReplayLog | None = None  # None before its first snapshot or batch
    logs: int = 0
    batches: int = 0
    differences: int = 0
    first_difference: Differs | None = None
    recorded_digest: bytes = EMPTY_DIGEST  # of the last batch, or the snapshot after it

    @property
    def agrees(self) -> bool:
        """Whether the digest is the recorded one now."""
        return self.log is not None and self.log.digest == self.recorded_digest

    @property
    def equal(self) -> bool:
        """Whether every digest came out as recorded."""
        return self.differences == 0


class Replayer:
    """Turns records into logs, stream by stream."""

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        """`capacity` of each log, in batches."""
        self.streams: dict[str, ReplayedStream] = {}
        self._cursors: dict[str, EventCursor] = {}
        self._old_epochs: dict[str, OldEpochs] = {}
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
            self._offer(stream, cursor, record)
        return stream if stream.logs > logs else None

    def _restore(self, stream: ReplayedStream, cursor: EventCursor, snapshot: Snapshot) -> None:
        if not is_sound(snapshot):
            return  # it was refused then, too
        position = snapshot.epoch, snapshot.next_seq
        if snapshot.epoch < cursor.position[0]:
            if not self._old_epochs.setdefault(stream.name, OldEpochs()).outvote():
                return
            cursor = self._cursors[stream.name] = EventCursor()
        elif position <= cursor.position and stream.agrees:
            cursor.restored(*cursor.position)  # what waits in vain goes
            return
        self._old_epochs.pop(stream.name, None)
        self._begin(stream, snapshot)
        for joined in cursor.restored(*position):
            self._append(stream, joined.batch)

    def _offer(self, stream: ReplayedStream, cursor: EventCursor, record: Record) -> None:
        batch = record.batch()
        if stream.log is not None and batch.worker != stream.log.worker:
            return
        instructions = cursor.offer(batch)
        if batch.epoch == cursor.position[0]:
            self._old_epochs.pop(stream.name, None)
        for instruction in instructions:
            if isinstance(instruction, Apply):
                joined = instruction.batch
                self._append(stream, joined, record.payload if joined is batch else None)

    def _append(self, stream: ReplayedStream, batch: EventBatch, payload: bytes | None = None) -> None:
        if stream.log is None or stream.log.epoch != batch.epoch:  # no snapshot: it begins with the worker
            self._begin(stream, _nothing(batch, stream.log))
        assert stream.log is not None
        stream.log.append_recorded(batch, payload)
        stream.batches += 1
        stream.recorded_digest = batch.digest
        _compare(stream, batch.epoch, batch.seq, batch.digest)

    def _begin(self, stream: ReplayedStream, snapshot: Snapshot) -> None:
        stream.log = ReplayLog(snapshot, self._capacity)
        stream.logs += 1
        stream.recorded_digest = snapshot.digest
        _compare(stream, snapshot.epoch, snapshot.next_seq, snapshot.digest)


class OldEpochs:
    """Tells when snapshots of an older epoch show that a newer one was misheard, as kv_events.view.WorkerView does."""

    def __init__(self) -> None:
        self._snapshots = 0

    def outvote(self) -> bool:
        """Another snapshot of an older epoch came, and no batch of the newer one since the last."""
        self._snapshots += 1
        return self._snapshots >= OLD_SNAPSHOTS


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


def is_sound(snapshot: Snapshot) -> bool:
    """Whether a snapshot's digest is that of its blocks."""
    hashes, digest = snapshot.block_hashes, SetDigest()
    for tier in Tier:
        digest.add(hashes[snapshot.held_in(tier)], tier)
    return bool(hashes.all()) and are_distinct(hashes) and digest.value == snapshot.digest


def _nothing(first: EventBatch, former: ReplayLog | None) -> Snapshot:
    """What a worker holds that has just started."""
    sizes = [event.block_size for event in first.events if isinstance(event, BlockStored) and event.block_size]
    block_size = next(iter(sizes), 1) if former is None else former.block_size
    nothing = np.empty(0, dtype=np.uint64)
    return Snapshot(first.worker, first.epoch, 0, EMPTY_DIGEST, block_size, nothing, nothing)
