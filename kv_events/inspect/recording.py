"""Recordings of event streams: one file with everything that came from any number of workers.

Written as it comes and flushed every few seconds, a recording is good up to its last whole chunk however the recorder
ended; an index at the end, checks on every part, and a snapshot at the beginning of each stream make it seekable,
checked and replayable to the same digest. The bytes are described in kv_events.inspect.recording_format. In
kv_events.inspect, only this module and the conversions touch files.

    with RecordingWriter(open(path, "wb")) as writer:
        writer.snapshot("w0", snapshot, time_ns)
        writer.batch("w0", batch, time_ns)
    with RecordingReader(path) as reader:
        for record in reader.records():
            ...
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from kv_events import wire
from kv_events.events import EventBatch, Snapshot
from kv_events.inspect.recording_format import (
    CHUNK,
    CHUNK_BYTES,
    FOOTER_BYTES,
    FRAME_BYTES,
    HEADER_BYTES,
    INDEX,
    MAX_INDEX_SPANS,
    MAX_RECORD_BYTES,
    Frame,
    IndexEntry,
    RawRecord,
    RecordingError,
    RecordKind,
    Span,
    Spans,
    inflate,
    pack_footer,
    pack_frame,
    pack_header,
    pack_index,
    pack_record,
    parse_footer,
    parse_frame,
    parse_header,
    parse_index,
    parse_name,
    parse_records,
    thinned,
)
from kv_events.snapshot_bytes import decode_snapshot, encode_snapshot
from radix.tree import MAX_WORKERS
from rhizome.errors import InvalidRequest

__all__ = [
    "Record",
    "RecordKind",
    "RecordingError",
    "RecordingReader",
    "RecordingWriter",
    "Summary",
    "WorkerSummary",
    "is_recording",
]

FLUSH_NS = 5 * 10**9
"""Of records' time that a killed recorder loses at most, as long as records come; flush() loses none."""

MAX_MARK_BYTES = wire.MAX_STRING_BYTES


class Record(NamedTuple):
    """What a recording holds of one stream at one time. WORKER records are not told: `worker` is the name."""

    kind: RecordKind
    worker: str
    time_ns: int  # wall time of receipt
    payload: bytes
    offset: int  # of its chunk in the file, for messages

    def batch(self) -> EventBatch:
        """Of a BATCH. Raises WireError where the payload is none."""
        return wire.decode(self.payload)

    def snapshot(self) -> Snapshot:
        """Of a SNAPSHOT. Raises WireError where the payload is none."""
        return decode_snapshot(self.payload)

    def mark(self) -> str:
        """Of a MARK: its text."""
        return self.payload.decode(errors="replace")


