"""Host memory behind the device's blocks: which slot holds what, and in which order slots may go. Torch-free."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from worker.cached_block import CachedBlock


class HostTier:
    """Slots, each of which is *free*, *pinned* or evictable: a *copy* of what the device lists too, or *alone*.

    Copies stay after a block is loaded, as in vLLM's and SGLang's offloading: a block read again and again crosses the
    bus once per read, not twice. They are the first to go, as nothing is lost with them; so they cost no capacity.
    After them those go that left the device longest ago.
    """

    def __init__(self, num_slots: int, on_evict: Callable[[CachedBlock], None]) -> None:
        """`on_evict(content)` is told when a slot's content is about to be overwritten."""
        self.num_slots = num_slots
        self._on_evict = on_evict
        self._free = list(range(num_slots - 1, -1, -1))
        self._by_hash: dict[int, int] = {}  # by block hash
        self._contents: dict[int, CachedBlock] = {}
        self._copies: OrderedDict[int, None] = OrderedDict()  # the first one goes first
        self._alone: OrderedDict[int, None] = OrderedDict()  # the same
        self._pinned: dict[int, bool] = {}  # whether the slot is a copy

    def __len__(self) -> int:
        """Blocks held."""
        return len(self._contents)

    @property
    def alone(self) -> int:
        """Blocks held that the device does not list."""
        return len(self._alone) + sum(not copy for copy in self._pinned.values())

    def find(self, block_hash: int) -> int | None:
        """The slot listed under a block hash. Whether it holds the same prefix is for the caller to see."""
        return self._by_hash.get(block_hash)

    def content(self, slot: int) -> CachedBlock:
        """What a slot holds."""
        return self._contents[slot]

    def store(self, content: CachedBlock) -> int | None:
        """A slot for what leaves the device, and is not here yet. None where every slot is pinned: then it is lost."""
        slot = self._slot()
        if slot is not None:
            self._by_hash[content.block_hash] = slot
            self._contents[slot] = content
            self._alone[slot] = None
        return slot

    def set_copy(self, slot: int, copy: bool) -> None:
        """Whether the device lists the slot's content, too. Either way it is now the last of its kind to go."""
        if slot in self._pinned:
            self._pinned[slot] = copy
            return
        self._unqueue(slot)
        (self._copies if copy else self._alone)[slot] = None

    def pin(self, slot: int) -> None:
        """Keep the slot as it is until `unpin_all`: it is about to be read."""
        if slot not in self._pinned:
            self._pinned[slot] = self._unqueue(slot)

    def unpin_all(self) -> None:
        """What was to be read has been, before anything that comes from now on."""
        for slot, copy in self._pinned.items():
            (self._copies if copy else self._alone)[slot] = None
        self._pinned.clear()

    def clear(self) -> None:
        """Forget everything; nothing is pinned."""
        self._free = list(range(self.num_slots - 1, -1, -1))
        for held in (self._by_hash, self._contents, self._copies, self._alone, self._pinned):
            held.clear()

    def check(self, on_device: Callable[[CachedBlock], bool]) -> None:
        """Assert that each slot is in one state, and that copies are those that `on_device` knows."""
        states = [*self._free, *self._copies, *self._alone, *self._pinned]
        assert sorted(states) == list(range(self.num_slots)), "a slot is lost, or in two states"
        assert {content.block_hash: slot for slot, content in self._contents.items()} == self._by_hash
        assert self._contents.keys().isdisjoint(self._free), "a free slot holds something"
        copies = {*self._copies, *(slot for slot, copy in self._pinned.items() if copy)}
        assert copies == {slot for slot, content in self._contents.items() if on_device(content)}

    def _slot(self) -> int | None:
        if self._free:
            return self._free.pop()
        queue = self._copies or self._alone
        if not queue:
            return None
        slot, _ = queue.popitem(last=False)
        content = self._contents.pop(slot)
        del self._by_hash[content.block_hash]
        self._on_evict(content)
        return slot

    def _unqueue(self, slot: int) -> bool:
        """Take an evictable slot out of its queue; whether it is a copy."""
        if slot in self._copies:
            del self._copies[slot]
            return True
        del self._alone[slot]
        return False
