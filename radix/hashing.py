"""Block keys: a keyed hash, chained over the blocks of a prompt.

key(block) = BLAKE2b-128 (RFC 7693), keyed with the salt, over key(previous block) | tokens as little-endian uint32.
The salt holds model, adapter and tenant, so keys of different ones never meet, and nobody without the salt can compute
or steer them. A key names the whole prefix up to and with its block.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from radix.keys import KEY_BYTES, BlockKeys, Tokens, keys_from_bytes

SALT_BYTES = 32
MAX_TOKEN_ID = 2**32 - 1

_ROOT_KEY = bytes(KEY_BYTES)
_NO_HASH = bytes(8)
_FIRST_HASH = (1).to_bytes(8, "little")


def derive_salt(model: str, adapter: str = "", tenant: str = "") -> bytes:
    """The salt (32 bytes) of everything that must not share blocks. `tenant` is the authenticated one."""
    digest = hashlib.blake2b(digest_size=SALT_BYTES, person=b"rhizome salt")
    for part in (model, adapter, tenant):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def as_tokens(tokens: ArrayLike) -> Tokens:
    """Token ids as a 1-D uint32 array. Raises TypeError for other than integers, ValueError for shape or range."""
    array: np.ndarray[Any, np.dtype[Any]] = np.asarray(tokens)
    if array.ndim != 1:
        raise ValueError(f"tokens have the shape {array.shape}: one dimension is needed")
    if array.dtype == np.uint32 or array.size == 0:
        return np.ascontiguousarray(array, dtype=np.uint32)
    if array.dtype.kind not in "iu":
        raise TypeError(f"tokens are {array.dtype}: integers from 0 to {MAX_TOKEN_ID} are needed")
    if array.min() < 0 or array.max() > MAX_TOKEN_ID:
        raise ValueError(f"tokens hold {array.min()} to {array.max()}: 0 to {MAX_TOKEN_ID} are allowed")
    return array.astype(np.uint32)


class BlockHasher:
    """Turns tokens into block keys for one block size and one salt."""

    def __init__(self, block_size: int, salt: bytes) -> None:
        """`block_size` in tokens, at least 1; `salt` from `derive_salt`. Raises ValueError for anything else."""
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}: at least 1 token")
        if len(salt) != SALT_BYTES:
            raise ValueError(f"salt has {len(salt)} bytes: {SALT_BYTES} are needed")
        self.block_size = block_size
        self.salt = bytes(salt)

    def keys(self, tokens: ArrayLike, parent: BlockKeys | None = None) -> BlockKeys:
        """Keys of the full blocks of `tokens`, shape (len(tokens) // block_size, 2); a shorter tail has none.

        `parent` is the key, shape (2,), of the block before `tokens`; None at the start of a prompt. So a growing
        conversation hashes only what is new. Raises TypeError or ValueError for what is not a token or a key.
        """
        step = 4 * self.block_size
        array = as_tokens(tokens)
        full = len(array) // self.block_size * step
        data = memoryview(array.astype("<u4", copy=False).tobytes())
        previous = _ROOT_KEY if parent is None else _key_bytes(parent)
        blake2b, salt = hashlib.blake2b, self.salt
        keys: list[bytes] = []
        for start in range(0, full, step):
            previous = blake2b(previous + data[start : start + step], digest_size=KEY_BYTES, key=salt).digest()
            if previous.startswith(_NO_HASH):  # a block hash of 0 would be the root
                previous = _FIRST_HASH + previous[8:]
            keys.append(previous)
        return keys_from_bytes(b"".join(keys)).astype(np.uint64)


def _key_bytes(key: BlockKeys) -> bytes:
    if not isinstance(key, np.ndarray) or key.dtype != np.uint64:
        raise TypeError(f"parent is {getattr(key, 'dtype', type(key).__name__)}: a uint64 array is needed")
    if key.shape != (2,):
        raise ValueError(f"parent has the shape {key.shape}: one key of shape (2,) is needed")
    return key.astype("<u8", copy=False).tobytes()
