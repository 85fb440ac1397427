"""The set digest: order-free, incremental, and sensitive to every bit."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from radix.digest import DIGEST_BYTES, EMPTY_DIGEST, TIER_SALTS, ReferenceDigest, SetDigest, digest_of
from radix.keys import Hashes
from radix.tree import Tier

SETS = st.lists(st.integers(1, 2**64 - 1), unique=True, max_size=30)


def blocks(hashes: list[int]) -> Hashes:
    return np.array(hashes, dtype=np.uint64)


def test_the_values_are_fixed() -> None:
    """Digests are compared between processes: these never change."""
    assert digest_of(blocks([1, 2**64 - 1])).hex() == "e18867a4639fe3756e16ee70fbae058d"
    assert digest_of(blocks([])) == EMPTY_DIGEST == bytes(DIGEST_BYTES)
    assert digest_of(blocks([1, 2**64 - 1]), Tier.HOST).hex() == "7fc67e6c1db6d4f99bfcbfda251ff2b7"
    assert digest_of(blocks([1, 2**64 - 1]), Tier.DISK).hex() == "b9bca455f195347aab8e6f4b30c9e6e2"


def test_the_mix_is_splitmix64s() -> None:
    """The lower lane of a single hash is splitmix64's output for it: the generator's known first value for seed 0."""
    # splitmix64 with state 0 adds its increment (our first lane key) and finalizes: 0xE220A8397B1DCDAF.
    assert digest_of(blocks([0]))[:8] == (0xE220A8397B1DCDAF).to_bytes(8, "little")


def test_a_tier_is_a_part_of_each_element() -> None:
    """The hash is XORed with the tier's salt, which is 0 on the device; a block in two tiers is two elements."""
    for tier in Tier:
        assert digest_of(blocks([77]), tier) == digest_of(blocks([77 ^ TIER_SALTS[tier]]))
    assert TIER_SALTS[Tier.DEVICE] == 0
    digest = SetDigest()
    digest.add(blocks([1, 2]))
    digest.add(blocks([1, 2]), Tier.DISK)
    digest.remove(blocks([2, 1]))
    assert digest.value == digest_of(blocks([1, 2]), Tier.DISK)
    with pytest.raises(ValueError, match="tier is 3: 0 to 2"):
        digest.add(blocks([1]), 3)


@settings(deadline=None)
@given(SETS, st.randoms(use_true_random=False))
def test_order_and_steps_do_not_matter(hashes: list[int], shuffler: object) -> None:
    """A set added at once, in any order, or one by one with others that go again, has one digest."""
    shuffled = list(hashes)
    shuffler.shuffle(shuffled)
    digest = SetDigest()
    digest.add(blocks([7, 8]))
    for block in shuffled:
        digest.add(blocks([block]))
    digest.remove(blocks([8, 7]))
    assert digest.value == digest_of(blocks(hashes)) == digest_of(blocks(shuffled))


@settings(deadline=None)
@given(SETS.filter(bool), st.integers(0, 63), st.data())
def test_a_flipped_bit_shows(hashes: list[int], bit: int, data: st.DataObject) -> None:
    """One wrong bit of one hash, or one missing hash, changes both lanes."""
    victim = data.draw(st.sampled_from(hashes))
    others = [block for block in hashes if block != victim]
    right, wrong, lost = (digest_of(blocks(each)) for each in (hashes, [*others, victim ^ (1 << bit)], others))
    for other in (wrong, lost):
        assert right[:8] != other[:8]
        assert right[8:] != other[8:]


@settings(deadline=None)
@given(SETS, SETS, st.sampled_from(Tier))
def test_the_digest_that_runs_is_the_references(added: list[int], removed: list[int], tier: Tier) -> None:
    """Compiled or not, value by value, in every tier."""
    digest, reference = SetDigest(), ReferenceDigest()
    for each in (digest, reference):
        each.add(blocks(added), tier)
        each.remove(blocks(removed)[::-1])
    assert digest.value == reference.value


def test_only_hashes_are_taken() -> None:
    """Lists are refused, not converted."""
    with pytest.raises(TypeError, match="one-dimensional array of uint64"):
        SetDigest().add([1, 2])
