"""A router's view of one worker: proved by digests, healed by snapshots, never another worker's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kv_events.bus import Resync
from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventBatch, UnknownEvent
from kv_events.log import EventLog
from kv_events.view import WorkerView
from radix import make_tree
from radix.digest import EMPTY_DIGEST
from radix.keys import ROOT_HASH, Hashes
from radix.tree import PrefixTree
from tests.support.prefix_trees import BACKENDS, all_of, holdings


def blocks(*hashes: int) -> Hashes:
    return np.array(hashes, dtype=np.uint64)


def store(*hashes: int, parent: int = ROOT_HASH, medium: str = "GPU") -> BlockStored:
    return BlockStored(blocks(*hashes), parent, 16, medium=medium)


class Pair:
    """A worker's log and a router's view of it."""

    def __init__(self, epoch: int = 1, max_blocks: int = 1000, max_blocks_per_worker: int = 1000) -> None:
        self.tree = make_tree(max_blocks, max_blocks_per_worker)
        self.view = WorkerView("w0", 4, self.tree)
        self.log = EventLog("w0", epoch, 16)

    def restart(self) -> None:
        self.log = EventLog("w0", self.log.epoch + 1, 16)

    def step(self, *events: Event) -> Resync:
        return self.view.offer(self.log.append(events, 0.0))

    def check_equal(self) -> None:
        self.tree.check()
        snapshot = self.log.snapshot()
        assert self.view.synced
        assert self.view.digest == snapshot.digest
        assert self.tree.blocks(4).tolist() == sorted(snapshot.block_hashes.tolist())
        assert self.view.position() == (self.log.epoch, self.log.next_seq)


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_a_view_follows_a_log(pair: Pair) -> None:
    """Stores, removals and clears arrive in the tree under the worker's index, and the digests agree."""
    assert not pair.view.synced
    assert pair.view.position() == (0, 0)
    steps = ([store(1, 2, 3)], [BlockRemoved(blocks(2))], [], [AllBlocksCleared(), store(7), store(8, parent=7)])
    for step in steps:
        assert pair.view.offer(pair.log.append(step, 0.0)) is Resync.NONE
        pair.check_equal()
    assert pair.tree.match(blocks(7, 8)).as_dict() == {4: 2}
    assert pair.view.counts.applied == 4


def test_a_missing_batch_asks_for_a_replay(pair: Pair) -> None:
    """Until it has come the view is not in step; one gap is counted once."""
    first, lost, third, fourth = (pair.log.append([store(block)], 0.0) for block in (1, 2, 3, 4))
    pair.view.offer(first)
    assert pair.view.offer(third) is Resync.REPLAY
    assert not pair.view.synced
    assert pair.view.offer(fourth) is Resync.REPLAY
    assert pair.view.counts.gaps == 1
    assert pair.view.offer(lost) is Resync.NONE
    pair.check_equal()
    assert pair.view.offer(lost) is Resync.NONE
    assert pair.view.counts.duplicates == 1


def test_the_lost_end_of_a_stream_is_noticed_by_the_workers_word(pair: Pair) -> None:
    """Once the same position is told again: till then the batches may be under way. Each view asks seldom."""
    assert pair.view.told(1, 9) is Resync.NONE  # nothing is known yet: a snapshot comes in any case
    pair.step(store(1))
    lost = [pair.log.append([store(2)], 0.0), pair.log.append([store(3)], 0.0)]
    said = [pair.view.told(1, pair.log.next_seq) for _ in range(9)]
    replay, none = Resync.REPLAY, Resync.NONE
    assert said == [none, replay, replay, none, replay, none, none, none, replay]
    assert pair.view.counts.gaps == 1
    for batch in lost:
        pair.view.offer(batch)
    pair.check_equal()
    assert [pair.view.told(1, pair.log.next_seq) for _ in range(9)] == 9 * [none]


