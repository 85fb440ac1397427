"""Which blocks hold which prefix, on the device and behind it in host memory. Torch-free.

Every change leaves an event behind, in order, for the router to follow. A block is listed under its block hash, as in
those events, and is reused only if its key, its tokens and those of all blocks before it are the ones asked for. So
prefixes that share a hash or a whole key, by chance or by design, cost misses and never mix contents.
"""

from __future__ import annotations

from collections.abc import Sequence

from kv_events.events import Event
from worker.block_pool import BlockPool
from worker.cache_events import CacheEvents
from worker.cached_block import CachedBlock, hash_of, pack, same_prefix
from worker.host_tier import HostTier

__all__ = ["CachedBlock", "PrefixCache", "hash_of", "pack"]


class PrefixCache:
    """Block hash -> block, over a pool of its own making. Of two prefixes under one hash the first is listed.

    With a host tier an idle block that the pool evicts is *demoted*: its content is saved to a host slot. A block found
    there is *promoted* by `acquire`: loaded into a device block, and listed in both tiers. Whoever computes a step
    makes its transfers first: all saves, then all copies of the step, then all loads. A save reads what its block held
    before the step, and no slot is saved to that the same step loads from, unless it loads what was saved.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, host_blocks: int = 0, include_token_ids: bool = False
    ) -> None:
        """`host_blocks`: slots of the host tier, 0 for none. `include_token_ids`: events tell the tokens of stored
        blocks, too."""
        self.block_size = block_size
        self.pool = BlockPool(num_blocks, self._evicted)
        self.host = HostTier(host_blocks, self._lost) if host_blocks else None
        self._by_hash: dict[int, int] = {}
        self._contents: dict[int, CachedBlock] = {}
        self._events = CacheEvents(block_size, include_token_ids=include_token_ids)
        self._saves: dict[int, int] = {}  # host slot -> the device block whose content goes there
        self.collisions = 0  # full blocks that stayed unlisted, as another prefix was listed under their hash

    def __len__(self) -> int:
        """Blocks listed, in either tier or both."""
        return len(self._contents) + (0 if self.host is None else self.host.alone)

    def lookup(self, contents: Sequence[CachedBlock]) -> list[int]:
        """Where the blocks of the longest cached prefix of a chain of full blocks are: a device block is told by its
        number, a host slot by ~slot, which is negative. Takes no reference."""
        places: list[int] = []
        previous: CachedBlock | None = None
        for wanted in contents:
            place = self._by_hash.get(wanted.block_hash)
            if place is not None:
                content = self._contents[place]
            elif self.host is not None and (slot := self.host.find(wanted.block_hash)) is not None:
                place, content = ~slot, self.host.content(slot)
            else:
                break
            if content.key != wanted.key or content.tokens != wanted.tokens:
                break
            if content.parent is not previous:
                if not same_prefix(content.parent, previous):
                    break
                content.parent = previous  # one object for one prefix, so that comparing takes one step
            places.append(place)
            previous = content
        return places

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Device blocks of the longest cached prefix that these keys name, from its first block on. Keys are compared
        whole; who asks by keys alone has no tokens to compare."""
        blocks: list[int] = []
        previous: CachedBlock | None = None
        for key in keys:
            block = self._by_hash.get(hash_of(key))
            if block is None:
                break
            content = self._contents[block]
            if content.key != key or not same_prefix(content.parent, previous):
                break
            content.parent = previous
            blocks.append(block)
            previous = content
        return blocks

    def acquire(self, places: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """A reference on each block that `lookup` told. Returns the device blocks, and the loads to be made: (host
        slot, device block). Each load takes a block from the pool; the caller made sure that they are available."""
        for place in places:
            if place >= 0:
                self.pool.retain(place)
        if self.host is None or not places or min(places) >= 0:
            return list(places), []
        for place in places:  # all of them, before allocating evicts others
            if place < 0:
                self.host.pin(~place)
        blocks: list[int] = []
        loads: list[tuple[int, int]] = []
        for place in places:
            blocks.append(place if place >= 0 else self.pool.allocate())
            if place < 0:
                loads.append((~place, blocks[-1]))
                self.host.set_copy(~place, True)
                self._list(blocks[-1], self.host.content(~place))
        return blocks, loads

    def take_saves(self) -> list[tuple[int, int]]:
        """A step is scheduled: the saves that it begins with, (device block, host slot), in any order."""
        if self.host is not None:
            self.host.unpin_all()
        saves = [(block, slot) for slot, block in self._saves.items()]
        self._saves.clear()
        return saves

    def insert(self, block: int, content: CachedBlock) -> None:
        """List a block that is in use and full. If its hash is taken, the block stays unlisted."""
        if content.parent is not None:
            parent = self._listed(content.parent)
            if parent is not None and same_prefix(parent, content.parent):
                content.parent = parent
        listed = self._listed(content)
        if listed is not None:
            if not same_prefix(listed, content):
                self.collisions += 1
                return
            if content.block_hash in self._by_hash:
                return
            slot = None if self.host is None else self.host.find(content.block_hash)
            assert self.host is not None
            assert slot is not None
            self.host.set_copy(slot, True)
            content = listed
        assert block not in self._contents, "a listed block is rewritten"
        self._list(block, content)

    def clear(self) -> int:
        """Forget everything, in both tiers. Blocks in use stay with their users, unlisted. Returns the number of blocks
        forgotten."""
        forgotten = len(self)
        for block in self._contents:
            self.pool.set_cached(block, False)
        self._by_hash.clear()
        self._contents.clear()
        self._saves.clear()
        if self.host is not None:
            self.host.clear()
        self._events.cleared()
        return forgotten

    def take_events(self) -> tuple[Event, ...]:
        """What changed since the last call."""
        return self._events.take()

    def check(self) -> None:
        """Assert the pool's invariants, that both directions agree, and what the tiers know of each other."""
        self.pool.check()
        assert {content.block_hash: block for block, content in self._contents.items()} == self._by_hash
        if self.host is not None:
            self.host.check(self._on_device)

    def _on_device(self, content: CachedBlock) -> bool:
        block = self._by_hash.get(content.block_hash)
        assert block is None or self._contents[block] is content, "the tiers hold two prefixes under one hash"
        return block is not None

    def _listed(self, content: CachedBlock) -> CachedBlock | None:
        """What is listed under the hash of `content`, in any tier."""
        block = self._by_hash.get(content.block_hash)
        if block is not None:
            return self._contents[block]
        slot = None if self.host is None else self.host.find(content.block_hash)
        return None if slot is None or self.host is None else self.host.content(slot)

    def _list(self, block: int, content: CachedBlock) -> None:
        self._by_hash[content.block_hash] = block
        self._contents[block] = content
        self.pool.set_cached(block, True)
        self._events.device_stored(content)

    def _evicted(self, block: int) -> None:
        content = self._contents.pop(block)
        del self._by_hash[content.block_hash]
        if self.host is not None:
            self._demote(self.host, block, content)
        self._events.device_removed(content)

    def _demote(self, host: HostTier, block: int, content: CachedBlock) -> None:
        slot = host.find(content.block_hash)
        if slot is not None:
            host.set_copy(slot, False)  # it is there already
            return
        slot = host.store(content)
        if slot is not None:
            self._saves[slot] = block
            self._events.host_stored(content)

    def _lost(self, content: CachedBlock) -> None:
        self._events.host_removed(content)
