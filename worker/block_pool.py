"""Physical KV blocks: who uses them, which are free, and in which order cached ones may go. Torch-free."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable


class BlockPool:
    """Reference counts, a free list, and the LRU order of cached blocks that nobody uses.

    Every block is in exactly one state: *in use* (reference count above 0), *idle* (unused, its content cached and
    reusable, evictable) or *free*. So free + idle + in use = total, always; `check` asserts it.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None]) -> None:
        """`on_evict(block)` is told when an idle block's content is about to be overwritten."""
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._ref_counts = [0] * num_blocks
        self._cached = [False] * num_blocks
        # Popped from the end: low numbers first, so that fresh sequences get consecutive blocks.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def available(self) -> int:
        """Blocks that can be allocated: free ones, and idle ones by eviction."""
        return len(self._free) + len(self._idle)

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def in_use(self) -> int:
        return self.num_blocks - self.available

    def ref_count(self, block: int) -> int:
        return self._ref_counts[block]

    def unused(self, blocks: Iterable[int]) -> int:
        """How many of them nobody uses."""
        return sum([self._ref_counts[block] == 0 for block in blocks])

    def allocate(self) -> int:
        """A block with reference count 1 and undefined content. The caller made sure that one is available."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._on_evict(block)
            self._cached[block] = False
        self._ref_counts[block] = 1
        return block

    def retain(self, block: int) -> None:
        """One more user of a block that is idle or in use."""
        if self._ref_counts[block] == 0:
            del self._idle[block]
        self._ref_counts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One user less of each. Give a sequence's blocks tail first: the tail is then evicted before its prefix."""
        for block in blocks:
            users = self._ref_counts[block] - 1
            assert users >= 0, f"block {block} is released more often than it was taken"
            self._ref_counts[block] = users
            if users == 0:
                if self._cached[block]:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def set_cached(self, block: int, cached: bool) -> None:
        """Whether the block's content may be found again once nobody uses it."""
        self._cached[block] = cached
        if not cached and self._ref_counts[block] == 0:
            del self._idle[block]
            self._free.append(block)

    def check(self) -> None:
        """Assert that every block is in exactly one state."""
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        assert not set(self._free) & set(self._idle), "a block is free and idle"
        used = sum(count > 0 for count in self._ref_counts)
        assert len(self._free) + len(self._idle) + used == self.num_blocks, "a block is lost"
        assert all(self._ref_counts[block] == 0 and self._cached[block] for block in self._idle)
        assert all(self._ref_counts[block] == 0 and not self._cached[block] for block in self._free)
