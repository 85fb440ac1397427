"""The backends that pass the contract suite of PrefixTree, and what they are compared with."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest

from radix.digest import SetDigest
from radix.keys import ROOT_HASH, Hashes
from radix.reference import ReferenceTree
from radix.tree import (
    DEFAULT_MAX_BLOCKS,
    DEFAULT_MAX_BLOCKS_PER_WORKER,
    HEAT_WINDOW,
    Changes,
    HotPrefix,
    PrefixTree,
    Tier,
)

TREES: dict[str, Callable[..., PrefixTree]] = {"reference": ReferenceTree}
MISSING = ""
try:
    from radix._native import NativeTree
except ImportError as error:
    MISSING = f"no native tree ({error}): `make native` builds it"
else:
    TREES["native"] = NativeTree

BACKENDS = [
    pytest.param(ReferenceTree, id="reference"),
    pytest.param(TREES.get("native"), id="native", marks=pytest.mark.skipif(bool(MISSING), reason=MISSING)),
]
"""Classes to parametrize tests with."""


def blocks(*hashes: int) -> Hashes:
    return np.array(hashes, dtype=np.uint64)


def columns(*changes: tuple[int, int, int, Sequence[int]]) -> Changes:
    """Changes of rows (kind, tier, parent, hashes)."""
    kinds, tiers, parents, parts = zip(*changes, strict=True) if changes else ((), (), (), ())
    return Changes(
        np.array(kinds, dtype=np.uint8),
        np.array(tiers, dtype=np.uint8),
        np.array(parents, dtype=np.uint64),
        np.cumsum([len(part) for part in parts], dtype=np.uint32),
        blocks(*(block for part in parts for block in part)),
    )


class NaiveTree:
    """What the contract says, as a dict of sets. Hashes are lists of integers."""

    def __init__(
        self, max_blocks: int = DEFAULT_MAX_BLOCKS, max_blocks_per_worker: int = DEFAULT_MAX_BLOCKS_PER_WORKER
    ) -> None:
        self.caps = (max_blocks, max_blocks_per_worker)
        self.held: defaultdict[tuple[int, int], set[int]] = defaultdict(set)  # (worker, tier) -> blocks
        self.parents: dict[int, int] = {}
        self.refused: Counter[int] = Counter()
        self.matched: list[int] = []

    def store(self, worker: int, hashes: Iterable[int], parent: int = ROOT_HASH, tier: int = Tier.DEVICE) -> int:
        new = 0
        for block in hashes:
            if block not in self.blocks(worker) and not self.room(worker):
                self.refused[worker] += 1
            elif block not in self.held[worker, tier]:
                self.held[worker, tier].add(block)
                self.parents.setdefault(block, parent)
                new += 1
            parent = block
        return new

    def remove(self, worker: int, hashes: Iterable[int], tier: int = Tier.DEVICE) -> int:
        gone = self.held[worker, tier].intersection(hashes)
        self.held[worker, tier] -= gone
        self._drop_links()
        return len(gone)

    def clear(self, worker: int) -> int:
        count = len(self.blocks(worker))
        for tier in Tier:
            self.held[worker, tier].clear()
        self.refused[worker] = 0
        self._drop_links()
        return count

    def tier_depths(self, query: Sequence[int], worker: int) -> list[int]:
        levels = [set().union(*(self.held[worker, tier] for tier in Tier if tier <= slowest)) for slowest in Tier]
        return [next((i for i, block in enumerate(query) if block not in held), len(query)) for held in levels]

    def record(self, query: Sequence[int], depth: int) -> None:
        """A match of `query` whose deepest worker holds `depth` blocks."""
        if depth:
            self.matched.append(query[depth - 1])

    def blocks(self, worker: int) -> set[int]:
        return set().union(*(self.held[worker, tier] for tier in Tier))

    def all(self) -> dict[str, Any]:
        """See all_of."""
        workers = self.workers()
        held = {worker: self.blocks(worker) for worker in workers}
        members = {
            block: [(worker, self._mask(worker, block)) for worker in workers if block in held[worker]]
            for block in self.parents
        }
        children: dict[int, list[int]] = {block: [] for block in {*self.parents, *self.parents.values(), ROOT_HASH}}
        for block, parent in sorted(self.parents.items()):
            children[parent].append(block)
        return {
            "entries": len(self),
            "parents": self.parents,
            "members": members,
            "blocks": {worker: sorted(held[worker]) for worker in workers},
            "counts": {worker: len(held[worker]) for worker in workers},
            "digests": {worker: self._digest(worker) for worker in workers},
            "refused": {worker: self.refused[worker] for worker in workers},
            "room": {worker: self.room(worker) for worker in workers},
            "holders": {block: [worker for worker, _ in row] for block, row in members.items()},
            "children": children,
        }

    def holders(self, block: int) -> list[int]:
        return [worker for worker in self.workers() if block in self.blocks(worker)]

    def children(self, block: int) -> list[int]:
        return sorted(child for child, parent in self.parents.items() if parent == block)

    def workers(self) -> list[int]:
        return sorted({worker for worker, _ in self.held})

    def room(self, worker: int) -> int:
        return min(self.caps[0] - len(self), self.caps[1] - len(self.blocks(worker)))

    def hottest(self, limit: int) -> list[HotPrefix]:
        hits: Counter[int] = Counter()
        for block in self.matched[-HEAT_WINDOW:]:
            hits.update(self._way_up(block))
        listed = [
            HotPrefix(block, len(self._way_up(block)), count)
            for block, count in hits.items()
            if all(hits[child] != count for child in self.children(block))
        ]
        return sorted(listed, key=lambda hot: (-hot.hits, -hot.depth, hot.block_hash))[:limit]

    def __len__(self) -> int:
        return sum(len(self.blocks(worker)) for worker in self.workers())

    def _mask(self, worker: int, block: int) -> int:
        return sum(1 << tier for tier in Tier if block in self.held[worker, tier])

    def _digest(self, worker: int) -> bytes:
        digest = SetDigest()
        for tier in Tier:
            digest.add(blocks(*self.held[worker, tier]), tier)
        return digest.value

    def _way_up(self, block: int) -> list[int]:
        """A block and the held ones above it; nothing where the block is not held, or the way goes in a circle."""
        way: list[int] = []
        while block in self.parents:
            if block in way:
                return []
            way.append(block)
            block = self.parents[block]
        return way

    def _drop_links(self) -> None:
        everything = set().union(*self.held.values())
        self.parents = {block: parent for block, parent in self.parents.items() if block in everything}


def holdings(tree: PrefixTree) -> tuple[dict[int, int], dict[int, list[tuple[int, int]]]]:
    """A dump as dicts: block -> parent, block -> (worker, mask of tiers), ascending."""
    dump = tree.dump()
    assert len(dump.hashes) == len(dump.parents) == len(dump.holder_sets) == len(set(dump.hashes.tolist()))
    sets = [
        [(member >> 3, member & 7) for member in part.tolist()] for part in np.split(dump.members, dump.set_ends)[:-1]
    ]
    parents = dict(zip(dump.hashes.tolist(), dump.parents.tolist(), strict=True))
    return parents, {b: sets[row] for b, row in zip(dump.hashes.tolist(), dump.holder_sets.tolist(), strict=True)}


def all_of(tree: PrefixTree, workers: Iterable[int]) -> dict[str, Any]:
    """Everything that a tree tells of these workers and of all blocks, to be compared."""
    workers = list(workers)
    parents, members = holdings(tree)
    return {
        "entries": len(tree),
        "parents": parents,
        "members": members,
        "blocks": {worker: tree.blocks(worker).tolist() for worker in workers},
        "counts": {worker: tree.count(worker) for worker in workers},
        "digests": {worker: tree.digest(worker) for worker in workers},
        "refused": {worker: tree.refused(worker) for worker in workers},
        "room": {worker: tree.room(worker) for worker in workers},
        "holders": {block: tree.holders(block).tolist() for block in parents},
        "children": {block: tree.children(block).tolist() for block in {*parents, *parents.values(), ROOT_HASH}},
    }
