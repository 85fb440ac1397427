"""What the tree's arguments must be. Errors name field, value and limit."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from radix.keys import ROOT_HASH, Hashes, check_hashes
from radix.tree import CLEAR, LARGEST_MAX_BLOCKS, MAX_WORKERS, STORE, Changes, Tier

Unsigned = TypeVar("Unsigned", np.uint8, np.uint32)


def check_cap(field: str, value: int) -> None:
    """Raise ValueError unless a tree can have this cap."""
    if not 1 <= value <= LARGEST_MAX_BLOCKS:
        raise ValueError(f"{field} is {value}: 1 to {LARGEST_MAX_BLOCKS} are allowed")


def check_worker(worker: int) -> None:
    """Raise ValueError unless this can be a worker."""
    if not 0 <= worker < MAX_WORKERS:
        raise ValueError(f"worker is {worker}: 0 to {MAX_WORKERS - 1} are allowed")


def check_tier(tier: int) -> int:
    """A tier as a plain integer: NumPy's would overflow in bit masks. Raises ValueError for what is none."""
    if not 0 <= tier < len(Tier):
        raise ValueError(f"tier is {tier}: 0 to {len(Tier) - 1} are allowed")
    return int(tier)


def check_hash(field: str, value: int) -> None:
    """Raise ValueError unless this can be a block hash, or the root."""
    if not 0 <= value < 2**64:
        raise ValueError(f"{field} is {value}: 0 to 2^64 - 1 are allowed")


def check_blocks(hashes: Hashes, field: str = "hashes") -> None:
    """Raise TypeError for what are no hashes, ValueError where the root is among them: it cannot be stored."""
    check_hashes(field, hashes)
    if not hashes.all():
        raise ValueError(f"{field} hold {ROOT_HASH}: it stands for the root, a block has another")


def check_changes(changes: Changes) -> None:
    """Raise TypeError or ValueError unless the columns fit each other and all values are in range."""
    kinds, tiers, ends = changes.kinds, changes.tiers, changes.ends
    _check_column("kinds", kinds, np.uint8)
    _check_column("tiers", tiers, np.uint8)
    _check_column("ends", ends, np.uint32)
    check_hashes("parents", changes.parents)
    check_hashes("hashes", changes.hashes)
    rows = len(kinds)
    for field, column in (("tiers", tiers), ("parents", changes.parents), ("ends", ends)):
        if len(column) != rows:
            raise ValueError(f"{field} has {len(column)} rows: {rows} are needed, as in kinds")
    if kinds.max(initial=STORE) > CLEAR:
        raise ValueError(f"kinds hold {kinds.max()}: 0 to {CLEAR} are allowed")
    if tiers.max(initial=Tier.DEVICE) >= len(Tier):
        raise ValueError(f"tiers hold {tiers.max()}: 0 to {len(Tier) - 1} are allowed")
    if (ends[1:] < ends[:-1]).any():
        raise ValueError("ends go down: they must ascend")
    last = int(ends[-1]) if rows else 0
    if last != len(changes.hashes):
        raise ValueError(f"ends go to {last}: there are {len(changes.hashes)} hashes")
    zeros = np.flatnonzero(changes.hashes == ROOT_HASH)
    if (kinds[np.searchsorted(ends, zeros, side="right")] == STORE).any():
        raise ValueError(f"hashes to store hold {ROOT_HASH}: it stands for the root, a block has another")


def _check_column(field: str, column: NDArray[Unsigned], dtype: type[Unsigned]) -> None:
    if not isinstance(column, np.ndarray) or column.dtype != dtype or column.ndim != 1:
        shown = f"{column.dtype} {column.shape}" if isinstance(column, np.ndarray) else type(column).__name__
        raise TypeError(f"{field} is {shown}: a one-dimensional array of {np.dtype(dtype).name} is needed")
