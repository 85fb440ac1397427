"""The bytes of a recording: frames, records and the index. No I/O.

All integers are little-endian. A recording is

    header   magic "RHZEVTS\\0", version uint32, 0 uint32, created uint64 (ns since 1970), check (8 bytes)
    chunk *  a frame "CHNK" of records
    index    a frame "INDX"
    footer   magic "RHZEND\\0\\0", offset of the index uint64, check (8 bytes)

    frame    magic (4 bytes), number uint32 (chunks from 0; the index: how many chunks), stored_bytes uint32, raw_bytes
             uint32, records uint32 (in an index: entries), first time uint64, last time uint64, check of the stored
             bytes (16 bytes), check of all before (8 bytes); then stored_bytes of zlib, which inflate to raw_bytes
    record   kind uint8, worker uint16, time uint64, payload_bytes uint32; then the payload

Kinds of records are in RecordKind; times are wall times of receipt in ns, and do not go back. A worker is named by a
record of its own before the first record with its number. The index repeats the names, and says of each chunk, or run
of chunks, where it is, when it begins and ends, and which batches (epoch, from and to which seq) and how many snapshots
of whom it holds.

Checks are BLAKE2b (RFC 7693) of 8 or 16 bytes: they tell of damage, and are no defence against forgers. A file that
ends within a frame, or before the footer, was cut off: what is whole before is good. Anything else that does not fit
is damage.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple, TypeAlias

from kv_events.snapshot_bytes import MAX_SNAPSHOT_BYTES
from kv_events.wire import MAX_COUNT, MAX_STRING_BYTES, WireError
from radix.tree import MAX_WORKERS

VERSION = 1

CHUNK_BYTES = 2**20
"""Of records, before they are compressed: a chunk that has as many is written. One larger record has its own chunk."""

MAX_RECORD_BYTES = MAX_SNAPSHOT_BYTES  # batches are smaller
MAX_INDEX_SPANS = 2**18
"""In an index, about 10 MB, unless one entry has more: past that neighbouring entries become one, whatever the file."""

MAX_INDEX_BYTES = 64 * 2**20
MAX_RATIO = 1100  # zlib's is 1,032 at most: what claims more is not inflated

_HEADER = struct.Struct("<8sIIQ")
_FRAME = struct.Struct("<4sIIIIQQ16s")
_FOOTER = struct.Struct("<8sQ")
_RECORD = struct.Struct("<BHQI")
_INDEX_ENTRY = struct.Struct("<QIQQQI")  # offset, chunks, first and last time, records, spans
_INDEX_SPAN = struct.Struct("<HIIQQQ")  # worker, snapshots, batches, epoch, first and last seq
_CHECK_BYTES = 8

HEADER_BYTES = _HEADER.size + _CHECK_BYTES
FRAME_BYTES = _FRAME.size + _CHECK_BYTES
FOOTER_BYTES = _FOOTER.size + _CHECK_BYTES
RECORD_BYTES = _RECORD.size

CHUNK, INDEX = b"CHNK", b"INDX"
_MAGIC, _END_MAGIC = b"RHZEVTS\0", b"RHZEND\0\0"


class RecordingError(WireError):
    """Bytes that are not a recording, or a damaged one."""

    def __init__(self, message: str, offset: int) -> None:
        """`offset` in the file, in bytes, of what does not fit."""
        super().__init__(f"{message} (at byte {offset})")
        self.offset = offset

    def name_file(self, file: str) -> None:
        """Begin the message with the file's name, once it is known."""
        if file and not str(self).startswith(f"{file}: "):
            self.args = (f"{file}: {self}",)


DIGESTS_MADE_HERE = "the digests are the recorder's: this server sends none"
"""A mark on streams of foreign servers: that digests come out as recorded says nothing of what the server holds."""


class RecordKind(IntEnum):
    """What a record holds."""

    WORKER = 1  # the name of a worker (UTF-8), which has this number from here on
    SNAPSHOT = 2  # kv_events.snapshot_bytes
    BATCH = 3  # kv_events.wire
    MARK = 4  # a line of text (UTF-8) about the stream at this point: what the recorder saw


class RawRecord(NamedTuple):
    """A record as it is in a chunk."""

    kind: RecordKind
    worker: int
    time_ns: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Frame:
    """The head of a chunk or an index."""

    magic: bytes
    number: int
    stored_bytes: int
    raw_bytes: int
    records: int
    first_ns: int
    last_ns: int
    check: bytes
    offset: int  # in the file

    @property
    def end(self) -> int:
        """The offset behind it."""
        return self.offset + FRAME_BYTES + self.stored_bytes


@dataclass(slots=True)
class Span:
    """What some chunks hold of a worker in one epoch. Sequence numbers are of no meaning where there are no batches."""

    snapshots: int = 0
    batches: int = 0
    first_seq: int = MAX_COUNT
    last_seq: int = 0

    def add(self, other: Span) -> None:
        """Take in what other chunks hold."""
        self.snapshots += other.snapshots
        self.batches += other.batches
        self.first_seq = min(self.first_seq, other.first_seq)
        self.last_seq = max(self.last_seq, other.last_seq)


