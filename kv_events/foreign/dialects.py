"""Event batches of vLLM and SGLang servers from bytes: every release's shape of them, bounded.

    [ts, [event, ...], rank]

An event is an array that begins with its type (vLLM up to 0.23, SGLang up to 0.5.19) or a map with a "type" (later).
Fields grew release by release, and differently in the two: one that is missing or nil has its default, one that is not
known is passed over, and one of a wrong type or size refuses the batch, if any key may depend on it.

Reading takes a small multiple of the payload's own memory: of a batch one event is unpacked at a time, of a large event
one field, of a large field some values.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import msgpack
import numpy as np

from kv_events.foreign.events import (
    NO_TOKENS,
    BlockHash,
    ExtraKey,
    ForeignBatch,
    ForeignCleared,
    ForeignEvent,
    ForeignRemoved,
    ForeignStored,
    ForeignUnknown,
)
from kv_events.foreign.fields import (
    ADVISORY,
    FIELDS,
    MAX_FIELDS,
    MAX_INDEX,
    ODD,
    POSITIONS,
    event_from,
    event_of,
    extra_key_of,
    integer,
    shown,
    tokens_of,
)
from kv_events.wire import MAX_PAYLOAD_BYTES, MAX_TOKENS_PER_BATCH, WireError
from radix.keys import Tokens

__all__ = [
    "NO_TOKENS",
    "BlockHash",
    "ExtraKey",
    "ForeignBatch",
    "ForeignCleared",
    "ForeignEvent",
    "ForeignRemoved",
    "ForeignStored",
    "ForeignUnknown",
    "decode_foreign",
    "dialect_of",
]

MAX_EVENTS_PER_BATCH = 2**16  # SGLang may write an event for each page, and a page may be one token
MAX_HASHES_PER_BATCH = 2**18
MAX_EXTRA_KEYS_PER_EVENT = 2**16  # blocks
MAX_EXTRA_BYTES_PER_BATCH = 2**19  # of extra keys: as tuples they take up to 40 times as much

_SMALL = 2**14  # bytes that are unpacked at once: as Python's objects they take some 80 times as much at worst
_CHUNK = 2**12  # values of a long array that are unpacked at once

_REFUSED = (msgpack.UnpackException, ValueError, OverflowError, RecursionError)


def decode_foreign(payload: bytes) -> ForeignBatch:
    """A batch of any release from bytes. Raises WireError for anything else."""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise WireError(f"payload has {len(payload)} bytes: at most {MAX_PAYLOAD_BYTES}")
    try:
        return _common_batch(payload) or _batch(_Reader(payload))
    except _REFUSED as error:
        raise WireError(f"not msgpack of a batch: {type(error).__name__} {error}") from error


def dialect_of(payload: bytes) -> Literal["rhizome", "foreign"]:
    """Whose batch this is: behind the third element our own have a version, a worker's name, an epoch and a number.

    Raises WireError for what is no batch at all. That it will decode is not said.
    """
    try:
        reader = _Reader(payload)
        if reader.at_map() or reader.array_header("batch", MAX_FIELDS) < 7:
            return "foreign"
        for _ in range(3):
            reader.skip()
        kinds = [type(reader.value()) for _ in range(4)]
    except _REFUSED as error:
        raise WireError(f"not msgpack of a batch: {type(error).__name__} {error}") from error
    return "rhizome" if kinds == [int, str, int, int] else "foreign"


def _common_batch(payload: bytes) -> ForeignBatch | None:
    """What _batch says of a small batch of three elements, sooner; None of others, and of what is odd."""
    if len(payload) > _SMALL or payload[:1] != b"\x93":
        return None
    try:
        ts, events, rank = msgpack.unpackb(payload)
    except _REFUSED:
        return None
    if type(events) is not list or type(ts) is not float:
        return None
    return _checked(ts, tuple(map(event_of, events)), rank)


def _batch(reader: _Reader) -> ForeignBatch:
    ts: Any = None
    rank: Any = None
    events: tuple[ForeignEvent, ...] | None = None
    if reader.at_map():
        for _ in range(reader.map_header("batch", MAX_FIELDS)):
            match reader.value():
                case "ts":
                    ts = reader.value()
                case "events":
                    events = _events(reader)
                case "data_parallel_rank" | "attn_dp_rank":
                    rank = reader.value()
                case _:
                    reader.skip()
    else:
        elements = reader.array_header("batch", MAX_FIELDS)
        if elements and reader.at_text():  # its type, where a release names it
            reader.skip()
            elements -= 1
        if elements < 2:
            raise WireError(f"batch has {elements} elements: a time and events are needed")
        ts, events = reader.value(), _events(reader)
        rank = reader.value() if elements > 2 else None
        for _ in range(elements - 3):
            reader.skip()
    reader.finish()
    if events is None:
        raise WireError("batch has no events")
    return _checked(ts, events, rank)


def _checked(ts: Any, events: tuple[ForeignEvent, ...], rank: Any) -> ForeignBatch:
    if type(ts) not in (int, float) or not math.isfinite(ts):
        raise WireError(f"ts is {shown(ts)}: a finite number is needed")
    return ForeignBatch(float(ts), events, None if rank is None else integer("rank", rank, 0, MAX_INDEX))


@dataclass(slots=True)
class _Room:
    """What a batch may still hold."""

    hashes: int = MAX_HASHES_PER_BATCH
    tokens: int = MAX_TOKENS_PER_BATCH
    extra_bytes: int = MAX_EXTRA_BYTES_PER_BATCH

    def check(self) -> None:
        """Raise WireError where it is used up."""
        if min(self.hashes, self.tokens, self.extra_bytes) < 0:
            limits = (
                f"{MAX_HASHES_PER_BATCH} hashes, {MAX_TOKENS_PER_BATCH} tokens or {MAX_EXTRA_BYTES_PER_BATCH} bytes"
            )
            raise WireError(f"batch has more than {limits} of extra keys")


def _events(reader: _Reader) -> tuple[ForeignEvent, ...]:
    events: list[ForeignEvent] = []
    room = _Room()
    for _ in range(reader.array_header("events", MAX_EVENTS_PER_BATCH)):
        event = _event(reader.next_bytes(), room)
        if type(event) is ForeignStored:
            room.hashes -= len(event.block_hashes)
            room.tokens -= len(event.token_ids)
        elif type(event) is ForeignRemoved:
            room.hashes -= len(event.block_hashes)
        events.append(event)
        room.check()
    return tuple(events)


def _event(data: bytes, room: _Room) -> ForeignEvent:
    if len(data) <= _SMALL:
        try:
            value = msgpack.unpackb(data)
        except _REFUSED:  # by what is odd in a field, which may be none that is known
            pass
        else:
            event = event_of(value)
            if type(event) is ForeignStored and event.extra_keys is not None:
                room.extra_bytes -= len(msgpack.packb(event.extra_keys))
            return event
    return _walk(_Reader(data), room)


def _walk(reader: _Reader, room: _Room) -> ForeignEvent:
    """What event_of(unpackb(...)) says, a field at a time; `reader` is at the start of what it reads."""
    kind = _kind(reader.again())
    known = FIELDS.get(kind, ()) if type(kind) is str else ()
    fields: dict[str, Any] = {}

    def read(name: object) -> None:
        if name not in known:
            reader.skip()
        elif name == "token_ids":
            fields["token_ids"] = reader.tokens(room.tokens)
        elif name == "block_hashes":
            fields["block_hashes"] = reader.scalars("block_hashes", room.hashes)
        elif name == "extra_keys":
            fields["extra_keys"] = reader.extra_keys(room)
        elif name in ADVISORY:
            fields[str(name)] = reader.value_or_odd()
        else:
            fields[str(name)] = reader.value()

    if reader.at_map():
        for _ in range(reader.map_header("event", MAX_FIELDS)):
            name = reader.value()
            read(name if type(name) is str else "")
    else:
        elements = reader.array_header("event", MAX_FIELDS)
        reader.skip()
        names = POSITIONS.get(kind, ()) if type(kind) is str else ()
        for position in range(elements - 1):
            read(names[position] if position < len(names) else "")
    return event_from(kind, fields)


def _kind(reader: _Reader) -> Any:
    """An event's type, which a map may tell behind its other fields."""
    if not reader.at_map():
        reader.array_header("event", MAX_FIELDS)
        return reader.value()
    kind = None
    for _ in range(reader.map_header("event", MAX_FIELDS)):
        if reader.value() == "type":
            kind = reader.value()
        else:
            reader.skip()
    return kind


