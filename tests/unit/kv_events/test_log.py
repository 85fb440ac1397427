"""The worker's log: set semantics, the ring, snapshots, signals, threads."""

from __future__ import annotations

import random
import threading

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from kv_events import wire
from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, Snapshot, UnknownEvent, tier_of
from kv_events.log import MAX_KEPT_WEIGHT, EventLog
from radix.digest import EMPTY_DIGEST, SetDigest, digest_of
from radix.keys import ROOT_HASH, Hashes
from radix.tree import Tier
from rhizome.errors import Conflict, Trimmed


def blocks(*hashes: int) -> Hashes:
    return np.array(hashes, dtype=np.uint64)


def store(*hashes: int, parent: int = ROOT_HASH, medium: str = "GPU") -> BlockStored:
    return BlockStored(blocks(*hashes), parent, 16, medium=medium)


def remove(*hashes: int, medium: str = "GPU") -> BlockRemoved:
    return BlockRemoved(blocks(*hashes), medium)


def new_log(capacity: int = 100) -> EventLog:
    return EventLog("w0", 1, 16, capacity)


MEDIUMS = st.sampled_from(["GPU", "GPU", "CPU", "DISK"])
EVENTS = st.one_of(
    # Ascending, so that no two blocks descend from each other: hashing cannot do that.
    st.builds(
        lambda hashes, medium: store(*sorted(hashes), medium=medium), st.lists(st.integers(1, 12), max_size=4), MEDIUMS
    ),
    st.builds(lambda hashes, medium: remove(*hashes, medium=medium), st.lists(st.integers(1, 12), max_size=4), MEDIUMS),
    st.just(AllBlocksCleared()),
)


@settings(deadline=None)
@given(st.lists(st.lists(EVENTS, max_size=4), max_size=15))
def test_the_log_is_a_set_with_a_digest(steps: list[list[Event]]) -> None:
    """Of blocks in tiers: stores of what is held and removals of what is not change nothing; a clear empties all; each
    batch has its digest."""
    log, held = new_log(), set[tuple[int, int]]()
    for seq, events in enumerate(steps):
        for event in events:
            match event:
                case BlockStored():
                    held |= {(block, tier_of(event.medium)) for block in event.block_hashes.tolist()}
                case BlockRemoved():
                    held -= {(block, tier_of(event.medium)) for block in event.block_hashes.tolist()}
                case _:
                    held.clear()
        batch = log.append(events, float(seq))
        assert (batch.worker, batch.epoch, batch.seq, batch.ts) == ("w0", 1, seq, float(seq))
        assert batch.events == tuple(events), "nothing is filtered"
        assert batch.digest == log.digest == digest_in_tiers(held)
        assert len(log) == len({block for block, _ in held})
    assert log.next_seq == len(steps)
    assert [batch.seq for batch in log.since(0)] == list(range(len(steps)))
    check_snapshot(log.snapshot(), held)


def digest_in_tiers(held: set[tuple[int, int]]) -> bytes:
    digest = SetDigest()
    for tier in Tier:
        digest.add(blocks(*(block for block, its in held if its == tier)), tier)
    return digest.value


def check_snapshot(snapshot: Snapshot, held: set[tuple[int, int]]) -> None:
    hashes, parents = snapshot.block_hashes.tolist(), snapshot.parent_hashes.tolist()
    assert len(set(hashes)) == len(hashes)
    assert {(block, tier) for tier in Tier for block in snapshot.block_hashes[snapshot.held_in(tier)].tolist()} == held
    assert (snapshot.tier_masks is None) == all(tier == Tier.DEVICE for _, tier in held)
    assert snapshot.digest == digest_in_tiers(held)
    for position, parent in enumerate(parents):
        assert parent not in hashes[position + 1 :], "parents come first"