Spans: TypeAlias = dict[tuple[int, int], Span]
"""By (worker's number, epoch)."""


@dataclass(slots=True)
class IndexEntry:
    """One chunk, or some that follow each other. Marks count in `records` alone."""

    offset: int
    chunks: int
    first_ns: int
    last_ns: int
    records: int
    spans: Spans = field(default_factory=dict)

    def add(self, following: IndexEntry) -> None:
        """Take in the next entry."""
        self.chunks += following.chunks
        self.last_ns = following.last_ns
        self.records += following.records
        for key, span in following.spans.items():
            self.spans.setdefault(key, Span()).add(span)


def thinned(entries: list[IndexEntry]) -> list[IndexEntry]:
    """Half as many entries, each made of two. The given ones are used up."""
    for one, following in zip(entries[::2], entries[1::2], strict=False):
        one.add(following)
    return entries[::2]


def pack_header(created_ns: int) -> bytes:
    """The first HEADER_BYTES of a file."""
    return _checked(_HEADER.pack(_MAGIC, VERSION, 0, created_ns))


def parse_header(data: bytes) -> int:
    """When the recording was begun, ns. Raises RecordingError for what is none."""
    if data[: len(_MAGIC)] != _MAGIC:
        raise RecordingError("this is not a recording of events", 0)
    if len(data) < HEADER_BYTES:
        raise RecordingError(f"the file ends after {len(data)} bytes: a header has {HEADER_BYTES}", 0)
    _, version, _, created_ns = _HEADER.unpack_from(data)
    if not _is_checked(data):
        raise RecordingError("the header is damaged", 0)
    if version != VERSION:
        raise RecordingError(f"version is {version}: this release reads {VERSION}", len(_MAGIC))
    return int(created_ns)


def pack_footer(index_offset: int) -> bytes:
    """The last FOOTER_BYTES of a whole file."""
    return _checked(_FOOTER.pack(_END_MAGIC, index_offset))


def parse_footer(data: bytes) -> int | None:
    """The offset of the index; None where this is no footer."""
    if len(data) != FOOTER_BYTES or not _is_checked(data) or data[: len(_END_MAGIC)] != _END_MAGIC:
        return None
    return int(_FOOTER.unpack_from(data)[1])


def pack_frame(magic: bytes, number: int, raw: bytes, records: int, first_ns: int, last_ns: int) -> bytes:
    """A whole frame, its body included."""
    assert len(raw) <= MAX_RECORD_BYTES + CHUNK_BYTES
    stored = zlib.compress(raw, 6)
    fields = (magic, number, len(stored), len(raw), records, first_ns, last_ns)
    return _checked(_FRAME.pack(*fields, _digest(stored, 16))) + stored


def parse_frame(data: bytes, offset: int) -> Frame:
    """A frame's head from its FRAME_BYTES. Raises RecordingError for damage, and for sizes over the limits."""
    if len(data) != FRAME_BYTES or not _is_checked(data):
        raise RecordingError("the head of a frame is damaged", offset)
    magic, number, stored_bytes, raw_bytes, records, first_ns, last_ns, check = _FRAME.unpack_from(data)
    frame = Frame(magic, number, stored_bytes, raw_bytes, records, first_ns, last_ns, check, offset)
    limit = {CHUNK: MAX_RECORD_BYTES + CHUNK_BYTES, INDEX: MAX_INDEX_BYTES}.get(frame.magic)
    if limit is None:
        raise RecordingError(f"a frame of the unknown kind {frame.magic!r}", offset)
    if frame.raw_bytes > min(limit, MAX_RATIO * frame.stored_bytes):
        raise RecordingError(f"a frame says that {frame.stored_bytes} bytes inflate to {frame.raw_bytes}", offset)
    if frame.stored_bytes > limit or frame.first_ns > frame.last_ns:
        raise RecordingError("the head of a frame contradicts itself", offset)
    return frame


def inflate(frame: Frame, stored: bytes) -> bytes:
    """A frame's body. Raises RecordingError for damage; allocates no more than the frame says."""
    if len(stored) != frame.stored_bytes or _digest(stored, 16) != frame.check:
        raise RecordingError("a frame's body is damaged", frame.offset)
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(stored, frame.raw_bytes + 1)
    except zlib.error as error:
        raise RecordingError(f"a frame's body is not zlib: {error}", frame.offset) from error
    if len(raw) != frame.raw_bytes or not inflater.eof or inflater.unused_data:
        raise RecordingError(f"a frame's body does not inflate to {frame.raw_bytes} bytes", frame.offset)
    return raw


def pack_record(record: RawRecord) -> bytes:
    """A record."""
    return _RECORD.pack(record.kind, record.worker, record.time_ns, len(record.payload)) + record.payload


