"""Digests of blocks: XXH3-64 finds what a transfer broke. It is no signature: who may send is the ticket's matter.

Digests and copies go through the native core where it is: one pass over memory, without Python's lock. The rest, and
blocks whose pieces are no multiples of 64 bytes, through NumPy and PyPI's xxhash, with equal digests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from radix.backend import native

Pieces: TypeAlias = NDArray[np.uint8]
"""A pool: [planes, blocks, bytes of a piece]."""

_STRIPE_BYTES, _LEAST_BYTES = 64, 256  # as in radix/native/xxh3.hpp


def digests_of(pool: Pieces, blocks: Sequence[int]) -> list[int]:
    """Each block's digest."""
    if native is not None and _is_striped(pool):
        digests: list[int] = native.block_digests(pool, np.array(blocks, dtype=np.uint32)).tolist()
        return digests
    return [_digest(pool[:, block]) for block in blocks]


def copy_blocks(
    into: Pieces, slots: Sequence[int], pool: Pieces, blocks: Sequence[int], *, digest: bool = True
) -> list[int]:
    """Copy blocks into slots of a pool of equal pieces. Returns their digests, or zeros."""
    if native is not None and _is_striped(pool):
        numbers = (np.array(slots, dtype=np.uint32), np.array(blocks, dtype=np.uint32))
        digests: list[int] = native.copy_blocks(into, numbers[0], pool, numbers[1], digest).tolist()
        return digests
    for slot, block in zip(slots, blocks, strict=True):
        into[:, slot] = pool[:, block]
    return digests_of(into, slots) if digest else [0] * len(slots)


def bound(digests: Sequence[int], keys: Sequence[bytes]) -> list[int]:
    """Digests as holders tell them, each bound to its block's key: another block's bytes, whole, are broken, too."""
    halves = np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2)
    told: list[int] = (np.array(digests, dtype=np.uint64) ^ halves[:, 0] ^ halves[:, 1]).tolist()
    return told


def _is_striped(pool: Pieces) -> bool:
    planes, _, piece_bytes = pool.shape
    return bool(piece_bytes % _STRIPE_BYTES == 0 and planes * piece_bytes >= _LEAST_BYTES)


def _digest(pieces: Any) -> int:
    state = xxhash.xxh3_64()
    for piece in pieces:
        state.update(piece)
    return state.intdigest()
