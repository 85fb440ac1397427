"""A server of another make, simulated: blocks of its own size, hashes of its own, its events; and what somebody who saw
all of them would know of it, worked out anew from what it holds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, tier_of
from kv_events.foreign.events import ForeignRemoved, ForeignStored
from radix.hashing import BlockHasher, derive_salt
from radix.keys import ROOT_HASH
from radix.tree import Tier

MODEL = "m"

Held = set[tuple[int, int]]  # (tier, hash of ours)


class Block(NamedTuple):
    """A block of the server: the last of its prefix."""

    prefix: tuple[int, ...]  # tokens, whole blocks
    tenant: str = ""


class ForeignEngine:
    """What the server holds, in which tier; and the events that say so."""

    def __init__(self, block_size: int, root: str = "") -> None:
        self.block_size = block_size
        self.held: dict[Block, set[Tier]] = {}
        self.by_hash: dict[int, Block] = {}
        self._root = root

    def hash_of(self, block: Block) -> int:
        """Chained over the prefix, as it names it."""
        data = repr((self._root, block)).encode()
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")

    def chain(self, tokens: Sequence[int], tenant: str = "") -> list[Block]:
        """The whole blocks of a prompt."""
        size = self.block_size
        return [Block(tuple(tokens[:end]), tenant) for end in range(size, len(tokens) + 1, size)]

    def store(self, blocks: Sequence[Block], medium: str = "GPU", *, tell_tokens: bool = True) -> ForeignStored:
        """A chain of blocks is held now."""
        for block in blocks:
            self.held.setdefault(block, set()).add(tier_of(medium))
            self.by_hash[self.hash_of(block)] = block
        hashes = tuple(map(self.hash_of, blocks))
        if not tell_tokens:
            return ForeignStored(hashes, medium=medium)
        size, first = self.block_size, blocks[0]
        before = first.prefix[:-size]
        return ForeignStored(
            hashes,
            parent_hash=self.hash_of(first._replace(prefix=before)) if before else None,
            token_ids=np.array(blocks[-1].prefix[len(before) :], dtype=np.uint32),
            block_size=size,
            medium=medium,
            extra_keys=None if before or not first.tenant else ((first.tenant,), *[None] * (len(blocks) - 1)),
        )

    def remove(self, blocks: Iterable[Block], medium: str = "GPU") -> ForeignRemoved:
        """Blocks are held there no longer."""
        blocks = list(blocks)
        for block in blocks:
            tiers = self.held.get(block, set())
            tiers.discard(tier_of(medium))
            if not tiers:
                self.held.pop(block, None)
        return ForeignRemoved(tuple(map(self.hash_of, blocks)), medium)

    def clear(self) -> None:
        """Nothing is held."""
        self.held.clear()

    def holds(self, tier: Tier) -> list[Block]:
        """The blocks in a tier."""
        return [block for block, tiers in self.held.items() if tier in tiers]

    def keys(self, block_size: int, told: Iterable[Block] | None = None, secret: bytes = b"") -> Held:
        """The blocks of ours, of `block_size` tokens, that are held: those of which each token is in a held block.

        `told`: of those whose tokens were told, and their parents'; None takes all.
        """
        known = None if told is None else set(told)
        held: Held = set()
        for block, tiers in self.held.items():
            if known is not None and not all(before in known for before in self._with_ancestors(block)):
                continue
            for tier in tiers:
                held |= {(tier, ours) for ours in self._complete(block, tier, block_size, secret)}
        return held

    def _with_ancestors(self, block: Block) -> Iterator[Block]:
        for end in range(len(block.prefix), 0, -self.block_size):
            yield block._replace(prefix=block.prefix[:end])

    def _complete(self, block: Block, tier: Tier, block_size: int, secret: bytes) -> Iterator[int]:
        """Hashes of the blocks of ours that end in `block` and are held in `tier`."""
        hasher = BlockHasher(block_size, derive_salt(MODEL, "", block.tenant), secret)
        keys = hasher.keys(list(block.prefix))
        end = len(block.prefix)
        for index, key in enumerate(keys[:, 0].tolist()):
            if (index + 1) * block_size <= end - self.block_size:
                continue
            needed = [
                before for before in self._with_ancestors(block) if len(before.prefix) > index * block_size
            ]  # those that overlap it
            if all(tier in self.held.get(before, ()) for before in needed):
                yield key


class Follower:
    """Events of ours, applied to a set; a store's parents are checked against those of former stores."""

    def __init__(self) -> None:
        self.held: Held = set()
        self._parents: dict[int, int] = {}

    def apply(self, events: Iterable[Event]) -> None:
        """In order."""
        for event in events:
            match event:
                case BlockStored():
                    parent = event.parent_hash
                    for block in event.block_hashes.tolist():
                        assert block != ROOT_HASH
                        assert self._parents.setdefault(block, parent) == parent
                        self.held.add((tier_of(event.medium), block))
                        parent = block
                case BlockRemoved():
                    self.held -= {(tier_of(event.medium), block) for block in event.block_hashes.tolist()}
                case AllBlocksCleared():
                    self.held.clear()
