"""WorkerView: what a router knows of one worker's cache, kept in step and proved by digests. No I/O, no clock."""

from __future__ import annotations

from dataclasses import dataclass

from kv_events.bus import Resync
from kv_events.columns import are_distinct, changes_of, changes_to
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
from kv_events.events import EventBatch, Snapshot
from radix.digest import SetDigest
from radix.tree import PrefixTree, Tier

OLD_SNAPSHOTS = 3
"""Snapshots of an older epoch in a row that show that a newer one was misheard."""


@dataclass(slots=True)
class ViewCounts:
    """Since the view was made."""

    applied: int = 0  # batches
    duplicates: int = 0  # batches
    gaps: int = 0
    stale: int = 0  # batches of an old epoch, or of another worker
    mismatches: int = 0  # times that the digest showed a wrong view
    truncated: int = 0  # batches after which a cap kept the view from being right
    resyncs: int = 0  # snapshots taken over
    bad_snapshots: int = 0  # snapshots refused
    malformed: int = 0  # batches or snapshots that could not be read


class WorkerView:
    """One worker's part of a shared tree, and its cursor: an EventConsumer.

    After every batch the tree's digest is compared with the worker's own. Where they differ the view goes on with what
    is known, says SNAPSHOT after each batch, and is in step again with a snapshot, or as soon as digests agree.

    A batch of a new epoch drops the blocks of the former one at once. Had the epoch been damaged on the way, all that
    the worker says would be taken for old. So, until a snapshot of the new epoch has come, old batches lead to
    SNAPSHOT; where OLD_SNAPSHOTS of an older epoch come in a row, with no batch of the new one between, that one is
    right.

    Where a cap of the tree keeps blocks of the worker out, the digests cannot agree, and a snapshot would not help: the
    view goes on with what got in, not in step, and says SNAPSHOT once there is room for a good part of the rest.
    """

    def __init__(self, worker_name: str, worker_index: int, tree: PrefixTree) -> None:
        self.worker_name = worker_name
        self.worker_index = worker_index
        self.counts = ViewCounts()
        self._tree = tree
        self._cursor = EventCursor()
        self._verified = False  # the digests agreed when they were compared last
        self._epoch_seen = False  # a snapshot of the cursor's epoch has come
        self._old_snapshots = 0  # since a batch of the cursor's epoch has come
        self._last_gap = (0, -1)
        self._told = (0, 0)  # how far the worker itself said that it was,
        self._told_again = 0  # and how often again

    @property
    def synced(self) -> bool:
        """Whether the view is known to be right as of position()."""
        return self._verified and not self._cursor.has_gap

    @property
    def truncated(self) -> bool:
        """Whether a cap of the tree keeps the view from being right."""
        return not self._verified and self._tree.refused(self.worker_index) > 0

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
        if self._cursor.advance(batch):
            self._apply(batch)
            self._old_snapshots = 0
            return Resync.NONE if self._verified else self._needed()
        for instruction in self._cursor.offer(batch):
            self._follow(instruction)
        if batch.epoch < self._cursor.position[0]:
            return self._needed() if self._epoch_seen else Resync.SNAPSHOT
        self._old_snapshots = 0
        return self._needed()

    def told(self, epoch: int, next_seq: int) -> Resync:
        """The worker reports its own position; says what is needed now.

        A lost batch is noticed with the next one, and the last of a stream has none. So where two reports in a row tell
        the same position, and it was not reached between them, what is missing is not under way any more. Should the
        answer not help, it is said again after twice as many further reports each time.
        """
        before, self._told = self._told, (epoch, next_seq)
        self._told_again = self._told_again + 1 if self._told == before else 0
        position = self._cursor.position
        if self._told_again.bit_count() != 1 or position == (0, 0) or position > self._told:
            return Resync.NONE
        if position == self._told:
            return self._needed()
        if position != self._last_gap:
            self.counts.gaps += 1
            self._last_gap = position
        return Resync.REPLAY if position[0] == epoch and self._verified else Resync.SNAPSHOT

    def restore(self, snapshot: Snapshot) -> bool:
        """Take over a snapshot, as far as there is room; False, and no change, when it is of an old epoch or does not
        verify."""
        if not self._acceptable(snapshot) or not self._is_of_today(snapshot.epoch):
            self.counts.bad_snapshots += 1
            return False
        self._epoch_seen, self._old_snapshots = True, 0
        if self._verified and (snapshot.epoch, snapshot.next_seq) <= self._cursor.position:
            self._cursor.restored(*self._cursor.position)  # nothing joins on: it would have been applied
            return True  # older than what is known, and that is right
        self._tree.clear(self.worker_index)
        self._tree.apply(self.worker_index, changes_to(snapshot))
        self._verified = self.digest == snapshot.digest
        self.counts.resyncs += 1
        for joined in self._cursor.restored(snapshot.epoch, snapshot.next_seq):
            self._follow(joined)
        return self._verified or self.truncated

    def malformed(self) -> None:
        """Count something that came and was neither a batch nor a snapshot."""
        self.counts.malformed += 1

    def forget(self) -> None:
        """The worker is gone: take its blocks out of the tree and start over."""
        self._tree.clear(self.worker_index)
        self._cursor = EventCursor()
        self._verified = self._epoch_seen = False
        self._old_snapshots = 0
        self._told, self._told_again = (0, 0), 0

    def _needed(self) -> Resync:
        if self._verified and not self._cursor.has_gap:
            return Resync.NONE
        epoch, next_seq = self._cursor.position
        if epoch == 0:
            return Resync.NONE
        truncated = self.truncated
        if self._cursor.has_gap:
            return Resync.REPLAY if next_seq and (self._verified or truncated) else Resync.SNAPSHOT
        return Resync.NONE if truncated and not self._has_room() else Resync.SNAPSHOT

    def _has_room(self) -> bool:
        """Whether a snapshot is worth its cost to a view that was cut short: where all that was refused would fit, or
        a quarter more than is held (refusals add up, though what was refused may be gone). Room for a 64th has to be
        there in any case: a cache about as large as its cap would be read again and again for a few blocks."""
        room, held = self._tree.room(self.worker_index), self._tree.count(self.worker_index)
        return room > held // 64 and room >= min(self._tree.refused(self.worker_index), held // 4 + 1)

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
                self._epoch_seen = False
            case NeedReplay() | NeedSnapshot():
                gap = self._cursor.position
                self.counts.gaps += gap != self._last_gap
                self._last_gap = gap

    def _apply(self, batch: EventBatch) -> None:
        self._tree.apply(self.worker_index, changes_of(batch.events))
        self.counts.applied += 1
        was_verified, self._verified = self._verified, self._tree.digest(self.worker_index) == batch.digest
        if not self._verified:
            truncated = self.truncated
            self.counts.truncated += truncated
            self.counts.mismatches += was_verified and not truncated

    def _is_of_today(self, epoch: int) -> bool:
        """Whether a snapshot that verifies may be taken over, by its epoch."""
        if epoch >= self._cursor.position[0]:
            return True
        self._old_snapshots += 1
        if self._old_snapshots < OLD_SNAPSHOTS:
            return False
        self._cursor = EventCursor()  # what it had heard of was no epoch of the worker's
        return True

    def _acceptable(self, snapshot: Snapshot) -> bool:
        hashes, parents, masks = snapshot.block_hashes, snapshot.parent_hashes, snapshot.tier_masks
        return (
            snapshot.worker == self.worker_name
            and snapshot.epoch >= 1
            and len(hashes) == len(parents)
            and bool(hashes.all())  # 0 is the root
            and are_distinct(hashes)
            and (masks is None or (len(masks) == len(hashes) and bool(((masks > 0) & (masks < 1 << len(Tier))).all())))
            and _digest_of(snapshot) == snapshot.digest
        )


def _digest_of(snapshot: Snapshot) -> bytes:
    digest = SetDigest()
    for tier in Tier:
        digest.add(snapshot.block_hashes[snapshot.held_in(tier)], tier)
    return digest.value
