"""The cursor: batches in any order become instructions in the right one."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from kv_events import wire
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
from kv_events.events import BlockRemoved, BlockStored, EventBatch
from radix.digest import EMPTY_DIGEST


def batch(seq: int, epoch: int = 1) -> EventBatch:
    return EventBatch("w0", epoch, seq, (), EMPTY_DIGEST, 0.0)


def applied(instructions: tuple[Instruction, ...]) -> list[int]:
    return [instruction.batch.seq for instruction in instructions if isinstance(instruction, Apply)]


def at(epoch: int, next_seq: int, max_waiting: int = 256) -> EventCursor:
    cursor = EventCursor(max_waiting)
    cursor.restored(epoch, next_seq)
    return cursor


def test_a_stream_from_the_start_applies_as_it_comes() -> None:
    """The first batch of an epoch needs no snapshot: a worker starts with nothing."""
    cursor = EventCursor()
    assert cursor.position == (0, 0)
    dropped, first = cursor.offer(batch(0))
    assert dropped == DropBlocks(1)
    assert applied((first,)) == [0]
    assert applied(cursor.offer(batch(1))) == [1]
    assert cursor.position == (1, 2)


def test_a_batch_that_was_applied_is_a_duplicate() -> None:
    """And changes nothing."""
    cursor = at(1, 5)
    assert cursor.offer(batch(4)) == (Duplicate(),)
    assert cursor.position == (1, 5)


def test_a_gap_is_asked_for_until_it_is_closed_and_what_waits_joins_on() -> None:
    """Each batch ahead of the gap asks again, as an answer may have been lost; the missing ones release all."""
    cursor = at(1, 5)
    assert cursor.offer(batch(7)) == (NeedReplay(1, 5),)
    assert cursor.offer(batch(8)) == (NeedReplay(1, 5),)
    assert cursor.offer(batch(7)) == (Duplicate(), NeedReplay(1, 5))
    assert cursor.has_gap
    assert applied(cursor.offer(batch(5))) == [5]
    assert cursor.position == (1, 6)
    assert applied(cursor.offer(batch(6))) == [6, 7, 8]
    assert not cursor.has_gap


def test_what_waits_is_bounded() -> None:
    """Past the bound batches are let go, and come again with the replay."""
    cursor = at(1, 5, max_waiting=2)
    for seq in (7, 8, 9, 10):
        assert cursor.offer(batch(seq)) == (NeedReplay(1, 5),)
    assert applied(cursor.offer(batch(5))) == [5]
    assert applied(cursor.offer(batch(6))) == [6, 7, 8]
    assert applied(cursor.offer(batch(9))) == [9]


@pytest.mark.parametrize("decoded", [False, True])
def test_what_waits_is_bounded_by_its_size_too(decoded: bool) -> None:
    """Past it large batches are let go; the cursor knows of the gap until they have come again."""
    blocks = np.arange(1, 101, dtype=np.uint64)
    events = (BlockStored(blocks, 0, 16, np.arange(1_600, dtype=np.uint32)), BlockRemoved(blocks))

    def large(seq: int) -> EventBatch:
        whole = EventBatch("w0", 1, seq, events, EMPTY_DIGEST, 0.0)
        return wire.decode(wire.encode(whole)) if decoded else whole

    cursor = EventCursor(max_weight=500)
    cursor.restored(1, 5)
    assert cursor.offer(large(7)) == (NeedReplay(1, 5),)
    assert cursor.has_gap
    assert applied(cursor.offer(batch(5))) == [5]
    assert not cursor.advance(batch(6)), "a batch that was let go is still missing"
    assert applied(cursor.offer(batch(6))) == [6]
    assert cursor.has_gap
    assert applied(cursor.offer(large(7))) == [7]
    assert not cursor.has_gap
    cursor = EventCursor(max_weight=10_000)
    cursor.restored(1, 0)
    for seq in range(1, 40):
        cursor.offer(large(seq))
    joined = applied(cursor.offer(batch(0)))
    assert 3 <= len(joined) < 15
    assert cursor.has_gap
    for seq in range(len(joined), 40):
        cursor.offer(large(seq))
    assert not cursor.has_gap
    for seq in range(41, 44):  # what has left takes no room any more
        cursor.offer(large(seq))
    assert applied(cursor.offer(large(40))) == [40, 41, 42, 43]


def test_a_snapshot_forgets_what_was_let_go() -> None:
    """Its number may have been damaged on the way."""
    cursor = at(1, 3, max_waiting=0)
    cursor.offer(batch(2**40))
    assert cursor.has_gap
    assert cursor.restored(1, 3) == ()
    assert not cursor.has_gap


def test_a_new_epoch_drops_the_old_blocks_at_once() -> None:
    """From its first batch on it applies; from a later one, only a snapshot helps. What waited of the old is gone."""
    cursor = at(1, 5)
    cursor.offer(batch(9))
    instructions = cursor.offer(batch(0, epoch=2))
    assert instructions[0] == DropBlocks(2)
    assert applied(instructions) == [0]
    assert cursor.position == (2, 1)
    assert not cursor.has_gap
    assert cursor.offer(batch(3, epoch=3)) == (DropBlocks(3), NeedSnapshot())
    assert cursor.position == (3, 0)
    assert cursor.offer(batch(4, epoch=3)) == (NeedSnapshot(),)
    assert applied(cursor.restored(3, 4)) == [4]
    assert cursor.position == (3, 5)


def test_an_old_epoch_never_applies() -> None:
    """Whatever its number."""
    cursor = at(4, 5)
    for seq in (0, 5, 6):
        assert cursor.offer(batch(seq, epoch=3)) == (StaleEpoch(),)
    assert cursor.position == (4, 5)


def test_a_snapshot_may_be_older_than_the_position() -> None:
    """Then the stream is read again from there."""
    cursor = at(1, 9)
    assert cursor.restored(1, 6) == ()
    assert cursor.position == (1, 6)
    assert cursor.offer(batch(9)) == (NeedReplay(1, 6),)


def test_what_waits_beyond_a_further_gap_is_let_go_at_a_snapshot() -> None:
    """It comes again; a number that was damaged on the way would keep the gap open for ever."""
    cursor = at(1, 3)
    for seq in (7, 8, 2**40):
        cursor.offer(batch(seq))
    assert applied(cursor.restored(1, 7)) == [7, 8]
    assert cursor.position == (1, 9)
    assert not cursor.has_gap


def test_a_snapshot_of_a_new_epoch_forgets_what_waits() -> None:
    """Batches of the old epoch do not join on."""
    cursor = at(1, 3)
    cursor.offer(batch(5))
    assert cursor.restored(2, 5) == ()
    assert not cursor.has_gap


def test_advancing_is_for_the_next_batch_alone() -> None:
    """It moves the position as offering does; any other batch, and any while others wait, has to be offered."""
    cursor = at(1, 5)
    assert cursor.advance(batch(5))
    assert cursor.position == (1, 6)
    for other in (batch(5), batch(7), batch(6, epoch=2), batch(6, epoch=0)):
        assert not cursor.advance(other)
    cursor.offer(batch(7))
    assert not cursor.advance(batch(6))
    assert applied(cursor.offer(batch(6))) == [6, 7]
    assert not EventCursor().advance(batch(0)), "the first batch of an epoch drops the blocks of the one before"


@settings(deadline=None)
@given(st.integers(1, 30), st.randoms(use_true_random=False), st.integers(0, 8), st.booleans())
def test_any_order_with_duplicates_applies_each_batch_once_in_order(
    count: int, shuffler: random.Random, max_waiting: int, advancing: bool
) -> None:
    """Answering each NeedReplay, sooner or later, gives 0, 1, 2, ... exactly once, with the short way or without."""
    cursor = at(1, 0, max_waiting)
    seen: list[int] = []
    schedule = [*range(count), *shuffler.choices(range(count), k=count)]
    shuffler.shuffle(schedule)
    for seq in schedule:
        if advancing and cursor.advance(batch(seq)):
            seen.append(seq)
        else:
            seen += applied(cursor.offer(batch(seq)))
        if shuffler.random() < 0.2:
            for missing in range(cursor.position[1], seq):
                seen += applied(cursor.offer(batch(missing)))
    for missing in range(count):
        seen += applied(cursor.offer(batch(missing)))
    assert seen == list(range(count))
    assert cursor.position == (1, count)
    assert not cursor.has_gap