class _Reader:
    """Reads msgpack value by value; a value is unpacked whole where it is small."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        # What is unpacked from here, and not from a small part, is scalars: containers hold nothing.
        self._unpacker = msgpack.Unpacker(
            max_buffer_size=max(1, len(data)), max_array_len=0, max_map_len=0, max_ext_len=0
        )
        self._unpacker.feed(data)
        self.skip = self._unpacker.skip

    def again(self) -> _Reader:
        """From the start."""
        return _Reader(self._data)

    def at_map(self) -> bool:
        at = self._byte()
        return at >> 4 == 0x8 or at in (0xDE, 0xDF)

    def at_text(self) -> bool:
        at = self._byte()
        return at >> 5 == 0b101 or at in (0xD9, 0xDA, 0xDB)

    def array_header(self, field: str, limit: int) -> int:
        return self._bounded(field, self._unpacker.read_array_header(), limit)

    def map_header(self, field: str, limit: int) -> int:
        return self._bounded(field, self._unpacker.read_map_header(), limit)

    def next_bytes(self) -> bytes:
        """The bytes of the next value."""
        start = self._unpacker.tell()
        self._unpacker.skip()
        return self._data[start : self._unpacker.tell()]

    def value(self) -> Any:
        """The next value, which must be small."""
        data = self.next_bytes()
        if len(data) > _SMALL:
            raise WireError(f"a value has {len(data)} bytes: at most {_SMALL}")
        return msgpack.unpackb(data)

    def value_or_odd(self) -> Any:
        """The next value, or ODD where it is large or none of ours."""
        data = self.next_bytes()
        try:
            return msgpack.unpackb(data) if len(data) <= _SMALL else ODD
        except _REFUSED:
            return ODD

    def tokens(self, limit: int) -> Tokens | None:
        if not self._at_array():
            return self.value()  # type: ignore[no-any-return] # refused where it is looked at, unless nil
        count = self.array_header("token_ids", limit)
        in_pairs = count and self._at_array()
        chunks = self._small_values(count) if in_pairs else self._scalars("token_ids", count)
        tokens = [tokens_of(chunk) for chunk in chunks]
        return np.concatenate(tokens) if tokens else NO_TOKENS

    def scalars(self, field: str, limit: int) -> Any:
        """An array without arrays in it, as a list."""
        if not self._at_array():
            return self.value()
        return [each for chunk in self._scalars(field, self.array_header(field, limit)) for each in chunk]

    def extra_keys(self, room: _Room) -> Any:
        if not self._at_array():
            return self.value()
        keys: list[Any] = []
        size = 0
        count = self.array_header("extra_keys", MAX_EXTRA_KEYS_PER_EVENT)
        for chunk, chunk_bytes in self._sized_values(count, _mark_of):
            size += chunk_bytes
            if size > room.extra_bytes and chunk.count(None) < len(chunk):
                room.extra_bytes = -1
                room.check()
            keys += [extra_key_of(value) for value in chunk]
        room.extra_bytes -= size if any(keys) else 0
        return keys

    def finish(self) -> None:
        if self._unpacker.tell() != len(self._data):
            raise WireError("bytes follow the batch")

    def _scalars(self, field: str, count: int) -> Iterator[list[Any]]:
        for start in range(0, count, _CHUNK):
            wanted = min(_CHUNK, count - start)
            values = list(islice(self._unpacker, wanted))
            if len(values) < wanted or not {list, dict}.isdisjoint(map(type, values)):
                raise WireError(f"{field} is torn, or holds arrays")
            yield values

    def _small_values(self, count: int) -> Iterator[list[Any]]:
        """So many values, each of them small, unpacked some at a time."""
        return (values for values, _ in self._sized_values(count, _refuse_large))

    def _sized_values(self, count: int, large: Callable[[bytes], Any]) -> Iterator[tuple[list[Any], int]]:
        """So many values, some at a time, and their bytes; for a large one what `large` says, which takes none."""
        skip, tell = self._unpacker.skip, self._unpacker.tell
        start = end = tell()
        taken = 0
        for _ in range(count):
            before = end
            skip()
            end = tell()
            if end - before > _SMALL:
                if taken:
                    yield self._unpacked(start, before, taken), before - start
                yield [large(self._data[before:end])], 0
                start, taken = end, 0
                continue
            taken += 1
            if end - start > _SMALL:
                yield self._unpacked(start, end, taken), end - start
                start, taken = end, 0
        if taken:
            yield self._unpacked(start, end, taken), end - start

    def _unpacked(self, start: int, end: int, count: int) -> list[Any]:
        values: list[Any] = msgpack.unpackb(b"\xdd" + count.to_bytes(4, "big") + self._data[start:end])
        return values

    def _at_array(self) -> bool:
        at = self._byte()
        return at >> 4 == 0x9 or at in (0xDC, 0xDD)

    def _byte(self) -> int:
        """The next byte, the first of a value; 0xC1, which begins none, at the end."""
        at = self._unpacker.tell()
        return self._data[at] if at < len(self._data) else 0xC1

    @staticmethod
    def _bounded(field: str, count: Any, limit: int) -> int:
        if count > limit:
            raise WireError(f"{field} has {count} elements: at most {limit}")
        return int(count)


def _refuse_large(data: bytes) -> Any:
    raise WireError(f"a value has {len(data)} bytes: at most {_SMALL}")


def _mark_of(data: bytes) -> tuple[ExtraKey, ...]:
    """In the place of a block's large extra keys: its keys are then no plain prompt's, and no other such block's."""
    return (hashlib.blake2b(data, digest_size=32).digest(),)
