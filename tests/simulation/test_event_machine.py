"""One worker's log, a hostile channel, and a router's view in a tree: any sequence of moves that hypothesis finds.

Written beside event_schedules.py, whose moves are drawn from seeds: hypothesis shrinks what fails to the fewest moves,
and prints them, with a blob for @reproduce_failure.

What the digest sees of a damaged batch: every wrong, missing or further block, in every tier, and so every wrong hash,
medium or kind of event that makes a difference to what is held. What it does not see, and what changes nothing of that:
the parent of a block, its tokens, the block size, the time; a wrong hash in the removal of a block that was not held,
if the wrong one is not held either. All of the first is noticed with the very batch; this is asserted here for bits of
hashes. Damaged numbers, names and epochs are in the seeded schedules, where less can be asserted of them at once.
"""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kv_events import wire
from kv_events.bus import Resync
from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventBatch, Snapshot
from kv_events.view import WorkerView
from radix.keys import ROOT_HASH
from radix.tree import PrefixTree
from rhizome.errors import Trimmed
from tests.simulation.event_schedules import Held, Incarnation, held_in
from tests.support.prefix_trees import BACKENDS, blocks

WORKER = 3  # its number in the tree
OTHER = 5  # somebody else there, whom nothing may touch
MOST_UNDER_WAY = 12

MEDIUMS = st.sampled_from(["GPU", "GPU", "CPU", "DISK"])
CHAINS = st.tuples(st.integers(0, 1), st.integers(0, 5), st.integers(1, 4)).map(
    lambda chosen: [1 + 16 * chosen[0] + depth for depth in range(chosen[1], chosen[1] + chosen[2])]
)
EVENTS = st.one_of(
    st.builds(
        lambda chain, medium: BlockStored(
            blocks(*chain), ROOT_HASH if chain[0] % 16 == 1 else chain[0] - 1, 16, medium=medium
        ),
        CHAINS,
        MEDIUMS,
    ),
    st.builds(lambda chain, medium: BlockRemoved(blocks(*chain), medium), CHAINS, MEDIUMS),
    st.just(AllBlocksCleared()),
)
STEPS = st.lists(EVENTS, max_size=3)
WHICH = st.integers(0, 10_000)  # of those that there are