def test_parents_come_first_even_where_they_were_stored_again_later() -> None:
    """A snapshot is ordered by descent, not by age, and keeps each block's parent."""
    log = new_log()
    log.append([store(1, 2, 3, 4), store(5, parent=2), remove(2), remove(1), store(1, 2)], 0.0)
    snapshot = log.snapshot()
    check_snapshot(snapshot, {(block, Tier.DEVICE) for block in (1, 2, 3, 4, 5)})
    parents = dict(zip(snapshot.block_hashes.tolist(), snapshot.parent_hashes.tolist(), strict=True))
    assert parents == {1: 0, 2: 1, 3: 2, 4: 3, 5: 2}
    assert (snapshot.worker, snapshot.epoch, snapshot.next_seq, snapshot.block_size) == ("w0", 1, 1, 16)


def test_a_block_is_held_as_long_as_it_is_in_any_tier() -> None:
    """And a snapshot says in which, with its parent, whichever way it got there."""
    log = new_log()
    log.append([store(1, 2, 3), store(2, 3, parent=1, medium="CPU_PINNED"), store(3, parent=2, medium="STORAGE")], 0.0)
    log.append([remove(2, 3), remove(1, medium="CPU")], 0.0)
    snapshot = log.snapshot()
    assert snapshot.tier_masks is not None
    assert dict(zip(snapshot.block_hashes.tolist(), snapshot.tier_masks.tolist(), strict=True)) == {1: 1, 2: 2, 3: 6}
    assert dict(zip(snapshot.block_hashes.tolist(), snapshot.parent_hashes.tolist(), strict=True)) == {1: 0, 2: 1, 3: 2}
    assert len(log) == 3
    log.append([remove(1, 2, 3), remove(2, 3, medium="HOST"), remove(3, medium="DISK")], 0.0)
    assert (len(log), log.digest) == (0, EMPTY_DIGEST)


def test_blocks_that_claim_each_other_as_parent_do_not_hang_a_snapshot() -> None:
    """A loop of parents cannot come from hashing; it must not stop the worker either."""
    log = new_log()
    log.append([store(1, parent=2), store(2, parent=1), store(3, parent=3)], 0.0)
    assert sorted(log.snapshot().block_hashes.tolist()) == [1, 2, 3]


def test_an_empty_log_has_an_empty_snapshot() -> None:
    """Of the right types."""
    snapshot = new_log().snapshot()
    assert snapshot.block_hashes.dtype == snapshot.parent_hashes.dtype == np.uint64
    assert len(snapshot.block_hashes) == 0
    assert snapshot.digest == EMPTY_DIGEST


def test_only_the_last_batches_are_kept() -> None:
    """Older ones are Trimmed, the next one is empty, and a position past it is a Conflict."""
    log = new_log(capacity=3)
    for block in range(1, 6):
        log.append([store(block)], 0.0)
    assert [batch.seq for batch in log.since(2)] == [2, 3, 4]
    assert [entry.batch.seq for entry in log.read(3, 1)] == [3]
    assert log.since(5) == []
    with pytest.raises(Trimmed, match="kept from 2 on, 1 was asked for"):
        log.since(1)
    with pytest.raises(Conflict, match="next event is 5, 6"):
        log.since(6)