class RecordingWriter:
    """Appends records to a file that only has to be written to: a pipe will do. Holds a chunk, and a bounded index."""

    def __init__(self, file: BinaryIO, created_ns: int = 0) -> None:
        """Writes the header. `file` is closed with the writer. `created_ns`: wall time, for display."""
        self._file = file
        self._offset = 0
        self._numbers: dict[str, int] = {}
        self._entries: list[IndexEntry] = []
        self._kept_spans = 0
        self._chunk: list[bytes] = []
        self._chunk_bytes = 0
        self._chunk_records = 0  # those that name a worker not counted
        self._spans: Spans = {}
        self._first_ns = self._last_ns = 0
        self._number = 0
        self.records = 0
        self._write(pack_header(created_ns))
        self._file.flush()

    def __enter__(self) -> RecordingWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size_bytes(self) -> int:
        """Of the file so far, without the chunk that is being filled."""
        return self._offset

    def snapshot(self, worker: str, snapshot: Snapshot, time_ns: int) -> None:
        """A snapshot came. Raises WireError, and writes nothing, for one that is too large."""
        span = Span(snapshots=1)
        self._append(RecordKind.SNAPSHOT, worker, time_ns, encode_snapshot(snapshot), (snapshot.epoch, span))

    def batch(self, worker: str, batch: EventBatch, time_ns: int) -> None:
        """A batch came. Raises WireError, and writes nothing, for one that has no bytes: it is too large, or holds
        events of kinds that this release does not know."""
        self.batch_bytes(worker, wire.encode(batch), batch.epoch, batch.seq, time_ns)

    def batch_bytes(self, worker: str, payload: bytes, epoch: int, seq: int, time_ns: int) -> None:
        """A batch that is bytes of kv_events.wire already."""
        self._append(RecordKind.BATCH, worker, time_ns, payload, (epoch, Span(0, 1, seq, seq)))

    def snapshot_bytes(self, worker: str, payload: bytes, epoch: int, time_ns: int) -> None:
        """A snapshot that is bytes of kv_events.snapshot_bytes already."""
        self._append(RecordKind.SNAPSHOT, worker, time_ns, payload, (epoch, Span(snapshots=1)))

    def mark(self, worker: str, text: str, time_ns: int) -> None:
        """Something about the stream, at most MAX_MARK_BYTES of it."""
        self._append(RecordKind.MARK, worker, time_ns, text.encode()[:MAX_MARK_BYTES], None)

    def flush(self) -> None:
        """What was appended so far survives the recorder's end."""
        if self._chunk:
            times = (self._first_ns, self._last_ns)
            entry = IndexEntry(self._offset, 1, *times, self._chunk_records, self._spans)
            self._write(pack_frame(CHUNK, self._number, b"".join(self._chunk), len(self._chunk), *times))
            self._number += 1
            self._chunk, self._chunk_bytes, self._chunk_records, self._spans = [], 0, 0, {}
            self._entries.append(entry)
            self._kept_spans += len(entry.spans) + 1
            if self._kept_spans > MAX_INDEX_SPANS and len(self._entries) > 1:
                self._entries = thinned(self._entries)
                self._kept_spans = sum(len(entry.spans) + 1 for entry in self._entries)
        self._file.flush()

    def close(self) -> None:
        """Flush, write the index and the footer, close the file. A second call does nothing."""
        if self._file.closed:
            return
        try:
            self.flush()
            offset, raw = self._offset, pack_index(list(self._numbers), self._entries)
            self._write(pack_frame(INDEX, self._number, raw, len(self._entries), 0, self._last_ns))
            self._write(pack_footer(offset))
        finally:
            self._file.close()

    def _append(
        self, kind: RecordKind, worker: str, time_ns: int, payload: bytes, span: tuple[int, Span] | None
    ) -> None:
        if len(payload) > MAX_RECORD_BYTES:
            raise wire.WireError(f"a record of {len(payload)} bytes: at most {MAX_RECORD_BYTES}")
        number = self._number_of(worker, time_ns)
        self._put(RawRecord(kind, number, self._time(time_ns), payload))
        if span is not None:
            self._spans.setdefault((number, span[0]), Span()).add(span[1])
        self.records += 1
        self._chunk_records += 1
        if self._chunk_bytes >= CHUNK_BYTES or self._last_ns - self._first_ns >= FLUSH_NS:
            self.flush()

    def _number_of(self, worker: str, time_ns: int) -> int:
        number = self._numbers.get(worker)
        if number is None:
            parse_name(worker.encode(), self._offset)
            if len(self._numbers) == MAX_WORKERS:
                raise InvalidRequest("workers", MAX_WORKERS + 1, f"at most {MAX_WORKERS} in one recording")
            number = self._numbers[worker] = len(self._numbers)
            self._put(RawRecord(RecordKind.WORKER, number, self._time(time_ns), worker.encode()))
        return number

    def _put(self, record: RawRecord) -> None:
        if self._chunk and self._chunk_bytes + len(record.payload) > CHUNK_BYTES:
            self.flush()
        if not self._chunk:
            self._first_ns = record.time_ns
        self._last_ns = record.time_ns
        self._chunk.append(pack_record(record))
        self._chunk_bytes += len(self._chunk[-1])

    def _time(self, time_ns: int) -> int:
        """Which never goes back."""
        return max(self._last_ns, time_ns)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._offset += len(data)


