"""Blocks that transfers use: slots reserved for what a pull brings, and blocks pinned while others read. Pure.

Scheduling goes on beside them: what is claimed counts as in use, and never more is claimed than what is left over when
everything that was admitted gets its blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from worker.cached_block import CachedBlock
from worker.prefix_cache import PrefixCache

if TYPE_CHECKING:
    from worker.transfer.puller import TransportCounts


@dataclass(frozen=True, slots=True)
class TransferCounts:
    """Since the start."""

    pulls: int = 0
    pulls_short: int = 0  # that brought less than was asked for
    pulled_blocks: int = 0
    pulled_bytes: int = 0
    pull_transport: str = ""  # of the last one that brought anything
    lent_blocks: int = 0  # pinned for others
    pulls_by_transport: tuple[tuple[str, TransportCounts], ...] = ()  # of those that were used, the best first
    fetch_token_s: float = 0.0  # to pull a token's KV, as measured; 0: not measured yet
    skipped_blocks: int = 0  # that a pull was asked for, and that were here already


@dataclass(frozen=True, slots=True, eq=False)
class Reservation:
    """`slots` of the pool for `contents` that are to come, in order; and what is held to stay before them."""

    contents: Sequence[CachedBlock]
    slots: list[int]
    kept: list[int]


class BlockClaims:
    """References on a cache's blocks that are no sequence's. `held` counts them by block."""

    def __init__(self, cache: PrefixCache) -> None:
        self.counts = TransferCounts()
        self.held: Counter[int] = Counter()
        self._cache = cache
        self._most = max(1, cache.pool.num_blocks // 2)  # the rest is for who computes, whatever others want

    def reserve(self, contents: Sequence[CachedBlock], room: int) -> Reservation | None:
        """Slots for what is lacking of a chain of blocks, at most `room`. None where nothing lacks, or nothing fits.

        With a host tier there are none: what a slot held before may be on its way there.
        """
        cache = self._cache
        if cache.host is not None:
            return None
        kept = cache.lookup(contents)
        self.counts = replace(self.counts, skipped_blocks=self.counts.skipped_blocks + len(kept))
        missing = contents[len(kept) :]
        room = min(room - cache.pool.unused(kept), self._most - self.held.total())
        if not missing or room <= 0:
            return None
        for block in kept:
            cache.pool.retain(block)
        slots = [cache.pool.allocate() for _ in missing[:room]]
        self.held.update(kept)
        self.held.update(slots)
        return Reservation(missing[:room], slots, kept)

    def adopt(self, reservation: Reservation, arrived: int) -> None:
        """The first `arrived` contents lie in their slots: list them. The other slots are free again."""
        for slot, content in zip(reservation.slots[:arrived], reservation.contents, strict=False):
            self._cache.insert(slot, content)
        self._drop([*reservation.kept, *reservation.slots])

    def count_pull(self, wanted: int, arrived: int, size_bytes: int, transport: str) -> None:
        """A pull ended."""
        counts = self.counts
        self.counts = replace(
            counts,
            pulls=counts.pulls + 1,
            pulls_short=counts.pulls_short + (arrived < wanted),
            pulled_blocks=counts.pulled_blocks + arrived,
            pulled_bytes=counts.pulled_bytes + size_bytes,
            pull_transport=transport if arrived else counts.pull_transport,
        )

    def note_pulls(self, by_transport: tuple[tuple[str, TransportCounts], ...], fetch_token_s: float) -> None:
        """What was pulled which way since the start, and at what pace."""
        self.counts = replace(self.counts, pulls_by_transport=by_transport, fetch_token_s=fetch_token_s)

    def pin(self, keys: Sequence[bytes], room: int) -> list[int]:
        """One more user of each block of the longest held beginning of `keys`; at most `room` that nobody used."""
        pool = self._cache.pool
        blocks: list[int] = []
        for block in self._cache.find(keys):
            room -= pool.ref_count(block) == 0
            if room < 0:
                break
            blocks.append(block)
        for block in blocks:
            pool.retain(block)
        self.held.update(blocks)
        self.counts = replace(self.counts, lent_blocks=self.counts.lent_blocks + len(blocks))
        return blocks

    def unpin(self, blocks: Sequence[int]) -> None:
        """One user less of each."""
        self._drop(blocks)

    def _drop(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            assert self.held[block] > 0, f"block {block} is given back more often than it was claimed"
            self.held[block] -= 1
            if not self.held[block]:
                del self.held[block]
        self._cache.pool.release(reversed(blocks))  # the tail goes first
