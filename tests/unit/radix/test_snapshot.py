"""Snapshots of a tree: whole, compact, and refused where anything is wrong."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from radix import snapshot
from radix.keys import ROOT_HASH, Hashes
from radix.reference import ReferenceTree
from radix.snapshot import SnapshotError, encode, load
from radix.tree import MAX_WORKERS, PrefixTree, Tier
from tests.support.prefix_trees import BACKENDS, TREES, all_of, blocks, holdings

HEADER = struct.Struct("<8sI5Q")
CHECKSUM_BYTES = 32
DTYPES = {
    "hashes": "<u8",
    "follows": "u1",
    "parents": "<u8",
    "run_sets": "<u4",
    "run_sizes": "<u4",
    "set_sizes": "<u4",
    "members": "<u4",
}


def sealed(body: bytes) -> bytes:
    return body + hashlib.blake2b(body, digest_size=CHECKSUM_BYTES).digest()


def pack(columns: dict[str, np.ndarray], **header: int) -> bytes:
    """A snapshot of these columns by the format's description, whether they fit each other or not."""
    counts = {name: len(columns[name]) for name in ("hashes", "parents", "run_sets", "set_sizes", "members")} | header
    fields = [counts[name] for name in ("hashes", "parents", "run_sets", "set_sizes", "members")]
    start = HEADER.pack(b"RHZTREE\0", counts.get("version", 1), *fields)
    return sealed(start + b"".join(columns[name].astype(dtype).tobytes() for name, dtype in DTYPES.items()))


def good() -> dict[str, np.ndarray]:
    """Chains 11-12-13 of workers 1 and 2, 14 below 12 of worker 2 on host and disk."""
    return {
        "hashes": np.array([11, 12, 13, 14]),
        "follows": np.packbits([0, 1, 1, 0], bitorder="little"),
        "parents": np.array([0, 12]),
        "run_sets": np.array([0, 1]),
        "run_sizes": np.array([3, 1]),
        "set_sizes": np.array([2, 1]),
        "members": np.array([1 << 3 | 1, 2 << 3 | 1, 2 << 3 | 6]),
    }


def small_tree() -> PrefixTree:
    tree = ReferenceTree()
    load(tree, pack(good()))
    return tree


