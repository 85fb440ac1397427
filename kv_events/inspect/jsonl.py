"""Recordings as JSON lines, and back. No I/O.

One object a line; `kind` says which:

    header    format "rhizome-events", version 1, created_ns
    snapshot  worker, time_ns, epoch, next_seq, digest, block_size, block_hashes, parent_hashes, tier_masks (or null)
    batch     worker, time_ns, epoch, seq, digest, ts, events
    mark      worker, time_ns, text

`name` is there where the stream is called otherwise than its worker. Events are as kv_events.wire has them: `type`,
`block_hashes`, `parent_block_hash` (null at the root), `token_ids` (null where none are told), `block_size`, `medium`.
Hashes and digests are strings of hexadecimal digits, times in ns decimal strings: jq and JavaScript round integers past
2^53. Epochs and sequence numbers are numbers up to there, and decimal strings beyond. Where kv_events.wire would write
a batch otherwise than it was recorded (it came from another writer), `payload` holds its bytes in base64, and stands
for all the rest when the line is read.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kv_events import wire
from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventBatch, Snapshot, UnknownEvent
from kv_events.inspect.recording import Record, RecordingWriter, RecordKind
from kv_events.inspect.words import key_text
from kv_events.snapshot_bytes import decode_snapshot, encode_snapshot
from kv_events.wire import WireError
from radix.digest import DIGEST_BYTES
from radix.keys import Hashes
from rhizome.errors import InvalidRequest

FORMAT = "rhizome-events"
VERSION = 1

MAX_LINE_CHARS = 2**30
"""A snapshot of 2^24 blocks has 600 million."""

_EXACT = 2**53  # larger integers are not exact as doubles


def record_lines(created_ns: int, records: Iterable[Record]) -> Iterator[str]:
    """All lines of a recording, without their ends. Raises WireError where a record cannot be read."""
    yield header_line(created_ns)
    yield from map(record_line, records)


def header_line(created_ns: int) -> str:
    """The first line, without its end."""
    return _dumped({"kind": "header", "format": FORMAT, "version": VERSION, "created_ns": str(created_ns)})


def record_line(record: Record) -> str:
    """A record as a line, without its end. Raises WireError where its payload is none."""
    head: dict[str, Any] = {"kind": record.kind.name.lower(), "worker": record.worker, "time_ns": str(record.time_ns)}
    match record.kind:
        case RecordKind.BATCH:
            batch = record.batch()
            body, worker = _batch_fields(batch), batch.worker
            if wire.encode(batch) != record.payload:
                body["payload"] = base64.b64encode(record.payload).decode()
        case RecordKind.SNAPSHOT:
            snapshot = record.snapshot()
            body, worker = _snapshot_fields(snapshot), snapshot.worker
        case _:
            body, worker = {"text": record.mark()}, record.worker
    if worker != record.worker:
        head |= {"worker": worker, "name": record.worker}
    return _dumped(head | body)


def read_lines(lines: Iterable[str], make_writer: Callable[[int], RecordingWriter]) -> int:
    """Write lines into a recording, and close it; returns how many records. `make_writer` is told when the recording
    was created, in ns. Raises InvalidRequest("line", ...) for the first line that is not right."""
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    number, line = next(numbered, (1, "{}"))
    with _line(number):
        created_ns = _header(_Fields(_loaded(line)))
    with make_writer(created_ns) as writer:
        for number, line in numbered:
            with _line(number):
                _write(_Fields(_loaded(line)), writer)
    return writer.records


@contextmanager
def _line(number: int) -> Iterator[None]:
    try:
        yield
    except (WireError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidRequest("line", number, str(error)) from error


def _batch_fields(batch: EventBatch) -> dict[str, Any]:
    return {
        "epoch": _count(batch.epoch),
        "seq": _count(batch.seq),
        "digest": batch.digest.hex(),
        "ts": batch.ts,
        "events": [_event_fields(event) for event in batch.events],
    }


def _event_fields(event: Event) -> dict[str, Any]:
    match event:
        case BlockStored():
            return {
                "type": "BlockStored",
                "block_hashes": hex_hashes(event.block_hashes),
                "parent_block_hash": key_text(event.parent_hash) if event.parent_hash else None,
                "token_ids": None if event.token_ids is None else event.token_ids.tolist(),
                "block_size": event.block_size,
                "medium": event.medium,
            }
        case BlockRemoved():
            return {"type": "BlockRemoved", "block_hashes": hex_hashes(event.block_hashes), "medium": event.medium}
        case AllBlocksCleared():
            return {"type": "AllBlocksCleared"}
        case UnknownEvent():
            return {"type": event.kind}


def _snapshot_fields(snapshot: Snapshot) -> dict[str, Any]:
    masks = snapshot.tier_masks
    return {
        "epoch": _count(snapshot.epoch),
        "next_seq": _count(snapshot.next_seq),
        "digest": snapshot.digest.hex(),
        "block_size": snapshot.block_size,
        "block_hashes": hex_hashes(snapshot.block_hashes),
        "parent_hashes": hex_hashes(snapshot.parent_hashes),
        "tier_masks": None if masks is None else masks.tolist(),
    }


def hex_hashes(hashes: Hashes) -> list[str]:
    """16 hexadecimal digits each."""
    return [key_text(block) for block in hashes.tolist()]


def _header(fields: _Fields) -> int:
    if (
        fields.get("kind", str) != "header"
        or fields.get("format", str) != FORMAT
        or fields.get("version", int) != VERSION
    ):
        raise ValueError(f"not the header of {FORMAT} version {VERSION}")
    return fields.count("created_ns")


def _write(fields: _Fields, writer: RecordingWriter) -> None:
    worker, time_ns = fields.get("worker", str), fields.count("time_ns")
    name = fields.get("name", str) if fields.has("name") else worker
    match fields.get("kind", str):
        case "batch":
            batch = fields.batch(worker)
            payload = fields.payload() if fields.has("payload") else wire.encode(batch)
            batch = wire.decode(payload)  # what is written can be read
            writer.batch_bytes(name, payload, batch.epoch, batch.seq, time_ns)
        case "snapshot":
            payload = encode_snapshot(fields.snapshot(worker))
            writer.snapshot_bytes(name, payload, decode_snapshot(payload).epoch, time_ns)
        case "mark":
            writer.mark(name, fields.get("text", str), time_ns)
        case kind:
            raise ValueError(f"kind is {kind[:40]!r}: snapshot, batch and mark are known")


class _Fields:
    """A line's object; every method raises ValueError naming the field."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def has(self, name: str) -> bool:
        return self._fields.get(name) is not None

    def get(self, name: str, kind: type[Any]) -> Any:
        value = self._fields.get(name)
        if type(value) is not kind:
            raise ValueError(f"{name} is {_shown(value)}: {kind.__name__} is needed")
        return value

    def count(self, name: str, most: int = 2**64 - 1) -> int:
        value = self._fields.get(name)
        if type(value) is str and value.isdecimal() and value.isascii() and len(value) <= 20:
            value = int(value)
        if type(value) is not int or not 0 <= value <= most:
            raise ValueError(f"{name} is {_shown(value)}: 0 to {most} is needed, as a number or a decimal string")
        return value

    def hashes(self, name: str) -> Hashes:
        values = self.get(name, list)
        try:
            return np.array([_from_hex(value) for value in values], dtype=np.uint64)
        except ValueError as error:
            raise ValueError(f"{name} hold {error}") from None

    def digest(self) -> bytes:
        text = self.get("digest", str)
        try:
            digest = bytes.fromhex(text)
        except ValueError:
            digest = b""
        if len(digest) != DIGEST_BYTES:
            raise ValueError(f"digest is {_shown(text)}: {2 * DIGEST_BYTES} hexadecimal digits are needed")
        return digest

    def payload(self) -> bytes:
        try:
            return base64.b64decode(self.get("payload", str), validate=True)
        except binascii.Error as error:
            raise ValueError(f"payload is not base64: {error}") from error

    def batch(self, worker: str) -> EventBatch:
        ts: Any = self._fields.get("ts")
        if type(ts) not in (int, float) or not math.isfinite(ts):
            raise ValueError(f"ts is {_shown(ts)}: a finite number is needed")
        events = tuple(_Fields(_object("event", each)).event() for each in self.get("events", list))
        return EventBatch(worker, self.count("epoch"), self.count("seq"), events, self.digest(), float(ts))

    def event(self) -> Event:
        match self.get("type", str):
            case "BlockStored":
                parent = _from_hex(self.get("parent_block_hash", str)) if self.has("parent_block_hash") else 0
                tokens = self._integers("token_ids", np.uint32) if self.has("token_ids") else None
                size, medium = self.get("block_size", int), self.get("medium", str)
                return BlockStored(self.hashes("block_hashes"), parent, size, tokens, medium)
            case "BlockRemoved":
                return BlockRemoved(self.hashes("block_hashes"), self.get("medium", str))
            case "AllBlocksCleared":
                return AllBlocksCleared()
            case kind:
                return UnknownEvent(kind)

    def snapshot(self, worker: str) -> Snapshot:
        hashes, parents = self.hashes("block_hashes"), self.hashes("parent_hashes")
        masks = self._integers("tier_masks", np.uint8) if self.has("tier_masks") else None
        if len(parents) != len(hashes) or (masks is not None and len(masks) != len(hashes)):
            raise ValueError(f"parent_hashes and tier_masks must be as many as block_hashes, {len(hashes)}")
        numbers = self.count("epoch"), self.count("next_seq")
        block_size = self.count("block_size", wire.MAX_BLOCK_SIZE)
        return Snapshot(worker, *numbers, self.digest(), block_size, hashes, parents, masks)

    def _integers(self, name: str, dtype: type[Any]) -> NDArray[Any]:
        values = self.get(name, list)
        if not set(map(type, values)) <= {int}:
            raise ValueError(f"{name} hold other than integers")
        return np.array(values, dtype=dtype)  # OverflowError out of its range


def _from_hex(text: object) -> int:
    if type(text) is not str or not 1 <= len(text) <= 16 or not set(text) <= _HEX:
        raise ValueError(f"{_shown(text)}: 1 to 16 hexadecimal digits are needed")
    return int(text, 16)


_HEX = set("0123456789abcdefABCDEF")


def _count(value: int) -> int | str:
    return value if value < _EXACT else str(value)


def _dumped(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _loaded(line: str) -> dict[str, Any]:
    if len(line) > MAX_LINE_CHARS:
        raise ValueError(f"it has {len(line)} characters: at most {MAX_LINE_CHARS}")
    try:
        return _object("it", json.loads(line))
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from None


def _object(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {_shown(value)}: a JSON object is needed")
    return value


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
