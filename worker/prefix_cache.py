"""Which blocks hold which prefix. Torch-free.

Every change leaves an event behind, in order, for the router to follow. A block is listed under its block hash, as in
those events, and is reused only if its key, its tokens and those of all blocks before it are the ones asked for. So
prefixes that share a hash or a whole key, by chance or by design, cost misses and never mix contents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from radix.hashing import as_tokens
from radix.keys import ROOT_HASH
from worker.block_pool import BlockPool


@dataclass(slots=True, eq=False)
class CachedBlock:
    """The content of one full block: its key, its tokens as `pack` makes them, and what comes before (None: nothing).

    The content of an evicted block lives on in what follows it: that was computed after it and after nothing else.
    """

    key: bytes
    tokens: bytes
    parent: CachedBlock | None


def pack(tokens: Sequence[int]) -> bytes:
    """Tokens in 4 bytes each."""
    return as_tokens(tokens).tobytes()


def hash_of(key: bytes) -> int:
    """The block hash: the low 64 bits of a key."""
    return int.from_bytes(key[:8], "little")


@dataclass(slots=True)
class _Chain:
    """Blocks stored one after another: an event in the making."""

    parent_hash: int
    hashes: list[int] = field(default_factory=list)
    tokens: list[bytes] = field(default_factory=list)  # of each, as `pack` makes them; none where they are not told

    def event(self, block_size: int) -> BlockStored:
        tokens = np.frombuffer(b"".join(self.tokens), np.uint32) if self.tokens else None
        return BlockStored(np.array(self.hashes, np.uint64), self.parent_hash, block_size, tokens)


def _same_prefix(one: CachedBlock | None, other: CachedBlock | None) -> bool:
    """Whether both end the same prefix. Takes one step where both have one parent object."""
    while one is not other:
        if one is None or other is None or one.key != other.key or one.tokens != other.tokens:
            return False
        one, other = one.parent, other.parent
    return True


class PrefixCache:
    """Block hash -> block, over a pool of its own making. Of two prefixes under one hash the first is listed."""

    def __init__(self, num_blocks: int, block_size: int, *, include_token_ids: bool = False) -> None:
        """`include_token_ids`: events tell the tokens of stored blocks, too."""
        self.block_size = block_size
        self._include_token_ids = include_token_ids
        self.pool = BlockPool(num_blocks, self._forget)
        self._by_hash: dict[bytes, int] = {}  # by the first 8 bytes of a key
        self._contents: dict[int, CachedBlock] = {}
        self._events: list[Event | _Chain] = []
        self.collisions = 0  # full blocks that stayed unlisted, as another prefix was listed under their hash

    def __len__(self) -> int:
        return len(self._contents)

    def lookup(self, contents: Sequence[CachedBlock]) -> list[int]:
        """The blocks of the longest cached prefix of a chain of full blocks. Takes no reference."""
        blocks: list[int] = []
        previous: CachedBlock | None = None
        for wanted in contents:
            block = self._by_hash.get(wanted.key[:8])
            if block is None:
                break
            content = self._contents[block]
            if content.key != wanted.key or content.tokens != wanted.tokens:
                break
            if content.parent is not previous:
                if not _same_prefix(content.parent, previous):
                    break
                content.parent = previous  # one object for one prefix, so that comparing takes one step
            blocks.append(block)
            previous = content
        return blocks

    def insert(self, block: int, content: CachedBlock) -> None:
        """List a block that is in use and full. If its hash is taken, the block stays unlisted."""
        if content.parent is not None:
            parent = self._listed(content.parent)
            if parent is not None and _same_prefix(parent, content.parent):
                content.parent = parent
        listed = self._listed(content)
        if listed is not None:
            self.collisions += not _same_prefix(listed, content)
            return
        assert block not in self._contents, "a listed block is rewritten"
        self._by_hash[content.key[:8]] = block
        self._contents[block] = content
        self.pool.set_cached(block, True)
        self._stored(content)

    def clear(self) -> int:
        """Forget everything. Blocks in use stay with their users, unlisted. Returns the number forgotten."""
        forgotten = len(self._contents)
        for block in self._contents:
            self.pool.set_cached(block, False)
        self._by_hash.clear()
        self._contents.clear()
        self._events.append(AllBlocksCleared())
        return forgotten

    def take_events(self) -> tuple[Event, ...]:
        """What changed since the last call."""
        noted, self._events = self._events, []
        return tuple(each.event(self.block_size) if isinstance(each, _Chain) else each for each in noted)

    def check(self) -> None:
        """Assert the pool's invariants and that both directions agree."""
        self.pool.check()
        assert {content.key[:8]: block for block, content in self._contents.items()} == self._by_hash

    def _listed(self, content: CachedBlock) -> CachedBlock | None:
        """What is listed under the hash of `content`."""
        block = self._by_hash.get(content.key[:8])
        return None if block is None else self._contents[block]

    def _stored(self, content: CachedBlock) -> None:
        """Note a stored block; blocks that follow one another in a chain share an event."""
        block_hash = hash_of(content.key)
        parent_hash = ROOT_HASH if content.parent is None else hash_of(content.parent.key)
        chain = self._events[-1] if self._events else None
        if not isinstance(chain, _Chain) or parent_hash == ROOT_HASH or chain.hashes[-1] != parent_hash:
            chain = _Chain(parent_hash)
            self._events.append(chain)
        chain.hashes.append(block_hash)
        if self._include_token_ids:
            chain.tokens.append(content.tokens)

    def _forget(self, block: int) -> None:
        content = self._contents.pop(block)
        del self._by_hash[content.key[:8]]
        removed = np.array([hash_of(content.key)], np.uint64)
        last = self._events[-1] if self._events else None
        if isinstance(last, BlockRemoved):
            self._events[-1] = BlockRemoved(np.append(last.block_hashes, removed))
        else:
            self._events.append(BlockRemoved(removed))
