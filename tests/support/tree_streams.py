"""Bytes as operations on a prefix tree: what the fuzzer in tests/native makes of the same bytes (streams.hpp)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from radix.keys import ROOT_HASH, Hashes
from radix.tree import CLEAR, REMOVE, STORE, Matches, PrefixTree
from tests.support.prefix_trees import blocks, columns

WORKERS = (0, 1, 2, 3, 7, 40, 300, 1000)
CAPS = ((1 << 17, 1 << 16), (60, 25), (1, 1), (900, 300))

_SHORT, _CROWD, _STAR, _CHAINS = 12, 15, 16, 19
_MASK = 2**64 - 1


def _mixed(value: int) -> int:
    """splitmix64's finalizer."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31


def _table_place(block: int) -> int:
    product = block * 0x9E3779B97F4A7C15
    return (product & _MASK ^ product >> 64) * 0xD1B54A32D192ED03 & _MASK


def _chain(chain: int) -> list[int]:
    if chain == _CROWD:
        tried = map(_mixed, range(chain << 32 | 1, (chain + 1) << 32))
        return [block for block, _ in zip((b for b in tried if not _table_place(b) >> 58), range(512), strict=False)]
    length, hashes = 240 if chain < _SHORT else 1024 if chain < _CROWD else 512, []
    for i in range(length):
        family = chain
        while 0 < family < _SHORT and i < family * 37 % 200 + 1:
            family //= 2
        hashes.append(_mixed(family << 32 | i + 1))
    return hashes


CHAINS = [_chain(chain) for chain in range(_CHAINS)]
PARENTS = {
    block: CHAINS[0][chain] if chain >= _STAR else above
    for chain, hashes in enumerate(CHAINS)
    for above, block in zip([ROOT_HASH, *hashes], hashes, strict=False)
}

Change = tuple[int, int, int, list[int]]  # kind, tier, parent, hashes
Depths = dict[int, list[int]]  # worker -> leading blocks by tier


class Stream:
    """A reader of such bytes. One that is missing is 0, and a stream ends where an operation would begin."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        head = self.byte()
        self.caps = CAPS[head % 4]

    @property
    def ended(self) -> bool:
        return self._at >= len(self._data)

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def changes(self, what: int) -> tuple[int, list[Change]]:
        """Changes of one worker, and which."""
        worker, tier = WORKERS[what & 7], (what >> 3 & 3) % 3
        if what >> 5 == 3:
            chain = self.byte() % _CHAINS
            parent = CHAINS[chain][self._place(chain, self.byte())]
            return worker, [(STORE, tier, parent, self._part(chain))]
        if what >> 5 < 3:
            chain = self.byte() % _CHAINS
            part = self._part(chain)
            if chain >= _STAR:
                return worker, [(STORE, tier, PARENTS[leaf], [leaf]) for leaf in part]
            return worker, [(STORE, tier, PARENTS[part[0]], part)]
        if what >> 5 == 4:
            shape = self.byte()
            picked = [self.block() for _ in range(shape % 4 + 1)]
            parents = (ROOT_HASH, picked[0], picked[-1], unknown(shape >> 4))
            return worker, [(STORE, tier, self.block() if shape & 16 else parents[shape >> 2 & 3], picked)]
        if what >> 5 == 7 and self.byte() % 4 == 0:
            return worker, [(CLEAR, 0, ROOT_HASH, [])]
        part, order = self._part(self.byte() % _CHAINS), self.byte()
        thinned = part[:: 1 + order % 8]
        return worker, [(REMOVE, tier, ROOT_HASH, thinned[::-1] if order & 128 else thinned)]

    def query(self) -> Hashes:
        chain, length, tail = self.byte() % _CHAINS, self.byte(), self.byte() % 4
        end = self._place(chain, length)
        leaf = [*CHAINS[0][: chain + 1], CHAINS[chain][end]]
        start = leaf if chain >= _STAR else CHAINS[chain][: end + (length > 0)]
        return blocks(*start, *map(unknown, range(tail)))

    def block(self) -> int:
        chain = self.byte() % _CHAINS
        return CHAINS[chain][self._place(chain, self.byte())]

    def _place(self, chain: int, at: int) -> int:
        return at * (1 if chain < _SHORT else 4 if chain < _CROWD else 2) % len(CHAINS[chain])

    def _part(self, chain: int) -> list[int]:
        start, length = self._place(chain, self.byte()), self._place(chain, self.byte()) + 1
        return CHAINS[chain][start : start + length]


def unknown(i: int) -> int:
    return _mixed(0xFFFF << 32 | i)


class Replay:
    """A stream on a tree, an operation at a time.

    `liars` are the workers that have told a false parent since they were cleared: the native tree may take them for
    deeper than they are.
    """

    def __init__(self, tree: PrefixTree, data: bytes) -> None:
        self.tree = tree
        self.liars: set[int] = set()
        self._stream = Stream(data)

    def answers(self) -> Iterator[list[int | Depths]]:
        """What the tree said to each operation, and in the end."""
        while not self._stream.ended:
            yield self._operation(self._stream.byte() % 16)
        yield self.accounts()

    def accounts(self) -> list[int | Depths]:
        """Of each worker: blocks, refused ones, room, and both halves of its digest."""
        tree, numbers = self.tree, list[int | Depths]()
        tree.check()
        for worker in WORKERS:
            digest = np.frombuffer(tree.digest(worker), dtype="<u8").tolist()
            numbers += [tree.count(worker), tree.refused(worker), tree.room(worker), *digest]
        return numbers

    def _operation(self, operation: int) -> list[int | Depths]:
        stream, tree = self._stream, self.tree
        if operation < 6:
            worker, changes = stream.changes(stream.byte())
            self._note_lies(worker, changes)
            return [self._change(worker, *change) for change in changes]
        if operation < 8:
            what, count = stream.byte(), stream.byte() % 6
            batch = [change for _ in range(count) for change in stream.changes(stream.byte() & 0xF8 | what & 7)[1]]
            self._note_lies(WORKERS[what & 7], batch)
            tree.apply(WORKERS[what & 7], columns(*batch))
            return []
        if operation < 13:
            return [depths_of(tree.match(stream.query()))]
        if operation == 13:
            queries = [stream.query() for _ in range(stream.byte() % 4 + 1)]
            byte = stream.byte()
            count = len(queries) + (byte % 16 if byte < 240 else byte * 8)
            found = [
                depths_of(matches) for matches in tree.match_many([queries[i % len(queries)] for i in range(count)])
            ]
            assert all(found[i] == found[i % len(queries)] for i in range(count))
            return [*found[: len(queries)]]
        if operation == 14:
            which = stream.byte()
            block = unknown(which) if which < 8 else stream.block()
            return [*tree.holders(block).tolist(), *tree.children(block).tolist()]
        return self.accounts()

    def _change(self, worker: int, kind: int, tier: int, parent: int, hashes: list[int]) -> int:
        if kind == STORE:
            return self.tree.store(worker, blocks(*hashes), parent, tier)
        if kind == REMOVE:
            return self.tree.remove(worker, blocks(*hashes), tier)
        return self.tree.clear(worker)

    def _note_lies(self, worker: int, changes: list[Change]) -> None:
        for kind, _, parent, hashes in changes:
            if kind == CLEAR:
                self.liars.discard(worker)
            elif kind == STORE and any(
                PARENTS[block] != above for above, block in zip([parent, *hashes], hashes, strict=False)
            ):
                self.liars.add(worker)


def depths_of(matches: Matches) -> Depths:
    return dict(zip(matches.workers.tolist(), matches.tier_depths.T.tolist(), strict=True))
