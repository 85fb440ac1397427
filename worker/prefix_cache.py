"""Which blocks hold which prefix. Torch-free.

Every change leaves an event behind, in order, for the router to follow. A block is found by its whole 128-bit key,
and is reused only if its own tokens and the key before it are those asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from radix.keys import ROOT_HASH
from worker.block_pool import BlockPool

ROOT_KEY = bytes(16)


@dataclass(frozen=True, slots=True)
class CachedBlock:
    """The content of one full block: its key, the key before it, its tokens."""

    key: bytes
    parent_key: bytes
    tokens: tuple[int, ...]


def hash_of(key: bytes) -> int:
    """The block hash: the low 64 bits of a key; the root's is 0."""
    return int.from_bytes(key[:8], "little")


class PrefixCache:
    """Key -> block, over a pool of its own making."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks, self._forget)
        self._by_key: dict[bytes, int] = {}
        self._contents: dict[int, CachedBlock] = {}
        self._events: list[Event] = []

    def __len__(self) -> int:
        return len(self._contents)

    def lookup(self, keys: Sequence[bytes], tokens: Sequence[int]) -> list[int]:
        """The blocks of the longest cached prefix, at most one for each key. Takes no reference."""
        blocks: list[int] = []
        parent_key = ROOT_KEY
        for index, key in enumerate(keys):
            block = self._by_key.get(key)
            if block is None:
                break
            start = index * self.block_size
            content = self._contents[block]
            if content.parent_key != parent_key or content.tokens != tuple(tokens[start : start + self.block_size]):
                break
            blocks.append(block)
            parent_key = key
        return blocks

    def insert(self, block: int, content: CachedBlock) -> None:
        """List a block that is in use and full. If its key is listed already, the block stays unlisted."""
        if content.key in self._by_key:
            return
        assert block not in self._contents, "a listed block is rewritten"
        self._by_key[content.key] = block
        self._contents[block] = content
        self.pool.set_cached(block, True)
        self._stored(content)

    def clear(self) -> int:
        """Forget everything. Blocks in use stay with their users, unlisted. Returns the number forgotten."""
        forgotten = len(self._contents)
        for block in self._contents:
            self.pool.set_cached(block, False)
        self._by_key.clear()
        self._contents.clear()
        self._events.append(AllBlocksCleared())
        return forgotten

    def take_events(self) -> tuple[Event, ...]:
        """What changed since the last call."""
        events, self._events = tuple(self._events), []
        return events

    def check(self) -> None:
        """Assert the pool's invariants and that both directions agree."""
        self.pool.check()
        assert {content.key: block for block, content in self._contents.items()} == self._by_key

    def _stored(self, content: CachedBlock) -> None:
        """Note a stored block; blocks that follow one another in a chain share an event."""
        block_hash, parent_hash = hash_of(content.key), hash_of(content.parent_key)
        last = self._events[-1] if self._events else None
        if isinstance(last, BlockStored) and parent_hash != ROOT_HASH and int(last.block_hashes[-1]) == parent_hash:
            hashes = np.append(last.block_hashes, np.uint64(block_hash))
            self._events[-1] = BlockStored(hashes, last.parent_hash, self.block_size)
        else:
            self._events.append(BlockStored(np.array([block_hash], np.uint64), parent_hash, self.block_size))

    def _forget(self, block: int) -> None:
        content = self._contents.pop(block)
        del self._by_key[content.key]
        removed = np.array([hash_of(content.key)], np.uint64)
        last = self._events[-1] if self._events else None
        if isinstance(last, BlockRemoved):
            self._events[-1] = BlockRemoved(np.append(last.block_hashes, removed))
        else:
            self._events.append(BlockRemoved(removed))
