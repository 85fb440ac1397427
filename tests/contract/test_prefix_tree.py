"""What every PrefixTree does. A further implementation is one more line in TREES."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from radix.digest import EMPTY_DIGEST, digest_of
from radix.keys import ROOT_HASH, Hashes
from radix.reference import ReferenceTree
from radix.tree import MAX_WORKERS, PrefixTree

TREES: dict[str, Callable[[], PrefixTree]] = {
    "reference": ReferenceTree,
}


@pytest.fixture(params=TREES.values(), ids=TREES.keys())
def tree(request: pytest.FixtureRequest) -> PrefixTree:
    return request.param()


def blocks(*hashes: int) -> Hashes:
    return np.array(hashes, dtype=np.uint64)


A, B, C, D = 10, 2**64 - 1, 30, 40
ABCD = blocks(A, B, C, D)


def test_match_gives_each_worker_its_leading_blocks(tree: PrefixTree) -> None:
    """Workers are listed ascending with the blocks that they hold from the first one on; who holds none is left out."""
    tree.store(7, ABCD)
    tree.store(3, blocks(A, B))
    tree.store(5, blocks(99))
    matches = tree.match(ABCD)
    assert matches.workers.tolist() == [3, 7]
    assert matches.depths.tolist() == [2, 4]
    assert matches.workers.dtype == matches.depths.dtype == np.uint32
    assert tree.match(blocks(A, B, 77, C)).as_dict() == {3: 2, 7: 2}
    assert tree.match(blocks(77, A)).as_dict() == {}
    assert tree.match(blocks()).as_dict() == {}


def test_a_middle_block_that_comes_back_lets_later_ones_count_again(tree: PrefixTree) -> None:
    """A-B-C without B matches one block; when B is stored again, C counts at once: it was never gone."""
    tree.store(0, blocks(A, B, C))
    assert tree.remove(0, blocks(B)) == 1
    assert tree.match(ABCD).as_dict() == {0: 1}
    assert tree.store(0, blocks(B), parent=A) == 1
    assert tree.match(ABCD).as_dict() == {0: 3}
    tree.check()


def test_a_first_block_that_is_gone_hides_the_rest(tree: PrefixTree) -> None:
    """Depth counts from the prompt's first block."""
    tree.store(0, ABCD)
    tree.remove(0, blocks(A))
    assert tree.match(ABCD).as_dict() == {}
    assert tree.count(0) == 3


def test_store_and_remove_count_only_what_changes(tree: PrefixTree) -> None:
    """Held blocks are not stored twice, unknown or repeated ones not removed."""
    assert tree.store(1, blocks(A, B)) == 2
    assert tree.store(1, ABCD) == 2
    assert tree.store(1, blocks(A, A)) == 0
    assert len(tree) == tree.count(1) == 4
    assert tree.remove(1, blocks(D, D, 12345)) == 1
    assert tree.remove(2, ABCD) == 0
    assert tree.remove(1, blocks()) == tree.store(1, blocks()) == 0
    assert tree.blocks(1).tolist() == sorted([A, B, C])
    tree.check()


def test_workers_do_not_touch_each_other(tree: PrefixTree) -> None:
    """What one worker removes or clears, others still hold."""
    for worker in (0, 1, MAX_WORKERS - 1):
        tree.store(worker, ABCD)
    tree.remove(0, blocks(B))
    assert tree.clear(1) == 4
    assert tree.match(ABCD).as_dict() == {0: 1, MAX_WORKERS - 1: 4}
    assert tree.holders(A).tolist() == [0, MAX_WORKERS - 1]
    assert tree.holders(B).tolist() == [MAX_WORKERS - 1]
    assert tree.count(1) == 0
    assert tree.clear(1) == 0
    assert len(tree) == 7
    tree.check()


def test_digests_depend_on_the_set_alone(tree: PrefixTree) -> None:
    """Equal sets have equal digests, whatever way they came about, and different ones different digests."""
    tree.store(0, ABCD)
    tree.store(1, blocks(D))
    tree.store(1, blocks(A, 55))
    tree.store(1, blocks(C, B))
    assert tree.digest(0) != tree.digest(1)
    tree.remove(1, blocks(55))
    assert tree.digest(0) == tree.digest(1) == digest_of(ABCD)
    tree.clear(1)
    assert tree.digest(1) == tree.digest(2) == EMPTY_DIGEST


def test_children_and_their_parents(tree: PrefixTree) -> None:
    """Held blocks are found below the block that they were first stored after, until nobody holds them."""
    tree.store(0, blocks(A, B))
    tree.store(1, blocks(A, C))
    tree.store(1, blocks(C), parent=D)  # held already: the link stays
    assert tree.children(ROOT_HASH).tolist() == [A]
    assert tree.children(A).tolist() == sorted([B, C])
    assert tree.children(D).tolist() == tree.children(B).tolist() == []
    tree.remove(0, blocks(A))
    tree.remove(1, blocks(A))
    assert tree.children(A).tolist() == sorted([B, C]), "also of a block that is gone itself"
    tree.remove(1, blocks(C))
    tree.store(1, blocks(C), parent=D)
    assert tree.children(D).tolist() == [C]
    tree.clear(0)
    tree.clear(1)
    assert tree.children(A).tolist() == tree.children(ROOT_HASH).tolist() == []
    tree.check()