def test_what_is_kept_is_bounded_in_blocks_too() -> None:
    """A ring of large batches holds fewer of them."""
    log = new_log(capacity=1000)
    chunk = np.arange(1, wire.MAX_HASHES_PER_EVENT + 1, dtype=np.uint64)
    appended = 3 * MAX_KEPT_WEIGHT // len(chunk)
    for _ in range(appended):
        log.append([BlockRemoved(chunk)], 0.0)
    kept = log.since(appended - MAX_KEPT_WEIGHT // len(chunk))
    assert len(kept) * len(chunk) == MAX_KEPT_WEIGHT
    with pytest.raises(Trimmed):
        log.since(appended - len(kept) - 1)


def test_a_batch_too_large_to_be_sent_sends_followers_to_the_snapshot() -> None:
    """It counts in set and digest, and everything up to it is trimmed."""
    log = new_log()
    log.append([store(1)], 0.0)
    log.append([BlockStored(np.arange(2, wire.MAX_HASHES_PER_EVENT + 3, dtype=np.uint64), 1, 16)], 0.0)
    log.append([store(7)], 0.0)
    assert len(log) == wire.MAX_HASHES_PER_EVENT + 2
    assert [batch.seq for batch in log.since(2)] == [2]
    with pytest.raises(Trimmed):
        log.since(1)
    assert log.snapshot().digest == log.digest


def test_a_payload_is_encoded_once() -> None:
    """All subscribers share the same bytes."""
    log = new_log()
    log.append([store(1, 2)], 0.0)
    [entry], [again] = log.read(0, 10), log.read(0, 10)
    assert entry.payload is again.payload
    assert wire.decode(entry.payload).digest == log.digest


def test_callbacks_are_called_and_a_raising_one_is_dropped() -> None:
    """One subscriber's trouble neither reaches the engine nor other subscribers."""
    log = new_log()
    calls: list[str] = []

    def broken() -> None:
        calls.append("broken")
        raise RuntimeError("loop is closed")

    def working() -> None:
        calls.append("working")
        assert log.digest, "the lock is not held"

    log.subscribe(broken)
    log.subscribe(working)
    log.append([store(1)], 0.0)
    log.append([store(2)], 0.0)
    assert calls == ["broken", "working", "working"]
    log.unsubscribe(working)
    log.unsubscribe(working)
    log.append([store(3)], 0.0)
    assert len(calls) == 3
    assert log.subscribers == 0


def test_bad_events_are_refused_whole() -> None:
    """Nothing is logged when one event of a step is no event."""
    log = new_log()
    bad: list[tuple[object, type[Exception]]] = [
        (BlockStored([1], 0, 16), TypeError),
        (BlockRemoved(np.array([1])), TypeError),
        (store(1, 0), ValueError),
        (store(1, parent=2**64), ValueError),
        (UnknownEvent("x"), TypeError),
        ("BlockStored", TypeError),
    ]
    for event, error in bad:
        with pytest.raises(error):
            log.append([store(5), event], 0.0)
    assert (len(log), log.next_seq, log.digest) == (0, 0, EMPTY_DIGEST)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("", 1, 16, 1), "worker is ''"),
        (("w" * 257, 1, 16, 1), "1 to 256 bytes"),
        (("w", 0, 16, 1), "epoch is 0: 1 to"),
        (("w", 1, 0, 1), "block_size is 0: 1 to"),
        (("w", 1, 16, 0), "capacity is 0: at least 1"),
    ],
)
def test_a_log_without_a_name_epoch_or_size_is_refused(arguments: tuple[str, int, int, int], text: str) -> None:
    """The error names field, value and limit."""
    with pytest.raises(ValueError, match=text):
        EventLog(*arguments)


def test_another_epoch_is_a_conflict() -> None:
    """0 takes any."""
    log = EventLog("w0", 7, 16)
    log.check_epoch(0)
    log.check_epoch(7)
    with pytest.raises(Conflict, match="this is epoch 7, 6"):
        log.check_epoch(6)


def test_readers_in_other_threads_see_whole_batches() -> None:
    """While the engine appends, snapshots verify against their digest and batches come in order."""
    log = new_log(capacity=64)
    done = threading.Event()
    failures: list[str] = []

    def read() -> None:
        while not done.is_set():
            snapshot = log.snapshot()
            if digest_of(snapshot.block_hashes) != snapshot.digest:
                failures.append("a snapshot does not verify")
            try:
                seqs = [batch.seq for batch in log.since(snapshot.next_seq)]
            except Trimmed:
                continue
            if seqs != list(range(snapshot.next_seq, snapshot.next_seq + len(seqs))):
                failures.append(f"batches {seqs} after {snapshot.next_seq}")

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    shuffler = random.Random(1)
    for _ in range(2_000):
        log.append([store(shuffler.randrange(1, 200)), remove(shuffler.randrange(1, 200))], 0.0)
    done.set()
    for reader in readers:
        reader.join()
    assert not failures
