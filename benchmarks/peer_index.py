"""The peer that the index is measured against: RadixTree of ai-dynamo-runtime, its fastest index within Python's reach.

It takes one event a call, as JSON, and lists of ints as queries; all of that is made beforehand, and not timed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from time import perf_counter_ns
from typing import Any

from radix.keys import Hashes

PACKAGE = "ai-dynamo-runtime"
VERSION = "1.6.1"
INSTALL = f"pip install '{PACKAGE}=={VERSION}'"

os.environ.setdefault("DYN_LOG", "off")  # a log line for each event that it refuses would slow it down


def peer_name() -> str:
    """Name and version of the peer that is installed; "" without one."""
    try:
        import_module("dynamo.llm")
        return f"{PACKAGE} {version(PACKAGE)}"
    except (ImportError, PackageNotFoundError):
        return ""


def hash_tokens(tokens: Sequence[int], block_size: int) -> list[int]:
    """The peer's block hashes of a prompt: each of one block's tokens alone, not chained."""
    hashes: list[int] = import_module("dynamo.llm").compute_block_hash_for_seq(tokens, block_size)
    return hashes


class PeerIndex:
    """See benchmarks.our_index.Index."""

    def __init__(self) -> None:
        self.tree: Any = import_module("dynamo.llm").RadixTree()
        self._event_ids = count()

    def stored(self, hashes: Hashes, parent: int) -> bytes:
        blocks = ",".join([f'{{"block_hash":{each},"tokens_hash":{each}}}' for each in hashes.tolist()])
        return self._event(f'{{"stored":{{"parent_hash":{parent or "null"},"blocks":[{blocks}]}}}}')

    def removed(self, hashes: Hashes) -> bytes:
        return self._event(f'{{"removed":{{"block_hashes":{hashes.tolist()}}}}}')

    def _event(self, data: str) -> bytes:
        return f'{{"event_id":{next(self._event_ids)},"data":{data},"dp_rank":0}}'.encode()

    def feed(self, events: Sequence[tuple[int, bytes]]) -> int:
        apply, refused = self.tree.apply_event, 0
        for worker, payload in events:
            try:
                apply(worker, payload)
            except Exception:  # it raises where it finds no parent, or not the block to remove
                refused += 1
        return refused

    def feed_times(self, events: Sequence[tuple[int, bytes]]) -> list[int]:
        apply, times = self.tree.apply_event, []
        for worker, payload in events:
            start = perf_counter_ns()
            apply(worker, payload)
            times.append(perf_counter_ns() - start)
        return times

    def query(self, hashes: Hashes) -> Any:
        return hashes.tolist()

    def match_times(self, queries: Sequence[Any]) -> list[int]:
        find, times = self.tree.find_matches, []
        for query in queries:
            start = perf_counter_ns()
            _scores = find(query).scores
            times.append(perf_counter_ns() - start)
        return times

    dict_times = match_times

    def lookup(self, queries: Sequence[Any]) -> None:
        find = self.tree.find_matches
        for query in queries:
            _scores = find(query).scores

    def depths(self, query: Any) -> dict[int, int]:
        return {worker: depth for (worker, _), depth in self.tree.find_matches(query).scores.items()}

    def drop(self, worker: int) -> None:
        self.tree.remove_worker(worker)
