"""Block keys: a keyed hash, chained over the blocks of a prompt.

key(block) = SipHash-2-4 with 128 bits of output (Aumasson, Bernstein: SipHash: a fast short-input PRF, INDOCRYPT 2012)
over the block's tokens, as little-endian uint32, and then the key of the block before. So a key names the whole prefix
up to and with its block. The SipHash key is BLAKE2b (RFC 7693), under the fleet's secret, of salt and block size; the
salt holds model, adapter and tenant. Keys of different ones never meet.

Why this hash: every request is hashed whole, and clients choose what is hashed. So it must be fast on 80 bytes, keyed,
and 128 bits wide, which SipHash was made for. Its best published cryptanalysis (Dobraunig, Mendel, Schläffer, SAC 2014)
does not come near 2-4 rounds; OpenSSL has it as a MAC, and it or its form of 1-3 rounds guards the hash tables of
Linux, Python and Rust. XXH3 and the like are faster, and whoever chooses their input can steer them.

What somebody who chooses prompts can do. With a secret: not tell or aim a key; of q blocks that he has had hashed two
share their low halves with a chance of q^2 / 2^65. Without one the SipHash key follows from public names, and then
SipHash promises nothing about collisions: 2^32 trials at his own desk give two blocks of one low half, as with any hash
of 64 bits. Either way a collision can only misroute: the tree then takes one block for another, while engines compare
tokens before they reuse a block (worker.prefix_cache), and take keys from nobody but the router (rhizome.ticket).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from radix import siphash
from radix.backend import native
from radix.keys import BlockKeys, Tokens

SALT_BYTES = 32
MAX_TOKEN_ID = 2**32 - 1
MAX_BLOCK_SIZE = 2**32 - 1  # tokens


def derive_salt(model: str, adapter: str = "", tenant: str = "") -> bytes:
    """The salt (32 bytes) of everything that must not share blocks. `tenant` is the authenticated one.

    It is a name, not a secret: it travels with requests.
    """
    digest = hashlib.blake2b(digest_size=SALT_BYTES, person=b"rhizome salt")
    for part in (model, adapter, tenant):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def as_tokens(tokens: ArrayLike) -> Tokens:
    """Token ids as a 1-D uint32 array. Raises TypeError for other than integers, ValueError for shape or range."""
    plain: Tokens | None = None if native is None else native.as_tokens(tokens)
    if plain is not None:
        return plain
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


_block_keys: Callable[..., BlockKeys] = (native or siphash).block_keys


class BlockHasher:
    """Turns tokens into block keys for one block size, one salt and one fleet."""

    def __init__(self, block_size: int, salt: bytes, secret: bytes = b"") -> None:
        """`block_size` in tokens, `salt` from `derive_salt`, `secret` the fleet's. Raises ValueError for what is none.

        Without a secret keys are made from public names: see above for what that means.
        """
        if not 1 <= block_size <= MAX_BLOCK_SIZE:
            raise ValueError(f"block_size is {block_size}: at least 1 token, at most {MAX_BLOCK_SIZE}")
        if len(salt) != SALT_BYTES:
            raise ValueError(f"salt has {len(salt)} bytes: {SALT_BYTES} are needed")
        self.block_size = block_size
        self.salt = bytes(salt)
        if len(secret) > hashlib.blake2b.MAX_KEY_SIZE:
            secret = hashlib.blake2b(secret).digest()
        data = self.salt + block_size.to_bytes(4, "little")
        key = hashlib.blake2b(data, key=secret, digest_size=16, person=b"rhizome blocks").digest()
        self._key_low, self._key_high = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")

    def keys(self, tokens: ArrayLike, parent: BlockKeys | None = None) -> BlockKeys:
        """Keys of the full blocks of `tokens`, shape (len(tokens) // block_size, 2); a shorter tail has none.

        `parent` is the key, shape (2,), of the block before `tokens`; None at the start of a prompt. So a growing
        conversation hashes only what is new. Raises TypeError or ValueError for what is not a token or a key.
        """
        plain = None if native is None else native.as_tokens(tokens)
        if plain is None:
            plain = as_tokens(tokens)
        return _block_keys(plain, self.block_size, self._key_low, self._key_high, parent)
