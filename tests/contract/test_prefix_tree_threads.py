"""Every call beside every other, in threads, on sizes that the native core handles without the GIL.

What each thread is told must be right whatever the others do. `make sanitize` runs this under ThreadSanitizer, which
sees accesses that are not ordered even where nothing comes of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from kv_events import wire
from kv_events.columns import changes_of
from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, EventBatch
from radix.digest import EMPTY_DIGEST, digest_of
from radix.hashing import BlockHasher
from radix.keys import Hashes
from radix.tree import HEAT_WINDOW, PrefixTree
from tests.support.prefix_trees import BACKENDS, columns, holdings

LONG = 9000  # blocks: above what the native core takes for long, of events, of hashes to compute, and of bytes
KEEPER, WRITERS, FOLLOWER = 9, (0, 1, 2), 3
ROUNDS = 4


class Crowd:
    """A tree in which worker KEEPER keeps `chain`. Others come and go, on that chain and on ones of their own."""

    def __init__(self, tree: PrefixTree) -> None:
        self.tree = tree
        self.chain = self.own(KEEPER)
        self.digest = digest_of(self.chain)
        self.first, self.second, self.last = (int(self.chain[i]) for i in (0, 1, -1))
        tree.store(KEEPER, self.chain)

    @staticmethod
    def own(worker: int) -> Hashes:
        return np.random.default_rng(worker).integers(1, 2**64 - 1, LONG, dtype=np.uint64)

    def write(self, worker: int) -> None:
        """Stores, removals and clears of thousands of blocks, on the way into the shared chain and out of it."""
        tree, own = self.tree, self.own(worker)
        store = (0, worker % 3, self.first, own.tolist())
        for _ in range(ROUNDS):
            assert tree.store(worker, self.chain) == LONG
            tree.apply(worker, columns(store, (1, 0, 0, self.chain[::2].tolist())))
            assert tree.count(worker) == LONG + LONG // 2
            assert tree.remove(worker, self.chain) == LONG // 2
            assert tree.remove(worker, own[::-3], worker % 3) == LONG // 3
            assert tree.clear(worker) == LONG - LONG // 3
            assert tree.digest(worker) == EMPTY_DIGEST

    def match(self) -> None:
        queries = [self.chain] * 5 + [self.chain[:500]] * 300
        for _ in range(4 * ROUNDS):
            for query, matches in zip(
                queries, [self.tree.match(self.chain), *self.tree.match_many(queries[1:])], strict=True
            ):
                assert matches.as_dict()[KEEPER] == len(query)
                assert matches.as_dict().keys() <= {KEEPER, *WRITERS}

    def look_back(self) -> None:
        """At what was matched, while others match."""
        for _ in range(10 * ROUNDS):
            assert all(0 < prefix.hits <= HEAT_WINDOW for prefix in self.tree.hottest(50))

    def walk(self) -> None:
        tree = self.tree
        for _ in range(ROUNDS):
            assert tree.digest(KEEPER) == self.digest
            assert tree.count(KEEPER) == LONG
            assert tree.refused(KEEPER) == 0
            assert tree.room(KEEPER) > LONG
            assert len(tree) >= LONG
            assert tree.blocks(KEEPER).tolist() == np.sort(self.chain).tolist()
            assert KEEPER in tree.holders(self.last)
            assert self.first in tree.children(0)
            assert self.second in tree.children(self.first)
            parents, members = holdings(tree)
            assert parents[self.last] == int(self.chain[-2])
            assert (KEEPER, 1) in members[self.last]
            tree.check()

    def follow(self) -> None:
        """Prompts are hashed, sent as an event, read and applied, all of it long."""
        hasher, tokens = BlockHasher(16, bytes(32)), np.arange(16 * LONG, dtype=np.uint32)
        first = hasher.keys(tokens)
        for number in range(1, ROUNDS + 1):
            keys = hasher.keys(tokens)
            assert (keys == first).all()
            hashes = np.ascontiguousarray(keys[:, 0])
            events = (AllBlocksCleared(), BlockStored(hashes, 0, 16), BlockRemoved(hashes[LONG // 2 :]))
            payload = wire.encode(EventBatch("w3", 1, number, events, bytes(16), 0.0))
            self.tree.apply(FOLLOWER, changes_of(wire.decode(payload).events))
            assert self.tree.digest(FOLLOWER) == digest_of(hashes[: LONG // 2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_beside_each_other_do_not_disturb_each_other(backend: Callable[..., PrefixTree]) -> None:
    """Three writers, a follower of events, readers and walkers: each is told what is true of what it knows."""
    crowd = Crowd(backend())
    acts: list[Callable[[], None]] = [crowd.match, crowd.match, crowd.look_back, crowd.walk, crowd.follow]
    acts += [lambda worker=worker: crowd.write(worker) for worker in WRITERS]  # type: ignore[misc]
    start, errors = threading.Barrier(len(acts)), list[BaseException]()

    def run(act: Callable[[], None]) -> None:
        try:
            start.wait()
            act()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    crowd.tree.check()
    assert len(crowd.tree) == LONG + LONG // 2
    assert crowd.tree.match(crowd.chain).as_dict() == {KEEPER: LONG}
