"""ForeignStream: numbered batches in any order become a log. Each rule by itself; for all of them together see
tests/simulation/test_foreign_convergence.py."""

from __future__ import annotations

import numpy as np
import pytest

from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored
from kv_events.foreign.events import ForeignBatch, ForeignCleared, ForeignRemoved, ForeignStored
from kv_events.foreign.mapper import IdentityMapper, KeyMapper
from kv_events.foreign.stream import (
    MAX_FRUITLESS,
    MAX_UNANSWERED,
    MAX_WAITING,
    OVERLAP,
    RECENT,
    ForeignStream,
    Offered,
)
from kv_events.view import WorkerView
from radix import make_tree

MALFORMED = b"\xc1"


class Server:
    """A process: batch number n, at time n (and when the process was started), stores block n + 1 of it."""

    def __init__(self, start: float = 0.0, first_block: int = 1) -> None:
        self.start = start
        self.first_block = first_block

    def batch(self, seq: int) -> ForeignBatch:
        block = self.first_block + seq
        tokens = np.array([block], dtype=np.uint32)
        return ForeignBatch(self.start + seq, (ForeignStored((block,), None, tokens, 1),))

    def offer(self, stream: ForeignStream, *seqs: int) -> None:
        for seq in seqs:
            stream.offer(seq, self.batch(seq))

    def answer(self, stream: ForeignStream, *seqs: int, answered: bool = True) -> int:
        """A replay as it is needed, answered with these; returns from where it was asked for."""
        assert stream.needs_replay
        asked = stream.begin_replay()
        for seq in seqs:
            stream.replayed(seq, self.batch(seq))
        stream.end_replay(answered)
        return asked


OLD, NEW = Server(), Server(start=1000.0, first_block=101)


def held(stream: ForeignStream) -> set[int]:
    return set(stream.log.snapshot().block_hashes.tolist())


def joined(*seqs: int, server: Server = OLD) -> ForeignStream:
    """A stream that got these in a first replay."""
    stream = ForeignStream("w", IdentityMapper(), 7)
    stream.connected()
    server.answer(stream, *seqs)
    return stream


def test_a_stream_asks_for_all_that_is_kept_and_applies_what_comes() -> None:
    """What arrives before the answer waits for it."""
    stream = ForeignStream("w", IdentityMapper(), 7)
    stream.connected()
    assert stream.needs_replay
    assert not stream.in_step
    OLD.offer(stream, 3)
    assert OLD.answer(stream, 0, 1, 2) == 0
    OLD.offer(stream, 4)
    assert stream.in_step
    assert not stream.needs_replay
    assert held(stream) == {1, 2, 3, 4, 5}
    assert (stream.log.epoch, stream.log.next_seq, stream.next_seq) == (7, 5, 5)
    assert (stream.counts.lost, stream.counts.forgotten, stream.counts.applied) == (0, 0, 5)


def test_a_server_that_has_said_nothing_yet_is_joined_at_once() -> None:
    """Its first batch will be number 0; one that comes without it shows a gap."""
    stream = joined()
    assert stream.in_step
    OLD.offer(stream, 1)
    assert OLD.answer(stream, 0, 1) == 0
    assert held(stream) == {1, 2}


def test_a_stream_that_joins_late_goes_on_with_what_is_kept() -> None:
    """What the server let go before is lost, and counted."""
    stream = joined(5, 6)
    assert held(stream) == {6, 7}
    assert (stream.counts.lost, stream.counts.forgotten) == (5, 0)


def test_duplicates_change_nothing() -> None:
    """Applied or waiting ones."""
    stream = joined(0, 1)
    OLD.offer(stream, 0, 1, 3, 3)
    assert stream.counts.duplicates == 3
    assert stream.counts.restarts == 0
    assert held(stream) == {1, 2}


def test_a_gap_is_asked_for_from_one_before_and_what_waits_joins_on() -> None:
    """The overlap proves that it is the same process that answers."""
    stream = joined(0, 1)
    OLD.offer(stream, 4, 3)
    assert OLD.answer(stream, 1, 2) == 1
    assert stream.in_step
    assert held(stream) == {1, 2, 3, 4, 5}
    assert (stream.counts.gaps, stream.counts.lost, stream.counts.forgotten) == (1, 0, 0)


def test_what_a_replay_brings_beyond_the_gap_is_applied_too() -> None:
    """However little waited, as what waits is bounded."""
    stream = joined(0)
    OLD.offer(stream, *range(2, 3 + 2 * MAX_WAITING))
    assert len(stream._waiting) == MAX_WAITING
    OLD.answer(stream, *range(3 + 2 * MAX_WAITING))
    assert stream.next_seq == 3 + 2 * MAX_WAITING
    assert stream.in_step


