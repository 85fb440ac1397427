"""What every PrefixTree does, by example. The implementations are listed in tests/support/prefix_trees.py."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from radix.digest import EMPTY_DIGEST, SetDigest, digest_of
from radix.keys import ROOT_HASH, Hashes
from radix.tree import (
    CLEAR,
    HEAT_WINDOW,
    LARGEST_MAX_BLOCKS,
    MAX_WORKERS,
    REMOVE,
    STORE,
    HotPrefix,
    PrefixTree,
    Tier,
)
from tests.support.prefix_trees import BACKENDS, blocks, columns, holdings

A, B, C, D, E = 10, 2**64 - 1, 30, 40, 50
ABCD = blocks(A, B, C, D)
DEVICE, HOST, DISK = Tier


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Callable[..., PrefixTree]:
    return request.param


@pytest.fixture
def tree(backend: Callable[..., PrefixTree]) -> PrefixTree:
    return backend()


def test_match_gives_each_worker_its_leading_blocks(tree: PrefixTree) -> None:
    """Workers are listed ascending with the blocks that they hold from the first one on; who holds none is left out."""
    tree.store(7, ABCD)
    tree.store(3, blocks(A, B))
    tree.store(5, blocks(99))
    matches = tree.match(ABCD)
    assert matches.workers.tolist() == [3, 7]
    assert matches.depths.tolist() == [2, 4]
    assert matches.tier_depths.tolist() == [[2, 4]] * 3
    assert matches.by_worker(8).tolist() == [[0, 0, 0, 2, 0, 0, 0, 4]] * 2
    assert matches.by_worker(7).tolist() == [[0, 0, 0, 2, 0, 0, 0]] * 2
    assert matches.by_worker(0).shape == (2, 0)
    assert matches.workers.dtype == matches.depths.dtype == matches.tier_depths.dtype == np.uint32
    assert len(matches) == 2
    assert tree.match(blocks(A, B, 77, C)).as_dict() == {3: 2, 7: 2}
    for nothing in (blocks(77, A), blocks(), blocks(0)):
        matches = tree.match(nothing)
        assert matches.as_dict() == {}
        assert len(matches) == len(matches.workers) == len(matches.depths) == 0
        assert matches.tier_depths.shape == (3, 0)


def test_matches_stay_what_they_were(tree: PrefixTree) -> None:
    """A result is the caller's: later changes of the tree, or of one array, do not show in it."""
    tree.store(1, ABCD)
    matches = tree.match(ABCD)
    tree.clear(1)
    tree.store(2, blocks(A))
    tree.match(ABCD)
    assert matches.as_dict() == {1: 4}
    assert matches.depths.tolist() == [4]


def test_numpy_integers_are_integers(tree: PrefixTree) -> None:
    """Hashes come out of arrays, so workers, parents, hashes and tiers may be NumPy's, too."""
    tree.store(np.uint16(3), ABCD[1:], ABCD[0], np.uint8(2))
    assert tree.holders(ABCD[1]).tolist() == [3]
    assert tree.children(ABCD[0]).tolist() == [B]
    assert tree.match(ABCD[1:]).tier_depths.tolist() == [[0], [0], [3]]
    with pytest.raises(ValueError, match="block_hash is -5: 0 to"):
        tree.holders(np.int64(-5))


def test_many_queries_in_one_call(tree: PrefixTree) -> None:
    """Each query has the matches that it has alone, in their order."""
    tree.store(1, ABCD)
    tree.store(2, blocks(A))
    queries = [ABCD, blocks(77), blocks(), ABCD[:2], ABCD]
    assert [matches.as_dict() for matches in tree.match_many(queries)] == [
        {1: 4, 2: 1},
        {},
        {},
        {1: 2, 2: 1},
        {1: 4, 2: 1},
    ]
    many = tree.match_many(queries)
    assert len(many) == len(queries)
    assert many.ends.dtype == many.workers.dtype == many.depths.dtype == np.uint32
    for index, end in enumerate(many.ends.tolist()):
        rows = slice(many.ends[index - 1] if index else 0, end)
        assert many.workers[rows].tolist() == many[index].workers.tolist() == many[index - len(many)].workers.tolist()
        assert many.depths[rows].tolist() == many[index].depths.tolist()
    with pytest.raises(IndexError):
        many[len(many)]
    nothing = tree.match_many([])
    assert len(nothing) == len(list(nothing)) == len(nothing.ends) == len(nothing.workers) == len(nothing.depths) == 0
    with pytest.raises(TypeError, match="one-dimensional array of uint64"):
        tree.match_many([ABCD, [1]])


