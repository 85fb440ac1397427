"""Any sequence of operations on a PrefixTree leaves what naive models have, also with readers beside a writer."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from itertools import cycle

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from radix.digest import digest_of
from radix.keys import ROOT_HASH, Hashes
from radix.reference import ReferenceTree
from radix.snapshot import encode, load
from radix.tree import (
    CLEAR,
    DEFAULT_MAX_BLOCKS,
    DEFAULT_MAX_BLOCKS_PER_WORKER,
    REMOVE,
    STORE,
    Matches,
    PrefixTree,
    Tier,
)
from tests.support.prefix_trees import BACKENDS, TREES, NaiveTree, all_of, blocks, columns

DEFAULTS = (DEFAULT_MAX_BLOCKS, DEFAULT_MAX_BLOCKS_PER_WORKER)
WORKER_NUMBERS = (0, 1, 2, 300)
UNKNOWN = (3, 4, 5)  # blocks that nobody ever holds
LENGTH = 26  # of chains: more than a search looks at in its first step


def _forest() -> tuple[list[list[int]], dict[int, int]]:
    """Four chains of LENGTH blocks that share trunks, and each block's true parent."""
    shuffler = random.Random(5)
    trunk = [shuffler.getrandbits(64) | 8 for _ in range(LENGTH)]
    chains = [
        trunk[:shared] + [shuffler.getrandbits(64) | 8 for _ in range(LENGTH - shared)] for shared in (1, 2, 9, 14)
    ]
    return chains, {
        block: parent for chain in chains for parent, block in zip([ROOT_HASH, *chain], chain, strict=False)
    }


CHAINS, PARENTS = _forest()
BLOCKS = sorted(PARENTS)

Change = tuple[int, int, int, list[int]]


@st.composite
def _true_stores(draw: st.DrawFn) -> Change:
    start, length = draw(st.integers(0, LENGTH - 1)), draw(st.integers(0, LENGTH))
    part = draw(st.sampled_from(CHAINS))[start : start + length]
    return STORE, draw(st.sampled_from(Tier)), PARENTS[part[0]] if part else ROOT_HASH, part


@st.composite
def _false_stores(draw: st.DrawFn) -> Change:
    """Blocks in any order below anything, itself included: what a broken or lying worker may say."""
    part = draw(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=4))
    parent = draw(st.sampled_from([ROOT_HASH, part[0], *UNKNOWN, *BLOCKS]))
    return STORE, draw(st.sampled_from(Tier)), parent, part


@st.composite
def _removals(draw: st.DrawFn) -> Change:
    picks = draw(st.lists(st.integers(0, LENGTH - 1), max_size=6))
    chain = draw(st.sampled_from(CHAINS))
    return REMOVE, draw(st.sampled_from(Tier)), ROOT_HASH, [chain[pick] for pick in picks]


CLEARS = st.just((CLEAR, 0, ROOT_HASH, []))