def parse_records(raw: bytes, frame: Frame) -> Iterator[RawRecord]:
    """The records of a chunk's body. Raises RecordingError where they are not as many as said, or do not fit."""
    at, time_ns = 0, frame.first_ns
    for _ in range(frame.records):
        if len(raw) - at < RECORD_BYTES:
            raise RecordingError("a chunk ends within a record", frame.offset)
        kind, worker, record_ns, payload_bytes = _RECORD.unpack_from(raw, at)
        at += RECORD_BYTES
        if len(raw) - at < payload_bytes:
            raise RecordingError("a chunk ends within a record's payload", frame.offset)
        if not RecordKind.WORKER <= kind <= RecordKind.MARK:
            raise RecordingError(f"a record of the unknown kind {kind}", frame.offset)
        if not time_ns <= record_ns <= frame.last_ns:
            raise RecordingError("the times of a chunk's records go back, or leave the chunk's", frame.offset)
        time_ns = record_ns
        yield RawRecord(RecordKind(kind), worker, record_ns, raw[at : at + payload_bytes])
        at += payload_bytes
    if at != len(raw):
        raise RecordingError("bytes follow a chunk's records", frame.offset)


def pack_index(names: list[str], entries: list[IndexEntry]) -> bytes:
    """The body of an index."""
    parts = [struct.pack("<I", len(names))]
    for encoded in (name.encode() for name in names):
        parts += [struct.pack("<H", len(encoded)), encoded]
    parts.append(struct.pack("<I", len(entries)))
    for entry in entries:
        times = (entry.first_ns, entry.last_ns)
        parts.append(_INDEX_ENTRY.pack(entry.offset, entry.chunks, *times, entry.records, len(entry.spans)))
        for (worker, epoch), span in entry.spans.items():
            seqs = (span.first_seq, span.last_seq)
            parts.append(_INDEX_SPAN.pack(worker, span.snapshots, span.batches, epoch, *seqs))
    return b"".join(parts)


def parse_index(raw: bytes, frame: Frame) -> tuple[list[str], list[IndexEntry]]:
    """The names of the workers by number, and the entries. Raises RecordingError for what does not fit."""
    body = _Body(raw, frame.offset)
    (workers,) = body.take("<I")
    if workers > MAX_WORKERS:
        raise RecordingError(f"the index names {workers} workers: at most {MAX_WORKERS}", frame.offset)
    names = [parse_name(body.bytes(*body.take("<H")), frame.offset) for _ in range(workers)]
    (count,) = body.take("<I")
    if count != frame.records:
        raise RecordingError(f"the index lists {count} entries, its head {frame.records}", frame.offset)
    entries = [_parse_entry(body, workers, frame.offset) for _ in range(count)]
    body.finish()
    offsets = [entry.offset for entry in entries]
    if offsets != sorted(set(offsets)) or (offsets and not HEADER_BYTES == offsets[0] <= offsets[-1] < frame.offset):
        raise RecordingError("the index places chunks where none can be", frame.offset)
    if sum(entry.chunks for entry in entries) != frame.number:
        raise RecordingError(f"the index does not list the {frame.number} chunks of its head", frame.offset)
    return names, entries


def _parse_entry(body: _Body, workers: int, at: int) -> IndexEntry:
    offset, chunks, first_ns, last_ns, records, spans = body.take(_INDEX_ENTRY)
    entry = IndexEntry(offset, chunks, first_ns, last_ns, records)
    for _ in range(spans):
        worker, snapshots, batches, epoch, first_seq, last_seq = body.take(_INDEX_SPAN)
        if worker >= workers:
            raise RecordingError(f"the index tells of worker {worker} of {workers}", at)
        entry.spans[worker, epoch] = Span(snapshots, batches, first_seq, last_seq)
    return entry


def parse_name(data: bytes, offset: int) -> str:
    """A worker's name. Raises RecordingError for what is none."""
    try:
        name = data.decode()
    except UnicodeDecodeError:
        name = ""
    if not 0 < len(data) <= MAX_STRING_BYTES or not name:
        raise RecordingError(f"a worker's name is {data[:MAX_STRING_BYTES]!r}", offset)
    return name


class _Body:
    """Reads an index piece by piece."""

    def __init__(self, raw: bytes, offset: int) -> None:
        self._raw = raw
        self._at = 0
        self._offset = offset

    def take(self, layout: struct.Struct | str) -> tuple[int, ...]:
        layout = struct.Struct(layout) if isinstance(layout, str) else layout
        values: tuple[int, ...] = layout.unpack(self.bytes(layout.size))
        return values

    def bytes(self, count: int) -> bytes:
        part = self._raw[self._at : self._at + count]
        if len(part) != count:
            raise RecordingError("the index ends too early", self._offset)
        self._at += count
        return part

    def finish(self) -> None:
        if self._at != len(self._raw):
            raise RecordingError("bytes follow the index", self._offset)


def _checked(data: bytes) -> bytes:
    return data + _digest(data, _CHECK_BYTES)


def _is_checked(data: bytes) -> bool:
    return _digest(data[:-_CHECK_BYTES], _CHECK_BYTES) == data[-_CHECK_BYTES:]


def _digest(data: bytes, size: int) -> bytes:
    return hashlib.blake2b(data, digest_size=size).digest()