def test_a_stream_that_goes_on_is_no_lost_end(pair: Pair) -> None:
    """Reports are ahead of their batches, or behind: that is what a network does."""
    for number in range(5):
        pair.step(store(10 + number))
        assert pair.view.told(1, pair.log.next_seq + 1) is Resync.NONE
    assert [pair.view.told(1, 2) for _ in range(3)] == 3 * [Resync.NONE]


def test_a_wrong_or_old_view_at_the_end_of_a_stream_needs_a_snapshot(pair: Pair) -> None:
    """Where the answer to a mismatch got lost, and where a whole new epoch did."""
    pair.step(store(1))
    flipped = pair.log.append([store(2)], 0.0)._replace(events=(store(3),))
    assert pair.view.offer(flipped) is Resync.SNAPSHOT
    assert [pair.view.told(1, 2) for _ in range(2)] == [Resync.NONE, Resync.SNAPSHOT]
    assert [pair.view.told(2, 1) for _ in range(2)] == [Resync.NONE, Resync.SNAPSHOT]


def test_a_wrong_hash_is_noticed_with_its_batch_and_healed(pair: Pair) -> None:
    """A bit that flipped on the way is a mismatch at once, counted once, and gone with the next snapshot."""
    pair.view.offer(pair.log.append([store(1, 2)], 0.0))
    right = pair.log.append([store(3)], 0.0)
    assert pair.view.offer(right._replace(events=(store(3 ^ 64),))) is Resync.SNAPSHOT
    assert not pair.view.synced
    assert pair.view.offer(pair.log.append([store(5)], 0.0)) is Resync.SNAPSHOT
    assert pair.view.counts.mismatches == 1
    assert pair.view.restore(pair.log.snapshot())
    pair.check_equal()
    assert pair.view.counts.resyncs == 1


def test_a_wrong_view_that_becomes_right_is_in_step_again(pair: Pair) -> None:
    """After a clear both sides hold nothing: the digest proves it, and no snapshot is needed."""
    right = pair.log.append([store(3)], 0.0)
    pair.view.offer(right._replace(events=(store(4),)))
    assert pair.view.offer(pair.log.append([AllBlocksCleared(), store(9)], 0.0)) is Resync.NONE
    pair.check_equal()


def test_an_unknown_event_matters_only_if_the_digest_says_so(pair: Pair) -> None:
    """A newer worker's news that changes nothing is passed over; what it changed unseen leads to a snapshot."""
    harmless = pair.log.append([], 0.0)._replace(events=(UnknownEvent("BlockTouched"),))
    assert pair.view.offer(harmless) is Resync.NONE
    unseen = pair.log.append([store(1)], 0.0)._replace(events=(UnknownEvent("BlockStoredV2"),))
    assert pair.view.offer(unseen) is Resync.SNAPSHOT
    assert pair.view.restore(pair.log.snapshot())
    pair.check_equal()


def test_a_restarted_worker_loses_its_old_blocks_at_once(pair: Pair) -> None:
    """Whether its first or a later batch is seen; batches of the old incarnation are counted and ignored."""
    pair.view.offer(pair.log.append([store(1, 2)], 0.0))
    zombie = pair.log.append([store(3)], 0.0)
    pair.restart()
    assert pair.view.offer(pair.log.append([store(9)], 0.0)) is Resync.NONE
    pair.check_equal()
    assert pair.view.offer(zombie) is Resync.SNAPSHOT, "which of the two lives?"
    assert pair.view.restore(pair.log.snapshot())
    assert pair.view.offer(zombie) is Resync.NONE
    assert pair.view.counts.stale == 2
    assert pair.view.counts.resyncs == 0, "the view was right"
    pair.check_equal()
    pair.restart()
    pair.log.append([store(5)], 0.0)
    assert pair.view.offer(pair.log.append([store(6)], 0.0)) is Resync.SNAPSHOT
    assert pair.tree.count(4) == 0
    assert not pair.view.synced
    assert pair.view.restore(pair.log.snapshot())
    pair.check_equal()


