"""Slots that are written after their pull was given up; and what a worker tells of its pulls."""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Callable, Generator, Sequence

import pytest

from tests.unit.worker.test_peers import LAYOUT, PATIENCE_S, PROMPT, expected, prompt, two
from worker.late_slots import LateSlots
from worker.pull_pace import PullPace
from worker.service import WorkerIdentity, status_message
from worker.transfer.deadline import Deadline
from worker.transfer.errors import OutOfTime
from worker.transfer.memory import BlockMemory
from worker.transfer.messages import Grant
from worker.transfer.transports import Batch, Channel, Offer
from worker.transfer.transports.local import LocalTransport


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.002)


def test_slots_come_back_when_nothing_writes_them_any_more() -> None:
    """Each once, in whatever order; those kept later, too."""
    in_flight, given = {1, 2, 3, 4}, queue.SimpleQueue[Sequence[int]]()
    late = LateSlots(in_flight, given.put)
    late.keep([1, 2, 3])
    in_flight.discard(2)
    assert given.get(timeout=PATIENCE_S) == [2]
    in_flight.clear()
    assert sorted(given.get(timeout=PATIENCE_S)) == [1, 3]
    in_flight.add(4)
    late.keep([4])
    assert given.empty()
    in_flight.clear()
    assert given.get(timeout=PATIENCE_S) == [4]
    late.close()


class Stuck:
    """A transport that gives up after four blocks, and may go on to write the five slots after them, as NIXL may."""

    name = "local"

    def __init__(self) -> None:
        self._inner = LocalTransport()
        self.channel: Channel | None = None

    def reaches(self, offer: Offer) -> bool:
        return self._inner.reaches(offer)

    def connect(self, offer: Offer, deadline: Deadline) -> Channel:
        self.channel = self._inner.connect(offer, deadline)
        self.channel.fetch = self.fetch  # type: ignore[method-assign]
        return self.channel

    def fetch(self, grant: Grant, memory: BlockMemory, slots: Sequence[int], deadline: Deadline) -> Generator[Batch]:
        assert self.channel is not None
        (batch,) = type(self.channel).fetch(self.channel, grant, memory, slots, deadline)
        assert batch.found is not None
        yield Batch(batch.told[:4], batch.found[:4])
        memory.in_flight.update(slots[4:9])
        raise OutOfTime("not done in time")


def test_what_is_written_late_is_nobodys_until_then() -> None:
    """What arrived before is used at once and the answer is right, while the rest of the slots stay claimed: all but
    those that nothing writes."""
    stuck = Stuck()
    with two([stuck]) as (a, b):  # type: ignore[list-item]
        a.answer(prompt("first"))
        asyncio.run(b.peers.fetch(prompt("second"), a.ticket(prompt("second"))))
        assert b.answer(prompt("second")) == expected()
        status = b.status()
        assert (status.cached_prompt_tokens, status.transfers.pulls_short, status.blocks_in_use) == (16, 1, 5)
        for number in range(8):  # enough to use every block that is free
            for slot in b.memory.in_flight:
                b.memory.pieces[:, slot] = number
            other = [9 + number] * 60
            assert b.answer(prompt(f"other {number}", other)) == expected(other)
        assert b.status().blocks_in_use == 5
        b.memory.in_flight.clear()
        until(lambda: b.status().blocks_in_use == 0)


def test_a_worker_tells_what_it_pulled_which_way_and_at_what_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """By transport; a pull that was cut does not change the pace."""
    monkeypatch.setattr("worker.peers.LONG_S", 0.0)  # that blocks of 32 bytes tell it
    identity = WorkerIdentity("b", 7, None, {})  # type: ignore[arg-type]
    with two() as (a, b):
        assert status_message(identity, b.status()).fetch_token_s == 0
        a.answer(prompt("first"))
        asyncio.run(b.peers.fetch(prompt("second"), a.ticket(prompt("second"))))
        told = status_message(identity, b.status())
        (counts,) = told.pull_counts
        assert (counts.transport, counts.pulls, counts.failed, counts.blocks) == ("local", 1, 0, 10)
        assert counts.size_bytes == 10 * LAYOUT.block_bytes
        assert told.fetch_token_s == pytest.approx(counts.seconds / 40, rel=0.5)
        longer = [*PROMPT[:40], *range(1, 20)]
        asyncio.run(b.peers.fetch(prompt("third", longer), a.ticket(prompt("third", longer))))
        again = status_message(identity, b.status())
        assert (again.pulls_short, again.pull_counts[0].pulls) == (1, 2)
        assert again.fetch_token_s == told.fetch_token_s
        assert again.pull_skipped_blocks == 10


def test_the_pace_follows_the_latest_pulls_and_long_ones_count_for_more() -> None:
    """Seconds for a token, of pulls that brought everything and were no mere round trips."""
    pace = PullPace(16, least_blocks=5)
    assert pace.token_s == 0
    pace.add(10, 9, 100.0)
    assert pace.token_s == 0
    pace.add(10, 10, 0.16)
    assert pace.token_s == pytest.approx(1e-3)
    pace.add(4, 4, 0.16)  # a round trip, mostly
    assert pace.token_s == pytest.approx(1e-3)
    for _ in range(100):
        pace.add(100, 100, 3.2)
    assert pace.token_s == pytest.approx(2e-3, rel=1e-3)
