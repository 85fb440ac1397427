"""What vLLM and SGLang servers say about their caches, as values: every release's fields under one set of names."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np

from radix.keys import Tokens

BlockHash: TypeAlias = int | bytes
"""As the server wrote it: an integer from -2**63 to 2**64 - 1, or 1 to 64 bytes."""

ExtraKey: TypeAlias = str | int | float | bytes | tuple[Any, ...] | None
"""What else a block depends on: an adapter's name, a salt, an image as (identifier, offset). Arrays become tuples."""

NO_TOKENS: Tokens = np.empty(0, dtype=np.uint32)
NO_TOKENS.flags.writeable = False


REMOTE = "REMOTE"  # the locality of blocks that another host holds for a server: it would have to fetch them
ODD_KIND = "?"  # a group's kind that cannot be read: not full attention, for all that is known


class ForeignStored(NamedTuple):
    """A chain of blocks is held now.

    `token_ids` may span more than these blocks, or be empty (hybrid models, tiers). Of SGLang's pairs of tokens, which
    it writes where EAGLE drafts, they are the first of each: the tokens of the blocks themselves.
    """

    block_hashes: tuple[BlockHash, ...]
    parent_hash: BlockHash | None = None  # None: the first block begins a prompt, or it was not told
    token_ids: Tokens = NO_TOKENS
    block_size: int = 0  # tokens; 0: not told
    medium: str = "GPU"
    lora_id: int | None = None
    lora_name: str | None = None
    extra_keys: tuple[tuple[ExtraKey, ...] | None, ...] | None = None  # of each block; None: of none
    cache_salt: str | None = None
    group_idx: int | None = None  # the group of a hybrid model's cache; None: not told, which is not group 0
    spec_kind: str | None = None  # full_attention, sliding_window, mamba ...
    sliding_window: int | None = None  # tokens
    locality: str | None = None  # LOCAL or REMOTE, as seen from the server; None: not told
    odd: int = 0  # fields that no key depends on, and that could not be read


class ForeignRemoved(NamedTuple):
    """These blocks are held no longer."""

    block_hashes: tuple[BlockHash, ...]
    medium: str = "GPU"
    group_idx: int | None = None
    locality: str | None = None
    odd: int = 0  # as in a store


class ForeignCleared(NamedTuple):
    """Nothing is held any more."""


class ForeignUnknown(NamedTuple):
    """A kind of event that this release does not know."""

    kind: str


ForeignEvent: TypeAlias = ForeignStored | ForeignRemoved | ForeignCleared | ForeignUnknown


class ForeignBatch(NamedTuple):
    """What happened in one step of a server."""

    ts: float  # wall time of the server, seconds
    events: tuple[ForeignEvent, ...]
    rank: int | None = None  # of the data-parallel replica
