"""What a mapper of foreign events counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class MapCounts:
    """Since the mapper was made. Events, but for those that say blocks."""

    stored: int = 0  # foreign blocks, each time that one came to be held in a tier
    repeated: int = 0  # foreign blocks that were stored and were held already
    removed: int = 0  # foreign blocks, each time that one ceased to be held in a tier
    cleared: int = 0
    unknown: int = 0  # of a kind that this release does not know
    odd: int = 0  # fields of events that could not be read, and that no key depends on
    # Stores that were not mapped, by reason.
    other_groups: int = 0  # of a group whose attention is not full
    remote: int = 0  # of blocks that are not on the server itself
    misfits: int = 0  # tokens that are not those of the blocks (hybrid models)
    conflicts: int = 0  # a hash that was told with another parent, adapter or salt
    refused: int = 0  # no room
    # Blocks that are not mapped now, or were not at first.
    orphans: int = 0  # foreign blocks whose parents were not known
    adopted: int = 0  # of these, mapped since
    dropped: int = 0  # blocks that waited for parents or tokens, given up for newer ones
    untold: int = 0  # foreign blocks stored without tokens that were not known
    marked: int = 0  # foreign blocks that depend on images or the like: mapped to keys that no plain prompt has
    shared: int = 0  # further foreign blocks that complete a block of ours
