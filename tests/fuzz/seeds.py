"""The inputs that fuzzing starts from: made of tests/golden and of what our own writers write, and stored nowhere."""

from __future__ import annotations

import hashlib
import io
from functools import cache
from pathlib import Path
from unittest import mock

import msgpack
import numpy as np

from kv_events import wire
from kv_events.bus import grpc, zmq_frames
from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, EventBatch, Snapshot, UnknownEvent
from kv_events.inspect import jsonl, recording, recording_format
from kv_events.snapshot_bytes import encode_snapshot
from rhizome.v1 import worker_pb2
from tests.support import golden

_CHECK_BYTES = 16

# What the mutator cannot guess: names, and heads of containers.
WORDS = [
    *("type", "BlockStored", "BlockRemoved", "AllBlocksCleared", "block_hashes", "parent_block_hash", "token_ids"),
    *("block_size", "lora_id", "medium", "lora_name", "extra_keys", "group_idx", "kv_cache_spec_kind", "cache_salt"),
    *("kv_cache_spec_sliding_window", "locality", "ts", "events", "data_parallel_rank", "attn_dp_rank", "GPU", "CPU"),
]
DICTIONARY = [msgpack.packb(word) for word in WORDS] + [
    *(b"\xc0", b"\xc2", b"\xc4\x01x", b"\xca\x00\x00\x00\x00", b"\xcf" + b"\xff" * 8, b"\xd3\x80" + bytes(7)),
    *(b"\x90", b"\x92\x01\x02", b"\x80", b"\xdc\x00\x01", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc1"),
    *(b"\xd9\xff", b"\xc6\xff\xff\xff\xff", b"\xc7\x01\x05x", b"\xd6\xff" + bytes(4)),
]


def _blocks(*hashes: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(hashes, dtype=np.uint64)


@cache
def _our_batches() -> list[EventBatch]:
    tokens = np.arange(32, dtype=np.uint32)
    stored = BlockStored(_blocks(1, 2**64 - 1), 7, 16), BlockStored(_blocks(5), 0, 16, tokens, "CPU")
    removed = BlockRemoved(_blocks(1)), BlockRemoved(_blocks(2, 3), "DISK")
    groups = [(), stored, removed, (AllBlocksCleared(), UnknownEvent("New")), (*stored, *removed), removed[:1] * 9]
    return [EventBatch("w0", 1, seq, events, bytes(16), 1.5 * seq) for seq, events in enumerate(groups)]


def batches() -> list[bytes]:
    """Ours, in both encodings, and those that the native core's fuzzer learned."""
    learned = Path(__file__).parents[1] / "native/batches.txt"
    ours = [wire.encode(batch, positional=positional) for batch in _our_batches() for positional in (False, True)]
    return ours + [bytes.fromhex(line) for line in learned.read_text().splitlines()[::8]]


def foreign_batches() -> list[bytes]:
    """The golden frames, each odd thing that a release writes, and ours."""
    odd = [
        ["BlockStored", [b"12345678"], None, [[1, 2], [2, 3]], 2, "a", None, {"cache_salt": "s"}],
        {"type": "BlockStored", "block_hashes": [1], "extra_keys": [[["x", 1], b"y"], None], "lora_name": "l"},
        ["BlockStored", [-1], b"x" * 32, [], 0, 3, "STORAGE", None, [["s"]], 1, "mamba", 9, "REMOTE", {}, [[]]],
    ]
    maps = {"ts": 1, "events": odd, "attn_dp_rank": None}
    return [*golden.payloads().values(), msgpack.packb([1, odd]), msgpack.packb(maps), *batches()[:4]]


def foreign_events() -> list[bytes]:
    """The events of those, one by one."""
    found = set()
    for payload in foreign_batches()[:-4]:
        value = msgpack.unpackb(payload)
        found |= {msgpack.packb(event) for event in (value["events"] if isinstance(value, dict) else value[1])}
    return sorted(found)


def schedules() -> list[bytes]:
    """See tests.fuzz.foreign_stream."""
    grows = bytes(range(40))
    return [grows, grows[::-1], bytes([1, *[0] * 200]), bytes([2, *(at * 37 % 256 for at in range(300))])]


@cache
def _snapshots() -> list[Snapshot]:
    hashes, parents = _blocks(1, 2, 3), _blocks(0, 1, 7)
    masks = np.array([1, 3, 4], dtype=np.uint8)
    return [Snapshot("w0", 1, 3, bytes(16), 16, hashes, parents, mask) for mask in (None, masks)] + [
        Snapshot("wörker", 2**62, 0, bytes(16), 1, hashes[:0], parents[:0])
    ]


def snapshot_check(data: bytes) -> bytes:
    """What a snapshot's bytes should end with."""
    return hashlib.blake2b(data, digest_size=_CHECK_BYTES).digest()


def snapshots() -> list[bytes]:
    """With and without their checksums."""
    whole = [encode_snapshot(snapshot) for snapshot in _snapshots()]
    return whole + [data[:-_CHECK_BYTES] for data in whole]


def _recording(chunk_bytes: int, closed: bool) -> bytes:
    file = io.BytesIO()
    with mock.patch.object(recording, "CHUNK_BYTES", chunk_bytes), mock.patch.object(file, "close"):
        writer = recording.RecordingWriter(file, 5)
        for at, batch in enumerate(_our_batches()):
            writer.snapshot("w0", _snapshots()[at % 3], 10 * at)
            writer.batch(f"w{at % 2}", batch, 10 * at + 1)
            writer.mark("w0", "lost", 10 * at + 2)
        writer.flush()
        if closed:
            writer.close()
    return file.getvalue()


def recordings() -> list[bytes]:
    """Of one chunk and of several, whole and cut off, with checksums and (see targets.unchecked) without."""
    shapes = [(size, closed) for size in (64, 2**20) for closed in (False, True)]
    checked = [_recording(*shape) for shape in shapes]
    with mock.patch.object(recording_format, "_digest", lambda data, size: bytes(size)):
        return checked + [_recording(*shape) for shape in shapes]


def indices() -> list[bytes]:
    """The inflated bodies of those, behind a byte for the number of entries and one for the number of chunks."""
    found = []
    for whole in recordings()[:4]:
        at = recording_format.HEADER_BYTES
        while len(whole) - at >= recording_format.FRAME_BYTES:
            body = at + recording_format.FRAME_BYTES
            frame = recording_format.parse_frame(whole[at:body], at)
            head = bytes([frame.records % 256, frame.number % 256])
            found.append(head + recording_format.inflate(frame, whole[body : frame.end]))
            at = frame.end
    return found


def frames() -> list[bytes]:
    """Requests and answers, frames parted by a byte 255; those that begin with ! lack what all of them begin with."""
    requests = [
        zmq_frames.ForeignReplay(5),
        zmq_frames.StateRequest(b"proof"),
        zmq_frames.ReplayRequest(1, 2),
        zmq_frames.SnapshotRequest(7, 9),
    ]
    answer = zmq_frames.Answer(zmq_frames.Status.OK, "", "w0", 1, 2, False, True, 3, 4)
    sent = [zmq_frames.encode_request(3, request) for request in requests]
    sent.append(zmq_frames.encode_answer(3, answer, [b"part"]))
    topics = [b"kv@w0@model", zmq_frames.goodbye(1, 2), b"12-34"]
    return [b"\xff".join(each) for each in sent] + [b"!" + each[-1] for each in sent[1:-1]] + topics


def lines() -> list[bytes]:
    """A recording as JSON lines, whole and line by line behind its header."""
    with recording.RecordingReader(io.BytesIO(_recording(2**20, closed=True))) as reader:
        written = [line.encode() for line in jsonl.record_lines(reader.created_ns, reader.records())]
    return [b"\n".join(written), *(written[0] + b"\n" + line for line in written[1:])]


def messages() -> list[bytes]:
    """Frames of batches and chunks of snapshots, of a worker's gRPC service."""
    chunks = [chunk for snapshot in _snapshots() for chunk in grpc._chunks(snapshot)]
    payloads = batches()[:6]
    frames = [worker_pb2.EventFrame(seq=3, payload=payloads[0]), worker_pb2.EventFrame(payload=b"", more=payloads[2:5])]
    return [message.SerializeToString() for message in (*chunks, *frames)]
