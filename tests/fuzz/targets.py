"""What is fuzzed: each reader of bytes from afar, as a function of bytes that returns unless something is wrong.

WireError is what bytes may raise. Anything else is a finding: another exception, two readers that disagree, or what was
read and cannot be written again.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from unittest import mock

import msgpack
import numpy as np

from kv_events import wire
from kv_events.bus import grpc, redis_stream, zmq_frames
from kv_events.columns import changes_of
from kv_events.events import EventBatch
from kv_events.foreign import dialects
from kv_events.foreign.fields import event_of
from kv_events.inspect import jsonl, recording, recording_format
from kv_events.snapshot_bytes import decode_snapshot, encode_snapshot
from kv_events.wire import WireError
from radix.backend import native
from rhizome.errors import InvalidRequest
from rhizome.v1 import worker_pb2
from tests.fuzz import foreign_stream, seeds


@dataclass(frozen=True)
class Target:
    """One reader. `share`: of all runs; `max_len`: the longest input, bytes."""

    read: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    share: int
    max_len: int = 4096


def read_batch(data: bytes) -> None:
    """kv_events.wire.decode: what it reads can be looked at, applied, and written again to mean the same."""
    with suppress(WireError):
        batch = wire.decode(data)
        written = wire.encode(batch, positional=bool(batch.seq & 1))
        assert said(wire.decode(written)) == said(batch)


def read_batch_twice(data: bytes) -> None:
    """The decoder in Python and the native one: what the latter reads the former reads, with equal content."""
    try:
        right = wire.decode_in_python(data)
    except WireError:
        right = None
    found = native.decode_batch(data) if native else None
    if found is None:
        return
    assert right is not None
    assert (found.worker, found.epoch, found.seq, found.digest) == right[:3] + right[4:5]
    assert np.array_equal([found.ts], [right.ts])
    columns = changes_of(right.events)
    for name in ("kinds", "tiers", "parents", "ends", "hashes"):
        assert np.array_equal(getattr(found, name), getattr(columns, name))


def said(batch: EventBatch) -> Any:
    """A batch in a form that compares."""
    columns = changes_of(batch.events)
    values = [getattr(columns, name).tolist() for name in ("kinds", "tiers", "parents", "ends", "hashes")]
    return batch[:3], batch[4:], values, [repr(event) for event in batch.events]


def read_foreign(data: bytes) -> None:
    """kv_events.foreign.dialects: every value is of the type and within the limits that mappers count on; small batches
    of the common form, which are unpacked at once, say what others of the same bytes would."""
    with suppress(WireError):
        dialects.dialect_of(data)
    with suppress(WireError):
        batch = dialects.decode_foreign(data)
        assert type(batch.ts) is float
        assert abs(batch.ts) < float("inf")
        for event in batch.events:
            check_event(event)
        assert repr(dialects._batch(dialects._Reader(data))) == repr(batch)


def check_event(event: dialects.ForeignEvent) -> None:
    """That an event is what its types say."""
    if isinstance(event, dialects.ForeignStored):
        assert event.token_ids.dtype == np.uint32
        assert event.token_ids.ndim == 1
        assert 0 <= event.block_size <= wire.MAX_BLOCK_SIZE
        hash(event._replace(token_ids=dialects.NO_TOKENS.tobytes()))  # type: ignore[arg-type]
    if isinstance(event, dialects.ForeignStored | dialects.ForeignRemoved):
        for each in event.block_hashes:
            assert -(2**63) <= each < 2**64 if isinstance(each, int) else 1 <= len(each) <= 64
        assert type(event.medium) is str


def read_event_twice(data: bytes) -> None:
    """One foreign event, unpacked at once and read field by field, as large ones are: both say the same."""
    try:
        value = msgpack.unpackb(data, object_pairs_hook=_without_doubles)
    except Exception:
        return  # then it is always read field by field
    walked = _tried(lambda: dialects._walk(dialects._Reader(data), dialects._Room()))
    assert walked == _tried(lambda: event_of(value))


def _without_doubles(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("which of two fields of one name counts is not said")
    return found


def _tried(read: Callable[[], dialects.ForeignEvent]) -> str:
    try:
        event = read()
    except (WireError, *dialects._REFUSED):
        return "refused"
    tokens = event.token_ids.tolist() if isinstance(event, dialects.ForeignStored) else []
    return f"{tokens} {event!r}"


def read_snapshot(data: bytes) -> None:
    """kv_events.snapshot_bytes, with the checksum that came and with the right one: what it reads is written again
    byte for byte."""
    for whole in (data, data + seeds.snapshot_check(data)):
        with suppress(WireError):
            assert encode_snapshot(decode_snapshot(whole)) == whole


@contextmanager
def unchecked() -> Iterator[None]:
    """Checksums of recordings are zeros meanwhile, so that damage is found by what it does."""
    with mock.patch.object(recording_format, "_digest", lambda data, size: bytes(size)):
        yield


def read_recording(data: bytes) -> None:
    """kv_events.inspect.recording, checked and unchecked: its summary, its records, and what is in them."""
    _read_recording(data)
    with unchecked():
        _read_recording(data)


def _read_recording(data: bytes) -> None:
    with suppress(WireError), recording.RecordingReader(io.BytesIO(data)) as reader:
        with suppress(WireError):
            reader.summary()
        for record in reader.records():
            for look in (record.batch, record.snapshot, record.mark):
                if record.kind.name.lower() == look.__name__:
                    with suppress(WireError):
                        look()
        sum(1 for _ in reader.records({"w0"}, 5, ("w0", 1, 2)))


def read_index(data: bytes) -> None:
    """The bodies of an index and of a chunk, which lie compressed in a recording."""
    entries = int.from_bytes(data[:1], "little")
    frame = recording_format.Frame(b"INDX", data[1] if data[1:] else 0, 0, 0, entries, 0, 2**63, b"", 2**40)
    with suppress(WireError):
        recording_format.parse_index(data[2:], frame)
    with suppress(WireError):
        list(recording_format.parse_records(data[2:], frame))


def read_frames(data: bytes) -> None:
    """Requests and answers over ZeroMQ, of as many frames as bytes 255 part, and the IDs of Redis."""
    frames = data.split(b"\xff")
    for read in (zmq_frames.decode_request, zmq_frames.decode_answer):
        with suppress(WireError):
            read([b"", zmq_frames.MAGIC, bytes(8), *frames] if data[:1] == b"!" else frames)
    zmq_frames.worker_in(data)
    zmq_frames.is_goodbye(data, 1, 2)
    with suppress(WireError):
        redis_stream.StreamId.parse(data)


def read_lines(data: bytes) -> None:
    """JSON lines into a recording: what is taken can be read from it."""
    file = io.BytesIO()
    with mock.patch.object(file, "close"), suppress(InvalidRequest):
        lines = data.decode(errors="surrogateescape").split("\n")
        jsonl.read_lines(lines, lambda created_ns: recording.RecordingWriter(file, created_ns))
        with recording.RecordingReader(file) as reader:
            for line in jsonl.record_lines(reader.created_ns, reader.records()):
                assert line


def read_chunk(data: bytes) -> None:
    """A message of a worker's gRPC service, as a frame of batches and as a whole snapshot of one chunk."""
    with suppress(WireError):
        frame = grpc._parsed(worker_pb2.EventFrame, data)
        for payload in (frame.payload, *frame.more):
            read_batch(payload)
    with suppress(WireError):
        chunk = grpc._parsed(worker_pb2.SnapshotChunk, data)
        snapshot = grpc._assembled(chunk, chunk.block_hashes, chunk.parent_hashes, chunk.tier_masks)
        assert encode_snapshot(decode_snapshot(encode_snapshot(snapshot))) == encode_snapshot(snapshot)


TARGETS = {
    "wire": Target(read_batch, seeds.batches, 3),
    "wire-native": Target(read_batch_twice, seeds.batches, 3),
    "foreign": Target(read_foreign, seeds.foreign_batches, 4),
    "foreign-event": Target(read_event_twice, seeds.foreign_events, 4),
    "foreign-stream": Target(foreign_stream.play, seeds.schedules, 1, 512),
    "snapshot": Target(read_snapshot, seeds.snapshots, 1, 1024),
    "recording": Target(read_recording, seeds.recordings, 1, 2048),
    "recording-index": Target(read_index, seeds.indices, 1, 1024),
    "json-lines": Target(read_lines, seeds.lines, 1, 2048),
    "grpc": Target(read_chunk, seeds.messages, 1, 1024),
    "frames": Target(read_frames, seeds.frames, 1, 1024),
}
