"""What a worker says about its cache: frozen values. The arrays in them are not to be written to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from radix.keys import Hashes, Tokens


@dataclass(frozen=True, slots=True, eq=False)
class BlockStored:
    """A chain of blocks, the first of which follows `parent_hash` (0: it is a prompt's first block), is held now."""

    block_hashes: Hashes
    parent_hash: int
    block_size: int  # tokens
    token_ids: Tokens | None = None  # only where the worker is set to tell them
    medium: str = "GPU"


@dataclass(frozen=True, slots=True, eq=False)
class BlockRemoved:
    """These blocks are held no longer."""

    block_hashes: Hashes
    medium: str = "GPU"


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """Nothing is held any more."""


@dataclass(frozen=True, slots=True)
class UnknownEvent:
    """A kind of event that this release does not know; the batch's digest tells whether it mattered."""

    kind: str


Event: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared | UnknownEvent


@dataclass(frozen=True, slots=True, eq=False)
class EventBatch:
    """What happened in one step of a worker.

    `epoch` (at least 1) grows with each start of the worker; `seq` counts its batches from 0 in each epoch; `digest` is
    radix.digest of the worker's whole set after this batch.
    """

    worker: str
    epoch: int
    seq: int
    events: tuple[Event, ...]
    digest: bytes
    ts: float  # wall time in seconds, for display only


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Every block that a worker holds, parents before children where both are held."""

    worker: str
    epoch: int
    next_seq: int  # the first batch that is not in it
    digest: bytes
    block_size: int  # tokens
    block_hashes: Hashes
    parent_hashes: Hashes  # (blocks,); 0 at the root