def test_strided_and_read_only_arrays_are_taken(tree: PrefixTree) -> None:
    """Columns and slices of other arrays need no copy by the caller."""
    keys = np.stack([ABCD, ABCD + np.uint64(1)], axis=1)
    keys.flags.writeable = False
    assert tree.store(0, keys[:, 0]) == 4
    assert tree.blocks(0).tolist() == sorted([A, B, C, D])
    assert tree.match(keys[:, 0]).as_dict() == tree.match_many([keys[:, 0]])[0].as_dict() == {0: 4}
    assert tree.remove(0, keys[::-1, 0]) == 4


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


@pytest.mark.parametrize("length", [2, 3, 31, 64, 600, 4096])
def test_a_hole_anywhere_in_a_long_chain_is_seen(tree: PrefixTree, length: int) -> None:
    """One block of many is gone from one of two workers: its depth ends there, whichever block it is."""
    chain = np.random.default_rng(3).permutation(np.arange(1, length + 1, dtype=np.uint64))
    tree.store(0, chain)
    tree.store(1, chain)
    for hole in {0, 1, length // 3, length // 2, length - 2, length - 1}:
        tree.remove(1, chain[hole : hole + 1])
        expected = {0: length, 1: hole} if hole else {0: length}
        assert tree.match(chain).as_dict() == expected
        tree.store(1, chain[hole : hole + 1], int(chain[hole - 1]) if hole else ROOT_HASH)
        assert tree.match(chain).as_dict() == {0: length, 1: length}


def test_a_block_under_another_parent_than_it_has_is_matched_exactly(tree: PrefixTree) -> None:
    """Worker 8 has put a block below E, which it does not follow; 9, which knows better, is matched right."""
    chain = np.arange(1000, 1100, dtype=np.uint64)
    tree.store(8, blocks(E, 1050))
    for worker in (7, 9):
        tree.store(worker, chain)
    tree.store(9, blocks(E))
    assert tree.match(chain).as_dict() == {7: 100, 9: 100}
    tree.remove(9, chain[49:50])
    assert tree.match(chain).as_dict() == {7: 100, 9: 49}
    assert tree.children(E).tolist() == [1050], "the link stays"
    tree.check()


def test_store_and_remove_count_only_what_changes(tree: PrefixTree) -> None:
    """Held blocks are not stored twice, unknown or repeated ones not removed."""
    assert tree.store(1, blocks(A, B)) == 2
    assert tree.store(1, ABCD) == 2
    assert tree.store(1, blocks(A, A)) == 0
    assert len(tree) == tree.count(1) == 4
    assert tree.remove(1, blocks(D, D, 12345, 0)) == 1
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


def test_a_block_is_held_in_tiers(tree: PrefixTree) -> None:
    """It is one entry in however many tiers, goes from each on its own, and is gone with the last."""
    assert tree.store(0, ABCD) == 4
    assert tree.store(0, blocks(C, D), parent=B, tier=HOST) == 2
    assert tree.store(0, blocks(C, D), parent=B, tier=HOST) == 0
    assert tree.store(0, blocks(E), parent=D, tier=DISK) == 1
    assert len(tree) == tree.count(0) == 5
    assert tree.remove(0, blocks(C, D)) == 2
    assert tree.remove(0, blocks(C, D, E)) == 0
    assert tree.blocks(0).tolist() == sorted([A, B, C, D, E])
    assert tree.holders(C).tolist() == [0]
    assert tree.remove(0, blocks(A, C), tier=HOST) == 1
    assert tree.holders(C).tolist() == []
    assert tree.count(0) == 4
    tree.check()


def test_depths_tell_tiers_apart(tree: PrefixTree) -> None:
    """Rows count leading blocks on the device; on device or host; anywhere. What ends one need not end the next."""
    tree.store(1, blocks(A))
    tree.store(1, blocks(B), parent=A, tier=HOST)
    tree.store(1, blocks(C), parent=B, tier=DISK)
    tree.store(1, blocks(D), parent=C)
    tree.store(2, ABCD, tier=DISK)
    tree.store(3, ABCD)
    tree.store(3, ABCD, tier=HOST)
    tree.store(4, blocks(A), tier=HOST)
    matches = tree.match(ABCD)
    assert matches.workers.tolist() == [1, 2, 3, 4]
    assert matches.tier_depths.tolist() == [[1, 0, 4, 0], [2, 0, 4, 1], [4, 4, 4, 1]]
    assert matches.by_worker(10)[:, matches.workers].tolist() == [[1, 0, 4, 0], [4, 4, 4, 1]]
    assert matches.depths.tolist() == [4, 4, 4, 1]
    tree.store(1, blocks(C), parent=B)
    assert tree.match(ABCD).tier_depths[:, 0].tolist() == [1, 4, 4]
    tree.remove(1, blocks(A))
    assert tree.match(ABCD).as_dict() == {2: 4, 3: 4, 4: 1}
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


def test_digests_tell_tiers_apart(tree: PrefixTree) -> None:
    """A block in two tiers is two elements, and the tier is part of each."""
    for tier in Tier:
        tree.store(tier, ABCD, tier=tier)
        assert tree.digest(tier) == digest_of(ABCD, tier)
    tree.store(0, blocks(B), tier=DISK)
    expected = SetDigest()
    expected.add(ABCD)
    expected.add(blocks(B), DISK)
    assert tree.digest(0) == expected.value
    tree.remove(0, blocks(B), tier=DISK)
    assert tree.digest(0) == digest_of(ABCD)


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


def test_changes_are_applied_in_order(tree: PrefixTree) -> None:
    """A batch of columns does what the single calls do; empty changes and an empty batch do nothing."""
    tree.store(0, blocks(55))
    batch = columns(
        (REMOVE, DEVICE, 0, [A, 55]),
        (STORE, DEVICE, 0, [A, B]),
        (STORE, HOST, B, [C, D]),
        (STORE, DEVICE, 0, []),
        (REMOVE, DEVICE, 0, [C, 0, B]),
    )
    tree.apply(0, batch)
    assert tree.blocks(0).tolist() == sorted([A, C, D])
    assert tree.children(B).tolist() == [C]
    tree.apply(0, columns((CLEAR, DEVICE, 0, []), (STORE, DISK, 7, [E])))
    assert tree.blocks(0).tolist() == [E]
    assert tree.digest(0) == digest_of(blocks(E), DISK)
    tree.apply(0, columns())
    tree.apply(1, SimpleNamespace(**{name: getattr(batch, name) for name in batch.__slots__}))
    assert tree.blocks(1).tolist() == sorted([A, C, D]), "anything with these columns will do"
    tree.check()


@pytest.mark.parametrize(
    "wrong",
    [
        {"kinds": [STORE, 3]},
        {"tiers": [0, 3]},
        {"ends": [2, 1]},
        {"ends": [1, 9]},
        {"ends": [1, 1]},
        {"ends": [2]},
        {"tiers": [0, 0, 0]},
        {"parents": []},
        {"kinds": [STORE]},
        {"hashes": [A, 0]},
    ],
    ids=str,
)
def test_columns_that_do_not_fit_change_nothing(tree: PrefixTree, wrong: dict[str, list[int]]) -> None:
    """All columns are checked before the first change is made."""
    tree.store(0, blocks(D))
    good: dict[str, Any] = {"kinds": [REMOVE, STORE], "tiers": [0, 0], "parents": [0, 0], "ends": [1, 2]}
    good["hashes"] = [D, B]
    types = {"kinds": np.uint8, "tiers": np.uint8, "parents": np.uint64, "ends": np.uint32, "hashes": np.uint64}
    arrays = {name: np.array((good | wrong)[name], dtype=dtype) for name, dtype in types.items()}
    with pytest.raises(ValueError, match=r"\w"):
        tree.apply(0, SimpleNamespace(**arrays))
    assert tree.blocks(0).tolist() == [D]
    tree.check()


@pytest.mark.parametrize("field", ["kinds", "tiers", "parents", "ends", "hashes"])
@pytest.mark.parametrize("column", [[0], np.array([0.0]), np.zeros((1, 1), dtype=np.uint64), None])
def test_only_arrays_are_taken_as_columns(tree: PrefixTree, field: str, column: object) -> None:
    """The error names the column and what it must be."""
    batch = columns((STORE, DEVICE, 0, [A]))
    arrays = {name: getattr(batch, name) for name in batch.__slots__} | {field: column}
    with pytest.raises(TypeError, match=rf"{field} is .*: a one-dimensional array of uint"):
        tree.apply(0, SimpleNamespace(**arrays))
    assert len(tree) == 0


def test_a_cap_refuses_and_counts_new_entries(backend: Callable[..., PrefixTree]) -> None:
    """What is held stays and may get further tiers; room comes back as blocks go; `clear` resets the count."""
    tree = backend(max_blocks_per_worker=3)
    assert tree.room(0) == 3
    assert tree.store(0, ABCD) == 3
    assert tree.refused(0) == 1
    assert tree.room(0) == 0
    assert tree.store(0, blocks(C, D, E), parent=B, tier=HOST) == 1
    assert tree.refused(0) == 3
    assert tree.match(ABCD).as_dict() == {0: 3}
    assert tree.children(C).tolist() == []
    assert tree.store(1, ABCD) == 3, "another worker has its own room"
    assert tree.remove(0, blocks(A)) == 1
    assert tree.room(0) == 1
    assert tree.store(0, blocks(D), parent=C) == 1
    assert tree.refused(0) == 3
    assert tree.children(C).tolist() == [D], "the parent is known though it was given by a refused store before"
    tree.check()
    tree.clear(0)
    assert tree.refused(0) == 0
    assert tree.room(0) == 3


def test_the_cap_of_all_entries_is_shared(backend: Callable[..., PrefixTree]) -> None:
    """Entries count once a worker; in `apply` too; a worker without room is refused even its first block."""
    tree = backend(max_blocks=5, max_blocks_per_worker=4)
    assert tree.store(0, ABCD) == 4
    tree.apply(1, columns((STORE, DEVICE, 0, [A, B, C]), (REMOVE, DEVICE, 0, [A]), (STORE, DISK, C, [D, E])))
    assert tree.blocks(1).tolist() == [D]
    assert tree.refused(1) == 3
    assert len(tree) == 5
    assert tree.store(2, blocks(A)) == tree.count(2) == 0
    assert tree.refused(2) == 1
    assert tree.room(0) == tree.room(1) == tree.room(2) == 0
    tree.check()
    tree.clear(0)
    assert [tree.room(worker) for worker in range(3)] == [4, 3, 4]
    tree.apply(1, columns((CLEAR, DEVICE, 0, [])))
    assert tree.refused(1) == 0
    tree.check()


@pytest.mark.parametrize("cap", [0, -1, LARGEST_MAX_BLOCKS + 1])
@pytest.mark.parametrize("field", ["max_blocks", "max_blocks_per_worker"])
def test_caps_out_of_range_are_refused(backend: Callable[..., PrefixTree], field: str, cap: int) -> None:
    """The error names field, value and limit."""
    with pytest.raises(ValueError, match=rf"{field} is {cap}: 1 to {LARGEST_MAX_BLOCKS}"):
        backend(**{field: cap})


def test_hot_prefixes_are_what_recent_matches_held(tree: PrefixTree) -> None:
    """A match counts for its deepest held block and for all above; of equal hits only the deepest block is listed."""
    tree.store(0, ABCD)
    tree.store(1, blocks(A, B, E))
    assert tree.hottest(10) == []
    for query in (ABCD, blocks(A, B, 77), blocks(A, B, C), blocks(A, B, E), blocks(77, A), blocks()):
        tree.match(query)
    tree.match_many([ABCD])
    assert tree.hottest(10) == [
        HotPrefix(B, 2, 5),  # A has as many, and less depth
        HotPrefix(C, 3, 3),
        HotPrefix(D, 4, 2),
        HotPrefix(E, 3, 1),
    ]
    assert tree.hottest(2) == [HotPrefix(B, 2, 5), HotPrefix(C, 3, 3)]
    assert tree.hottest(0) == []
    tree.remove(0, blocks(C))
    assert tree.hottest(10) == [HotPrefix(B, 2, 2), HotPrefix(D, 1, 2), HotPrefix(E, 3, 1)], "depth from the gap"
    tree.clear(0)
    assert tree.hottest(10) == [HotPrefix(B, 2, 2), HotPrefix(E, 3, 1)]
    with pytest.raises(ValueError, match=rf"limit is -1: 0 to {HEAT_WINDOW}"):
        tree.hottest(-1)


def test_equally_hot_prefixes_are_ordered(tree: PrefixTree) -> None:
    """By hits, then the deepest first, then by hash."""
    tree.store(0, blocks(A, E))
    tree.store(0, blocks(C))
    tree.store(0, blocks(D))
    tree.match_many([blocks(D), blocks(C), blocks(A, E)])
    assert tree.hottest(9) == [HotPrefix(E, 2, 1), HotPrefix(C, 1, 1), HotPrefix(D, 1, 1)]


def test_heat_looks_back_on_a_window(tree: PrefixTree) -> None:
    """Only the last HEAT_WINDOW matches count, and those of nothing are none."""
    tree.store(0, blocks(A))
    tree.store(0, blocks(C))
    tree.match(blocks(C))
    tree.match_many([blocks(A)] * (HEAT_WINDOW - 1) + [blocks(77)] * 10)
    assert tree.hottest(9) == [HotPrefix(A, 1, HEAT_WINDOW - 1), HotPrefix(C, 1, 1)]
    tree.match(blocks(A))
    assert tree.hottest(9) == [HotPrefix(A, 1, HEAT_WINDOW)]


def test_parents_in_a_circle_are_not_hot(tree: PrefixTree) -> None:
    """No true chain is one. What is made up is matched like anything else, and not listed, nor what hangs on it."""
    tree.store(0, blocks(A, B, A), parent=B)
    tree.store(0, blocks(C), parent=B)
    tree.store(0, blocks(E), parent=E)
    tree.store(0, blocks(D))
    for query in (blocks(A), blocks(A, B), blocks(A, B, C), blocks(E), blocks(D)):
        tree.match(query)
    assert tree.children(B).tolist() == [A, C]
    assert tree.children(E).tolist() == [E]
    assert tree.hottest(9) == [HotPrefix(D, 1, 1)]
    tree.check()
    assert tree.clear(0) == 5
    assert tree.children(E).tolist() == tree.children(A).tolist() == []
    tree.check()


def test_a_dump_has_everything(tree: PrefixTree) -> None:
    """Blocks with their parents and holders; each set of holders is there once, and ascends."""
    tree.store(300, ABCD)
    tree.store(2, blocks(C), parent=B, tier=HOST)
    tree.store(2, blocks(C), parent=B, tier=DISK)
    tree.store(300, blocks(E), parent=77, tier=DISK)
    parents, members = holdings(tree)
    assert parents == {A: ROOT_HASH, B: A, C: B, D: C, E: 77}
    assert members == {A: [(300, 1)], B: [(300, 1)], C: [(2, 6), (300, 1)], D: [(300, 1)], E: [(300, 4)]}
    dump = tree.dump()
    assert len(dump.set_ends) == 3
    assert dump.hashes.dtype == dump.parents.dtype == np.uint64
    assert dump.holder_sets.dtype == dump.set_ends.dtype == dump.members.dtype == np.uint32
    tree.clear(300)
    tree.clear(2)
    assert holdings(tree) == ({}, {})
    assert len(tree.dump().members) == 0


@pytest.mark.parametrize("worker", [-1, MAX_WORKERS, 2**32])
def test_workers_out_of_range_are_refused(tree: PrefixTree, worker: int) -> None:
    """The error names the value and the limit."""
    with_hashes = [tree.store, tree.remove]
    alone = [tree.clear, tree.count, tree.digest, tree.blocks, tree.refused, tree.room]
    calls = [lambda call=call: call(worker, ABCD) for call in with_hashes]
    calls += [lambda call=call: call(worker) for call in alone]
    calls.append(lambda: tree.apply(worker, columns()))
    for call in calls:
        with pytest.raises(ValueError, match=rf"worker is {worker}: 0 to {MAX_WORKERS - 1}"):
            call()


@pytest.mark.parametrize("tier", [-1, 3, 8])
def test_tiers_out_of_range_are_refused(tree: PrefixTree, tier: int) -> None:
    """The error names the value and the limit."""
    for call in (tree.store, tree.remove):
        with pytest.raises(ValueError, match=rf"tier is {tier}: 0 to 2"):
            call(0, ABCD, tier=tier)
    assert len(tree) == 0


@pytest.mark.parametrize("hashes", [[1, 2], np.array([1, 2]), np.ones((2, 2), dtype=np.uint64), b"12345678"])
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
    with pytest.raises(ValueError, match="root"):
        tree.apply(0, columns((STORE, DEVICE, 0, [A]), (STORE, DEVICE, A, [0])))
    assert len(tree) == tree.count(0) == 0
    assert tree.holders(ROOT_HASH).tolist() == []
    tree.check()


@pytest.mark.parametrize("value", [-1, 2**64])
def test_hashes_out_of_range_are_refused(tree: PrefixTree, value: int) -> None:
    """The error names field and value."""
    with pytest.raises(ValueError, match=f"parent is {value}"):
        tree.store(0, blocks(A), parent=value)
    for call in (tree.holders, tree.children):
        with pytest.raises(ValueError, match=f"block_hash is {value}"):
            call(value)
    assert len(tree) == 0
