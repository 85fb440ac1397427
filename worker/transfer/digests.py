"""Digests of blocks: XXH3-64 finds what a transfer broke. It is no signature: who may send is the ticket's matter."""

from __future__ import annotations

from typing import Any

import xxhash


def digest_of(*pieces: Any) -> int:
    """The digest of the bytes of these buffers, one after another: 64 bits."""
    if len(pieces) == 1:
        return xxhash.xxh3_64_intdigest(pieces[0])
    state = xxhash.xxh3_64()
    for piece in pieces:
        state.update(piece)
    return state.intdigest()
