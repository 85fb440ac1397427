"""A holder and a puller for the tests of transfers: a cache over a real block pool, pools with known contents."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import closing
from functools import lru_cache

import numpy as np

from worker.block_pool import BlockPool
from worker.transfer.memory import BlockLayout, BlockMemory
from worker.transfer.puller import Puller, PullResult
from worker.transfer.transports import Transport

LAYOUT = BlockLayout(4096, tag=b"test-layout-0001")


class PooledHolder:
    """Keys over a BlockPool, as a prefix cache has them. `check` asserts the pool's accounts."""

    def __init__(self, memory: BlockMemory) -> None:
        self.pool = BlockPool(memory.num_blocks, self._evicted)
        self.memory = memory
        self._by_key: dict[bytes, int] = {}
        self._lock = threading.Lock()

    def store(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks with these keys, idle, each filled with bytes made from its key."""
        blocks = [self.pool.allocate() for _ in keys]
        for key, block in zip(keys, blocks, strict=True):
            data = memoryview(content(key, self.memory.layout))
            for view in self.memory.views([block]):
                view[:], data = data[: len(view)], data[len(view) :]
            self._by_key[key] = block
            self.pool.set_cached(block, True)
        self.pool.release(reversed(blocks))
        return blocks

    def pin(self, keys: Sequence[bytes]) -> list[int]:
        """See BlockHolder."""
        blocks: list[int] = []
        with self._lock:
            for key in keys:
                block = self._by_key.get(key)
                if block is None:
                    break
                self.pool.retain(block)
                blocks.append(block)
        return blocks

    def unpin(self, blocks: Sequence[int]) -> None:
        """See BlockHolder."""
        with self._lock:
            self.pool.release(reversed(blocks))

    @property
    def pinned(self) -> int:
        return self.pool.in_use

    def check(self) -> None:
        """The pool's invariants, and that nothing is pinned."""
        self.pool.check()
        assert self.pinned == 0, f"{self.pinned} blocks are still pinned"

    def _evicted(self, block: int) -> None:
        for key in [key for key, held in self._by_key.items() if held == block]:
            del self._by_key[key]


def pull_once(
    pool: BlockMemory,
    transports: Sequence[Transport],
    ticket: bytes,
    keys: Sequence[bytes],
    slots: Sequence[int],
    deadline_s: float,
) -> PullResult:
    """By a puller of its own."""
    with closing(Puller(pool, transports)) as puller:
        return puller.pull(ticket, keys, slots, deadline_s)


def keys_of(count: int, name: str = "k") -> list[bytes]:
    """Different keys."""
    return [f"{name}{number:015d}".encode()[:16].ljust(16, b".") for number in range(count)]


@lru_cache(maxsize=64)
def content(key: bytes, layout: BlockLayout) -> bytes:
    """What a block with that key holds: no byte is 0."""
    seed = int.from_bytes(key, "little")
    return np.random.default_rng(seed).integers(1, 256, layout.block_bytes, dtype=np.uint8).tobytes()


def held(memory: BlockMemory, slot: int) -> bytes:
    """A block's bytes."""
    return b"".join(bytes(view) for view in memory.views([slot]))


def private_memory(num_blocks: int, layout: BlockLayout = LAYOUT) -> BlockMemory:
    """A pool that no other process sees, full of zeros."""
    return BlockMemory(bytearray(num_blocks * layout.block_bytes), layout, num_blocks)