def test_a_snapshot_brings_parents_and_joins_with_what_waits(pair: Pair) -> None:
    """The links between blocks survive it, and batches that came ahead are applied on top."""
    steps = ([store(1, 2, 3)], [store(7, parent=2), store(8)], [BlockRemoved(blocks(2))])
    for step in steps:
        pair.log.append(step, 0.0)
    snapshot = pair.log.snapshot()
    later = pair.log.append([store(9)], 0.0)
    assert pair.view.offer(later) is Resync.SNAPSHOT
    assert pair.view.restore(snapshot)
    pair.check_equal()
    assert pair.tree.children(2).tolist() == [3, 7]
    assert pair.tree.children(ROOT_HASH).tolist() == [1, 8, 9]


def test_a_snapshot_that_does_not_verify_is_refused(pair: Pair) -> None:
    """Nothing of it gets into the tree: not a wrong hash, not another's, not an old incarnation's, not the root."""
    pair.view.offer(pair.log.append([store(1, 2)], 0.0))
    right = pair.log.snapshot()
    pair.restart()
    pair.view.offer(pair.log.append([store(3)], 0.0))
    now = pair.log.snapshot()
    bad = [
        right,  # of the old epoch
        replace(now, block_hashes=blocks(3 ^ 1)),
        replace(now, worker="w1"),
        replace(now, block_hashes=blocks(3, 3), parent_hashes=blocks(0, 0)),
        replace(now, block_hashes=blocks(0)),
        replace(now, parent_hashes=blocks()),
        replace(now, epoch=0),
        replace(now, tier_masks=np.array([2], dtype=np.uint8)),
        replace(now, tier_masks=np.array([0], dtype=np.uint8)),
        replace(now, tier_masks=np.array([9], dtype=np.uint8)),
        replace(now, tier_masks=np.array([1, 1], dtype=np.uint8)),
    ]
    for snapshot in bad:
        assert not pair.view.restore(snapshot)
        pair.check_equal()
    assert pair.view.counts.bad_snapshots == len(bad)


def test_a_snapshot_older_than_a_view_in_step_is_not_taken(pair: Pair) -> None:
    """There is nothing to gain from going back."""
    pair.view.offer(pair.log.append([store(1)], 0.0))
    old = pair.log.snapshot()
    pair.view.offer(pair.log.append([store(2)], 0.0))
    assert pair.view.restore(old)
    pair.check_equal()
    assert pair.view.counts.resyncs == 0


def test_a_snapshot_older_than_a_wrong_view_is(pair: Pair) -> None:
    """The view goes back to what is proved, and reads the stream again from there."""
    first = pair.log.append([store(1)], 0.0)
    pair.view.offer(first._replace(events=(store(2),)))
    old = pair.log.snapshot()
    second = pair.log.append([store(3)], 0.0)
    pair.view.offer(second)
    assert pair.view.restore(old)
    assert pair.view.position() == (1, 1)
    assert pair.view.offer(second) is Resync.NONE
    pair.check_equal()


def test_a_damaged_sequence_number_is_healed(pair: Pair) -> None:
    """It opens a gap that no replay can close; one snapshot does, whether it brings news or not."""
    for number in (7, 2**62):
        pair.step(store(number))
        lost = pair.log.append([store(number + 1)], 0.0)
        assert pair.view.offer(lost._replace(seq=number)) is Resync.REPLAY
        assert pair.view.offer(lost) is Resync.REPLAY
        assert not pair.view.synced
        assert pair.view.restore(pair.log.snapshot())
        pair.check_equal()
        assert pair.step(store(number + 2)) is Resync.NONE
        pair.check_equal()
    assert pair.view.counts.resyncs == 0, "the view was right"


