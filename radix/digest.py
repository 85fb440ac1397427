"""A digest of a set of block hashes: order-free, incremental, 128 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from radix.backend import native
from radix.checks import check_tier
from radix.keys import Hashes, check_hashes
from radix.tree import Tier

DIGEST_BYTES = 16
EMPTY_DIGEST = bytes(DIGEST_BYTES)

TIER_SALTS = (0, 0xA0761D6478BD642F, 0xE7037ED1A0B428DB)
"""By tier: what a hash is XORed with before it is mixed, so that a block in two tiers is two elements."""

_LANE_KEYS = np.array([[0x9E3779B97F4A7C15], [0xD1B54A32D192ED03]], dtype=np.uint64)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_MASK = 2**64 - 1


class ReferenceDigest:
    """Two sums (mod 2^64) of two differently keyed mixes of each hash: what is added may be removed, in any order.

    The mix is splitmix64's finalizer (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014)
    of `(hash ^ tier salt) + lane key`. Equal sets have equal digests. Different sets differ but for a chance of about
    2^-128, so lost, doubled or corrupted events and bugs show. It is no defence against an adversary: mixes are
    invertible and sums are linear, so sets of equal digest can be constructed. A worker could lie about its blocks
    without that.
    """

    __slots__ = ("_high", "_low")

    def __init__(self) -> None:
        self._low = self._high = 0

    def add(self, hashes: Hashes, tier: int = Tier.DEVICE) -> None:
        """Put in hashes that are not in the set in this tier, each once."""
        low, high = _lane_sums(hashes, tier)
        self._low = (self._low + low) & _MASK
        self._high = (self._high + high) & _MASK

    def remove(self, hashes: Hashes, tier: int = Tier.DEVICE) -> None:
        """Take out hashes that are in the set in this tier, each once."""
        low, high = _lane_sums(hashes, tier)
        self._low = (self._low - low) & _MASK
        self._high = (self._high - high) & _MASK

    @property
    def value(self) -> bytes:
        """16 bytes: both lanes, little-endian. Zeros for the empty set."""
        return self._low.to_bytes(8, "little") + self._high.to_bytes(8, "little")


if TYPE_CHECKING or native is None:
    SetDigest: TypeAlias = ReferenceDigest
else:
    SetDigest = getattr(native, "SetDigest", ReferenceDigest)
"""The digest that runs: the compiled one where there is one, in a twentieth of the time."""


def digest_of(hashes: Hashes, tier: int = Tier.DEVICE) -> bytes:
    """The digest of a set that is given whole: distinct hashes in one tier, in any order."""
    digest = SetDigest()
    digest.add(hashes, tier)
    return digest.value


def _lane_sums(hashes: Hashes, tier: int) -> tuple[int, int]:
    check_hashes("hashes", hashes)
    check_tier(tier)
    mixed = (hashes ^ np.uint64(TIER_SALTS[tier])) + _LANE_KEYS  # (2, n); uint64 arrays wrap
    mixed ^= mixed >> _SHIFTS[0]
    mixed *= _MULTIPLIERS[0]
    mixed ^= mixed >> _SHIFTS[1]
    mixed *= _MULTIPLIERS[1]
    mixed ^= mixed >> _SHIFTS[2]
    low, high = mixed.sum(axis=1, dtype=np.uint64).tolist()
    return low, high