def test_a_hole_in_a_replay_is_asked_for_again() -> None:
    """A ROUTER drops what its queue does not hold."""
    stream = joined(0)
    OLD.offer(stream, 5)
    OLD.answer(stream, 0, 1, 3, 4)
    assert OLD.answer(stream, 1, 2, 3, 4, 5) == 1
    assert stream.in_step
    assert len(held(stream)) == 6


def test_a_gap_that_the_server_keeps_no_more_makes_what_is_held_unknown() -> None:
    """All is forgotten, for removals were missed; what hashes mean is not."""
    mapper = KeyMapper("m", 1)
    stream = ForeignStream("w", mapper, 7)
    OLD.answer(stream, 0, 1)
    OLD.offer(stream, 9)
    child = ForeignStored((50,), 1, np.array([50], dtype=np.uint32), 1)
    stream.begin_replay()
    stream.replayed(7, ForeignBatch(7.0, (child,)))
    stream.replayed(8, OLD.batch(8))
    stream.end_replay(answered=True)
    assert stream.in_step
    assert len(stream.log) == 3
    assert mapper.counts.orphans == 0
    assert (stream.counts.lost, stream.counts.forgotten, stream.log.epoch) == (5, 1, 7)


def test_a_gap_that_no_replay_fills_is_given_up() -> None:
    """After so many that were asked for in vain."""
    stream = joined(0, 1)
    OLD.offer(stream, 4)
    for attempt in range(MAX_FRUITLESS):
        assert stream.needs_replay, attempt
        OLD.answer(stream, 1)
    assert stream.in_step
    assert held(stream) == {5}
    assert (stream.counts.lost, stream.counts.forgotten) == (2, 1)


def test_a_replay_that_does_not_end_is_asked_for_again() -> None:
    """What it brought is used."""
    stream = joined(0)
    OLD.offer(stream, 4)
    OLD.answer(stream, 0, 1, 2, answered=False)
    assert OLD.answer(stream, 2, 3) == 2
    assert held(stream) == {1, 2, 3, 4, 5}
    assert stream.counts.unanswered == 0


def test_a_server_without_a_replay_socket_is_followed_as_well_as_can_be() -> None:
    """From the first batch that is heard; a gap makes what is held unknown at once."""
    stream = ForeignStream("w", IdentityMapper(), 7)
    OLD.offer(stream, 4)
    for _ in range(MAX_UNANSWERED):
        OLD.answer(stream, answered=False)
    assert not stream.needs_replay
    OLD.offer(stream, 5, 6)
    assert held(stream) == {5, 6, 7}
    OLD.offer(stream, 8)
    assert held(stream) == {9}
    assert not stream.needs_replay
    assert (stream.counts.lost, stream.counts.forgotten, stream.counts.unanswered) == (5, 1, 3)
    stream.connected()
    assert stream.needs_replay  # another process may have one


def test_after_a_new_connection_a_server_without_a_replay_socket_is_not_trusted() -> None:
    """Batches may have been missed, or it may be another process: nothing is claimed but what comes."""
    stream = ForeignStream("w", IdentityMapper(), 7)
    for _ in range(MAX_UNANSWERED):
        OLD.answer(stream, answered=False)
    OLD.offer(stream, 0, 1)
    stream.connected()
    for _ in range(MAX_UNANSWERED):
        NEW.answer(stream, answered=False)
    NEW.offer(stream, 2)
    assert held(stream) == {103}


# Restarts.


def test_a_number_that_comes_again_at_a_later_time_is_of_a_new_process() -> None:
    """Its batches so far are asked for; the former log is closed, and its successor has a larger epoch."""
    stream = joined(0, 1, 2)
    former = stream.log
    NEW.offer(stream, 1)
    assert former.closed
    assert (stream.log.epoch, stream.counts.restarts) == (8, 1)
    assert NEW.answer(stream, 0, 1) == 0
    assert held(stream) == {101, 102}
    OLD.offer(stream, 2, 3, 2)  # on their way for long
    assert held(stream) == {101, 102}


def test_a_number_of_long_ago_at_a_later_time_is_of_a_new_process() -> None:
    """Also one that is not remembered: nothing that was applied is that new."""
    stream = joined(*range(RECENT + 5))
    Server(start=5000.0).offer(stream, 0)
    assert stream.counts.restarts == 1
    OLD.offer(stream, 0)
    assert stream.counts.restarts == 1


def test_a_new_process_that_is_ahead_is_told_by_the_overlap() -> None:
    """The first that is heard of it looks like a gap."""
    stream = joined(0, 1, 2)
    NEW.offer(stream, 7)
    NEW.answer(stream, 2, 3, 4)
    assert stream.counts.restarts == 1
    assert NEW.answer(stream, *range(8)) == 0
    assert held(stream) == set(range(101, 109))


