"""What a worker says about its cache: frozen values. The arrays in them are not to be written to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from radix.keys import Hashes, Tokens
from radix.tree import Tier

_TIERS = {
    "GPU": Tier.DEVICE,
    "CPU": Tier.HOST,
    "CPU_PINNED": Tier.HOST,
    "CPU_TIER1": Tier.HOST,
    "HOST": Tier.HOST,
}


def tier_of(medium: str) -> Tier:
    """The tier of an event's medium, by the names that vLLM, SGLang and Dynamo use.

    A name that is not known counts as disk: no block is taken for nearer than it is.
    """
    return _TIERS.get(medium, Tier.DISK)


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


class EventBatch(NamedTuple):
    """What happened in one step of a worker. (A named tuple is made in a third of the time that a frozen class takes.)

    `epoch` (at least 1) grows with each start of the worker; `seq` counts its batches from 0 in each epoch; `digest` is
    radix.digest of the worker's whole set after this batch, every block in its tiers.
    """

    worker: str
    epoch: int
    seq: int
    events: Sequence[Event]  # not to be written to
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
    tier_masks: NDArray[np.uint8] | None = None  # (blocks,): bit t where held in Tier t; None: all on the device alone

    def held_in(self, tier: Tier) -> NDArray[np.bool_]:
        """(blocks,): which are held in a tier."""
        if self.tier_masks is None:
            return np.full(len(self.block_hashes), tier == Tier.DEVICE)
        held: NDArray[np.bool_] = (self.tier_masks & (1 << tier)) != 0
        return held
