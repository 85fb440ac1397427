"""The prefix tree: which worker holds which blocks, and how far each holds a given prompt.

A block hash is chained, so it names its whole prefix: the tree is a set of blocks per worker with parent links, and a
match needs no walk from node to node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from radix.keys import ROOT_HASH, Hashes

MAX_WORKERS = 65_536
"""Workers are small integers below this, chosen by the caller."""


@dataclass(frozen=True, slots=True, eq=False)
class Matches:
    """How many leading blocks of a prompt each worker holds; workers that hold none are left out."""

    workers: NDArray[np.uint32]  # (matches,), ascending
    depths: NDArray[np.uint32]  # (matches,), blocks, at least 1

    def as_dict(self) -> dict[int, int]:
        """Worker -> depth in blocks."""
        return dict(zip(self.workers.tolist(), self.depths.tolist(), strict=True))


class PrefixTree(Protocol):
    """What every implementation does; tests/contract/test_prefix_tree.py is the suite that they pass.

    Hashes are 1-D uint64 arrays (TypeError otherwise), workers 0 <= worker < MAX_WORKERS (ValueError otherwise). No
    call of one worker touches the entries of another. Blocks may come and go in any order: a child whose parent is
    gone stays held, and counts in matches again as soon as the parent is back.
    """

    def store(self, worker: int, hashes: Hashes, parent: int = ROOT_HASH) -> int:
        """`worker` holds the chain `hashes`, whose first block follows `parent`. Returns how many were new to it.

        Blocks that it holds already stay as they are. A block's parent is the one that it was stored with first,
        until nobody holds it. Raises ValueError where a hash is 0 (the root).
        """
        ...

    def remove(self, worker: int, hashes: Hashes) -> int:
        """`worker` holds these no longer. Returns how many it had held; unknown ones are ignored."""
        ...

    def clear(self, worker: int) -> int:
        """`worker` holds nothing any more and leaves no trace. Returns how many blocks it had held."""
        ...

    def match(self, hashes: Hashes) -> Matches:
        """Each worker's number of leading `hashes` (a prompt's blocks, from its first) that it holds without a hole."""
        ...

    def digest(self, worker: int) -> bytes:
        """radix.digest of the worker's blocks: 16 bytes."""
        ...

    def blocks(self, worker: int) -> Hashes:
        """The worker's blocks, ascending."""
        ...

    def count(self, worker: int) -> int:
        """How many blocks the worker holds."""
        ...

    def __len__(self) -> int:
        """(worker, block) entries."""
        ...

    def holders(self, block_hash: int) -> NDArray[np.uint32]:
        """The workers that hold a block, ascending."""
        ...

    def children(self, block_hash: int) -> Hashes:
        """The held blocks that follow a block (ROOT_HASH: first blocks), ascending; the block itself may be gone."""
        ...

    def check(self) -> None:
        """Assert every invariant; for tests and `validate` switches."""
        ...