def random_chain(rng: np.random.Generator, length: int) -> Hashes:
    return rng.integers(1, 2**64 - 1, length, dtype=np.uint64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_format_is_fixed(backend: Callable[..., PrefixTree]) -> None:
    """Bytes made by the description load: releases read each other's snapshots. These never change in version 1."""
    tree = backend()
    load(tree, pack(good()))
    parents, members = holdings(tree)
    assert parents == {11: 0, 12: 11, 13: 12, 14: 12}
    assert members == {11: [(1, 1), (2, 1)], 12: [(1, 1), (2, 1)], 13: [(1, 1), (2, 1)], 14: [(2, 6)]}
    tree.check()
    only = backend()
    only.store(5, blocks(7, 8), parent=6, tier=Tier.HOST)
    assert encode(only) == pack(
        {
            "hashes": np.array([7, 8]),
            "follows": np.array([2]),
            "parents": np.array([6]),
            "run_sets": np.array([0]),
            "run_sizes": np.array([2]),
            "set_sizes": np.array([1]),
            "members": np.array([5 << 3 | 2]),
        }
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_tree_survives(backend: Callable[..., PrefixTree]) -> None:
    """No blocks, no sets, no surprise."""
    tree = backend()
    data = encode(tree)
    load(tree, data)
    assert len(tree) == 0
    assert len(data) == HEADER.size + CHECKSUM_BYTES


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_chain_costs_little_more_than_its_hashes(backend: Callable[..., PrefixTree]) -> None:
    """8 bytes and a bit a block, whatever the order in which the tree gives them."""
    tree = backend()
    chain = random_chain(np.random.default_rng(1), 20_000)
    pieces = [(start, start + 40) for start in range(0, len(chain), 40)]
    random.Random(1).shuffle(pieces)
    for start, end in pieces:
        tree.store(1, chain[start:end], int(chain[start - 1]) if start else ROOT_HASH)
    data = encode(tree)
    assert len(data) < 8.2 * len(chain)
    other = backend()
    load(other, data)
    assert other.match(chain).as_dict() == {1: len(chain)}
    assert other.digest(1) == tree.digest(1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shared_prefixes_and_scattered_blocks_survive(backend: Callable[..., PrefixTree]) -> None:
    """Sessions on shared prefixes, many workers, tiers, holes: all comes back, in either backend, and stays small."""
    rng, tree = np.random.default_rng(2), backend()
    prefixes = [random_chain(rng, 32) for _ in range(20)]
    for number in range(600):
        prefix, worker = prefixes[number % 20], int(rng.integers(60))
        tree.store(worker, prefix)
        session = random_chain(rng, 64)
        tree.store(worker, session, int(prefix[-1]))
        if number % 5 == 0:
            tree.store(worker, session[20:40], int(session[19]), Tier.HOST)
        if number % 7 == 0:
            tree.remove(worker, session[rng.integers(64, size=9)])
    data = encode(tree)
    assert len(data) < 9.5 * len(tree.dump().hashes)
    for make in TREES.values():
        other = make()
        load(other, data)
        other.check()
        assert all_of(other, range(60)) == all_of(tree, range(60))


@pytest.mark.parametrize("backend", BACKENDS)
def test_made_up_parents_survive(backend: Callable[..., PrefixTree]) -> None:
    """Circles, blocks below themselves and below unknown ones: odd links cost space, and come back."""
    tree = backend()
    tree.store(0, blocks(1, 2, 3), parent=3)
    tree.store(1, blocks(9), parent=9)
    tree.store(1, blocks(4, 5), parent=2)
    tree.store(2, blocks(7), parent=1000)
    other = backend()
    load(other, encode(tree))
    other.check()
    assert all_of(other, range(3)) == all_of(tree, range(3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_caps_refuse_what_is_too_much(backend: Callable[..., PrefixTree]) -> None:
    """The heads of chains get in; the rest is counted, like in any store."""
    tree, capped = backend(), backend(max_blocks=10, max_blocks_per_worker=8)
    tree.store(1, blocks(*range(1, 21)))
    load(capped, encode(tree))
    assert capped.blocks(1).tolist() == list(range(1, 9))
    assert capped.refused(1) == 12
    capped.check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_an_empty_tree_is_loaded_into(backend: Callable[..., PrefixTree]) -> None:
    """Two trees cannot be mixed: parents could be another's."""
    tree = backend()
    tree.store(0, blocks(5))
    with pytest.raises(ValueError, match="holds 1 entries"):
        load(tree, pack(good()))
    assert tree.blocks(0).tolist() == [5]


def test_a_flipped_bit_is_refused() -> None:
    """Wherever it is."""
    right, tree = encode(small_tree()), ReferenceTree()
    for at in range(len(right)):
        for bit in range(8):
            with pytest.raises(SnapshotError):
                load(tree, right[:at] + bytes([right[at] ^ 1 << bit]) + right[at + 1 :])
    assert len(tree) == 0


def test_a_piece_or_more_than_all_is_refused() -> None:
    """Every truncation, and bytes behind the end."""
    right = encode(small_tree())
    for wrong in [*(right[:length] for length in range(len(right))), right + b"\0"]:
        with pytest.raises(SnapshotError, match="snapshot has .* bytes"):
            load(ReferenceTree(), wrong)


FORGED: list[tuple[dict[str, list[int]], dict[str, int], str]] = [
    ({"hashes": [11, 12, 0, 14]}, {}, "hashes hold 0"),
    ({"hashes": [11, 12, 11, 14]}, {}, "hashes hold a block twice"),
    ({"follows": [0b0111]}, {}, "first block has a block before it"),
    ({"follows": [0b10110]}, {}, "bits set beyond the last block"),
    ({"follows": [0b0010]}, {}, "parents has 2 rows: follows leaves 3"),
    ({"parents": [0]}, {}, "parents has 1 rows: follows leaves 2"),
    ({"run_sizes": [3, 2]}, {}, "run_sizes sum up to 5"),
    ({"run_sizes": [4, 0]}, {}, "run_sizes sum up to 4, or hold 0"),
    ({"run_sizes": [2**32 - 1, 5]}, {}, "run_sizes sum up to 4294967300"),
    ({"run_sets": [0, 2]}, {}, "run_sets hold 2: there are 2 sets"),
    ({"set_sizes": [], "members": []}, {}, "run_sets hold 1: there are 0 sets"),
    ({"set_sizes": [2, 2]}, {}, "set_sizes sum up to 4"),
    ({"set_sizes": [3, 0]}, {}, "set_sizes sum up to 3, or hold 0"),
    ({"members": [9, 17, MAX_WORKERS << 3 | 1]}, {}, "members hold worker 65536: 0 to 65535"),
    ({"members": [9, 16, 22]}, {}, "in no tier"),
    ({"members": [17, 9, 22]}, {}, "do not ascend"),
    ({"members": [9, 10, 22]}, {}, "do not ascend"),
    ({}, {"version": 2}, "version 2: this release reads 1"),
    ({}, {"hashes": 2**63}, "its counts need"),
    ({}, {"members": 2**64 - 1}, "its counts need"),
    ({}, {"hashes": 3, "parents": 3}, "follows has bits set"),  # the same length in all
]


@pytest.mark.parametrize(("wrong", "header", "text"), FORGED, ids=[text for *_, text in FORGED])
def test_what_contradicts_itself_is_refused(wrong: dict[str, list[int]], header: dict[str, int], text: str) -> None:
    """Also under a right checksum; the error says what is wrong, and nothing is stored."""
    columns = good() | {name: np.array(values, dtype=np.uint64) for name, values in wrong.items()}
    tree = ReferenceTree()
    with pytest.raises(SnapshotError, match=text):
        load(tree, pack(columns, **header))
    assert len(tree) == 0


def test_another_kind_of_file_is_refused() -> None:
    """By its first bytes."""
    with pytest.raises(SnapshotError, match="begins with b'RHZTREF"):
        load(ReferenceTree(), sealed(b"RHZTREF\0" + pack(good())[8:-CHECKSUM_BYTES]))


def test_a_small_file_cannot_make_a_huge_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few bytes may say that many workers hold many blocks: entries have a limit before any is made."""
    monkeypatch.setattr(snapshot, "LARGEST_MAX_BLOCKS", 6)
    with pytest.raises(SnapshotError, match="snapshot has 7 entries: up to 6"):
        load(ReferenceTree(), pack(good()))
    monkeypatch.setattr(snapshot, "LARGEST_MAX_BLOCKS", 3)
    with pytest.raises(SnapshotError, match="snapshot has 4 blocks: up to 3"):
        load(ReferenceTree(), pack(good()))


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_forged_body_is_refused_or_whole(data: st.DataObject) -> None:
    """Some bytes of the body changed, the checksum made anew: an error, or a tree that keeps its invariants."""
    right = encode(small_tree())
    body = bytearray(right[:-CHECKSUM_BYTES])
    places = st.integers(0, len(body) - 1)
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4)):
        body[place] = value
    tree = ReferenceTree()
    try:
        load(tree, sealed(bytes(body)))
    except SnapshotError:
        assert len(tree) == 0
    else:
        tree.check()
        other = ReferenceTree()
        load(other, encode(tree))
        assert holdings(other) == holdings(tree)