@dataclass(slots=True)
class WorkerSummary:
    """What a recording holds of one stream. `spans` by epoch."""

    snapshots: int = 0
    batches: int = 0
    spans: dict[int, Span] = field(default_factory=dict)

    def add(self, epoch: int, span: Span) -> None:
        """Take in what a chunk holds."""
        self.snapshots += span.snapshots
        self.batches += span.batches
        self.spans.setdefault(epoch, Span()).add(span)


@dataclass(slots=True)
class Summary:
    """What a recording holds. Times are wall times in ns; 0 where there are no records."""

    size_bytes: int
    created_ns: int
    complete: bool  # False: the recorder was cut off, and all this is of what is whole
    first_ns: int = 0
    last_ns: int = 0
    chunks: int = 0
    records: int = 0
    workers: dict[str, WorkerSummary] = field(default_factory=dict)  # by name


class RecordingReader:
    """Reads a recording chunk by chunk: holds one, and the index.

    Every method raises RecordingError for damage, naming the offset, and no other error. A record's payload is looked
    at when it is asked for: what is in it is checked by kv_events.wire and kv_events.snapshot_bytes.
    """

    def __init__(self, file: Path | str | BinaryIO) -> None:
        """A path, or a file that is open for reading and can be sought; it is closed with the reader. Raises OSError
        where a path cannot be opened."""
        self._name = str(file) if isinstance(file, Path | str) else ""
        self._file = Path(file).open("rb") if isinstance(file, Path | str) else file  # noqa: SIM115 - closed by close()
        try:
            self.size_bytes = self._file.seek(0, os.SEEK_END)
            self.created_ns = parse_header(self._read(0, HEADER_BYTES))
            self._entries: list[IndexEntry] | None = None  # None: there is no index
            self._names: list[str] = []
            self._index: Frame | None = None
            self._read_index()
        except BaseException as error:
            self._file.close()
            if isinstance(error, RecordingError):
                error.name_file(self._name)
            raise

    def __enter__(self) -> RecordingReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def complete(self) -> bool:
        """Whether the recorder ended in order. If not, the file is good up to its last whole chunk."""
        return self._entries is not None

    def records(
        self,
        workers: Collection[str] | None = None,
        from_ns: int = 0,
        position: tuple[str, int, int] | None = None,
    ) -> Iterator[Record]:
        """The records in the order in which they came: of these workers, from a time on.

        With `position` (worker, epoch, seq) they begin at, or somewhat before, the first batch of that worker at or
        past it.
        """
        try:
            yield from self._records(workers, from_ns, position)
        except RecordingError as error:
            error.name_file(self._name)
            raise

    def _records(
        self, workers: Collection[str] | None, from_ns: int, position: tuple[str, int, int] | None
    ) -> Iterator[Record]:
        names = dict(enumerate(self._names))
        for frame in self._chunks(*self._start(from_ns, position)):
            for kind, number, time_ns, payload in parse_records(self._body(frame), frame):
                if kind is RecordKind.WORKER:
                    name = parse_name(payload, frame.offset)
                    if names.setdefault(number, name) != name:
                        raise RecordingError(f"worker {number} has two names", frame.offset)
                elif number not in names:
                    raise RecordingError(f"a record of worker {number}, who has no name", frame.offset)
                elif time_ns >= from_ns and (workers is None or names[number] in workers):
                    yield Record(kind, names[number], time_ns, payload, frame.offset)

    def summary(self) -> Summary:
        """From the index, or by reading all of it where there is none."""
        summary = Summary(self.size_bytes, self.created_ns, self.complete)
        if self._entries is None:
            self._look_through(summary)
            return summary
        summary.workers = {name: WorkerSummary() for name in self._names}
        if self._entries:
            summary.first_ns, summary.last_ns = self._entries[0].first_ns, self._entries[-1].last_ns
        for entry in self._entries:
            summary.chunks += entry.chunks
            summary.records += entry.records
            for (number, epoch), span in entry.spans.items():
                summary.workers[self._names[number]].add(epoch, span)
        return summary

    def _read_index(self) -> None:
        end = self.size_bytes - FOOTER_BYTES
        offset = parse_footer(self._read(end, FOOTER_BYTES)) if end >= HEADER_BYTES else None
        if offset is None:
            return
        if not HEADER_BYTES <= offset <= end - FRAME_BYTES:
            raise RecordingError(f"the footer places the index at byte {offset}", end)
        frame = parse_frame(self._read(offset, FRAME_BYTES), offset)
        if frame.magic != INDEX or frame.end != end:
            raise RecordingError("there is no index where the footer says", offset)
        raw = inflate(frame, self._read(offset + FRAME_BYTES, frame.stored_bytes))
        self._names, self._entries = parse_index(raw, frame)
        self._index = frame

    def _look_through(self, summary: Summary) -> None:
        """What the index would say."""
        offset = -1
        for record in self.records():
            if not summary.records:
                summary.first_ns = record.time_ns
            summary.last_ns = record.time_ns
            summary.records += 1
            summary.chunks += record.offset != offset
            offset = record.offset
            worker = summary.workers.setdefault(record.worker, WorkerSummary())
            with suppress(wire.WireError):  # a record that is none counts as a record
                if record.kind is RecordKind.BATCH:
                    batch = record.batch()
                    worker.add(batch.epoch, Span(0, 1, batch.seq, batch.seq))
                elif record.kind is RecordKind.SNAPSHOT:
                    worker.add(record.snapshot().epoch, Span(snapshots=1))

    def _chunks(self, offset: int, number: int) -> Iterator[Frame]:
        """The heads of the chunks from one on."""
        end = self.size_bytes if self._index is None else self._index.offset
        time_ns = 0
        while offset < end:
            head = self._read(offset, FRAME_BYTES)
            if len(head) < FRAME_BYTES and self._index is None:
                return  # cut off
            frame = parse_frame(head, offset)
            if frame.end > end:
                if self._index is None:
                    return  # cut off
                raise RecordingError("a frame reaches into the index", offset)
            if frame.magic == INDEX:
                if self._index is None and self.size_bytes - frame.end < FOOTER_BYTES:
                    return  # cut off
                raise RecordingError("what follows the index is not the end of a recording", frame.end)
            if frame.number != number:
                raise RecordingError(f"this is chunk {frame.number} where {number} belongs", offset)
            if frame.first_ns < time_ns:
                raise RecordingError("the times of the chunks go back", offset)
            yield frame
            offset, number, time_ns = frame.end, number + 1, frame.last_ns
        if self._index is not None and number != self._index.number:
            raise RecordingError(f"{number} chunks come before the index, it tells of {self._index.number}", offset)

    def _body(self, frame: Frame) -> bytes:
        return inflate(frame, self._read(frame.offset + FRAME_BYTES, frame.stored_bytes))

    def _start(self, from_ns: int, position: tuple[str, int, int] | None) -> tuple[int, int]:
        """Offset and number of the chunk to begin with."""
        if self._index is None or not self._entries:
            return HEADER_BYTES, 0
        entries = self._entries
        first = max(0, bisect_left(entries, from_ns, key=lambda entry: entry.first_ns) - 1)
        if position is not None:
            first = max(
                first, next((i for i, entry in enumerate(entries) if self._reaches(entry, position)), len(entries))
            )
        if first == len(entries):
            return self._index.offset, self._index.number
        return entries[first].offset, sum(entry.chunks for entry in entries[:first])

    def _reaches(self, entry: IndexEntry, position: tuple[str, int, int]) -> bool:
        """Whether a chunk holds a batch of a worker at or past a position."""
        worker, *wanted = position
        return any(
            span.batches and self._names[number] == worker and [epoch, span.last_seq] >= wanted
            for (number, epoch), span in entry.spans.items()
        )

    def _read(self, offset: int, count: int) -> bytes:
        """At most `count` bytes: fewer at the end of the file."""
        self._file.seek(offset)
        return self._file.read(count)


def is_recording(path: Path) -> bool:
    """Whether a file begins like one. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
    try:
        parse_header(head)
    except RecordingError:
        return False
    return True