@pytest.mark.parametrize("worker", [-1, MAX_WORKERS])
def test_workers_out_of_range_are_refused(tree: PrefixTree, worker: int) -> None:
    """The error names the value and the limit."""
    calls = [tree.store, tree.remove]
    for call in calls:
        with pytest.raises(ValueError, match=rf"worker is {worker}: 0 to {MAX_WORKERS - 1}"):
            call(worker, ABCD)
    for count in (tree.clear, tree.count, tree.digest, tree.blocks):
        with pytest.raises(ValueError, match="worker"):
            count(worker)


@pytest.mark.parametrize("hashes", [[1, 2], np.array([1, 2]), np.ones((2, 2), dtype=np.uint64), None])
def test_only_arrays_of_hashes_are_taken(tree: PrefixTree, hashes: Hashes) -> None:
    """Lists, other types and other shapes are refused, not converted."""
    for call in (lambda: tree.store(0, hashes), lambda: tree.remove(0, hashes), lambda: tree.match(hashes)):
        with pytest.raises(TypeError, match="one-dimensional array of uint64"):
            call()
    assert len(tree) == 0


def test_the_root_is_no_block(tree: PrefixTree) -> None:
    """Hash 0 cannot be stored, and a refused store changes nothing."""
    with pytest.raises(ValueError, match="root"):
        tree.store(0, blocks(A, 0))
    with pytest.raises(ValueError, match="parent is -1"):
        tree.store(0, blocks(A), parent=-1)
    assert len(tree) == tree.count(0) == 0
    tree.check()


class TreeMachine(RuleBasedStateMachine):
    """Any tree against a dict of sets, over a small forest of chains, so that workers share prefixes and holes."""

    make: Callable[[], PrefixTree]

    WORKERS = st.integers(0, 3)
    CHAINS = st.integers(0, 5)

    def __init__(self) -> None:
        super().__init__()
        self.tree = type(self).make()
        self.held: dict[int, set[int]] = {worker: set() for worker in range(4)}
        shuffler = random.Random(5)
        trunk = [shuffler.getrandbits(64) | 1 for _ in range(4)]
        self.chains = [trunk[: 1 + chain % 4] + [shuffler.getrandbits(64) | 1 for _ in range(6)] for chain in range(6)]
        self.parents = {
            block: parent for chain in self.chains for parent, block in zip([ROOT_HASH, *chain], chain, strict=False)
        }

    @rule(worker=WORKERS, chain=CHAINS, start=st.integers(0, 9), length=st.integers(0, 10))
    def store(self, worker: int, chain: int, start: int, length: int) -> None:
        part = self.chains[chain][start : start + length]
        parent = self.parents[part[0]] if part else ROOT_HASH
        assert self.tree.store(worker, blocks(*part), parent) == len(set(part) - self.held[worker])
        self.held[worker].update(part)

    @rule(worker=WORKERS, chain=CHAINS, picks=st.lists(st.integers(0, 6), max_size=5))
    def remove(self, worker: int, chain: int, picks: list[int]) -> None:
        gone = [self.chains[chain][pick] for pick in picks if pick < len(self.chains[chain])]
        assert self.tree.remove(worker, blocks(*gone)) == len(set(gone) & self.held[worker])
        self.held[worker].difference_update(gone)

    @rule(worker=WORKERS)
    def clear(self, worker: int) -> None:
        assert self.tree.clear(worker) == len(self.held[worker])
        self.held[worker].clear()

    @rule(chain=CHAINS, length=st.integers(0, 10))
    def match(self, chain: int, length: int) -> None:
        query = self.chains[chain][:length]
        expected = {worker: _leading(query, held) for worker, held in self.held.items()}
        matches = self.tree.match(blocks(*query))
        assert matches.as_dict() == {worker: depth for worker, depth in expected.items() if depth}
        assert matches.workers.tolist() == sorted(matches.workers.tolist())

    @invariant()
    def equals_the_model(self) -> None:
        self.tree.check()
        assert len(self.tree) == sum(map(len, self.held.values()))
        everything = set().union(*self.held.values())
        for worker, held in self.held.items():
            assert self.tree.blocks(worker).tolist() == sorted(held)
            assert self.tree.count(worker) == len(held)
            assert self.tree.digest(worker) == digest_of(blocks(*held))
        for block in {ROOT_HASH, *everything}:
            assert self.tree.holders(block).tolist() == [w for w, held in self.held.items() if block in held]
            below = sorted(child for child in everything if self.parents[child] == block)
            assert self.tree.children(block).tolist() == below


def _leading(query: Iterable[int], held: set[int]) -> int:
    depth = 0
    for block in query:
        if block not in held:
            break
        depth += 1
    return depth


@pytest.mark.parametrize("make", TREES.values(), ids=TREES.keys())
def test_a_tree_behaves_like_a_dict_of_sets(make: Callable[[], PrefixTree]) -> None:
    """Any sequence of operations leaves what the naive model has."""
    machine = type("Machine", (TreeMachine,), {"make": staticmethod(make)})
    test = machine.TestCase
    test.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
    test().runTest()
