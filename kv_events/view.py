"""WorkerView: what a router knows of one worker's cache, kept in step and proved by digests. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from kv_events.bus import Resync
from kv_events.cursor import (
    Apply,
    DropBlocks,
    Duplicate,
    EventCursor,
    Instruction,
    NeedReplay,
    NeedSnapshot,
    StaleEpoch,
)
from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventBatch, Snapshot, UnknownEvent
from radix.digest import digest_of
from radix.keys import Hashes
from radix.tree import PrefixTree


@dataclass(slots=True)
class ViewCounts:
    """Since the view was made."""

    applied: int = 0  # batches
    duplicates: int = 0  # batches
    gaps: int = 0
    stale: int = 0  # batches of an old epoch, or of another worker
    mismatches: int = 0  # times that the digest showed a wrong view
    resyncs: int = 0  # snapshots taken over
    bad_snapshots: int = 0  # snapshots refused


class WorkerView:
    """One worker's part of a shared tree, and its cursor: an EventConsumer.

    After every batch the tree's digest is compared with the worker's own. Where they differ the view goes on with what
    is known, says SNAPSHOT after each batch, and is in step again with a snapshot, or as soon as digests agree.
    """

    def __init__(self, worker_name: str, worker_index: int, tree: PrefixTree) -> None:
        self.worker_name = worker_name
        self.worker_index = worker_index
        self.counts = ViewCounts()
        self._tree = tree
        self._cursor = EventCursor()
        self._verified = False  # the digests agreed when they were compared last
        self._last_gap = (0, -1)

    @property
    def synced(self) -> bool:
        """Whether the view is known to be right as of position()."""
        return self._verified and not self._cursor.has_gap

    @property
    def digest(self) -> bytes:
        """Of the view."""
        return self._tree.digest(self.worker_index)

    def position(self) -> tuple[int, int]:
        """(epoch, next_seq); (0, 0) when nothing is known."""
        return self._cursor.position

    def offer(self, batch: EventBatch) -> Resync:
        """Take a batch; says what is needed now. A batch of another worker is counted and changes nothing."""
        if batch.worker != self.worker_name:
            self.counts.stale += 1
            return self._needed()
        for instruction in self._cursor.offer(batch):
            self._follow(instruction)
        return self._needed()

    def restore(self, snapshot: Snapshot) -> bool:
        """Take over a snapshot; False, and no change, when it is of an old epoch or does not verify."""
        if not self._acceptable(snapshot):
            self.counts.bad_snapshots += 1
            return False
        if self._verified and (snapshot.epoch, snapshot.next_seq) <= self._cursor.position:
            return True  # older than what is known, and that is right
        self._tree.clear(self.worker_index)
        for chain, parent in _chains(snapshot.block_hashes, snapshot.parent_hashes):
            self._tree.store(self.worker_index, chain, parent)
        self._verified = self.digest == snapshot.digest
        self.counts.resyncs += 1
        for joined in self._cursor.restored(snapshot.epoch, snapshot.next_seq):
            self._follow(joined)
        return self._verified

    def forget(self) -> None:
        """The worker is gone: take its blocks out of the tree and start over."""
        self._tree.clear(self.worker_index)
        self._cursor = EventCursor()
        self._verified = False

    def _needed(self) -> Resync:
        epoch, next_seq = self._cursor.position
        if epoch == 0:
            return Resync.NONE
        if self._cursor.has_gap:
            return Resync.REPLAY if next_seq and self._verified else Resync.SNAPSHOT
        return Resync.NONE if self._verified else Resync.SNAPSHOT

    def _follow(self, instruction: Instruction) -> None:
        match instruction:
            case Apply(batch):
                self._apply(batch)
            case Duplicate():
                self.counts.duplicates += 1
            case StaleEpoch():
                self.counts.stale += 1
            case DropBlocks():
                self._tree.clear(self.worker_index)
                self._verified = True  # of a worker that has just started: nothing
            case NeedReplay() | NeedSnapshot():
                gap = self._cursor.position
                self.counts.gaps += gap != self._last_gap
                self._last_gap = gap

    def _apply(self, batch: EventBatch) -> None:
        for event in batch.events:
            self._apply_event(event)
        self.counts.applied += 1
        matches = self.digest == batch.digest
        self.counts.mismatches += self._verified and not matches
        self._verified = matches

    def _apply_event(self, event: Event) -> None:
        match event:
            case BlockStored():
                self._tree.store(self.worker_index, event.block_hashes, event.parent_hash)
            case BlockRemoved():
                self._tree.remove(self.worker_index, event.block_hashes)
            case AllBlocksCleared():
                self._tree.clear(self.worker_index)
            case UnknownEvent():
                pass  # the digest tells whether it mattered

    def _acceptable(self, snapshot: Snapshot) -> bool:
        hashes, parents = snapshot.block_hashes, snapshot.parent_hashes
        return (
            snapshot.worker == self.worker_name
            and snapshot.epoch >= max(1, self._cursor.position[0])
            and len(hashes) == len(parents)
            and bool(hashes.all())  # 0 is the root
            and len(np.unique(hashes)) == len(hashes)
            and digest_of(hashes) == snapshot.digest
        )


def _chains(hashes: Hashes, parents: Hashes) -> Iterator[tuple[Hashes, int]]:
    """A snapshot's blocks as chains, each with the parent of its first block."""
    starts = np.flatnonzero(parents[1:] != hashes[:-1]) + 1
    bounds = [0, *starts.tolist(), len(hashes)] if len(hashes) else [0]
    for start, end in pairwise(bounds):
        yield hashes[start:end], int(parents[start])
