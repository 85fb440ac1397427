"""The index benchmark's workload: prefixes that several workers share, and sessions that go on from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from radix.keys import ROOT_HASH, Hashes

Item = TypeVar("Item")

BLOCK_SIZE = 16  # tokens
PREFIXES = 2_000
PREFIX_BLOCKS = 32
PREFIX_HOLDERS = 4
SESSION_BLOCKS = 64

_SEQUENCES = 2**32  # hash numbers from here on are of chains beside the workload
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


class Run(NamedTuple):
    """A chain of blocks that a worker stores, after `parent`."""

    worker: int
    parent: int
    hashes: Hashes


def hashes_at(first: int, count: int) -> Hashes:
    """Block hashes number `first` to `first + count - 1`: all different, none 0, like random ones."""
    mixed = np.arange(first + 1, first + count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX[0]
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX[1]
    return mixed ^ (mixed >> np.uint64(31))


def chain_at(index: int, blocks: int) -> Hashes:
    """A chain beside the workload: one for each `index`, of up to 2^16 blocks."""
    return hashes_at(_SEQUENCES + (index << 16), blocks)


class Workload:
    """Prefixes on min(4, workers) workers each, and as many sessions as make up `entries` (worker, block) entries.

    A session goes on from a random prefix, on one of the prefix's holders.
    """

    def __init__(self, workers: int, entries: int, prefixes: int = PREFIXES, seed: int = 1) -> None:
        rng = np.random.default_rng(seed)
        holders = min(PREFIX_HOLDERS, workers)
        self.workers = workers
        chosen = [rng.choice(workers, holders, replace=False) for _ in range(prefixes)]
        self._holders: NDArray[np.int64] = np.array(chosen)  # (prefixes, holders)
        self.sessions = max(1, (entries - self._holders.size * PREFIX_BLOCKS) // SESSION_BLOCKS)
        self._prefix_of = rng.integers(prefixes, size=self.sessions)
        self._worker_of = self._holders[self._prefix_of, rng.integers(holders, size=self.sessions)]

    @property
    def entries(self) -> int:
        """(worker, block) entries when all is stored."""
        return self._holders.size * PREFIX_BLOCKS + self.sessions * SESSION_BLOCKS

    def prefixes(self) -> list[Run]:
        """Each prefix on each of its holders."""
        chains = (hashes_at(index * PREFIX_BLOCKS, PREFIX_BLOCKS) for index in range(len(self._holders)))
        return [
            Run(worker, ROOT_HASH, chain)
            for chain, holders in zip(chains, self._holders.tolist(), strict=True)
            for worker in holders
        ]

    def session(self, index: int) -> Run:
        """The private blocks of a session."""
        prefix = hashes_at(int(self._prefix_of[index] + 1) * PREFIX_BLOCKS - 1, 1)
        first = len(self._holders) * PREFIX_BLOCKS + index * SESSION_BLOCKS
        return Run(int(self._worker_of[index]), int(prefix[0]), hashes_at(first, SESSION_BLOCKS))

    def prompt(self, index: int) -> Hashes:
        """All blocks of a session: its prefix's and its own."""
        prefix = hashes_at(int(self._prefix_of[index]) * PREFIX_BLOCKS, PREFIX_BLOCKS)
        return np.concatenate([prefix, self.session(index).hashes])


def stores(run: Run, blocks: int) -> Iterator[Run]:
    """The run in stored events of up to `blocks` each."""
    parent = run.parent
    for start in range(0, len(run.hashes), blocks):
        hashes = run.hashes[start : start + blocks]
        yield Run(run.worker, parent, hashes)
        parent = int(hashes[-1])


def removals(run: Run, blocks: int) -> list[Hashes]:
    """The run's blocks in removals of up to `blocks` each, the leaf first."""
    backwards = run.hashes[::-1]
    return [backwards[start : start + blocks] for start in range(0, len(backwards), blocks)]


def chunks(items: Sequence[Item], count: int) -> list[Sequence[Item]]:
    """The items in groups of `count`; the last may be shorter."""
    return [items[start : start + count] for start in range(0, len(items), count)]
