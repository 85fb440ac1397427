"""IdentityMapper: a foreign server's hashes as they are, for tools that look at its stream and know no model of it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, tier_of
from kv_events.foreign.counts import MapCounts
from kv_events.foreign.events import REMOTE, BlockHash, ForeignCleared, ForeignEvent, ForeignRemoved, ForeignStored
from kv_events.foreign.labels import Groups
from kv_events.wire import MAX_BLOCK_SIZE
from radix.keys import ROOT_HASH
from radix.tree import Tier

MEDIUMS = {Tier.DEVICE: "GPU", Tier.HOST: "CPU", Tier.DISK: "DISK"}

MAX_PARENTS = 2**20
"""Blocks whose parents are remembered, for copies in other tiers that are told without: about 100 MiB."""

_HASH_BYTES = 8


class IdentityMapper:
    """A kv_events.foreign.mapper.Mapper. Integer hashes are taken modulo 2^64; of byte strings the last 8 bytes, which
    is what vLLM itself makes integers of.

    It needs no tokens, and knows no tenants: blocks of prompts that differ in their salts differ in their hashes.
    """

    def __init__(self, max_parents: int = MAX_PARENTS) -> None:
        self.counts = MapCounts()
        self._block_size = 1
        self._groups = Groups()
        self._parents: dict[int, int] = {}  # of the latest blocks told with tokens
        self._older: dict[int, int] = {}  # of those before: a dict is slow to find its oldest entry
        self._max_parents = max_parents

    @property
    def block_size(self) -> int:
        """As the server's last store said, tokens; 1 before."""
        return self._block_size

    def map(self, event: ForeignEvent) -> list[Event]:
        """See Mapper."""
        match event:
            case ForeignStored():
                return self._store(event)
            case ForeignRemoved():
                return self._remove(event)
            case ForeignCleared():
                self.counts.cleared += 1
                return [AllBlocksCleared()]
            case _:
                self.counts.unknown += 1
                return []

    def forget(self) -> None:
        """See Mapper."""

    def reset(self) -> None:
        """See Mapper."""
        self._groups = Groups()
        self._parents, self._older = {}, {}

    def _store(self, event: ForeignStored) -> list[Event]:
        self.counts.odd += event.odd
        if not self._groups.stores(event.group_idx, event.spec_kind):
            self.counts.other_groups += 1
            return []
        if event.locality == REMOTE:
            self.counts.remote += 1
            return []
        hashes = self._hashes(event.block_hashes)
        if not hashes:
            return []
        if 1 <= event.block_size <= MAX_BLOCK_SIZE:
            self._block_size = event.block_size
        self.counts.stored += len(hashes)
        medium = MEDIUMS[tier_of(event.medium)]
        if event.parent_hash is None and not len(event.token_ids):
            return self._store_in_tier(hashes, medium)
        parent = ROOT_HASH if event.parent_hash is None else as_integer(event.parent_hash)
        self._parents.update(zip(hashes, [parent, *hashes[:-1]], strict=True))
        if len(self._parents) > self._max_parents // 2:
            self._parents, self._older = {}, self._parents
        return [BlockStored(np.array(hashes, dtype=np.uint64), parent, self._block_size, None, medium)]

    def _remove(self, event: ForeignRemoved) -> list[Event]:
        self.counts.odd += event.odd
        hashes = self._hashes(event.block_hashes)
        if event.locality == REMOTE or not self._groups.removes(event.group_idx) or not hashes:
            return []
        self.counts.removed += len(hashes)
        return [BlockRemoved(np.array(hashes, dtype=np.uint64), MEDIUMS[tier_of(event.medium)])]

    def _store_in_tier(self, hashes: list[int], medium: str) -> list[Event]:
        """Told by hashes alone, in no order: each follows what it was known to follow."""
        chains: list[tuple[int, list[int]]] = []
        for block in hashes:
            known = self._parents.get(block, self._older.get(block))
            parent = ROOT_HASH if known is None else known
            if chains and parent == chains[-1][1][-1]:
                chains[-1][1].append(block)
            else:
                self.counts.untold += known is None
                chains.append((parent, [block]))
        return [
            BlockStored(np.array(blocks, dtype=np.uint64), parent, self._block_size, None, medium)
            for parent, blocks in chains
        ]

    @staticmethod
    def _hashes(hashes: Iterable[BlockHash]) -> list[int]:
        """Those that are ours, too: 0 is the root."""
        return [mapped for block_hash in hashes if (mapped := as_integer(block_hash)) != ROOT_HASH]


def as_integer(block_hash: BlockHash) -> int:
    """A foreign hash as an unsigned integer of 64 bits."""
    if isinstance(block_hash, int):
        return block_hash % 2**64
    return int.from_bytes(block_hash[-_HASH_BYTES:], "big")
