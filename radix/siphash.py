"""Block keys in plain Python: SipHash-2-4 with 128 bits of output, chained over blocks.

The readable form of radix/native/siphash.hpp: its oracle, and what runs where nothing is compiled. One round function
serves whole columns of blocks (NumPy) and the chain (Python's ints).
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from radix.keys import KEY_BYTES, BlockKeys, Tokens

Word: TypeAlias = Any
"""An int below 2^64, or a column of them: the arithmetic is the same."""

State: TypeAlias = tuple[Word, Word, Word, Word]

_MASK = 2**64 - 1


def siphash128(message: bytes, key_low: int, key_high: int) -> bytes:
    """SipHash-2-4 with 16 bytes of output, as its authors published it."""
    padded = message + bytes(-(len(message) + 1) % 8) + bytes([len(message) % 256])
    state = _initial(key_low, key_high)
    for at in range(0, len(padded), 8):
        state = _absorb(state, int.from_bytes(padded[at : at + 8], "little"))
    low, high = _finish(state)
    return low.to_bytes(8, "little") + high.to_bytes(8, "little")


def block_keys(
    tokens: Tokens, block_size: int, key_low: int, key_high: int, parent: BlockKeys | None = None
) -> BlockKeys:
    """Keys of the full blocks of `tokens`, shape (len(tokens) // block_size, 2).

    A key is SipHash-2-4-128, under (`key_low`, `key_high`), of the block's tokens as little-endian uint32, padded with
    zeros to 8 bytes, and then the key before. `parent`, shape (2,), is the key before the first block; None stands for
    16 zero bytes. A low half of 0 becomes 1: a block hash of 0 is the root's. Raises TypeError for what is no array of
    tokens or keys, ValueError for a wrong shape or block size.
    """
    _check_array("tokens", tokens, np.uint32)
    before = _key(parent)
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}: at least 1 token")
    blocks = len(tokens) // block_size
    if not blocks:
        return np.empty((0, 2), np.uint64)
    words = -(-block_size // 2)
    padded = np.zeros((blocks, 2 * words), "<u4")
    padded[:, :block_size] = tokens[: blocks * block_size].reshape(blocks, block_size)
    columns = padded.view("<u8").astype(np.uint64)
    length_word = (8 * words + KEY_BYTES) % 256 << 56

    v0, v1, v2, v3 = (np.full(blocks, v, np.uint64) for v in _initial(key_low, key_high))
    for word in range(words):
        v0, v1, v2, v3 = _absorb((v0, v1, v2, v3), columns[:, word])
    keys = np.empty((blocks, 2), np.uint64)
    for block, state in enumerate(zip(v0.tolist(), v1.tolist(), v2.tolist(), v3.tolist(), strict=True)):
        for each in (*before, length_word):
            state = _absorb(state, each)
        low, high = _finish(state)
        keys[block] = before = (low or 1, high)
    return keys


def _initial(key_low: int, key_high: int) -> State:
    return (
        key_low ^ 0x736F6D6570736575,
        key_high ^ 0x646F72616E646F6D ^ 0xEE,
        key_low ^ 0x6C7967656E657261,
        key_high ^ 0x7465646279746573,
    )


def _absorb(state: State, word: Word) -> State:
    v0, v1, v2, v3 = state
    v0, v1, v2, v3 = _rounds(2, v0, v1, v2, v3 ^ word)
    return v0 ^ word, v1, v2, v3


def _finish(state: State) -> tuple[int, int]:
    v0, v1, v2, v3 = state
    v0, v1, v2, v3 = _rounds(4, v0, v1, v2 ^ 0xEE, v3)
    low = v0 ^ v1 ^ v2 ^ v3
    v0, v1, v2, v3 = _rounds(4, v0, v1 ^ 0xDD, v2, v3)
    return low, v0 ^ v1 ^ v2 ^ v3


def _rounds(count: int, v0: Word, v1: Word, v2: Word, v3: Word) -> State:
    for _ in range(count):
        v0 = (v0 + v1) & _MASK
        v1 = (v1 << 13 & _MASK | v1 >> 51) ^ v0
        v0 = v0 << 32 & _MASK | v0 >> 32
        v2 = (v2 + v3) & _MASK
        v3 = (v3 << 16 & _MASK | v3 >> 48) ^ v2
        v0 = (v0 + v3) & _MASK
        v3 = (v3 << 21 & _MASK | v3 >> 43) ^ v0
        v2 = (v2 + v1) & _MASK
        v1 = (v1 << 17 & _MASK | v1 >> 47) ^ v2
        v2 = v2 << 32 & _MASK | v2 >> 32
    return v0, v1, v2, v3


def _key(parent: BlockKeys | None) -> tuple[int, int]:
    if parent is None:
        return 0, 0
    _check_array("parent", parent, np.uint64)
    if len(parent) != 2:
        raise ValueError(f"parent has the shape {parent.shape}: one key of shape (2,) is needed")
    return int(parent[0]), int(parent[1])


def _check_array(field: str, array: object, dtype: type[np.unsignedinteger]) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 1:
        shown = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise TypeError(f"{field} is {shown}: a one-dimensional array of {np.dtype(dtype).name} is needed")