class TreeMachine(RuleBasedStateMachine):
    """Any tree against a dict of sets, over a small forest of chains, so that workers share prefixes and holes."""

    make: Callable[..., PrefixTree]

    WORKERS = st.sampled_from(WORKER_NUMBERS)
    QUERIES = st.tuples(st.sampled_from(CHAINS), st.integers(0, LENGTH), st.integers(0, 2)).map(
        lambda drawn: drawn[0][: drawn[1]] + list(UNKNOWN[: drawn[2]])
    )

    @initialize(caps=st.sampled_from([DEFAULTS, DEFAULTS, (60, 25), (30, 50), (1, 1)]))
    def start(self, caps: tuple[int, int]) -> None:
        self.caps = caps
        self.tree = type(self).make(*caps)
        self.model = NaiveTree(*caps)
        self.misled: set[int] = set()  # who holds a block below a parent that it does not follow

    @rule(worker=WORKERS, change=_true_stores() | _false_stores() | _removals() | CLEARS)
    def change(self, worker: int, change: Change) -> None:
        kind, tier, parent, hashes = change
        if kind == STORE:
            stored = self.tree.store(worker, blocks(*hashes), parent, tier)
            assert stored == self._model_store(worker, hashes, parent, tier)
        elif kind == REMOVE:
            assert self.tree.remove(worker, blocks(*hashes), tier) == self.model.remove(worker, hashes, tier)
        else:
            assert self.tree.clear(worker) == self._model_clear(worker)

    @rule(worker=WORKERS, changes=st.lists(_true_stores() | _false_stores() | _removals() | CLEARS, max_size=5))
    def apply(self, worker: int, changes: list[Change]) -> None:
        self.tree.apply(worker, columns(*changes))
        for kind, tier, parent, hashes in changes:
            if kind == STORE:
                self._model_store(worker, hashes, parent, tier)
            elif kind == REMOVE:
                self.model.remove(worker, hashes, tier)
            else:
                self._model_clear(worker)

    @rule(query=QUERIES)
    def match(self, query: list[int]) -> None:
        self._compare(query, self.tree.match(blocks(*query)))

    @rule(queries=st.lists(QUERIES, max_size=4))
    def match_many(self, queries: list[list[int]]) -> None:
        for query, matches in zip(queries, self.tree.match_many([blocks(*q) for q in queries]), strict=True):
            self._compare(query, matches)

    @rule(limit=st.integers(0, 9))
    def hottest(self, limit: int) -> None:
        assert self.tree.hottest(limit) == self.model.hottest(limit)

    @rule()
    def snapshot(self) -> None:
        """Loaded by every backend, and gone on with: but for heat and what was refused, nothing is lost."""
        data = encode(self.tree)
        self.model.refused.clear()
        self.model.matched.clear()
        for make in TREES.values():
            other = make(*self.caps)
            load(other, data)
            other.check()
            assert all_of(other, self.model.workers()) == self.model.all()
        self.tree = type(self).make(*self.caps)
        load(self.tree, data)
        self.misled = {
            worker for block, parent in self.model.parents.items() if parent != PARENTS[block]
            for worker in self.model.holders(block)
        }  # fmt: skip

    @invariant()
    def equals_the_model(self) -> None:
        self.tree.check()
        assert all_of(self.tree, self.model.workers()) == self.model.all()
        for block in (*UNKNOWN, *BLOCKS):
            if block not in self.model.parents:
                assert not len(self.tree.holders(block))
                assert self.tree.children(block).tolist() == self.model.children(block)

    def _model_store(self, worker: int, hashes: Sequence[int], parent: int, tier: int) -> int:
        """Also notes who stored a new block below a false parent that the block has, for want of a true one before."""
        before = self.model.blocks(worker)
        stored = self.model.store(worker, hashes, parent, tier)
        for above, block in zip([parent, *hashes], hashes, strict=False):
            new = block in self.model.blocks(worker) - before
            if new and above == self.model.parents[block] != PARENTS[block]:
                self.misled.add(worker)
        return stored

    def _model_clear(self, worker: int) -> int:
        self.misled.discard(worker)
        return self.model.clear(worker)

    def _compare(self, query: list[int], matches: Matches) -> None:
        """Depths are exact, and at least right for workers whose own false word on parents was taken."""
        workers = matches.workers.tolist()
        found = dict(zip(workers, matches.tier_depths.T.tolist(), strict=True))
        assert workers == sorted(found)
        assert matches.as_dict() == {worker: depths[-1] for worker, depths in found.items()}
        assert matches.depths.tolist() == list(matches.as_dict().values())
        for worker in WORKER_NUMBERS:
            expected, depths = self.model.tier_depths(query, worker), found.pop(worker, [0, 0, 0])
            assert depths == expected or (worker in self.misled and all(np.greater_equal(depths, expected)))
        assert not found
        self.model.record(query, max(matches.depths.tolist(), default=0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tree_behaves_like_a_dict_of_sets(backend: Callable[..., PrefixTree]) -> None:
    """Any sequence of operations leaves what the naive model has."""
    machine = type("Machine", (TreeMachine,), {"make": staticmethod(backend)})
    test = machine.TestCase
    test.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
    test().runTest()


class DeepForest:
    """Chains of up to 600 blocks that branch off each other anywhere."""

    def __init__(self, rng: random.Random, chains: int) -> None:
        self.rng = rng
        self.chains: list[Hashes] = []
        for _ in range(chains):
            trunk = rng.choice(self.chains) if self.chains and rng.random() < 0.7 else blocks()
            shared = trunk[: rng.randint(0, len(trunk))]
            own = blocks(*(rng.getrandbits(64) | 1 for _ in range(rng.randint(1, 600 - min(599, len(shared))))))
            self.chains.append(np.concatenate([shared, own])[:600])

    def part(self, head: bool) -> tuple[Hashes, int]:
        """A piece of a chain, from the root if it is to be its head, and its parent."""
        chain = self.rng.choice(self.chains)
        start = 0 if head else self.rng.randrange(len(chain))
        end = self.rng.randint(start + 1, len(chain))
        return chain[start:end], int(chain[start - 1]) if start else ROOT_HASH

    def query(self) -> Hashes:
        part, _ = self.part(head=True)
        tail = blocks(*(self.rng.getrandbits(64) | 1 for _ in range(self.rng.choice([0, 0, 7]))))
        return np.concatenate([part, tail])


@pytest.mark.skipif("native" not in TREES, reason="no native tree: `make native` builds it")
@pytest.mark.parametrize(
    ("seed", "caps", "workers"),
    [
        (1, DEFAULTS, 300),
        (2, (20_000, 700), 100),
        (3, DEFAULTS, 3),
    ],
)
def test_native_and_reference_agree_on_long_streams(seed: int, caps: tuple[int, int], workers: int) -> None:
    """Thousands of operations on deep chains, shared, half-evicted, in tiers: the same answers throughout."""
    rng = random.Random(seed)
    forest = DeepForest(rng, 40)
    native, reference = TREES["native"](*caps), ReferenceTree(*caps)
    both = (native, reference)
    for step in range(3000):
        worker = rng.randrange(workers)
        tier = rng.choice([Tier.DEVICE] * 8 + [Tier.HOST, Tier.DISK])
        choice = rng.random()
        if choice < 0.45:
            part, parent = forest.part(head=rng.random() < 0.8)
            stored = [tree.store(worker, part, parent, tier) for tree in both]
            assert stored[0] == stored[1]
        elif choice < 0.6:
            part, _ = forest.part(head=False)
            thinned = part[:: rng.choice([1, 1, 2, 5])]
            removed = [tree.remove(worker, thinned, tier) for tree in both]
            assert removed[0] == removed[1]
        elif choice < 0.62:
            assert native.clear(worker) == reference.clear(worker)
        else:
            query = forest.query()
            expected, found = reference.match(query), native.match(query)
            assert found.workers.tolist() == expected.workers.tolist()
            assert found.tier_depths.tolist() == expected.tier_depths.tolist()
        if step % 500 == 499:
            for tree in both:
                tree.check()
            assert all_of(native, range(workers)) == all_of(reference, range(workers))
            assert native.hottest(50) == reference.hottest(50)


@pytest.mark.parametrize("backend", BACKENDS)
def test_most_of_many_blocks_go_in_any_order(backend: Callable[..., PrefixTree]) -> None:
    """Sessions below few prefixes, most of whose blocks are removed at random: what stays is what was left.

    Worker 4 holds sessions without their prefixes.
    """
    rng, tree = np.random.default_rng(4), backend()
    prefixes = rng.integers(1, 2**64 - 1, (3, 8), dtype=np.uint64)
    sessions = rng.integers(1, 2**64 - 1, (5, 800, 50), dtype=np.uint64)  # of worker, by number
    for worker, number in np.ndindex(5, 800):
        tree.store(worker, prefixes[number % 3, : 8 * (worker < 4)])
        tree.store(worker, sessions[worker, number], int(prefixes[number % 3, -1]))
    gone = rng.random(sessions.shape) < 0.85
    for row in rng.permutation(5 * 800).tolist():
        worker, number = divmod(row, 800)
        tree.remove(worker, sessions[worker, number][gone[worker, number]])
    tree.check()
    for worker in range(5):
        held = np.concatenate([sessions[worker][~gone[worker]], prefixes[:, : 8 * (worker < 4)].ravel()])
        assert tree.blocks(worker).tolist() == np.sort(held).tolist()
        assert tree.digest(worker) == digest_of(held)
    for worker, number in np.ndindex(5, 800):
        session, lost = sessions[worker, number], gone[worker, number]
        expected = dict.fromkeys(range(4), 8)
        if worker < 4:
            expected[worker] += int(lost.argmax() if lost.any() else len(session))
        assert tree.match(np.concatenate([prefixes[number % 3], session])).as_dict() == expected
    for prefix in range(3):
        first = sessions[:, prefix::3, 0][~gone[:, prefix::3, 0]]
        assert tree.children(int(prefixes[prefix, -1])).tolist() == np.sort(first).tolist()
    for worker in reversed(range(5)):
        count = tree.count(worker)
        assert tree.clear(worker) == count
        assert tree.blocks(worker).tolist() == []
        tree.check()
    assert len(tree) == 0


class Shifts:
    """A writer that always leaves worker 0 or 1 the whole chain, and worker 2 half of it.

    Worker 3 loses a block in the middle, and gets it back. LEAVING workers hold the chain until they are cleared, which
    readers see whole or not at all. Worker 4 comes and goes with other blocks, so that the tree grows and shrinks.
    """

    LENGTH, HALF, HOLE = 4200, 2100, 1234  # calls with so many blocks run beside each other in the native tree
    LEAVING = range(10, 34)

    def __init__(self, tree: PrefixTree) -> None:
        self.tree = tree
        self.chain = np.random.default_rng(1).permutation(np.arange(1, self.LENGTH + 1, dtype=np.uint64))
        self.middle = self.chain[self.HOLE : self.HOLE + 1]
        for at in np.random.default_rng(2).permutation(self.LENGTH).tolist():  # in no order, inside
            tree.store(3, self.chain[at : at + 1], int(self.chain[at - 1]) if at else ROOT_HASH)
        tree.store(2, self.chain[: self.HALF])
        for worker in (0, *self.LEAVING):
            tree.store(worker, self.chain)
        self.done = threading.Event()
        self.errors: list[BaseException] = []

    def write(self) -> None:
        tree, chain = self.tree, self.chain
        for coming, leaving in zip(cycle([1, 0]), self.LEAVING, strict=False):
            tree.store(coming, chain)
            tree.remove(1 - coming, chain)
            tree.remove(3, self.middle)
            tree.clear(leaving)
            tree.clear(4)
            tree.apply(4, columns((STORE, 0, 7, (chain + np.uint64(leaving * self.LENGTH)).tolist())))
            tree.store(3, self.middle, int(chain[self.HOLE - 1]))

    def read(self) -> None:
        rounds, known = 0, dict.fromkeys(self.LEAVING, self.LENGTH)
        while rounds < 20 or not self.done.is_set():
            rounds += 1
            assert {2, 3} < set(self.tree.holders(int(self.chain[0])).tolist())
            for matches in [self.tree.match(self.chain), *self.tree.match_many([self.chain, self.chain])]:
                depths = matches.as_dict()
                assert list(depths) == sorted(depths)
                assert max(depths.get(0, 0), depths.get(1, 0)) == self.LENGTH
                assert depths[2] == self.HALF
                assert depths[3] in (self.HOLE, self.LENGTH)
                for worker in self.LEAVING:
                    assert depths.get(worker, 0) in (0, known[worker]), "nobody has stored it again"
                    known[worker] = depths.get(worker, 0)

    def run(self, act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as error:
            self.errors.append(error)


@pytest.mark.parametrize("backend", BACKENDS)
def test_readers_beside_a_writer_see_what_was_true(backend: Callable[..., PrefixTree]) -> None:
    """Whatever a reader is told held at some moment, and at none before that of its last answer."""
    shifts = Shifts(backend())
    readers = [threading.Thread(target=shifts.run, args=(shifts.read,)) for _ in range(2)]
    for reader in readers:
        reader.start()
    shifts.run(shifts.write)
    shifts.done.set()
    for reader in readers:
        reader.join()
    assert not shifts.errors
    shifts.tree.check()
    assert shifts.tree.match(shifts.chain).as_dict() == {0: shifts.LENGTH, 2: shifts.HALF, 3: shifts.LENGTH}