@pytest.mark.parametrize("first", [True, False])
def test_a_damaged_epoch_is_healed(pair: Pair, first: bool) -> None:
    """The view hears of a new incarnation and drops the blocks. Whatever comes asks for a snapshot then, and the third
    one that contradicts shows what happened; an incarnation that speaks in between is believed, though."""
    if not first:
        pair.step(store(1))
    pair.view.offer(pair.log.append([store(2)], 0.0)._replace(epoch=2**40))
    assert pair.tree.count(4) == (1 if first else 0)
    assert pair.view.position() == (2**40, 1 if first else 0)
    for _ in range(2):
        assert pair.step(store(3)) is Resync.SNAPSHOT
        assert not pair.view.restore(pair.log.snapshot())
    again = EventBatch("w0", 2**40, 7, (), EMPTY_DIGEST, 0.0)
    assert pair.view.offer(again) is not Resync.NONE
    for _ in range(2):
        assert not pair.view.restore(pair.log.snapshot())
    assert pair.view.counts.bad_snapshots == 4
    assert pair.view.restore(pair.log.snapshot())
    pair.check_equal()
    assert pair.step(store(4)) is Resync.NONE
    pair.check_equal()


@pytest.fixture(params=BACKENDS)
def tree(request: pytest.FixtureRequest) -> PrefixTree:
    """Whichever tree a view is given."""
    made: PrefixTree = request.param()
    return made


def test_a_worker_changes_only_its_own_entries(tree: PrefixTree) -> None:
    """Batches and snapshots in another's name change nothing at all, whatever they say and in whatever order; and what
    a view takes in, snapshots and forgetting included, changes nothing of anybody else."""
    names = ("w0", "w1")
    views = {name: WorkerView(name, index, tree) for index, name in enumerate(names)}
    logs = {name: EventLog(name, 1, 16) for name in names}
    batches = [
        logs[name].append(events, 0.0)
        for events in ([store(1, 2, 3)], [store(4, parent=3, medium="CPU"), BlockRemoved(blocks(2))], [store(9)])
        for name in names
    ]
    for batch in batches:
        views[batch.worker].offer(batch)
    everything = all_of(tree, range(3))

    def check_nothing_changed() -> None:
        tree.check()
        assert all_of(tree, range(3)) == everything
        assert all(view.synced for view in views.values())

    hostile = EventLog("w1", 7, 16)
    for events in ([AllBlocksCleared()], [store(5)], [BlockRemoved(blocks(1, 3))], [store(6, parent=1, medium="DISK")]):
        batch = hostile.append(events, 0.0)
        for seq in (0, 3, batch.seq, 2**40):
            assert views["w0"].offer(batch._replace(seq=seq, epoch=1)) is Resync.NONE
            assert views["w0"].offer(batch._replace(seq=seq)) is Resync.NONE
        check_nothing_changed()
        for epoch in (1, 7):
            assert not views["w0"].restore(replace(hostile.snapshot(), epoch=epoch))
        check_nothing_changed()
    assert views["w0"].counts.stale == 32
    assert views["w0"].counts.bad_snapshots == 8
    assert views["w0"].position() == (1, 3)

    others = {name: rows[1:] for name, rows in parts_of(tree).items()}
    views["w0"].offer(logs["w0"].append([AllBlocksCleared(), store(1), BlockRemoved(blocks(4), "CPU")], 0.0))
    views["w0"].restore(replace(logs["w0"].snapshot(), next_seq=9))
    views["w0"].forget()
    tree.check()
    assert {name: rows[1:] for name, rows in parts_of(tree).items()} == others
    assert tree.count(0) == 0


def parts_of(tree: PrefixTree) -> dict[str, list[object]]:
    """What a tree tells of each worker."""
    everything = all_of(tree, range(3))
    return {what: [everything[what][worker] for worker in range(3)] for what in ("blocks", "digests", "counts")}


def test_a_view_follows_through_the_tiers(pair: Pair) -> None:
    """Blocks that move down and up again are where the worker has them, after batches and after a snapshot."""
    pair.step(store(1, 2, 3))
    pair.step(store(2, 3, parent=1, medium="CPU"), BlockRemoved(blocks(2, 3)), store(3, parent=2, medium="DISK"))
    pair.check_equal()
    right = {1: [(4, 0b001)], 2: [(4, 0b010)], 3: [(4, 0b110)]}
    assert holdings(pair.tree) == ({1: 0, 2: 1, 3: 2}, right)
    assert pair.tree.match(blocks(1, 2, 3)).tier_depths.tolist() == [[1], [3], [3]]
    other = Pair()
    other.log = pair.log
    assert other.view.restore(pair.log.snapshot())
    other.check_equal()
    assert holdings(other.tree) == ({1: 0, 2: 1, 3: 2}, right)
    wrong = pair.log.append([BlockRemoved(blocks(3), "CPU")], 0.0)._replace(events=[BlockRemoved(blocks(3), "DISK")])
    assert pair.view.offer(wrong) is Resync.SNAPSHOT, "the digest covers the tiers"