def test_a_new_process_that_goes_on_where_the_former_one_ended_is_told_at_its_connection() -> None:
    """Its batch looks like the next one. Some of its batches may come before the news of the connection."""
    stream = joined(*range(20))
    NEW.offer(stream, *range(20, 18 + OVERLAP))
    stream.connected()
    asked = NEW.answer(stream, *range(18, 18 + OVERLAP))
    assert asked == 18
    assert stream.counts.restarts == 1
    NEW.answer(stream, *range(18 + OVERLAP))
    assert held(stream) == set(range(101, 119 + OVERLAP))


def test_a_new_process_whose_clock_is_behind_is_told_by_the_overlap() -> None:
    """Its time says nothing then."""
    behind = Server(start=-500.0, first_block=201)
    stream = joined(0, 1, 2)
    behind.offer(stream, 1)
    assert not stream.in_step
    behind.answer(stream, 0, 1)
    behind.answer(stream, 0, 1)
    behind.offer(stream, 2)
    assert held(stream) == {201, 202, 203}


def test_a_server_that_has_not_come_as_far_as_it_was_is_a_new_process() -> None:
    """Nothing at all, or less than was applied."""
    for answers in ([], [0]):
        stream = joined(*range(OVERLAP))
        stream.connected()
        NEW.answer(stream, *answers)
        NEW.answer(stream, *answers)
        assert stream.counts.restarts == 1
        assert stream.in_step
        assert held(stream) == {101 + seq for seq in answers}


def test_a_new_connection_to_the_same_process_changes_nothing() -> None:
    """What was missed meanwhile comes with the replay; what comes meanwhile waits for it."""
    stream = joined(*range(20))
    stream.connected()
    OLD.offer(stream, 22)
    assert len(held(stream)) == 20
    OLD.answer(stream, *range(20 - OVERLAP, 23))
    assert stream.in_step
    assert len(held(stream)) == 23
    assert (stream.counts.restarts, stream.counts.forgotten, stream.log.epoch) == (0, 0, 7)


def test_a_new_connection_soon_after_a_late_join_changes_nothing_either() -> None:
    """No more is compared than is known."""
    stream = joined(50, 51)
    stream.connected()
    assert OLD.answer(stream, 50, 51, 52) == 50
    assert held(stream) == {51, 52, 53}
    assert stream.counts.forgotten == 0


def test_a_connection_after_which_nothing_shows_it_to_be_the_same_process_is_not_trusted() -> None:
    """The server keeps but its latest batches: they may be another process's."""
    stream = joined(*range(20))
    stream.connected()
    OLD.answer(stream, 19, 20)
    assert held(stream) == {21}
    assert stream.counts.forgotten == 1


def test_a_replay_that_was_under_way_when_the_connection_was_made_anew_counts_no_more() -> None:
    """Its answers are the former connection's."""
    stream = joined(0)
    OLD.offer(stream, 5)
    stream.begin_replay()
    stream.connected()
    stream.replayed(1, OLD.batch(1))
    stream.end_replay(answered=True)
    assert stream.next_seq == 1
    assert NEW.answer(stream, 0) == 0
    assert stream.counts.restarts == 1


def test_what_waited_before_a_new_connection_counts_no_more() -> None:
    """It is of the former process, or comes again."""
    stream = ForeignStream("w", IdentityMapper(), 7)
    OLD.offer(stream, 0)
    stream.connected()
    for _ in range(MAX_UNANSWERED):
        NEW.answer(stream, answered=False)
    NEW.offer(stream, 1)
    assert held(stream) == {102}


def test_what_the_new_process_does_not_keep_is_not_taken_from_the_former_one() -> None:
    """Its late batch has the number of one that the new process let go."""
    stream = joined()
    stream.connected()
    OLD.offer(stream, 0)
    NEW.answer(stream, 1, 2)
    assert held(stream) == {102, 103}


def test_what_waited_of_the_former_process_goes_once_the_new_one_is_known() -> None:
    """By its time."""
    stream = joined(0, 1)
    OLD.offer(stream, 5)
    NEW.answer(stream, 1, 2)
    NEW.answer(stream, 0, 1, 2)
    assert stream.in_step
    assert held(stream) == {101, 102, 103}


def test_where_no_replay_tells_a_late_batch_makes_all_unknown() -> None:
    """It may be of a former process, or of a new one whose clock is behind: neither's blocks are claimed."""
    stream = ForeignStream("w", IdentityMapper(), 7)
    for _ in range(MAX_UNANSWERED):
        NEW.answer(stream, answered=False)
    NEW.offer(stream, 0, 1, 2)
    OLD.offer(stream, 1)
    assert held(stream) == set()
    NEW.offer(stream, 3)
    assert held(stream) == {104}


