"""A tree's blocks as pieces: chains without a branch whose blocks all have the same holders. No I/O, no clock.

All of it is columns: a tree of a million blocks takes about a second.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kv_events.inspect.words import KeyRange, key_text
from radix.keys import ROOT_HASH, Hashes
from radix.tree import Dump, HotPrefix
from rhizome.errors import InvalidRequest

Rows: TypeAlias = NDArray[np.intp]

_TIER_BITS = 3
ABOVE_ALL = -1
"""Stands for the root among the pieces: those at the top hang on it."""


class Holder(NamedTuple):
    """A worker that holds a block."""

    worker: int  # its number in the tree
    tiers: int  # bit mask: bit t where it holds it in Tier t


class Forest:
    """The pieces of a tree, what hangs below each, and how often matches went there.

    A piece whose first block's parent is held by nobody stands at the top, like a prompt's first blocks. Parents in a
    circle, which only made-up events have, are in no piece that can be reached from the top: `circling` counts them.
    """

    def __init__(self, dump: Dump, hottest: Iterable[HotPrefix] = (), worker: int | None = None) -> None:
        """With `worker` only what that one holds."""
        rows = _rows_of(dump, worker)
        self._hashes: Hashes = dump.hashes[rows]
        self._parents: Hashes = dump.parents[rows]
        self._sets = dump.holder_sets[rows]
        self._set_ends, self._members = dump.set_ends, dump.members
        self._by_hash = np.argsort(self._hashes)
        above = self.find(self._parents)
        joins = self._joins(above)
        heads, self._places = _follow(above, joins)
        self._first_rows: Rows = np.flatnonzero(~joins)
        piece_at = np.full(len(rows), ABOVE_ALL, dtype=np.intp)
        piece_at[self._first_rows] = np.arange(len(self._first_rows))
        self._pieces = piece_at[heads]  # by row; nobody in circles
        reached = self._pieces >= 0
        self.sizes = np.bincount(self._pieces[reached], minlength=len(self._first_rows))
        self._rows_in_order = np.lexsort((self._places, self._pieces))
        self._row_starts = np.searchsorted(self._pieces[self._rows_in_order], np.arange(len(self._first_rows)))
        upper = above[self._first_rows]
        self._parent_pieces = np.where(upper >= 0, self._pieces[upper], ABOVE_ALL)
        self._parent_pieces[(upper >= 0) & (self._parent_pieces < 0)] = len(self._first_rows)  # hangs on a circle
        self._by_parent = np.argsort(self._parent_pieces, kind="stable")
        self._sorted_parents = self._parent_pieces[self._by_parent]
        self.entries, self.workers = self._held_by(worker)
        self._add_up(hottest)

    def __len__(self) -> int:
        """Blocks."""
        return len(self._hashes)

    @property
    def circling(self) -> int:
        """Blocks that cannot be reached from the top."""
        return len(self) - int(self.totals[self.children(ABOVE_ALL)].sum())

    def find(self, wanted: Hashes) -> Rows:
        """The row of each hash; -1 where it is not held."""
        if not len(self._hashes):
            return np.full(len(wanted), ABOVE_ALL, dtype=np.intp)
        places = np.searchsorted(self._hashes, wanted, sorter=self._by_hash)
        rows = self._by_hash[np.minimum(places, len(self._hashes) - 1)]
        return np.where((self._hashes[rows] == wanted) & (wanted != ROOT_HASH), rows, ABOVE_ALL)

    def row_of(self, key: KeyRange) -> int:
        """The row of the one block whose hash is in a range. Raises InvalidRequest for none, and for several."""
        first = int(np.searchsorted(self._hashes, np.uint64(key.low), sorter=self._by_hash))
        last = int(np.searchsorted(self._hashes, np.uint64(key.high), side="right", sorter=self._by_hash))
        if last - first == 1:
            return int(self._by_hash[first])
        shown = key_text(key.low)
        if first == last:
            raise InvalidRequest("below", shown, "no block that is held has this key")
        raise InvalidRequest("below", shown, f"{last - first} blocks begin with these digits: give more of them")

    def children(self, piece: int) -> Rows:
        """The pieces that hang on a piece's last block; of -1 those at the top. Most matched first, then largest."""
        start, end = np.searchsorted(self._sorted_parents, [piece, piece + 1])
        found: Rows = self._by_parent[start:end]
        return found[np.lexsort((self._hashes[self._first_rows[found]], -self.totals[found], -self.hits[found]))]

    def child_count(self, piece: int) -> int:
        """How many those are."""
        start, end = np.searchsorted(self._sorted_parents, [piece, piece + 1])
        return int(end - start)

    def place(self, row: int) -> tuple[int, int]:
        """The piece that a row's block is in, and how many of the piece's blocks are before it."""
        return int(self._pieces[row]), int(self._places[row])

    def blocks(self, piece: int) -> Hashes:
        """The hashes of a piece's blocks, from the first on."""
        start = self._row_starts[piece]
        return self._hashes[self._rows_in_order[start : start + self.sizes[piece]]]

    def parent_hash(self, piece: int) -> int:
        """Of its first block."""
        return int(self._parents[self._first_rows[piece]])

    def holders(self, piece: int) -> tuple[Holder, ...]:
        """Of all its blocks alike, by number."""
        row = int(self._sets[self._first_rows[piece]])
        start = int(self._set_ends[row - 1]) if row else 0
        members = self._members[start : int(self._set_ends[row])].tolist()
        return tuple(Holder(member >> _TIER_BITS, member & (1 << _TIER_BITS) - 1) for member in members)

    def upper_blocks(self, piece: int) -> int:
        """How many blocks are above it; in a circle, how many are in it."""
        upper, seen = 0, set[int]()
        while 0 <= (piece := int(self._parent_pieces[piece])) < len(self.sizes) and piece not in seen:
            seen.add(piece)
            upper += int(self.sizes[piece])
        return upper

    def _joins(self, above: Rows) -> NDArray[np.bool_]:
        """By row: the only child of a block with the same holders."""
        held = above >= 0
        children = np.bincount(above[held], minlength=len(above))
        joins: NDArray[np.bool_] = held & (children[above] == 1) & (self._sets[above] == self._sets)
        return joins

    def _held_by(self, worker: int | None) -> tuple[int, int]:
        """(worker, block) entries, and workers that have some."""
        sizes = np.diff(self._set_ends, prepend=np.uint32(0)).astype(np.intp)
        blocks = np.repeat(np.bincount(self._sets, minlength=len(sizes)), sizes)  # by member of a set
        workers = self._members >> np.uint32(_TIER_BITS)
        counts = (blocks > 0) & (True if worker is None else workers == worker)
        return int(blocks[counts].sum()), len(np.unique(workers[counts]))

    def _add_up(self, hottest: Iterable[HotPrefix]) -> None:
        """`totals`: blocks of each piece and all below it. `hits`: recent matches that held its first block.

        A hot prefix stands for the blocks above it too, as far as they have no more hits (PrefixTree.hottest): so a
        piece has the most hits of those in it and below it.
        """
        self.totals = self.sizes.copy()
        self.hits = np.zeros(len(self.sizes), dtype=np.int64)
        hot = list(hottest)
        rows = self.find(np.array([prefix.block_hash for prefix in hot], dtype=np.uint64))
        for row, prefix in zip(rows.tolist(), hot, strict=True):
            if row >= 0 and (piece := self._pieces[row]) >= 0:
                self.hits[piece] = max(self.hits[piece], prefix.hits)
        for level in reversed(self._levels()):
            np.add.at(self.totals, self._parent_pieces[level], self.totals[level])
            np.maximum.at(self.hits, self._parent_pieces[level], self.hits[level])

    def _levels(self) -> list[Rows]:
        """The pieces below the top ones, level by level."""
        levels: list[Rows] = []
        level = self._below(np.array([ABOVE_ALL], dtype=np.intp))
        while len(level := self._below(level)):
            levels.append(level)
        return levels

    def _below(self, pieces: Rows) -> Rows:
        starts = np.searchsorted(self._sorted_parents, pieces)
        counts = np.searchsorted(self._sorted_parents, pieces, side="right") - starts
        firsts = np.cumsum(counts) - counts
        below: Rows = self._by_parent[np.repeat(starts - firsts, counts) + np.arange(counts.sum())]
        return below


def _rows_of(dump: Dump, worker: int | None) -> Rows:
    if worker is None:
        return np.arange(len(dump.hashes))
    sizes = np.diff(dump.set_ends, prepend=np.uint32(0)).astype(np.intp)
    owners = np.repeat(np.arange(len(sizes)), sizes)[(dump.members >> _TIER_BITS) == worker]
    return np.flatnonzero(np.isin(dump.holder_sets, owners))


def _follow(above: Rows, joins: NDArray[np.bool_]) -> tuple[Rows, NDArray[Any]]:
    """Each row's head (the first row of its piece), and how many rows are between. By pointer doubling.

    Rows of a circle that is all joins have one of their own as head, which no piece begins with.
    """
    heads = np.where(joins, above, np.arange(len(above)))
    places = joins.astype(np.intp)
    for _ in range(len(above).bit_length()):
        if not joins[heads].any():
            break
        places = places + places[heads]
        heads = heads[heads]
    return heads, places
