"""Event batches as bytes, in the shape of vLLM's KV events (msgpack; its KVEventBatch), with our fields at the tail.

    [ts, [event, ...], data_parallel_rank, version, worker, epoch, seq, digest]

Events are maps with a "type" (vLLM from 0.24) or, by switch, arrays that begin with it (before); hashes are unsigned
64-bit integers, a missing parent is nil. msgspec, so vLLM's own reader, ignores the elements that follow the third.
Decoding is strict and bounded: what it accepts it understands, and no input makes it allocate more than a small
multiple of its own size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, overload

import msgpack
import numpy as np
from numpy.typing import NDArray

from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventBatch, UnknownEvent
from radix.backend import native
from radix.digest import DIGEST_BYTES
from radix.keys import ROOT_HASH
from radix.tree import Changes

VERSION = 1

MAX_PAYLOAD_BYTES = 8 * 2**20  # holds the two sums below; half of a gRPC message
MAX_EVENTS_PER_BATCH = 2**14
MAX_HASHES_PER_EVENT = 2**16
MAX_HASHES_PER_BATCH = 2**17
MAX_TOKENS_PER_BATCH = 2**20
MAX_FIELDS = 32  # of a batch or an event: twice what any known release writes
MAX_STRING_BYTES = 256
MAX_BLOCK_SIZE = 2**20  # tokens
MAX_COUNT = 2**63 - 1  # of epochs and sequence numbers
MAX_HASH = 2**64 - 1

_CHUNK = 2**12  # integers that are Python's at once, before they go into an array


class WireError(Exception):
    """Bytes that are not an event batch of ours. The only exception that decoding raises."""


def fits(events: Sequence[Event]) -> bool:
    """Whether a batch of these events is within the limits; one that is not cannot be sent."""
    stored = [event for event in events if isinstance(event, BlockStored)]
    hashes = [len(event.block_hashes) for event in events if isinstance(event, BlockStored | BlockRemoved)]
    return (
        len(events) <= MAX_EVENTS_PER_BATCH
        and sum(hashes) <= MAX_HASHES_PER_BATCH
        and max(hashes, default=0) <= MAX_HASHES_PER_EVENT
        and sum(len(event.token_ids) for event in stored if event.token_ids is not None) <= MAX_TOKENS_PER_BATCH
    )


def encode(batch: EventBatch, *, positional: bool = False, own_fields: bool = True) -> bytes:
    """A batch as bytes. Raises WireError when it is over the limits.

    Without `own_fields` it ends after the third element, as Dynamo's and other strict readers of vLLM's shape want it;
    `decode` refuses it then.
    """
    if not fits(batch.events):
        raise WireError(f"batch {batch.seq} of {batch.worker} is too large to be sent")
    events = [_encode_event(event) for event in batch.events]
    encoded = [list(event.values()) for event in events] if positional else events
    ours = (VERSION, batch.worker, batch.epoch, batch.seq, batch.digest) if own_fields else ()
    payload: bytes = msgpack.packb([batch.ts, encoded, 0, *ours])
    if len(payload) > MAX_PAYLOAD_BYTES:  # only names of unknown kinds could do it
        raise WireError(f"batch {batch.seq} of {batch.worker} is too large to be sent")
    return payload


def _encode_event(event: Event) -> dict[str, Any]:
    """An event with its fields in the order that the positional encoding wants."""
    match event:
        case BlockStored():
            return {
                "type": "BlockStored",
                "block_hashes": event.block_hashes.tolist(),
                "parent_block_hash": event.parent_hash or None,
                "token_ids": [] if event.token_ids is None else event.token_ids.tolist(),
                "block_size": event.block_size,
                "lora_id": None,
                "medium": event.medium,
                "lora_name": None,  # may be nil, not missing, to vLLM's own reader
            }
        case BlockRemoved():
            return {"type": "BlockRemoved", "block_hashes": event.block_hashes.tolist(), "medium": event.medium}
        case AllBlocksCleared():
            return {"type": "AllBlocksCleared"}
        case UnknownEvent():  # from whoever records what it has read
            if event.kind in _POSITIONS or not 1 <= len(event.kind.encode()) <= MAX_STRING_BYTES:
                raise WireError(f"{event.kind[:40]!r} is no unknown kind: 1 to {MAX_STRING_BYTES} bytes, none known")
            return {"type": event.kind}


_decode_natively = getattr(native, "decode_batch", None)


class DecodedEvents(Sequence[Event]):
    """The events of a batch that the native core has read: columns for the tree, values for whoever looks at them."""

    __slots__ = ("_source", "changes", "size_bytes")

    def __init__(self, payload: bytes, changes: Changes) -> None:
        self.changes = changes
        self.size_bytes = len(payload)  # of the whole batch
        self._source: bytes | Sequence[Event] = payload

    def __len__(self) -> int:
        return len(self.changes.kinds)

    @overload
    def __getitem__(self, index: int) -> Event: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Event]: ...
    def __getitem__(self, index: int | slice) -> Event | Sequence[Event]:
        if isinstance(self._source, bytes):
            self._source = decode_in_python(self._source).events
        return self._source[index]

    def __repr__(self) -> str:
        return repr(self[:])


def decode(payload: bytes) -> EventBatch:
    """A batch of either encoding from bytes. Raises WireError for anything else."""
    read = _decode_natively(payload) if _decode_natively else None
    if read is None:  # there is no native core, or this is not what our own workers send most
        return decode_in_python(payload)
    worker, epoch, seq, digest, ts = read.header
    # A fifth of all this would go into EventBatch's own __new__.
    return tuple.__new__(EventBatch, (worker, epoch, seq, DecodedEvents(payload, read), digest, ts))


def decode_in_python(payload: bytes) -> EventBatch:
    """What `decode` does, natively or not: the definition of a batch."""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise WireError(f"payload has {len(payload)} bytes: at most {MAX_PAYLOAD_BYTES}")
    try:
        return _decode_batch(_Reader(payload))
    except (msgpack.UnpackException, ValueError, OverflowError, RecursionError) as error:
        raise WireError(f"not msgpack of a batch: {type(error).__name__} {error}") from error


def _decode_batch(reader: _Reader) -> EventBatch:
    elements = reader.array_header("batch", MAX_FIELDS)
    if elements < 8:
        raise WireError(f"batch has {elements} elements: 8 are needed, with worker, epoch, seq and digest")
    ts = reader.number("ts")
    events = tuple(_decode_event(reader) for _ in range(reader.array_header("events", MAX_EVENTS_PER_BATCH)))
    reader.skip()  # data_parallel_rank: a worker has a name
    reader.integer("version", VERSION, VERSION)
    worker = reader.text("worker")
    if not worker:
        raise WireError("worker is empty")
    epoch = reader.integer("epoch", 1, MAX_COUNT)
    seq = reader.integer("seq", 0, MAX_COUNT)
    digest = reader.digest()
    for _ in range(elements - 8):
        reader.skip()
    reader.finish()
    return EventBatch(worker, epoch, seq, events, digest, ts)


_POSITIONS = {
    "BlockStored": ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium"),
    "BlockRemoved": ("block_hashes", "medium"),
    "AllBlocksCleared": (),
}


def _decode_event(reader: _Reader) -> Event:
    fields: dict[str, Any] = {}
    kind = ""
    if reader.at_map():
        for _ in range(reader.map_header("event", MAX_FIELDS)):
            name = reader.text("field name")
            if name == "type":
                kind = reader.text("type")
            elif kind and kind not in _POSITIONS:
                reader.skip()
            else:
                _decode_field(reader, name, fields)
    elif elements := reader.array_header("event", MAX_FIELDS):
        kind = reader.text("type")
        names = _POSITIONS.get(kind, ())
        for position in range(elements - 1):
            _decode_field(reader, names[position] if position < len(names) else "", fields)
    if not kind:
        raise WireError("an event has no type")
    return _event(kind, fields)


def _event(kind: str, fields: dict[str, Any]) -> Event:
    if kind == "AllBlocksCleared":
        return AllBlocksCleared()
    if kind not in _POSITIONS:
        return UnknownEvent(kind)
    for needed in ("block_hashes", "block_size") if kind == "BlockStored" else ("block_hashes",):
        if needed not in fields:
            raise WireError(f"{kind} has no {needed}")
    medium = fields.get("medium", "GPU")
    if kind == "BlockRemoved":
        return BlockRemoved(fields["block_hashes"], medium)
    parent = fields.get("parent_block_hash", ROOT_HASH)
    return BlockStored(fields["block_hashes"], parent, fields["block_size"], fields.get("token_ids"), medium)


def _decode_field(reader: _Reader, name: str, fields: dict[str, Any]) -> None:
    read = _FIELDS.get(name)
    if read is None:
        reader.skip()
    elif (value := read(reader)) is not None:
        fields[name] = value


class _Reader:
    """Reads msgpack value by value, so that no container is built that was not asked for."""

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        # Whatever is read as one value is a scalar: containers are walked through their headers, or skipped.
        self._unpacker = msgpack.Unpacker(
            raw=False,
            max_buffer_size=max(1, len(payload)),
            max_str_len=MAX_STRING_BYTES,
            max_bin_len=DIGEST_BYTES,
            max_array_len=0,
            max_map_len=0,
            max_ext_len=0,
        )
        self._unpacker.feed(payload)
        self._hashes_left = MAX_HASHES_PER_BATCH
        self._tokens_left = MAX_TOKENS_PER_BATCH

    def at_map(self) -> bool:
        at = self._unpacker.tell()
        return at < len(self._payload) and (self._payload[at] >> 4 == 0x8 or self._payload[at] in (0xDE, 0xDF))

    def array_header(self, field: str, limit: int) -> int:
        return self._bounded(field, self._unpacker.read_array_header(), limit)

    def map_header(self, field: str, limit: int) -> int:
        return self._bounded(field, self._unpacker.read_map_header(), limit)

    def skip(self) -> None:
        self._unpacker.skip()

    def finish(self) -> None:
        if self._unpacker.tell() != len(self._payload):
            raise WireError("bytes follow the batch")

    def number(self, field: str) -> float:
        value = self._unpacker.unpack()
        if type(value) not in (int, float) or not math.isfinite(value):
            raise WireError(f"{field} is {value!r}: a finite number is needed")
        return float(value)

    def integer(self, field: str, low: int, high: int) -> int:
        value = self._unpacker.unpack()
        if type(value) is not int or not low <= value <= high:
            raise WireError(f"{field} is {value!r}: an integer from {low} to {high} is needed")
        return value

    def text(self, field: str) -> str:
        value = self._unpacker.unpack()
        if type(value) is not str:
            raise WireError(f"{field} is {value!r}: a string is needed")
        return value

    def digest(self) -> bytes:
        value = self._unpacker.unpack()
        if type(value) is not bytes or len(value) != DIGEST_BYTES:
            raise WireError(f"digest is {value!r}: {DIGEST_BYTES} bytes are needed")
        return value

    def hashes(self) -> NDArray[np.uint64]:
        hashes = self._integers("block_hashes", min(MAX_HASHES_PER_EVENT, self._hashes_left), np.uint64)
        self._hashes_left -= len(hashes)
        if not hashes.all():
            raise WireError("block_hashes hold 0: it stands for the root")
        return hashes

    def tokens(self) -> NDArray[np.uint32] | None:
        tokens = self._integers("token_ids", self._tokens_left, np.uint32)
        self._tokens_left -= len(tokens)
        return tokens if len(tokens) else None

    def parent(self) -> int | None:
        return None if self._at_nil() else self.integer("parent_block_hash", 0, MAX_HASH)

    def medium(self) -> str | None:
        return None if self._at_nil() else self.text("medium")

    def block_size(self) -> int:
        return self.integer("block_size", 0, MAX_BLOCK_SIZE)

    def _at_nil(self) -> bool:
        at = self._unpacker.tell()
        if self._payload[at : at + 1] != b"\xc0":
            return False
        self._unpacker.skip()
        return True

    def _integers(self, field: str, limit: int, dtype: type[Any]) -> NDArray[Any]:
        count, chunks = self.array_header(field, limit), [np.empty(0, dtype=dtype)]
        for start in range(0, count, _CHUNK):
            wanted = min(_CHUNK, count - start)
            values = list(islice(self._unpacker, wanted))
            if len(values) < wanted or set(map(type, values)) != {int}:
                raise WireError(f"{field} hold other than integers, or end early")
            chunks.append(np.array(values, dtype=dtype))  # OverflowError out of its range
        return chunks[-1] if len(chunks) <= 2 else np.concatenate(chunks)

    @staticmethod
    def _bounded(field: str, count: Any, limit: int) -> int:
        if count > limit:
            raise WireError(f"{field} has {count} elements: at most {limit}")
        return int(count)


_FIELDS: dict[str, Callable[[_Reader], Any]] = {
    "block_hashes": _Reader.hashes,
    "parent_block_hash": _Reader.parent,
    "token_ids": _Reader.tokens,
    "block_size": _Reader.block_size,
    "medium": _Reader.medium,
}
