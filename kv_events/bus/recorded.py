"""A recording's streams as event sources: what follows a worker follows its recording."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from itertools import islice
from pathlib import Path

from kv_events.events import EventBatch, Snapshot
from kv_events.inspect.recording import Record, RecordingReader
from kv_events.inspect.replay import Replayer, ReplayLog
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

    It is read as far as somebody asks. A subscription ends with the recording; where the worker started anew, or the
    recorder lost batches and took a snapshot, it raises Trimmed, and goes on from the snapshot that is taken then.
    """

    def __init__(self, path: Path, worker: str) -> None:
        self._path = path
        self._worker = worker
        self._stream: _Stream | None = None

    async def subscribe(self, epoch: int, from_seq: int) -> AsyncGenerator[EventBatch, None]:
        """See EventSource. Reads on from where the last snapshot or batch stands, or anew from anywhere else."""
        stream = self._stream
        if stream is None or not stream.began or stream.position != (epoch, from_seq):
            stream = self._stream = _Stream(self._path, self._worker)
            stream.seek(epoch, from_seq)
        for count, batch in enumerate(stream.batches()):
            if count % _TURN_BATCHES == 0:
                await asyncio.sleep(0)
            yield batch

    async def replay(self, epoch: int, from_seq: int) -> list[EventBatch]:
        """See EventSource. At most MAX_REPLAY_BATCHES, up to a restart or a loss."""
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
        """What the worker held where the stream was read to. Raises Unavailable where nothing is recorded of it."""
        if self._stream is None:
            self._stream = _Stream(self._path, self._worker)
        return self._stream.snapshot()


class _Stream:
    """A place in a recording."""

    def __init__(self, path: Path, worker: str) -> None:
        self._worker = worker
        self._records = _records(path, worker)
        self._replayer = Replayer()
        self._log: ReplayLog | None = None  # that is read; the replayer may have begun another
        self._seq = 0  # of the next batch to read

    @property
    def began(self) -> bool:
        """Whether anything was read."""
        return self._log is not None

    @property
    def position(self) -> tuple[int, int]:
        """Of the next batch; (0, 0) before anything was read."""
        return (0, 0) if self._log is None else (self._log.epoch, self._seq)

    def batches(self) -> Iterator[EventBatch]:
        """From the position to the recording's end. Raises Trimmed where a snapshot is needed."""
        assert self._log is not None, "a snapshot or a seek comes first"
        while True:
            if self._replayed is not self._log:
                raise Trimmed(f"{self._worker}: batch {self._seq} of epoch {self._log.epoch} was not recorded")
            for entry in self._log.read(self._seq, self._log.next_seq - self._seq):
                self._seq += 1
                yield entry.batch
            if not self._advance():
                return

    def seek(self, epoch: int, from_seq: int) -> None:
        """Go to a batch, over whatever comes before; epoch 0 is the first one. Raises Trimmed where it was not recorded
        and later ones were, Conflict where the recording does not get there."""
        while True:
            log = self._replayed
            epoch = epoch or (0 if log is None else log.epoch)
            if log is not None and (log.epoch, log.next_seq) >= (epoch, from_seq):
                break
            if not self._advance():
                raise Conflict(f"{self._worker}: batch {from_seq} of epoch {epoch} was asked for, it is not recorded")
        if log.epoch != epoch or from_seq < log.first_seq:
            raise Trimmed(f"{self._worker}: batch {from_seq} of epoch {epoch} was asked for, later ones were recorded")
        self._log, self._seq = log, from_seq

    def snapshot(self) -> Snapshot:
        """As of the next batch, where one of another log is next; else of all that was read. Where that does not add up
        to the worker's digest, as soon after it as it does: there the recorder was in step again."""
        while not self._agrees and self._advance():
            pass
        log = self._replayed
        if log is None:
            raise Unavailable(f"{self._worker}: neither a snapshot nor a first batch is recorded")
        snapshot = log.snapshot() if log is self._log else log.start
        self._log, self._seq = log, snapshot.next_seq
        return snapshot

    @property
    def _agrees(self) -> bool:
        stream = self._replayer.streams.get(self._worker)
        return stream is not None and stream.agrees

    @property
    def _replayed(self) -> ReplayLog | None:
        stream = self._replayer.streams.get(self._worker)
        return stream.log if stream else None

    def _advance(self) -> bool:
        """Read a record; False at the recording's end."""
        record = next(self._records, None)
        if record is not None:
            self._replayer.take(record)
        return record is not None


def _records(path: Path, worker: str) -> Iterator[Record]:
    with RecordingReader(path) as reader:
        yield from reader.records(workers=[worker])