def test_a_view_that_a_cap_cuts_short_asks_for_nothing_until_there_is_room() -> None:
    """It goes on with what got in, not in step; snapshots would not help before, and one does afterwards."""
    pair = Pair(max_blocks=10)
    assert pair.step(store(*range(1, 9))) is Resync.NONE
    for block in range(20, 30):
        assert pair.step(store(block)) is Resync.NONE
    assert not pair.view.synced
    assert pair.view.truncated
    assert (pair.view.counts.truncated, pair.view.counts.mismatches) == (8, 0)
    assert pair.tree.match(blocks(*range(1, 9))).as_dict() == {4: 8}, "what got in counts"
    assert pair.step(BlockRemoved(blocks(*range(22, 29)))) is Resync.NONE, "none of these were in"
    assert pair.step(BlockRemoved(blocks(1, 2, 3))) is Resync.SNAPSHOT, "a quarter more than the 7 that are left"
    assert pair.view.restore(pair.log.snapshot())
    pair.check_equal()
    assert pair.step(store(40)) is Resync.NONE
    pair.check_equal()


def test_a_snapshot_for_which_there_is_no_room_is_taken_as_far_as_it_goes() -> None:
    """And is not asked for again; batches that follow it are applied, a gap is still replayed."""
    pair = Pair(max_blocks_per_worker=4)
    pair.log.append([store(*range(1, 9))], 0.0)
    assert pair.view.restore(pair.log.snapshot())
    assert not pair.view.synced
    assert pair.tree.blocks(4).tolist() == [1, 2, 3, 4]
    assert pair.step(store(20)) is Resync.NONE
    missing = pair.log.append([BlockRemoved(blocks(8))], 0.0)
    assert pair.step(store(21)) is Resync.REPLAY
    assert pair.view.offer(missing) is Resync.NONE
    assert pair.view.position() == (1, 4)


def test_a_view_that_was_cut_short_is_in_step_as_soon_as_the_digests_agree() -> None:
    """The worker let go of all that was kept out: nothing is missing any more, whatever was refused."""
    pair = Pair(max_blocks=3)
    pair.step(store(1, 2, 3, 4, 5))
    assert not pair.view.synced
    assert pair.step(BlockRemoved(blocks(4, 5))) is Resync.NONE
    pair.check_equal()
    assert not pair.view.truncated
    pair.step(store(6))
    pair.step(AllBlocksCleared(), store(7))
    pair.check_equal()


def test_a_cache_about_as_large_as_its_cap_is_not_read_again_and_again() -> None:
    """Where one block too many is held and others come and go, the room for one is not worth a snapshot."""
    pair = Pair(max_blocks_per_worker=200)
    pair.step(store(*range(1, 202)))
    for block in range(1, 100):
        assert pair.step(BlockRemoved(blocks(block))) is Resync.NONE
        assert pair.step(store(1000 + block)) is Resync.NONE
    assert pair.tree.count(4) == 200
    assert pair.tree.refused(4) == 1


def test_a_worker_that_is_gone_is_forgotten(pair: Pair) -> None:
    """Its blocks leave the tree, and it may come back in whatever epoch."""
    pair.view.offer(pair.log.append([store(1)], 0.0))
    pair.view.forget()
    assert len(pair.tree) == 0
    assert pair.view.position() == (0, 0)
    assert not pair.view.synced
    assert pair.view.restore(pair.log.snapshot())
    pair.check_equal()