class Recovery(RuleBasedStateMachine):
    """See the module. Channels carry what is under way; a rule that finds nothing there does nothing."""

    backend: type[PrefixTree]

    @initialize(capacity=st.sampled_from([1, 2, 5, 50]), others=CHAINS)
    def start(self, capacity: int, others: list[int]) -> None:
        self.capacity = capacity
        self.tree = self.backend()
        self.tree.store(OTHER, blocks(*others))
        self.others = held_in(self.tree, OTHER)
        self.view = WorkerView("w", WORKER, self.tree)
        self.incarnations: list[Incarnation] = []
        self.truth: dict[tuple[int, int], Held] = {}  # at (epoch, next_seq)
        self.batches: list[bytes] = []
        self.requests: list[Resync] = []
        self.snapshots: list[Snapshot] = []
        self.restart()

    @property
    def now(self) -> Incarnation:
        return self.incarnations[-1]

    # What workers do.

    @rule()
    def restart(self) -> None:
        self.incarnations.append(Incarnation("w", len(self.incarnations) + 1, self.capacity))
        self.truth[len(self.incarnations), 0] = {}

    @rule(events=STEPS)
    def append(self, events: list[Event]) -> None:
        self.say(self.now, events)

    @rule(which=WHICH, events=STEPS)
    def append_as_a_zombie(self, which: int, events: list[Event]) -> None:
        self.say(self.incarnations[which % len(self.incarnations)], events)

    def say(self, incarnation: Incarnation, events: list[Event]) -> None:
        batch = incarnation.append(events)
        self.truth[batch.epoch, batch.seq + 1] = incarnation.held.copy()
        self.batches.append(wire.encode(batch))

    # What the network does.

    @rule(which=WHICH)
    def lose(self, which: int) -> None:
        if self.batches:
            self.batches.pop(which % len(self.batches))

    @rule(which=WHICH)
    def duplicate(self, which: int) -> None:
        if 0 < len(self.batches) < MOST_UNDER_WAY:
            self.batches.append(self.batches[which % len(self.batches)])

    @rule(which=WHICH)
    def deliver_out_of_order(self, which: int) -> None:
        if self.batches:
            self.offer(wire.decode(self.batches.pop(which % len(self.batches))))

    @rule(count=st.integers(1, 4))
    def deliver(self, count: int) -> None:
        for payload in self.batches[:count]:
            self.offer(wire.decode(payload))
        del self.batches[:count]

    @rule(bit=st.integers(6, 63), at=WHICH)
    def deliver_with_a_wrong_bit(self, bit: int, at: int) -> None:
        """The next batch, with one bit of a hash wrong: whatever it comes to, it is noticed with the batch."""
        if not self.batches:
            return
        batch = wire.decode(self.batches.pop(0))
        wrong = with_a_wrong_bit(batch, at, bit)
        in_step = self.view.synced and self.view.position() == (batch.epoch, batch.seq)
        before = self.view.counts.mismatches
        needed = self.offer(wrong)
        if in_step and self.held() != self.truth[batch.epoch, batch.seq + 1]:
            assert needed is Resync.SNAPSHOT
            assert not self.view.synced
            assert self.view.counts.mismatches == before + 1

    def offer(self, batch: EventBatch) -> Resync:
        needed = self.view.offer(batch)
        if needed is not Resync.NONE:
            self.requests.append(needed)
            del self.requests[:-MOST_UNDER_WAY]
        return needed

    # Requests and answers.

    @rule(which=WHICH)
    def answer(self, which: int) -> None:
        """The oldest request arrives, at the worker or at what is left of an older one."""
        if self.requests:
            self.answer_by(self.incarnations[-1 - which % min(2, len(self.incarnations))])

    def answer_by(self, incarnation: Incarnation) -> None:
        epoch, next_seq = self.view.position()
        log = incarnation.log
        request = self.requests.pop(0)
        try:
            if request is Resync.REPLAY and epoch == log.epoch and next_seq <= log.next_seq:
                self.batches += [wire.encode(batch) for batch in log.since(next_seq)]
                return
        except Trimmed:
            pass
        self.snapshots.append(log.snapshot())

    @rule()
    def request_snapshot(self) -> None:
        self.requests.append(Resync.SNAPSHOT)

    @precondition(lambda self: self.snapshots)
    @rule(which=WHICH, keep=st.booleans())
    def deliver_snapshot(self, which: int, keep: bool) -> None:
        """Any that is under way, however old; perhaps not for the last time."""
        at = which % len(self.snapshots)
        self.view.restore(self.snapshots[at] if keep else self.snapshots.pop(at))

    @precondition(lambda self: self.snapshots)
    @rule(bit=st.integers(0, 63))
    def deliver_damaged_snapshot(self, bit: int) -> None:
        """It is refused, and nothing changes."""
        right = self.snapshots[-1]
        if not len(right.block_hashes):
            return
        hashes = right.block_hashes.copy()
        hashes[-1] ^= np.uint64(1 << bit)
        held, position, synced = self.held(), self.view.position(), self.view.synced
        assert not self.view.restore(replace(right, block_hashes=hashes))
        assert not self.view.restore(replace(right, worker="v"))
        assert (self.held(), self.view.position(), self.view.synced) == (held, position, synced)

    @rule()
    def deliver_in_anothers_name(self) -> None:
        """It changes nothing."""
        if self.batches:
            held, position = self.held(), self.view.position()
            self.offer(wire.decode(self.batches[-1])._replace(worker="v"))
            assert (self.held(), self.view.position()) == (held, position)

    @rule(late=st.booleans())
    def forget(self, late: bool) -> None:
        """A router starts anew and knows nothing; what was under way to it may be lost."""
        self.view.forget()
        if late:
            self.batches.clear()
        self.requests.append(Resync.SNAPSHOT)

    # What must hold.

    def held(self) -> Held:
        return held_in(self.tree, WORKER)

    @invariant()
    def in_step_means_right(self) -> None:
        """And what a former incarnation held is gone with the first news of a new one; nobody else is touched."""
        self.tree.check()
        if self.view.synced:
            assert self.held() == self.truth[self.view.position()]
        if self.view.position()[1] == 0:
            assert not self.held()
        assert held_in(self.tree, OTHER) == self.others

    @rule()
    def quiesce(self) -> None:
        """All that is under way arrives, in order, and the worker goes on: the view is in step, and right."""
        while self.batches or self.requests or self.snapshots:
            self.deliver(len(self.batches))
            while self.snapshots:
                self.view.restore(self.snapshots.pop(0))
            while self.requests:
                self.answer_by(self.now)
        for _ in range(2):  # the first may find that batches are missing
            self.append([BlockStored(blocks(99), ROOT_HASH, 16)])
            while self.batches or self.requests or self.snapshots:
                self.deliver(len(self.batches))
                while self.requests:
                    self.answer_by(self.now)
                while self.snapshots:
                    self.view.restore(self.snapshots.pop(0))
        log = self.now.log
        assert self.view.synced
        assert self.view.position() == (log.epoch, log.next_seq)
        assert self.view.digest == log.digest
        assert self.held() == self.now.held

    def teardown(self) -> None:
        if hasattr(self, "view"):
            self.quiesce()
            self.in_step_means_right()


def with_a_wrong_bit(batch: EventBatch, at: int, bit: int) -> EventBatch:
    """Bits from 6 on make hashes that no worker has."""
    events = list(batch.events)
    for position, event in enumerate(events):
        if isinstance(event, BlockStored | BlockRemoved):
            hashes = event.block_hashes.copy()
            hashes[at % len(hashes)] ^= np.uint64(1 << bit)
            events[position] = replace(event, block_hashes=hashes)
            break
    return batch._replace(events=tuple(events))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_sequence_of_moves_ends_in_step(backend: type[PrefixTree]) -> None:
    """On the tree in Python and on the compiled one. See the module."""

    class Machine(Recovery):
        pass

    Machine.backend = backend
    Machine.TestCase.settings = settings(deadline=None, max_examples=150, stateful_step_count=40, print_blob=True)
    Machine.TestCase().runTest()
