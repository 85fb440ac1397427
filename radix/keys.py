"""The shapes in which block keys travel, and nothing else.

A block key is 128 bits: a keyed hash of a block's tokens and of the key before it, so it names the whole prefix.
Engines and transfers compare whole keys. Events, tree and digests use the low 64 bits, the *block hash*: what vLLM
and SGLang put on the wire. Two keys that share their low half may misroute a request, never mix contents.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

BlockKeys: TypeAlias = NDArray[np.uint64]
"""Shape (blocks, 2), C-contiguous: column 0 the low half, column 1 the high half; 16 bytes a block."""

Hashes: TypeAlias = NDArray[np.uint64]
"""Shape (blocks,), C-contiguous: the low halves."""

Tokens: TypeAlias = NDArray[np.uint32]
"""Shape (tokens,)."""

KEY_BYTES = 16
ROOT_HASH = 0
"""The parent of a first block. No block has this hash."""


def hashes_of(keys: BlockKeys) -> Hashes:
    """The block hashes of keys: a contiguous copy, shape (blocks,)."""
    return np.ascontiguousarray(keys[:, 0])


def keys_from_bytes(data: bytes) -> BlockKeys:
    """Keys from their wire form, 16 little-endian bytes each. Raises ValueError for a torn length."""
    if len(data) % KEY_BYTES:
        raise ValueError(f"block keys are {KEY_BYTES} bytes each, not {len(data)} in all")
    return np.frombuffer(data, dtype="<u8").reshape(-1, 2)


def check_hashes(field: str, hashes: Hashes) -> None:
    """Raise TypeError unless `hashes` is a 1-D uint64 array: lists are not taken, converting them costs too much."""
    if not isinstance(hashes, np.ndarray) or hashes.dtype != np.uint64 or hashes.ndim != 1:
        shown = f"{hashes.dtype} {hashes.shape}" if isinstance(hashes, np.ndarray) else type(hashes).__name__
        raise TypeError(f"{field} is {shown}: a one-dimensional array of uint64 is needed")
