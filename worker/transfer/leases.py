"""Who may read which of our blocks until when: leases, and the cache that keeps their blocks. Pure, behind one lock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

MAX_LEASES = 1024  # each is one request's handover
MAX_LEASE_S = 60.0


class BlockHolder(Protocol):
    """A prefix cache as transfers see it. Called from transfer threads: it locks or posts as it must."""

    def pin(self, keys: Sequence[bytes]) -> list[int]:
        """One more user of each block of the longest held beginning of `keys`; where they are. They stay as they are
        until unpinned. A key (16 bytes) is compared whole."""
        ...

    def unpin(self, blocks: Sequence[int]) -> None:
        """One user less of each."""
        ...


@dataclass(slots=True, eq=False)
class Lease:
    """Blocks pinned for one ticket. `digests`: of the first of them, taken ahead and while all were pinned;
    `generations`: the blocks', from when it was added until it ends."""

    lease_id: bytes
    keys: list[bytes]
    blocks: list[int]
    ends_at: float
    generations: list[int] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)


class Leases:
    """The table of leases that have not ended. Blocks are pinned before `add` and unpinned after a lease came out:
    never under the lock, as the cache's owner may be the one who waits for it."""

    def __init__(
        self,
        max_blocks: int,
        generations: NDArray[np.uint32],
        clock: Callable[[], float],
        max_leases: int = MAX_LEASES,
    ) -> None:
        """`max_blocks`: how many may be pinned in all, counting a block once for each lease. `generations`: of all
        blocks; a block's grows when a lease ended that was not released, and no other lease is on the block."""
        self.max_blocks = max_blocks
        self.max_leases = max_leases
        self._clock = clock
        self._generations = generations
        self._users = np.zeros(len(generations), dtype=np.uint32)  # leases on each block
        self._lock = threading.Lock()
        self._by_id: dict[bytes, Lease] = {}
        self._blocks = 0

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def blocks(self) -> int:
        """Pinned, counting a block once for each lease."""
        return self._blocks

    @property
    def room(self) -> int:
        """How many more blocks may be leased now."""
        return 0 if len(self._by_id) >= self.max_leases else max(0, self.max_blocks - self._blocks)

    def add(self, lease: Lease) -> Lease | None:
        """Enter a lease. Returns the one that counts: another that has its id and was there before, or None where there
        is no room."""
        with self._lock:
            other = self._by_id.get(lease.lease_id)
            if other is not None:
                return other
            if len(lease.blocks) > self.room:
                return None
            self._by_id[lease.lease_id] = lease
            self._blocks += len(lease.blocks)
            self._users[lease.blocks] += 1
            lease.generations = self._generations[lease.blocks].tolist()
            return lease

    def get(self, lease_id: bytes) -> Lease | None:
        """A lease that has not ended."""
        with self._lock:
            lease = self._by_id.get(lease_id)
            return lease if lease is not None and lease.ends_at > self._clock() else None

    def holds(self, lease: Lease) -> bool:
        """Whether it has not ended: neither released nor expired."""
        return self.get(lease.lease_id) is lease

    def remove(self, lease_id: bytes) -> Lease | None:
        """Take a lease out: the caller unpins its blocks."""
        with self._lock:
            return self._taken(lease_id)

    def take_expired(self) -> list[Lease]:
        """Take out those that ended by now: the caller unpins their blocks."""
        with self._lock:
            now = self._clock()
            ended = [lease.lease_id for lease in self._by_id.values() if lease.ends_at <= now]
            return self._revoked(ended)

    def close(self) -> list[Lease]:
        """Take out all, and let none in any more: the caller unpins their blocks."""
        with self._lock:
            self.max_leases = 0
            return self._revoked(list(self._by_id))

    def next_end(self) -> float | None:
        """When the next lease ends; None where there is none."""
        with self._lock:
            return min((lease.ends_at for lease in self._by_id.values()), default=None)

    def _revoked(self, lease_ids: Sequence[bytes]) -> list[Lease]:
        leases = []
        for lease_id in lease_ids:
            lease = self._taken(lease_id)
            if lease is not None:
                blocks = np.array(lease.blocks, dtype=np.intp)
                self._generations[blocks[self._users[blocks] == 0]] += 1
                leases.append(lease)
        return leases

    def _taken(self, lease_id: bytes) -> Lease | None:
        lease = self._by_id.pop(lease_id, None)
        if lease is not None:
            self._blocks -= len(lease.blocks)
            self._users[lease.blocks] -= 1
        return lease