def test_batches_that_wait_in_two_times_are_of_two_processes() -> None:
    """A later number at an earlier time: the former process's go."""
    stream = joined()
    OLD.offer(stream, 5, 6)
    NEW.offer(stream, 2)
    assert stream.counts.restarts == 1
    NEW.answer(stream, 0, 1, 2)
    assert held(stream) == {101, 102, 103}
    assert stream.in_step


# What cannot be read.


@pytest.mark.parametrize("payload", [MALFORMED, b"", b"\x93" * 1000])
def test_a_malformed_batch_is_asked_for_again(payload: bytes) -> None:
    """It was damaged on its way."""
    stream = joined(0)
    stream.offer(1, payload)
    assert (stream.counts.malformed, stream.counts.gaps) == (1, 1)
    assert stream.last_problem
    OLD.answer(stream, 0, 1)
    assert stream.in_step
    assert held(stream) == {1, 2}


def test_a_batch_that_stays_malformed_is_given_up() -> None:
    """What it said is not known, so nothing is; what follows is taken as ever."""
    stream = joined(0)
    stream.offer(1, MALFORMED)
    OLD.offer(stream, 2)
    stream.begin_replay()
    stream.replayed(0, OLD.batch(0))
    stream.replayed(1, MALFORMED)
    stream.replayed(2, OLD.batch(2))
    stream.end_replay(answered=True)
    assert stream.in_step
    assert held(stream) == {3}
    assert (stream.counts.malformed, stream.counts.forgotten, stream.counts.lost) == (2, 1, 1)


def test_a_malformed_batch_of_long_ago_changes_nothing() -> None:
    """Its number was applied."""
    stream = joined(0, 1)
    stream.offer(0, MALFORMED)
    assert stream.in_step


@pytest.mark.parametrize("seq", [2**64 - 1, 10**6])
def test_a_made_up_number_does_not_stop_the_stream(seq: int) -> None:
    """It shows a gap that cannot be filled; the numbers that follow show a new process, and all is asked for again."""
    stream = joined(0, 1)
    offered: Offered = ForeignBatch(1.5, ())
    stream.offer(seq, offered)
    for _ in range(MAX_FRUITLESS):
        OLD.answer(stream, 1)
    OLD.offer(stream, 2)
    while stream.needs_replay:
        OLD.answer(stream, *range(3))
    assert stream.next_seq == 3
    assert held(stream) == {1, 2, 3}


# The log.


def test_views_follow_the_log_over_gaps_and_restarts() -> None:
    """As they follow our own workers' logs."""
    stream = joined(0, 1)
    view = WorkerView("w", 0, make_tree())
    for batch in stream.log.since(0):
        view.offer(batch)
    OLD.offer(stream, 4)
    for _ in range(MAX_FRUITLESS):
        OLD.answer(stream, 1)
    for batch in stream.log.since(2):
        view.offer(batch)
    assert view.synced
    assert view.digest == stream.log.digest
    NEW.offer(stream, 0)
    NEW.answer(stream, 0)
    for batch in stream.log.since(0):
        view.offer(batch)
    assert view.synced
    assert view.digest == stream.log.digest


def test_batches_that_change_nothing_are_not_logged() -> None:
    """A hybrid model's other groups would else push out what is kept for replays."""
    stream = joined(0)
    stream.offer(1, ForeignBatch(1.0, (ForeignStored((9,), spec_kind="mamba"), ForeignRemoved((), "GPU"))))
    assert stream.next_seq == 2
    assert stream.log.next_seq == 1


def test_removals_that_follow_each_other_are_one_event() -> None:
    """vLLM tells of each evicted block by itself; those of another tier, and what comes between, stay apart."""
    stream = joined(0, 1, 2)
    gone = tuple(ForeignRemoved((block,)) for block in (3, 2, 1))
    on_host = ForeignRemoved((9,), "CPU")
    stream.offer(3, ForeignBatch(3.0, (*gone, on_host, *OLD.batch(3).events, *gone[:1], ForeignCleared())))
    (batch,) = stream.log.since(3)
    assert [type(event) for event in batch.events] == [
        BlockRemoved,
        BlockRemoved,
        BlockStored,
        BlockRemoved,
        AllBlocksCleared,
    ]
    assert isinstance(batch.events[0], BlockRemoved)
    assert batch.events[0].block_hashes.tolist() == [3, 2, 1]


def test_the_log_has_the_mappers_block_size() -> None:
    """Which an IdentityMapper learns from the server."""
    stream = joined()
    assert stream.log.block_size == 1
    stream.offer(0, ForeignBatch(0.0, (ForeignStored((9,), None, np.zeros(32, np.uint32), 32),)))
    assert stream.log.snapshot().block_size == 32
    assert ForeignStream("w", KeyMapper("m", 16), 1).log.block_size == 16


def test_the_end_closes_the_log() -> None:
    """So that its readers end."""
    stream = joined(0)
    stream.close()
    assert stream.log.closed
