"""A worker's own account of its blocks: compiled and in Python the same, and not the tree's."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from radix.backend import native
from radix.digest import EMPTY_DIGEST, ReferenceDigest
from radix.held import HeldBlocks, ReferenceHeldBlocks
from radix.keys import Hashes
from radix.tree import Tier

ACCOUNTS = [
    pytest.param(ReferenceHeldBlocks, id="reference"),
    pytest.param(
        None if native is None else native.HeldBlocks,
        id="native",
        marks=pytest.mark.skipif(native is None, reason="nothing is compiled"),
    ),
]
Accounts = type[ReferenceHeldBlocks]
Rows = dict[int, tuple[int, int]]


def blocks(*hashes: int) -> Hashes:
    return np.array(hashes, dtype=np.uint64)


def rows(held: ReferenceHeldBlocks) -> Rows:
    """Block -> parent and mask of tiers; no block comes twice, and none before its parent."""
    hashes, parents, masks = held.columns()
    assert (hashes.dtype, parents.dtype, masks.dtype) == (np.uint64, np.uint64, np.uint8)
    at = {block: position for position, block in enumerate(hashes.tolist())}
    assert len(at) == len(hashes) == len(parents) == len(masks) == len(held)
    for position, parent in enumerate(parents.tolist()):
        assert at.get(parent, -1) < position, "parents come first"
    return dict(zip(hashes.tolist(), zip(parents.tolist(), masks.tolist(), strict=True), strict=True))


def digest_of_rows(held: Rows) -> bytes:
    digest = ReferenceDigest()
    for tier in Tier:
        digest.add(blocks(*(block for block, (_, mask) in held.items() if mask >> tier & 1)), tier)
    return digest.value


CHAINS = st.lists(st.integers(1, 40), max_size=8, unique=True).map(sorted)  # ascending: no block descends from itself
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("store"), CHAINS, st.sampled_from(Tier)),
        st.tuples(st.just("remove"), st.lists(st.integers(1, 40), max_size=8), st.sampled_from(Tier)),
        st.tuples(st.just("clear"), st.just([]), st.just(Tier.DEVICE)),
    ),
    max_size=40,
)


@pytest.mark.parametrize("account", ACCOUNTS)
@settings(deadline=None)
@given(steps=STEPS)
def test_it_is_a_set_of_blocks_in_tiers(account: Accounts, steps: list[tuple[str, list[int], Tier]]) -> None:
    """As a plain dict has it, whatever is stored twice or removed unheld; the digest is over all of it."""
    held, plain = account(), Rows()
    for kind, chain, tier in steps:
        match kind:
            case "store":
                held.store(blocks(*chain), 0, tier)
                for parent, block in zip([0, *chain], chain, strict=False):
                    first, mask = plain.get(block, (parent, 0))
                    plain[block] = first, mask | 1 << tier
            case "remove":
                held.remove(blocks(*chain), tier)
                for block in chain:
                    first, mask = plain.pop(block, (0, 0))
                    if left := mask & ~(1 << tier):
                        plain[block] = first, left
            case _:
                held.clear()
                plain.clear()
        assert rows(held) == plain
        assert held.digest == digest_of_rows(plain)
    other = ReferenceHeldBlocks()
    for block, (parent, mask) in reversed(plain.items()):
        for tier in Tier:
            if mask >> tier & 1:
                other.store(blocks(block), parent, tier)
    for column, same in zip(held.columns(), other.columns(), strict=True):
        assert column.tolist() == same.tolist(), "equal sets give equal columns"


@pytest.mark.parametrize("account", ACCOUNTS)
def test_many_blocks_come_and_go(account: Accounts) -> None:
    """Through every size of its table, with removals that leave no trace among those that stay."""
    held = account()
    rng = np.random.default_rng(1)
    hashes = rng.integers(1, 2**64, size=20_000, dtype=np.uint64, endpoint=False)
    held.store(hashes, 7)
    gone = rng.permutation(hashes)[:15_000]
    for start in range(0, len(gone), 500):
        held.remove(gone[start : start + 500])
        held.store(gone[start : start + 100], 0, Tier.HOST)
    again = np.concatenate([gone[start : start + 100] for start in range(0, len(gone), 500)])
    left = np.setdiff1d(hashes, gone)
    expected = ReferenceDigest()
    expected.add(left)
    expected.add(again, Tier.HOST)
    assert held.digest == expected.value
    assert set(rows(held)) == {*left.tolist(), *again.tolist()}
    held.remove(left)
    held.remove(again, Tier.HOST)
    assert (len(held), held.digest) == (0, EMPTY_DIGEST)


@pytest.mark.parametrize("account", ACCOUNTS)
def test_a_block_keeps_its_first_parent_while_it_is_held(account: Accounts) -> None:
    """In any tier; held nowhere, it may come back under another."""
    held = account()
    held.store(blocks(5), 3)
    held.store(blocks(5), 4, Tier.DISK)
    held.remove(blocks(5))
    assert rows(held) == {5: (3, 1 << Tier.DISK)}
    held.remove(blocks(5), Tier.DISK)
    held.store(blocks(5), 4)
    assert rows(held) == {5: (4, 1)}


@pytest.mark.parametrize("account", ACCOUNTS)
def test_parents_in_a_circle_end(account: Accounts) -> None:
    """Which hashing cannot make; each block comes once."""
    held = account()
    for block, parent in ((1, 2), (2, 3), (3, 1), (4, 4), (5, 1)):
        held.store(blocks(block), parent)
    assert sorted(held.columns()[0].tolist()) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("account", ACCOUNTS)
def test_a_copy_is_apart(account: Accounts) -> None:
    """What happens to either does not happen to the other."""
    held = account()
    held.store(blocks(1, 2))
    copied = held.copy()
    held.store(blocks(3), 2)
    copied.remove(blocks(1))
    assert set(rows(held)) == {1, 2, 3}
    assert set(rows(copied)) == {2}
    assert copied.digest == digest_of_rows(rows(copied)) != held.digest == digest_of_rows(rows(held))


@pytest.mark.parametrize("account", ACCOUNTS)
def test_what_is_no_block_is_refused_and_changes_nothing(account: Accounts) -> None:
    """Errors name field, value and limit."""
    held = account()
    with pytest.raises(TypeError, match="hashes is list: a one-dimensional array of uint64"):
        held.store([1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="hashes is int64"):
        held.remove(np.array([1]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hashes hold 0: it stands for the root"):
        held.store(blocks(1, 0))
    with pytest.raises(ValueError, match="tier is 3: 0 to 2"):
        held.store(blocks(1), 0, 3)
    with pytest.raises(ValueError, match="parent is -1: 0 to 2"):
        held.store(blocks(1), -1)
    with pytest.raises(TypeError, match="block_hashes is list: a one-dimensional array of uint64"):
        held.check([1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block_hashes hold 0: it stands for the root"):
        held.check(blocks(1, 0))
    assert held.check(blocks(1, 2)) == 2
    held.remove(blocks(0, 9))
    assert (len(held), held.digest) == (0, EMPTY_DIGEST)


def test_the_compiled_one_runs_where_it_is() -> None:
    """As everywhere in this package."""
    assert HeldBlocks is (ReferenceHeldBlocks if native is None else native.HeldBlocks)
