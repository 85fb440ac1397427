"""Notes what changes in a cache, tier by tier, and tells it in few events. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from radix.keys import ROOT_HASH, Hashes
from worker.cached_block import CachedBlock

DEVICE_MEDIUM, HOST_MEDIUM = "GPU", "CPU"
"""As vLLM names them."""


class TierEvents:
    """What changed in one tier since it was told last.

    Changes of different blocks may be told in any order, so removals are told before stores. That would be wrong
    for a block that was stored since and is removed: the changes before are to be told first.
    """

    def __init__(self, medium: str) -> None:
        self._medium = medium
        self.removed: list[int] = []
        self.stored: dict[int, CachedBlock] = {}  # by block hash: those that are to be told before they are removed

    @property
    def changed(self) -> bool:
        """Whether there is anything to tell."""
        return bool(self.removed or self.stored)

    def take(self, block_size: int, *, tails_first: bool, include_token_ids: bool) -> list[Event]:
        """Tell the changes, and forget them. `tails_first`: a prefix was stored last block first."""
        events: list[Event] = []
        if self.removed:
            events.append(BlockRemoved(np.array(self.removed, np.uint64), self._medium))
            self.removed = []
        if self.stored:
            stored = reversed(self.stored.items()) if tails_first else self.stored.items()
            for parent_hash, chain in _chains(stored):
                hashes: Hashes = np.fromiter(chain, np.uint64, len(chain))
                tokens = None
                if include_token_ids:
                    tokens = np.frombuffer(b"".join(content.tokens for content in chain.values()), np.uint32)
                events.append(BlockStored(hashes, parent_hash, block_size, tokens, self._medium))
            self.stored = {}
        return events


class CacheEvents:
    """The changes of a cache's device and host tier, in an order that a follower may apply one by one.

    A block that goes from the device to the host is told as held there before it is told as gone here.
    """

    def __init__(self, block_size: int, *, include_token_ids: bool = False) -> None:
        """`include_token_ids`: events tell the tokens of stored blocks, too."""
        self._block_size = block_size
        self._include_token_ids = include_token_ids
        self._device = TierEvents(DEVICE_MEDIUM)
        self._host = TierEvents(HOST_MEDIUM)
        self._told: list[Event] = []

    def device_stored(self, content: CachedBlock) -> None:
        """A device block is listed."""
        self._device.stored[content.block_hash] = content

    def device_removed(self, content: CachedBlock) -> None:
        """A device block is listed no longer."""
        if content.block_hash in self._device.stored:
            self._tell()
        self._device.removed.append(content.block_hash)

    def host_stored(self, content: CachedBlock) -> None:
        """A host slot holds this."""
        self._host.stored[content.block_hash] = content

    def host_removed(self, content: CachedBlock) -> None:
        """No host slot holds this."""
        if content.block_hash in self._host.stored:
            self._tell()
        self._host.removed.append(content.block_hash)

    def cleared(self) -> None:
        """Nothing is held in any tier."""
        self._tell()
        self._told.append(AllBlocksCleared())

    def take(self) -> tuple[Event, ...]:
        """What changed since the last call."""
        if not (self._told or self._device.changed or self._host.changed):
            return ()
        self._tell()
        told, self._told = self._told, []
        return tuple(told)

    def _tell(self) -> None:
        for tier, tails_first in ((self._host, True), (self._device, False)):
            if tier.changed:
                self._told += tier.take(
                    self._block_size, tails_first=tails_first, include_token_ids=self._include_token_ids
                )


def _chains(stored: Iterable[tuple[int, CachedBlock]]) -> Iterator[tuple[int, dict[int, CachedBlock]]]:
    """Blocks that follow one another, together: what comes before the first, and each by its block hash."""
    chain: dict[int, CachedBlock] = {}
    chain_parent = last = ROOT_HASH
    for block_hash, content in stored:
        parent_hash = ROOT_HASH if content.parent is None else content.parent.block_hash
        if chain and (parent_hash == ROOT_HASH or parent_hash != last):
            yield chain_parent, chain
            chain = {}
        if not chain:
            chain_parent = parent_hash
        chain[block_hash] = content
        last = block_hash
    if chain:
        yield chain_parent, chain
