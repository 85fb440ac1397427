"""A recording's streams as event sources: what follows a worker follows its recording."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from kv_events.cursor import Apply, EventCursor
from kv_events.events import BlockStored, EventBatch, Snapshot
from kv_events.inspect.recording import Record, RecordingReader, RecordKind
from radix.digest import EMPTY_DIGEST
from rhizome.errors import Conflict, Trimmed, Unavailable

MAX_REPLAY_BATCHES = 2**16  # a log keeps some thousands
_TURN_BATCHES = 64
"""Read from the file between two turns of other tasks."""


def recorded_sources(path: Path) -> dict[str, RecordedSource]:
    """An EventSource for each stream of a recording, by name. Raises RecordingError, OSError.

    Each reads the file by itself: where many streams are wanted at once, RecordingReader.records reads it once.
    """
    with RecordingReader(path) as reader:
        return {name: RecordedSource(path, name) for name in reader.summary().workers}


class RecordedSource:
    """One stream of a recording as a kv_events.bus.EventSource: its batches in order, each once.

    A subscription ends with the recording. Where batches are missing that the recorder did not get either, it raises
    Trimmed, and snapshot() gives the snapshot that the recorder took then: they come in the order of the recording.
    """

    def __init__(self, path: Path, worker: str) -> None:
        self._path = path
        self._worker = worker
        self._stream: _Stream | None = None

    async def subscribe(self, epoch: int, from_seq: int) -> AsyncGenerator[EventBatch, None]:
        """See EventSource. Reads on from where the last snapshot or batch stands, or anew from anywhere else."""
        stream = self._stream
        if stream is None or stream.position != (epoch, from_seq):
            stream = self._stream = _Stream(self._path, self._worker)
            stream.seek(epoch, from_seq)
        for count, batch in enumerate(stream.batches()):
            if count % _TURN_BATCHES == 0:
                await asyncio.sleep(0)
            yield batch

    async def replay(self, epoch: int, from_seq: int) -> list[EventBatch]:
        """See EventSource. At most MAX_REPLAY_BATCHES, up to where the recorder lost some."""
        stream = _Stream(self._path, self._worker)
        stream.seek(epoch, from_seq)
        batches: list[EventBatch] = []
        try:
            batches.extend(islice(stream.batches(), MAX_REPLAY_BATCHES))
        except Trimmed:
            if not batches:
                raise
        return batches

    async def snapshot(self) -> Snapshot:
        """The next one of the recording. Raises Unavailable when there is none."""
        if self._stream is None:
            self._stream = _Stream(self._path, self._worker)
        return self._stream.next_snapshot()


class _Stream:
    """A place in a recording."""

    def __init__(self, path: Path, worker: str) -> None:
        self._worker = worker
        self._records = _records(path, worker)
        self._cursor = EventCursor()
        self._ready: deque[EventBatch] = deque()  # what one record brought: MAX_WAITING batches at most
        self._snapshot: Snapshot | None = None  # what next_snapshot() gives

    @property
    def position(self) -> tuple[int, int]:
        """Of the next batch; (0, 0) before anything was read."""
        if self._ready:
            return self._ready[0].epoch, self._ready[0].seq
        return self._cursor.position

    def batches(self) -> Iterator[EventBatch]:
        """From the position to the recording's end. Raises Trimmed where a snapshot is needed."""
        while True:
            while self._ready:
                yield self._ready.popleft()
            record = next(self._records, None)
            if record is None:
                return
            if record.kind is RecordKind.BATCH:
                self._take(record.batch())
            elif record.kind is RecordKind.SNAPSHOT and self._leads_on(snapshot := record.snapshot()):
                self._snapshot = snapshot
                raise Trimmed(f"{self._worker}: what came before batch {snapshot.next_seq} was not recorded")

    def seek(self, epoch: int, from_seq: int) -> None:
        """Go to a batch, over whatever comes before; epoch 0 is the first one. Raises Trimmed where it was not recorded
        and later ones were, Conflict where the recording does not get there."""
        for record in self._records:
            if record.kind is RecordKind.BATCH:
                self._take(record.batch())
            elif record.kind is RecordKind.SNAPSHOT and self._leads_on(snapshot := record.snapshot()):
                self._restored(snapshot)
            epoch = epoch or self.position[0]
            while self._ready and self.position < (epoch, from_seq):
                self._ready.popleft()
            if self.position >= (epoch, from_seq):
                break
        self._check(epoch, from_seq)

    def next_snapshot(self) -> Snapshot:
        """The one that is due, or the next in the recording; that of nothing where a worker begins."""
        snapshot, self._snapshot = self._snapshot, None
        while snapshot is None:
            record = next(self._records, None)
            if record is None:
                raise Unavailable(f"{self._worker}: the recording holds no further snapshot")
            if record.kind is RecordKind.SNAPSHOT:
                snapshot = record.snapshot()
            elif record.kind is RecordKind.BATCH:
                began = self.position != (0, 0)
                self._take(record.batch())
                if not began and self._ready and self._ready[0].seq == 0:
                    return _snapshot_of_nothing(self._ready[0])
        self._restored(snapshot)
        return snapshot

    def _restored(self, snapshot: Snapshot) -> None:
        self._ready.clear()
        self._ready.extend(applied.batch for applied in self._cursor.restored(snapshot.epoch, snapshot.next_seq))

    def _take(self, batch: EventBatch) -> None:
        done = self._cursor.offer(batch)
        self._ready.extend(instruction.batch for instruction in done if isinstance(instruction, Apply))

    def _leads_on(self, snapshot: Snapshot) -> bool:
        return (snapshot.epoch, snapshot.next_seq) > self._cursor.position

    def _check(self, epoch: int, from_seq: int) -> None:
        position = self.position
        asked = f"batch {from_seq} of epoch {epoch} was asked for"
        if position[0] != epoch or from_seq > position[1]:
            raise Conflict(f"{self._worker}: the recording has batch {position[1]} of epoch {position[0]}, {asked}")
        if from_seq < position[1]:
            raise Trimmed(f"{self._worker}: batches were recorded from {position[1]} on, {asked}")


def _records(path: Path, worker: str) -> Iterator[Record]:
    with RecordingReader(path) as reader:
        yield from reader.records(workers=[worker])


def _snapshot_of_nothing(first: EventBatch) -> Snapshot:
    nothing = np.empty(0, dtype=np.uint64)
    sizes = (event.block_size for event in first.events if isinstance(event, BlockStored) and event.block_size)
    return Snapshot(first.worker, first.epoch, 0, EMPTY_DIGEST, next(sizes, 1), nothing, nothing)
