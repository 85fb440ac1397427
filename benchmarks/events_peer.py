"""The peer's way of an event from bytes into a tree: msgspec's typed structs, as vLLM declares its events, then the
RadixTree of ai-dynamo-runtime, which takes an event as JSON.

The JSON is made beforehand and not timed, but where it is said to be: its events could come to the tree in another way.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from itertools import count
from time import perf_counter_ns
from typing import Any, NamedTuple

from benchmarks.peer_index import PeerIndex, hash_tokens
from radix.keys import Hashes

BLOCK_SIZE = 16  # tokens


class Payload(NamedTuple):
    """One batch of one event."""

    worker: int
    data: bytes  # msgpack, as it comes from the wire
    prepared: bytes  # the event as the peer's tree takes it


class PeerEvents:
    """Decodes with msgspec and applies to the peer's tree."""

    def __init__(self) -> None:
        structs = import_module("benchmarks.events_structs")
        self.index = PeerIndex()
        self._decode = structs.DECODER.decode
        self._as_json = structs.as_json
        self._ids = count()

    def stored(self, hashes: Hashes, parent: int) -> bytes:
        """The event as the tree takes it."""
        return self.index.stored(hashes, parent)

    def removed(self, hashes: Hashes) -> bytes:
        """The event as the tree takes it."""
        return self.index.removed(hashes)

    def feed(self, payloads: Sequence[Payload]) -> int:
        """Nanoseconds for decoding all and applying what was prepared."""
        decode, apply = self._decode, self.index.tree.apply_event
        start = perf_counter_ns()
        for worker, data, prepared in payloads:
            _events = decode(data).events
            apply(worker, prepared)
        return perf_counter_ns() - start

    def feed_all(self, payloads: Sequence[Payload], *, tokens: bool) -> int:
        """Nanoseconds for all that Python has to do: the JSON made from the structs, too; with `tokens`, as the peer's
        consumers do for servers of another make, with its own hashes of the blocks' tokens."""
        decode, apply, as_json, ids = self._decode, self.index.tree.apply_event, self._as_json, self._ids
        start = perf_counter_ns()
        for worker, data, _ in payloads:
            for event in decode(data).events:
                hashed: Any = None
                if tokens and event.__class__.__name__ == "BlockStored":
                    hashed = hash_tokens(event.token_ids, event.block_size)
                apply(worker, as_json(next(ids), event, hashed))
        return perf_counter_ns() - start
