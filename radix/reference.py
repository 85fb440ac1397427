"""The prefix tree in plain Python: the oracle of every test, and what runs where nothing is compiled."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from radix.checks import check_blocks, check_cap, check_changes, check_hash, check_tier, check_worker
from radix.digest import EMPTY_DIGEST, ReferenceDigest
from radix.heat import hottest
from radix.keys import ROOT_HASH, Hashes, check_hashes
from radix.tree import (
    CLEAR,
    DEFAULT_MAX_BLOCKS,
    DEFAULT_MAX_BLOCKS_PER_WORKER,
    HEAT_WINDOW,
    STORE,
    Changes,
    Dump,
    HotPrefix,
    ManyMatches,
    Matches,
    Tier,
)

_WITHIN = (0b001, 0b011, 0b111)  # the tiers that the rows of tier_depths count, as bit masks


@dataclass(frozen=True, slots=True, eq=False)
class TreeMatches:
    """See radix.tree.Matches."""

    workers: NDArray[np.uint32]
    tier_depths: NDArray[np.uint32]

    @property
    def depths(self) -> NDArray[np.uint32]:
        depths: NDArray[np.uint32] = self.tier_depths[-1]
        return depths

    def by_worker(self, workers: int) -> NDArray[np.float64]:
        known = self.workers < workers
        depths = np.zeros((2, workers))
        depths[:, self.workers[known]] = self.tier_depths[::2, known]
        return depths

    def as_dict(self) -> dict[int, int]:
        return dict(zip(self.workers.tolist(), self.depths.tolist(), strict=True))

    def __len__(self) -> int:
        return len(self.workers)


class TreeManyMatches(list[Matches]):
    """See radix.tree.ManyMatches."""

    @property
    def ends(self) -> NDArray[np.uint32]:
        return np.cumsum([len(matches) for matches in self], dtype=np.uint32)

    @property
    def workers(self) -> NDArray[np.uint32]:
        return np.concatenate([_small([]), *(matches.workers for matches in self)])

    @property
    def depths(self) -> NDArray[np.uint32]:
        return np.concatenate([_small([]), *(matches.depths for matches in self)])


class _Worker:
    """What one worker holds, and what was refused to it."""

    __slots__ = ("blocks", "digest", "refused", "tiers")

    def __init__(self) -> None:
        self.blocks: set[int] = set()
        self.digest = ReferenceDigest()
        self.refused = 0
        self.tiers = 0  # bit mask of those in which it ever held a block


class ReferenceTree:
    """See radix.tree.PrefixTree. A store or removal costs O(blocks); a match O(depth x workers still matching).

    One lock makes every call a single step, but for `apply` and `match_many`: there it is each change, each query.
    """

    def __init__(
        self, max_blocks: int = DEFAULT_MAX_BLOCKS, max_blocks_per_worker: int = DEFAULT_MAX_BLOCKS_PER_WORKER
    ) -> None:
        check_cap("max_blocks", max_blocks)
        check_cap("max_blocks_per_worker", max_blocks_per_worker)
        self._max_blocks = max_blocks
        self._max_blocks_per_worker = max_blocks_per_worker
        self._lock = Lock()
        self._workers: dict[int, _Worker] = {}  # only those that hold a block, or were refused one
        self._holders: dict[int, dict[int, int]] = {}  # block -> worker -> bit mask of tiers; nothing empty in it
        self._parents: dict[int, int] = {}  # for each held block
        self._children: dict[int, set[int]] = {}  # block, itself held or not -> held blocks, never empty
        self._entries = 0
        self._matched: deque[int] = deque(maxlen=HEAT_WINDOW)  # the deepest block of each match

    def store(self, worker: int, hashes: Hashes, parent: int = ROOT_HASH, tier: int = Tier.DEVICE) -> int:
        check_worker(worker)
        check_hash("parent", parent)
        tier = check_tier(tier)
        check_blocks(hashes)
        with self._lock:
            return self._store(worker, hashes, parent, tier)

    def remove(self, worker: int, hashes: Hashes, tier: int = Tier.DEVICE) -> int:
        check_worker(worker)
        tier = check_tier(tier)
        check_hashes("hashes", hashes)
        with self._lock:
            return self._remove(worker, hashes, tier)

    def clear(self, worker: int) -> int:
        check_worker(worker)
        with self._lock:
            return self._clear(worker)

    def apply(self, worker: int, changes: Changes) -> None:
        check_worker(worker)
        check_changes(changes)
        parts = pairwise([0, *changes.ends.tolist()])
        rows = zip(changes.kinds.tolist(), changes.tiers.tolist(), changes.parents.tolist(), parts, strict=True)
        for kind, tier, parent, (start, end) in rows:
            with self._lock:
                if kind == STORE:
                    self._store(worker, changes.hashes[start:end], parent, tier)
                elif kind == CLEAR:
                    self._clear(worker)
                else:
                    self._remove(worker, changes.hashes[start:end], tier)

    def match(self, hashes: Hashes) -> Matches:
        check_hashes("hashes", hashes)
        query = hashes.tolist()
        with self._lock:
            depths = self._match(query)
            workers = sorted(depths)
            rows = [[self._within(tiers, query, depths[worker], worker) for worker in workers] for tiers in _WITHIN]
            if workers:
                self._matched.append(query[max(depths.values()) - 1])
        return TreeMatches(_small(workers), _small(rows))

    def match_many(self, queries: Sequence[Hashes]) -> ManyMatches:
        for index, query in enumerate(queries):
            check_hashes(f"queries[{index}]", query)
        return TreeManyMatches(self.match(query) for query in queries)

    def digest(self, worker: int) -> bytes:
        check_worker(worker)
        with self._lock:
            held = self._workers.get(worker)
            return held.digest.value if held else EMPTY_DIGEST

    def blocks(self, worker: int) -> Hashes:
        check_worker(worker)
        with self._lock:
            held = self._workers.get(worker)
            return np.sort(_array(held.blocks if held else ()))

    def count(self, worker: int) -> int:
        check_worker(worker)
        held = self._workers.get(worker)
        return len(held.blocks) if held else 0

    def refused(self, worker: int) -> int:
        check_worker(worker)
        held = self._workers.get(worker)
        return held.refused if held else 0

    def room(self, worker: int) -> int:
        with self._lock:
            return min(self._max_blocks - self._entries, self._max_blocks_per_worker - self.count(worker))

    def __len__(self) -> int:
        return self._entries

    def holders(self, block_hash: int) -> NDArray[np.uint32]:
        check_hash("block_hash", block_hash)
        with self._lock:
            return _small(sorted(self._holders.get(block_hash, ())))

    def children(self, block_hash: int) -> Hashes:
        check_hash("block_hash", block_hash)
        with self._lock:
            return np.sort(_array(self._children.get(block_hash, ())))

    def hottest(self, limit: int) -> list[HotPrefix]:
        if not 0 <= limit <= HEAT_WINDOW:
            raise ValueError(f"limit is {limit}: 0 to {HEAT_WINDOW} are allowed")
        with self._lock:
            return hottest(self._matched, self._parents, limit)

    def dump(self) -> Dump:
        with self._lock:
            sets: dict[tuple[int, ...], int] = {}
            rows = [
                sets.setdefault(tuple(sorted(worker << 3 | mask for worker, mask in holders.items())), len(sets))
                for holders in self._holders.values()
            ]
            hashes, parents = _array(self._holders), _array(map(self._parents.__getitem__, self._holders))
        ends = np.cumsum([len(members) for members in sets], dtype=np.uint32)
        return Dump(hashes, parents, _small(rows), ends, _small(list(chain.from_iterable(sets))))

    def check(self) -> None:
        with self._lock:
            assert self._entries == sum(len(holders) for holders in self._holders.values()) <= self._max_blocks
            assert self._entries == sum(len(held.blocks) for held in self._workers.values())
            assert self._parents.keys() == self._holders.keys()
            assert sum(len(children) for children in self._children.values()) == len(self._parents)
            assert all(self._children.values()), "no empty set of children is kept"
            for block, parent in self._parents.items():
                assert block in self._children[parent], f"block {block:016x} is missing below {parent:016x}"
            for worker, held in self._workers.items():
                self._check_worker(worker, held)

    def _check_worker(self, worker: int, held: _Worker) -> None:
        assert held.blocks or held.refused, f"worker {worker} holds nothing and is kept"
        assert len(held.blocks) <= self._max_blocks_per_worker
        masks = {block: self._holders[block][worker] for block in held.blocks}
        assert all(mask and not mask & ~held.tiers for mask in masks.values()), f"tiers of worker {worker}"
        digest = ReferenceDigest()
        for tier in Tier:
            digest.add(_array(block for block, mask in masks.items() if mask >> tier & 1), tier)
        assert held.digest.value == digest.value, f"digest of worker {worker}"

    def _store(self, worker: int, hashes: Hashes, parent: int, tier: int) -> int:
        held = self._workers.get(worker) or _Worker()
        room = min(self._max_blocks - self._entries, self._max_blocks_per_worker - len(held.blocks))
        entries, refused, new = len(held.blocks), 0, []
        for block in hashes.tolist():
            if block in held.blocks:
                holders = self._holders[block]
                if not holders[worker] >> tier & 1:
                    holders[worker] |= 1 << tier
                    new.append(block)
            elif room:
                room -= 1
                held.blocks.add(block)
                new.append(block)
                self._add_holder(worker, block, parent, 1 << tier)
            else:
                refused += 1
            parent = block
        if new or refused:
            self._workers[worker] = held
            self._entries += len(held.blocks) - entries
            held.refused += refused
            held.tiers |= 1 << tier
            held.digest.add(_array(new), tier)
        return len(new)

    def _remove(self, worker: int, hashes: Hashes, tier: int) -> int:
        held = self._workers.get(worker)
        if held is None:
            return 0
        known = held.blocks.intersection(hashes.tolist())
        gone = [block for block in known if self._holders[block][worker] >> tier & 1]
        held.digest.remove(_array(gone), tier)
        for block in gone:
            holders = self._holders[block]
            holders[worker] &= ~(1 << tier)
            if not holders[worker]:
                held.blocks.remove(block)
                self._entries -= 1
                self._drop_holder(worker, block)
        if not held.blocks and not held.refused:
            del self._workers[worker]
        return len(gone)

    def _clear(self, worker: int) -> int:
        held = self._workers.pop(worker, None)
        if held is None:
            return 0
        for block in held.blocks:
            self._drop_holder(worker, block)
        self._entries -= len(held.blocks)
        return len(held.blocks)

    def _add_holder(self, worker: int, block: int, parent: int, mask: int) -> None:
        holders = self._holders.get(block)
        if holders is None:
            self._holders[block] = {worker: mask}
            self._parents[block] = parent
            self._children.setdefault(parent, set()).add(block)
        else:
            holders[worker] = mask

    def _drop_holder(self, worker: int, block: int) -> None:
        holders = self._holders[block]
        del holders[worker]
        if not holders:
            del self._holders[block]
            parent = self._parents.pop(block)
            siblings = self._children[parent]
            siblings.remove(block)
            if not siblings:
                del self._children[parent]

    def _match(self, query: list[int]) -> dict[int, int]:
        """Worker -> leading blocks in any tier."""
        depths: dict[int, int] = {}
        matching: set[int] | None = None  # the workers that hold every block so far
        for depth, block in enumerate(query):
            holders = self._holders.get(block, {}).keys()
            if matching is None:
                matching = set(holders)
            elif not matching <= holders:
                depths.update(dict.fromkeys(matching - holders, depth))
                matching &= holders
            if not matching:
                break
        depths.update(dict.fromkeys(matching or (), len(query)))
        return depths

    def _within(self, tiers: int, query: list[int], depth: int, worker: int) -> int:
        """How many leading blocks of the first `depth`, all held by the worker, it holds in these tiers."""
        if not self._workers[worker].tiers & ~tiers:
            return depth
        return next((i for i in range(depth) if not self._holders[query[i]][worker] & tiers), depth)


def _array(blocks: Iterable[int]) -> Hashes:
    return np.fromiter(blocks, dtype=np.uint64)


def _small(values: list[int] | list[list[int]]) -> NDArray[np.uint32]:
    return np.array(values, dtype=np.uint32)
