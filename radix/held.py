"""What one worker holds, by its own account: blocks with their parents and tiers, and the digest over them."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from radix.backend import native
from radix.checks import check_blocks, check_hash, check_tier
from radix.digest import ReferenceDigest
from radix.keys import ROOT_HASH, Hashes, check_hashes
from radix.tree import Tier


class ReferenceHeldBlocks:
    """A set of blocks in tiers: storing what is held, and removing what is not, changes nothing.

    A block keeps the parent that it was stored with first, until it is held in no tier. One thread at a time.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, tuple[int, int]] = {}  # block -> parent, mask of tiers
        self._digest = ReferenceDigest()

    def store(self, hashes: Hashes, parent: int = ROOT_HASH, tier: int = Tier.DEVICE) -> None:
        """The chain `hashes`, whose first block follows `parent`, is held. Raises ValueError where a hash is 0."""
        check_blocks(hashes)
        check_hash("parent", parent)
        bit = 1 << check_tier(tier)
        new = []
        for block in hashes.tolist():
            first_parent, mask = self._blocks.get(block, (parent, 0))
            if not mask & bit:
                self._blocks[block] = first_parent, mask | bit
                new.append(block)
            parent = block
        self._digest.add(np.array(new, dtype=np.uint64), tier)

    def remove(self, hashes: Hashes, tier: int = Tier.DEVICE) -> None:
        """These are held no longer in `tier`."""
        check_hashes("hashes", hashes)
        bit = 1 << check_tier(tier)
        gone = []
        for block in hashes.tolist():
            parent, mask = self._blocks.get(block, (ROOT_HASH, 0))
            if not mask & bit:
                continue
            gone.append(block)
            if mask == bit:
                del self._blocks[block]
            else:
                self._blocks[block] = parent, mask & ~bit
        self._digest.remove(np.array(gone, dtype=np.uint64), tier)

    def check(self, block_hashes: Hashes) -> int:
        """How many blocks these are. Raises TypeError or ValueError for what cannot be stored, as `store` does."""
        check_blocks(block_hashes, "block_hashes")
        return len(block_hashes)

    def clear(self) -> None:
        """Nothing is held."""
        self._blocks = {}
        self._digest = ReferenceDigest()

    def copy(self) -> ReferenceHeldBlocks:
        """The same set, apart: a copy of memory, for whoever must not hold a lock for longer."""
        copied = ReferenceHeldBlocks()
        copied._blocks = self._blocks.copy()
        copied._digest = copy(self._digest)
        return copied

    def columns(self) -> tuple[Hashes, Hashes, NDArray[np.uint8]]:
        """(blocks,) each: hashes, parents, masks (bit t where held in Tier t).

        In the order of hashes, but parents before children where both are held: equal sets give equal columns. The
        compiled one lets other threads run meanwhile.
        """
        ordered = self._parents_first()
        parents, masks = zip(*map(self._blocks.__getitem__, ordered), strict=True) if ordered else ((), ())
        return (
            np.array(ordered, dtype=np.uint64),
            np.array(parents, dtype=np.uint64),
            np.array(masks, dtype=np.uint8),
        )

    @property
    def digest(self) -> bytes:
        """radix.digest of all that is held."""
        return self._digest.value

    def __len__(self) -> int:
        """Blocks held, in any tier."""
        return len(self._blocks)

    def _parents_first(self) -> list[int]:
        ordered: dict[int, None] = {}
        for block in sorted(self._blocks):
            way: dict[int, None] = {}  # upwards; parents in a circle, which hashing cannot make, end it
            while block in self._blocks and block not in ordered and block not in way:
                way[block] = None
                block = self._blocks[block][0]
            ordered.update(dict.fromkeys(reversed(way)))
        return list(ordered)


if TYPE_CHECKING or native is None:
    HeldBlocks: TypeAlias = ReferenceHeldBlocks
else:
    HeldBlocks = getattr(native, "HeldBlocks", ReferenceHeldBlocks)
"""The one that runs: the compiled one where there is one."""
