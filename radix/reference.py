"""The prefix tree in plain Python: the oracle of every test, and what runs where nothing is compiled."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from radix.digest import EMPTY_DIGEST, SetDigest, digest_of
from radix.keys import ROOT_HASH, Hashes, check_hashes
from radix.tree import MAX_WORKERS, Matches


class _Worker:
    """What one worker holds."""

    __slots__ = ("blocks", "digest")

    def __init__(self) -> None:
        self.blocks: set[int] = set()
        self.digest = SetDigest()


class ReferenceTree:
    """See radix.tree.PrefixTree. A store or removal costs O(blocks); a match O(depth x workers still matching)."""

    def __init__(self) -> None:
        self._workers: dict[int, _Worker] = {}  # only those that hold a block
        self._holders: dict[int, set[int]] = {}  # block -> workers, never empty
        self._parents: dict[int, int] = {}  # for each held block
        self._children: dict[int, set[int]] = {}  # block, itself held or not -> held blocks, never empty
        self._entries = 0

    def store(self, worker: int, hashes: Hashes, parent: int = ROOT_HASH) -> int:
        _check_worker(worker)
        _check_hash("parent", parent)
        check_hashes("hashes", hashes)
        if not hashes.all():
            raise ValueError(f"hashes hold {ROOT_HASH}: it stands for the root, a block has another")
        held = self._workers.get(worker) or _Worker()
        new = []
        for block in hashes.tolist():
            if block not in held.blocks:
                held.blocks.add(block)
                new.append(block)
                self._add_holder(worker, block, parent)
            parent = block
        if new:
            self._workers[worker] = held
            held.digest.add(_array(new))
            self._entries += len(new)
        return len(new)

    def remove(self, worker: int, hashes: Hashes) -> int:
        _check_worker(worker)
        check_hashes("hashes", hashes)
        held = self._workers.get(worker)
        if held is None:
            return 0
        gone = held.blocks.intersection(hashes.tolist())
        if not gone:
            return 0
        held.blocks -= gone
        held.digest.remove(_array(gone))
        for block in gone:
            self._drop_holder(worker, block)
        self._entries -= len(gone)
        if not held.blocks:
            del self._workers[worker]
        return len(gone)

    def clear(self, worker: int) -> int:
        _check_worker(worker)
        held = self._workers.pop(worker, None)
        if held is None:
            return 0
        for block in held.blocks:
            self._drop_holder(worker, block)
        self._entries -= len(held.blocks)
        return len(held.blocks)

    def match(self, hashes: Hashes) -> Matches:
        check_hashes("hashes", hashes)
        depths: dict[int, int] = {}
        matching: set[int] | None = None  # the workers that hold every block so far
        for depth, block in enumerate(hashes.tolist()):
            holders = self._holders.get(block) or set()
            if matching is None:
                matching = set(holders)
            elif not matching <= holders:
                depths.update(dict.fromkeys(matching - holders, depth))
                matching &= holders
            if not matching:
                break
        depths.update(dict.fromkeys(matching or (), len(hashes)))
        workers = sorted(depths)
        return Matches(_workers_array(workers), _workers_array([depths[worker] for worker in workers]))

    def digest(self, worker: int) -> bytes:
        _check_worker(worker)
        held = self._workers.get(worker)
        return held.digest.value if held else EMPTY_DIGEST

    def blocks(self, worker: int) -> Hashes:
        _check_worker(worker)
        held = self._workers.get(worker)
        return np.sort(_array(held.blocks if held else ()))

    def count(self, worker: int) -> int:
        _check_worker(worker)
        held = self._workers.get(worker)
        return len(held.blocks) if held else 0

    def __len__(self) -> int:
        return self._entries

    def holders(self, block_hash: int) -> NDArray[np.uint32]:
        _check_hash("block_hash", block_hash)
        return _workers_array(sorted(self._holders.get(block_hash, ())))

    def children(self, block_hash: int) -> Hashes:
        _check_hash("block_hash", block_hash)
        return np.sort(_array(self._children.get(block_hash, ())))

    def check(self) -> None:
        assert self._entries == sum(len(holders) for holders in self._holders.values())
        assert self._entries == sum(len(held.blocks) for held in self._workers.values())
        assert self._parents.keys() == self._holders.keys()
        assert sum(len(children) for children in self._children.values()) == len(self._parents)
        assert all(self._children.values()), "no empty set of children is kept"
        for block, parent in self._parents.items():
            assert block in self._children[parent], f"block {block:016x} is missing below {parent:016x}"
        for worker, held in self._workers.items():
            assert held.blocks, f"worker {worker} holds nothing and is kept"
            assert all(worker in self._holders[block] for block in held.blocks)
            assert held.digest.value == digest_of(_array(held.blocks)), f"digest of worker {worker}"

    def _add_holder(self, worker: int, block: int, parent: int) -> None:
        holders = self._holders.get(block)
        if holders is None:
            self._holders[block] = {worker}
            self._parents[block] = parent
            self._children.setdefault(parent, set()).add(block)
        else:
            holders.add(worker)

    def _drop_holder(self, worker: int, block: int) -> None:
        holders = self._holders[block]
        holders.remove(worker)
        if not holders:
            del self._holders[block]
            parent = self._parents.pop(block)
            siblings = self._children[parent]
            siblings.remove(block)
            if not siblings:
                del self._children[parent]


def _check_worker(worker: int) -> None:
    if not 0 <= worker < MAX_WORKERS:
        raise ValueError(f"worker is {worker}: 0 to {MAX_WORKERS - 1} are allowed")


def _check_hash(field: str, value: int) -> None:
    if not 0 <= value < 2**64:
        raise ValueError(f"{field} is {value}: 0 to 2^64 - 1 are allowed")


def _array(blocks: Iterable[int]) -> Hashes:
    return np.fromiter(blocks, dtype=np.uint64)


def _workers_array(values: list[int]) -> NDArray[np.uint32]:
    return np.array(values, dtype=np.uint32)
