"""The content of a full block, whichever tier holds it. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence

from radix.hashing import as_tokens


class CachedBlock:
    """The content of one full block: its key, its tokens as `pack` makes them, and what comes before (None: nothing).

    The content of an evicted block lives on in what follows it: that was computed after it and after nothing else.
    """

    __slots__ = ("block_hash", "key", "parent", "tokens")

    def __init__(self, key: bytes, tokens: bytes, parent: CachedBlock | None) -> None:
        self.key = key
        self.tokens = tokens
        self.parent = parent
        self.block_hash = int.from_bytes(key[:8], "little")


def pack(tokens: Sequence[int]) -> bytes:
    """Tokens in 4 bytes each."""
    return as_tokens(tokens).tobytes()


def hash_of(key: bytes) -> int:
    """The block hash: the low 64 bits of a key."""
    return int.from_bytes(key[:8], "little")


def same_prefix(one: CachedBlock | None, other: CachedBlock | None) -> bool:
    """Whether both end the same prefix. Takes one step where both have one parent object."""
    while one is not other:
        if one is None or other is None or one.key != other.key or one.tokens != other.tokens:
            return False
        one, other = one.parent, other.parent
    return True
