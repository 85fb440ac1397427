"""The prefix tree: which worker holds which blocks, and how far each holds a given prompt.

A block hash is chained, so it names its whole prefix: the tree is a set of blocks per worker with parent links, and a
match needs no walk from node to node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from radix.keys import ROOT_HASH, Hashes

MAX_WORKERS = 65_536
"""Workers are small integers below this, chosen by the caller."""

DEFAULT_MAX_BLOCKS = 2**26
"""(worker, block) entries in all: about 1.7 GB."""

DEFAULT_MAX_BLOCKS_PER_WORKER = 2**24
"""(worker, block) entries of one worker: 268 million tokens in blocks of 16."""

LARGEST_MAX_BLOCKS = 2**29
"""What either cap may be set to."""

HEAT_WINDOW = 4096
"""Matches that `hottest` looks back on."""


class Tier(IntEnum):
    """Where a worker holds a block; lower is faster."""

    DEVICE = 0
    HOST = 1
    DISK = 2


class Matches(Protocol):
    """How many leading blocks of a prompt each worker holds; workers that hold none are left out."""

    @property
    def workers(self) -> NDArray[np.uint32]:
        """Shape (matches,), ascending."""
        ...

    @property
    def depths(self) -> NDArray[np.uint32]:
        """Shape (matches,): leading blocks held in any tier, at least 1."""
        ...

    @property
    def tier_depths(self) -> NDArray[np.uint32]:
        """Shape (3, matches): leading blocks held on the device; on device or host; in any tier (`depths`)."""
        ...

    def by_worker(self, workers: int) -> NDArray[np.float64]:
        """Shape (2, workers): leading blocks that each of the first so many workers holds on the device, and in any
        tier; 0 for one that does not match."""
        ...

    def as_dict(self) -> dict[int, int]:
        """Worker -> depth in blocks."""
        ...

    def __len__(self) -> int:
        """Workers that match."""
        ...


class ManyMatches(Protocol):
    """The matches of several queries: one by one, as in a sequence, or all in one array."""

    @property
    def ends(self) -> NDArray[np.uint32]:
        """Shape (queries,), ascending: query i has the rows ends[i - 1] to ends[i] - 1 of the columns."""
        ...

    @property
    def workers(self) -> NDArray[np.uint32]:
        """Shape (rows,): as in Matches, query after query."""
        ...

    @property
    def depths(self) -> NDArray[np.uint32]:
        """Shape (rows,): as in Matches, query after query."""
        ...

    def __len__(self) -> int:
        """Queries."""
        ...

    def __getitem__(self, index: int, /) -> Matches:
        """The matches of one query."""
        ...

    def __iter__(self) -> Iterator[Matches]:
        """Query after query."""
        ...


class HotPrefix(NamedTuple):
    """A prefix that recent matches went through."""

    block_hash: int  # of its last block
    depth: int  # blocks from the root; from the nearest gap where an inner block is gone
    hits: int  # of the last HEAT_WINDOW matches


@dataclass(frozen=True, slots=True, eq=False)
class Changes:
    """What happened to one worker's blocks, in order, as columns: one row a change.

    Change i is about `hashes[ends[i - 1] : ends[i]]` (from 0 for the first).
    """

    kinds: NDArray[np.uint8]  # (changes,): STORE, REMOVE or CLEAR
    tiers: NDArray[np.uint8]  # (changes,): Tier; of no meaning to CLEAR
    parents: Hashes  # (changes,): of no meaning but to STORE
    ends: NDArray[np.uint32]  # (changes,), ascending to len(hashes)
    hashes: Hashes


STORE, REMOVE, CLEAR = 0, 1, 2


@dataclass(frozen=True, slots=True, eq=False)
class Dump:
    """All that a tree holds, as columns: what radix.snapshot packs."""

    hashes: Hashes  # (blocks,), distinct
    parents: Hashes  # (blocks,)
    holder_sets: NDArray[np.uint32]  # (blocks,): row of the set of holders
    set_ends: NDArray[np.uint32]  # (sets,), ascending
    members: NDArray[np.uint32]  # set i is members[set_ends[i - 1] : set_ends[i]]: worker << 3 | bit mask of tiers


class PrefixTree(Protocol):
    """What every implementation does; tests/contract/test_prefix_tree.py is the suite that they pass.

    Hashes are 1-D uint64 arrays (TypeError otherwise), workers 0 <= worker < MAX_WORKERS, tiers 0 to 2 (ValueError
    otherwise). No call of one worker touches the entries of another. Blocks may come and go in any order: a child whose
    parent is gone stays held, and counts in matches again as soon as the parent is back.

    An entry is a (worker, block) pair, in however many tiers. At a cap (`max_blocks` entries in all,
    `max_blocks_per_worker`) a new entry is refused and counted: what is held stays and matches go on. Room comes back
    as blocks go.

    Threads: any number may call; readers run beside each other, and beside a writer but for steps of microseconds.
    """

    def store(self, worker: int, hashes: Hashes, parent: int = ROOT_HASH, tier: int = Tier.DEVICE) -> int:
        """`worker` holds the chain `hashes`, whose first block follows `parent`. Returns how many were new in `tier`.

        Blocks that it holds there already stay as they are. A block's parent is the one that it was stored with first,
        until nobody holds it. Raises ValueError where a hash is 0 (the root).
        """
        ...

    def remove(self, worker: int, hashes: Hashes, tier: int = Tier.DEVICE) -> int:
        """`worker` holds these no longer in `tier`. Returns how many it had held there; unknown ones are ignored."""
        ...

    def clear(self, worker: int) -> int:
        """`worker` holds nothing any more, for all readers at once, and leaves no trace.

        Returns how many blocks it had held.
        """
        ...

    def apply(self, worker: int, changes: Changes) -> None:
        """A batch of changes of one worker in one call. Raises ValueError, and changes nothing, for columns that do
        not fit each other or values out of range."""
        ...

    def match(self, hashes: Hashes) -> Matches:
        """Each worker's number of leading `hashes` (a prompt's blocks, from its first) that it holds without a hole.

        `hashes` must be a chain: each block's hash made from the one before it. For other sequences a worker's depth
        may be too large; so may that of a worker which said itself that a block follows another than it does.
        """
        ...

    def match_many(self, queries: Sequence[Hashes]) -> ManyMatches:
        """`match` of each query, in one call that lets other threads run."""
        ...

    def digest(self, worker: int) -> bytes:
        """radix.digest of the worker's blocks in their tiers: 16 bytes."""
        ...

    def blocks(self, worker: int) -> Hashes:
        """The worker's blocks in any tier, ascending."""
        ...

    def count(self, worker: int) -> int:
        """How many blocks the worker holds, in any tier."""
        ...

    def refused(self, worker: int) -> int:
        """Entries that a cap kept out since the worker was cleared last."""
        ...

    def room(self, worker: int) -> int:
        """How many more entries the caps leave to the worker."""
        ...

    def __len__(self) -> int:
        """(worker, block) entries."""
        ...

    def holders(self, block_hash: int) -> NDArray[np.uint32]:
        """The workers that hold a block in any tier, ascending."""
        ...

    def children(self, block_hash: int) -> Hashes:
        """The held blocks that follow a block (ROOT_HASH: first blocks), ascending; the block itself may be gone."""
        ...

    def hottest(self, limit: int) -> list[HotPrefix]:
        """The prefixes that most of the last HEAT_WINDOW matches held, most hits first, then deepest, then by hash.

        A match counts for the deepest block that any worker held, if it is held still, and for all held blocks above
        it. Of a chain of blocks with equal hits only the deepest is listed. Parents in a circle, which only made-up
        events have, and what hangs on them are left out. `limit` is 0 to HEAT_WINDOW (ValueError).
        """
        ...

    def dump(self) -> Dump:
        """All that is held, in an order of no meaning. See radix.snapshot."""
        ...

    def check(self) -> None:
        """Assert every invariant; for tests and `validate` switches."""
        ...
