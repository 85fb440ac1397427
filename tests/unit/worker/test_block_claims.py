"""Blocks that transfers reserve and pin beside an engine at work: answers stay right, nothing is lost."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from kv_events.events import BlockRemoved
from tests.support.memory_runner import VOCAB, MemoryRunner, reference_answer
from tests.unit.worker.test_engine import (
    CONFIG,
    GREEDY,
    EngineMachine,
    follow_and_compare,
    idle_and_nothing_lost,
    make_engine,
    request,
    run,
)
from worker.block_claims import Reservation
from worker.cached_block import CachedBlock
from worker.engine import Engine
from worker.scheduler import SchedulerConfig
from worker.sequence import Sequence

PROMPT = list(range(1, 22))  # five full blocks


def contents_of(tokens: list[int]) -> list[CachedBlock]:
    return Sequence(request("contents", tokens), 0).reusable()


def fill(runner: MemoryRunner, reservation: Reservation, arrived: int) -> None:
    """What a pull would have written."""
    for slot, content in zip(reservation.slots[:arrived], reservation.contents, strict=False):
        runner.memory[slot] = np.frombuffer(content.tokens, np.uint32)
    runner.memory[reservation.slots[arrived:]] = 0


class ClaimingMachine(EngineMachine):
    """The engine machine with pulls and leases that begin and end at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.reserved: list[Reservation] = []
        self.pinned: list[tuple[list[int], np.ndarray]] = []

    def new_engine(self) -> Engine:
        self.runner = MemoryRunner(CONFIG.num_blocks, CONFIG.block_size)
        return make_engine(runner=self.runner)

    @rule(prefix=st.integers(0, 3), length=st.integers(1, 24))
    def reserve(self, prefix: int, length: int) -> None:
        tokens = [1 + (prefix * 7 + at) % (VOCAB - 1) for at in range(length)]
        reservation = self.engine.reserve(contents_of(tokens))
        if reservation is not None:
            self.runner.memory[reservation.slots] = -5  # half-way
            self.reserved.append(reservation)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def adopt(self, data: st.DataObject) -> None:
        reservation = self.reserved.pop(data.draw(st.integers(0, len(self.reserved) - 1)))
        arrived = data.draw(st.integers(0, len(reservation.slots)))
        fill(self.runner, reservation, arrived)
        self.engine.adopt(reservation, arrived, 0, "test")

    @rule(prefix=st.integers(0, 3), length=st.integers(4, 24))
    def pin(self, prefix: int, length: int) -> None:
        tokens = [1 + (prefix * 7 + at) % (VOCAB - 1) for at in range(length)]
        contents = contents_of([*tokens, 1])
        blocks = self.engine.pin([content.key for content in contents])
        for block, content in zip(blocks, contents, strict=False):
            assert self.runner.memory[block].tolist() == np.frombuffer(content.tokens, np.uint32).tolist()
        self.pinned.append((blocks, self.runner.memory[blocks].copy()))

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        blocks, before = self.pinned.pop(data.draw(st.integers(0, len(self.pinned) - 1)))
        assert (self.runner.memory[blocks] == before).all(), "a pinned block was overwritten"
        self.engine.unpin(blocks)

    def teardown(self) -> None:
        for reservation in self.reserved:
            fill(self.runner, reservation, 0)
            self.engine.adopt(reservation, 0, 0, "")
        for blocks, before in self.pinned:
            assert (self.runner.memory[blocks] == before).all(), "a pinned block was overwritten"
            self.engine.unpin(blocks)
        assert not self.engine.scheduler.claims.held
        super().teardown()


TestClaims = ClaimingMachine.TestCase
TestClaims.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("arrived", range(6))
def test_blocks_that_arrived_are_found_and_the_rest_is_computed(arrived: int) -> None:
    """The answer is the model's own however many came; events tell of them; all other slots are free."""
    runner = MemoryRunner(CONFIG.num_blocks, CONFIG.block_size)
    engine = make_engine(runner=runner)
    reservation = engine.reserve(contents_of(PROMPT))
    assert reservation is not None
    assert len(reservation.slots) == 5
    fill(runner, reservation, arrived)
    engine.adopt(reservation, arrived, arrived * 64, "tcp")
    assert engine.event_log.snapshot().block_hashes.size == arrived
    engine.add(request("r", PROMPT))
    assert run(engine)["r"][0] == reference_answer(PROMPT, GREEDY, 0, CONFIG.max_model_len)
    status = engine.status()
    assert status.cached_prompt_tokens == arrived * 4
    assert (status.transfers.pulled_blocks, status.transfers.pulled_bytes) == (arrived, arrived * 64)
    assert status.transfers.pulls_short == (arrived < 5)
    idle_and_nothing_lost(engine)
    follow_and_compare(engine)


def test_a_reservation_leaves_what_was_admitted_its_blocks() -> None:
    """A sequence that runs has blocks promised for its whole prompt: they are not given to a pull."""
    engine = make_engine()
    long = [1 + at % 30 for at in range(36)]  # nine of twelve blocks, two of them after the first step
    engine.add(request("long", long))
    engine.step()
    reservation = engine.reserve(contents_of(PROMPT))
    assert reservation is not None
    assert len(reservation.slots) == 3
    assert engine.reserve(contents_of([7] * 9)) is None
    while engine.scheduler.running[0].computed < 36:
        engine.step()
        assert engine.scheduler.preemptions == 0
    engine.adopt(reservation, 0, 0, "")
    run(engine)
    idle_and_nothing_lost(engine)


def test_slots_are_said_to_be_gone_before_a_pull_overwrites_them() -> None:
    """Evicted blocks leave the log with the reservation."""
    config = SchedulerConfig(num_blocks=6, block_size=4, max_model_len=24, max_running=2, max_batched_tokens=24)
    engine = make_engine(config)
    engine.add(request("old", [9] * 23, dataclasses.replace(GREEDY, max_tokens=1)))
    run(engine)
    position = engine.event_log.next_seq
    assert engine.reserve(contents_of(PROMPT)) is not None
    events = [event for batch in engine.event_log.since(position) for event in batch.events]
    assert any(isinstance(event, BlockRemoved) for event in events)


def test_who_waits_for_blocks_that_transfers_hold_goes_on_when_they_are_back() -> None:
    """The engine says that it is stalled, and no longer once they are."""
    engine = make_engine()
    first = PROMPT
    engine.add(request("first", first))
    run(engine)
    pinned = engine.pin([content.key for content in contents_of(first)])
    assert len(pinned) == 5
    engine.add(request("second", [30 + at % 9 for at in range(33)]))
    stalled = []
    for _ in range(2):
        assert engine.step() == []
        stalled.append(engine.stalled)
    engine.unpin(pinned)
    assert len(run(engine)["second"][0]) == GREEDY.max_tokens
    assert [*stalled, engine.stalled] == [True, True, False]
    idle_and_nothing_lost(engine)
