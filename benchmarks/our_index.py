"""Our index as the benchmark drives it, and the interface that it shares with the peer's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import Any, Protocol

from benchmarks.workload import BLOCK_SIZE
from kv_events import wire
from kv_events.columns import changes_of
from kv_events.events import BlockRemoved, BlockStored, Event, EventBatch
from radix import make_tree
from radix.backend import native
from radix.digest import EMPTY_DIGEST
from radix.keys import Hashes
from radix.reference import ReferenceTree
from radix.tree import Changes, PrefixTree


class Index(Protocol):
    """An index and its timed loops: each side has its own, so that neither pays for a layer between."""

    def stored(self, hashes: Hashes, parent: int) -> bytes:
        """The payload of one stored event."""
        ...

    def removed(self, hashes: Hashes) -> bytes:
        """The payload of one removal."""
        ...

    def feed(self, events: Sequence[tuple[int, bytes]]) -> int:
        """Apply (worker, payload) pairs. Returns how many of them the index refused."""
        ...

    def feed_times(self, events: Sequence[tuple[int, bytes]]) -> list[int]:
        """`feed`, and how long each event took in ns."""
        ...

    def query(self, hashes: Hashes) -> Any:
        """A prompt's blocks in the form that the index takes."""
        ...

    def match_times(self, queries: Sequence[Any]) -> list[int]:
        """How long each match took in ns, with the result read in the form that costs least."""
        ...

    def dict_times(self, queries: Sequence[Any]) -> list[int]:
        """The same, with the result as a dict."""
        ...

    def lookup(self, queries: Sequence[Any]) -> None:
        """Match all, in the way that lets other threads run, and read the results."""
        ...

    def depths(self, query: Any) -> dict[int, int]:
        """Worker -> leading blocks."""
        ...

    def drop(self, worker: int) -> None:
        """Forget a worker."""
        ...


class OurIndex:
    """A tree of ours, fed with event batches as they come from the wire: one event each, as the peer takes them."""

    def __init__(self, tree: PrefixTree | None = None) -> None:
        """`tree`: what `make_tree` gives unless set."""
        self.tree = make_tree() if tree is None else tree
        self._decode = _decode_in_python if isinstance(self.tree, ReferenceTree) else _native_decode()

    def stored(self, hashes: Hashes, parent: int) -> bytes:
        return _payload(BlockStored(hashes, parent, BLOCK_SIZE))

    def removed(self, hashes: Hashes) -> bytes:
        return _payload(BlockRemoved(hashes))

    def feed(self, events: Sequence[tuple[int, bytes]]) -> int:
        apply, decode = self.tree.apply, self._decode
        for worker, payload in events:
            apply(worker, decode(payload))
        return 0

    def feed_times(self, events: Sequence[tuple[int, bytes]]) -> list[int]:
        apply, decode, times = self.tree.apply, self._decode, []
        for worker, payload in events:
            start = perf_counter_ns()
            apply(worker, decode(payload))
            times.append(perf_counter_ns() - start)
        return times

    def query(self, hashes: Hashes) -> Any:
        return hashes

    def match_times(self, queries: Sequence[Any]) -> list[int]:
        match, times = self.tree.match, []
        for query in queries:
            start = perf_counter_ns()
            matches = match(query)
            _workers, _depths = matches.workers, matches.depths
            times.append(perf_counter_ns() - start)
        return times

    def dict_times(self, queries: Sequence[Any]) -> list[int]:
        match, times = self.tree.match, []
        for query in queries:
            start = perf_counter_ns()
            _depths = match(query).as_dict()
            times.append(perf_counter_ns() - start)
        return times

    def lookup(self, queries: Sequence[Any]) -> None:
        matches = self.tree.match_many(queries)
        _ends, _workers, _depths = matches.ends, matches.workers, matches.depths

    def depths(self, query: Any) -> dict[int, int]:
        return self.tree.match(query).as_dict()

    def drop(self, worker: int) -> None:
        self.tree.clear(worker)


def _payload(event: Event) -> bytes:
    return wire.encode(EventBatch("worker-0", 1, 0, (event,), EMPTY_DIGEST, 0.0))


def _native_decode() -> Callable[[bytes], Changes]:
    decode: Callable[[bytes], Changes] = getattr(native, "decode_batch", _decode_in_python)
    return decode


def _decode_in_python(payload: bytes) -> Changes:
    return changes_of(wire.decode_in_python(payload).events)
