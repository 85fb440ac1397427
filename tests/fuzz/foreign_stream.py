"""Bytes as what happens to a foreign server's stream: messages in any order, replays, new connections, poison.

Whatever happens, nothing is raised, every invariant of the mapper holds, and what the log says makes a tree whose
digest is the log's own.
"""

from __future__ import annotations

import msgpack
import numpy as np

from kv_events import wire
from kv_events.columns import changes_of
from kv_events.foreign.events import ForeignBatch, ForeignCleared, ForeignEvent, ForeignRemoved, ForeignStored
from kv_events.foreign.identity import IdentityMapper
from kv_events.foreign.mapper import KeyMapper
from kv_events.foreign.stream import ForeignStream
from kv_events.log import EventLog
from radix.reference import ReferenceTree

_MEDIUMS = ("GPU", "GPU", "CPU", "STORAGE")
_KINDS = (None, None, "full_attention", "sliding_window")


class _Bytes:
    """Reads small choices; what is missing is 0."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def ended(self) -> bool:
        return self._at >= len(self._data)

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def part(self, size: int) -> bytes:
        self._at += size
        return self._data[self._at - size : self._at]


def play(data: bytes) -> None:
    """One schedule."""
    choices = _Bytes(data)
    head = choices.byte()
    bounds = {"max_entries": 40, "max_tombstones": 8, "max_waiting": 8} if head & 16 else {}
    mapper = IdentityMapper() if head & 1 else KeyMapper("m", (1, 2, 3, 4)[head >> 1 & 3], **bounds)
    stream = ForeignStream("w0", mapper, 1, max_waiting=4 if head & 32 else 1024)
    logs = [stream.log]
    for _ in range(100):
        if choices.ended:
            break
        _happen(stream, choices)
        if stream.log is not logs[-1]:
            logs.append(stream.log)
    for log in logs[-3:]:
        _follow(log)
    if isinstance(mapper, KeyMapper):
        mapper.check()


def _happen(stream: ForeignStream, choices: _Bytes) -> None:
    what = choices.byte()
    match what % 16:
        case 0:
            stream.connected()
        case 1 if stream.needs_replay:
            stream.begin_replay()
        case 2:
            stream.end_replay(answered=bool(what & 16))
        case 3 | 4:
            stream.replayed(_seq(stream, choices), _message(choices))
        case _:
            stream.offer(_seq(stream, choices), _message(choices))


def _seq(stream: ForeignStream, choices: _Bytes) -> int:
    offset = choices.byte()
    if offset == 255:
        return int.from_bytes(choices.part(8), "big")
    return max(0, stream.next_seq + (offset >> 2) - 8) if offset & 3 == 0 else stream.next_seq


def _message(choices: _Bytes) -> ForeignBatch | bytes:
    head = choices.byte()
    events = tuple(_event(choices) for _ in range(head & 3))
    if head & 0xC0 == 0xC0:
        return choices.part(head & 63)
    if head & 0xC0 == 0x80:
        arrays = [[type(event).__name__.replace("Foreign", "Block"), *event[:2]] for event in events]
        packed: bytes = msgpack.packb([1.5, arrays], default=lambda tokens: tokens.tolist())
        return packed
    return ForeignBatch(float(choices.byte()), events)


def _event(choices: _Bytes) -> ForeignEvent:
    what, which = choices.byte(), choices.byte()
    group, medium = what >> 2 & 3, _MEDIUMS[what >> 4 & 3]
    count = (which & 3) + 1
    first = which >> 2 & 15
    hashes = tuple(first + at if what & 64 else bytes([first + at]) * 9 for at in range(count))
    group_idx = group - 1 if group else None
    match what & 3:
        case 0 if what & 128:
            return ForeignCleared()
        case 0 | 1:
            return ForeignRemoved(hashes, medium, group_idx)
    size = (1, 2, 3, 0)[which >> 6]
    parent = choices.byte()
    tokens = np.arange(size * count + (parent >> 7), dtype=np.uint32) + parent % 5
    above = None if parent & 64 else parent & 15 if what & 64 else bytes([parent & 15]) * 9
    salt = "s" if parent & 32 else None
    kind = _KINDS[choices.byte() & 3]
    return ForeignStored(hashes, above, tokens, size, medium, cache_salt=salt, group_idx=group_idx, spec_kind=kind)


def _follow(log: EventLog) -> None:
    """Apply a log's batches to a tree, by way of the wire."""
    tree = ReferenceTree()
    for batch in log.since(0):
        tree.apply(0, changes_of(wire.decode(wire.encode(batch)).events))
        assert tree.digest(0) == batch.digest
