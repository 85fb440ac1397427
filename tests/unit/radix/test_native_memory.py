"""The native tree at sizes where its memory moves: growth, holes that are filled, pages that go back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from radix.backend import native
from radix.keys import Hashes

pytestmark = pytest.mark.skipif(native is None, reason="no native tree: `make native` builds it")

CHAIN = 64


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def chains(count: int, seed: int) -> list[Hashes]:
    hashes = np.random.default_rng(seed).integers(1, 2**64, count * CHAIN, dtype=np.uint64)
    return [hashes[at : at + CHAIN] for at in range(0, len(hashes), CHAIN)]


def test_every_block_is_found_while_the_table_grows_and_shrinks() -> None:
    """Through all sizes up to 400,000 blocks and back, in any order, each match is right and the invariants hold."""
    tree = native.NativeTree()
    stored = chains(6_000, seed=1)
    for number, chain in enumerate(stored):
        tree.store(number % 7, chain)
        if number % 1_500 == 0:
            tree.check()
    for number, chain in enumerate(stored):
        assert tree.match(chain).as_dict() == {number % 7: CHAIN}
    order = np.random.default_rng(2).permutation(len(stored)).tolist()
    for step, number in enumerate(order):
        tree.remove(number % 7, stored[number][::-1])
        assert len(tree.match(stored[number])) == 0
        if step % 1_000 == 0:
            tree.check()
            left = order[step + 1 :: 50]
            found = tree.match_many([stored[each] for each in left])
            assert [each.as_dict() for each in found] == [{each % 7: CHAIN} for each in left]
    tree.check()
    assert len(tree) == 0


def test_memory_goes_back_when_blocks_go_in_any_order() -> None:
    """Of 2 million blocks nine in ten go: a fifth stays, with the parents of others, and some pages of slack."""
    tree = native.NativeTree()
    stored = chains(31_250, seed=3)
    blocks = np.concatenate(stored)
    np.random.default_rng(4).shuffle(blocks)
    before = resident_bytes()
    for chain in stored:
        tree.store(0, chain)
    full = resident_bytes() - before
    assert full / len(tree) < 35
    gone = len(blocks) * 9 // 10
    for at in range(0, gone, 1_000):
        tree.remove(0, blocks[at : min(at + 1_000, gone)])
    tree.check()
    left = resident_bytes() - before
    assert left < 0.6 * full, f"{left / 2**20:.0f} of {full / 2**20:.0f} MiB are left"


def test_workers_that_leave_give_memory_back_while_others_stay() -> None:
    """Of eight workers whose blocks lie between each other's one stays, with less than half of the memory."""
    tree = native.NativeTree()
    stored = chains(31_250, seed=6)
    before = resident_bytes()
    for number, chain in enumerate(stored):
        tree.store(number % 8, chain)
    full = resident_bytes() - before
    for worker in range(7):
        tree.clear(worker)
    tree.check()
    assert [tree.match(chain).as_dict() for chain in stored[7::800]] == [{7: CHAIN}] * len(stored[7::800])
    left = resident_bytes() - before
    assert left < full / 2, f"{left / 2**20:.0f} of {full / 2**20:.0f} MiB are left"


def test_clearing_gives_memory_back() -> None:
    """A worker that leaves takes its memory along."""
    tree = native.NativeTree()
    stored = chains(31_250, seed=5)
    before = resident_bytes()
    for chain in stored:
        tree.store(9, chain)
    full = resident_bytes() - before
    assert tree.clear(9) == 2_000_000
    tree.check()
    left = resident_bytes() - before
    assert left < 0.6 * full, f"{left / 2**20:.0f} of {full / 2**20:.0f} MiB are left"
