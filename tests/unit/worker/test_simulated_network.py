"""A simulated worker's network: how long pulls last on a clock of the test's own, and what it leaves as it is."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.block_transfer import PooledHolder, keys_of
from tests.unit.worker.test_peers import SECRET, prompt, two
from worker.peers import START_S, PeerBlocks
from worker.simulated_network import SLOWEST, SimulatedNetwork, simulated_memory
from worker.transfer.deadline import Deadline
from worker.transfer.errors import OutOfTime, TransferFailed
from worker.transfer.holder import Holder
from worker.transfer.leases import MAX_LEASE_S
from worker.transfer.puller import Puller
from worker.transfer.server import TransferServer
from worker.transfer.transports import POLL_S, Channel, Offer
from worker.transfer.transports.local import LocalTransport
from worker.transfer.transports.shm import ShmTransport
from worker.transfer.transports.tcp import TcpTransport

BLOCKS = 32
PATIENCE_S = 30.0


class Clock:
    """Time that passes by sleeping, and where the test lets it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.longest = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.longest = max(self.longest, seconds)
        self.now += seconds


def network(clock: Clock, block_s: float) -> SimulatedNetwork:
    return SimulatedNetwork(block_s, clock=clock, sleep=clock.sleep)


def test_blocks_take_their_time_from_when_they_are_on_their_way() -> None:
    """What has passed since then counts; whoever waits looks up as often as others who wait in transports."""
    clock = Clock()
    carrying = network(clock, 0.1)
    assert carrying.carry(20, clock.now - 0.5, Deadline(9.0, clock)) == pytest.approx(101.5)
    assert clock.now == pytest.approx(101.5)
    assert clock.longest <= POLL_S


def test_pulls_share_the_network() -> None:
    """The second one's blocks come after the first one's, though they were on their way as early; an idle network
    makes nothing up for."""
    clock = Clock()
    carrying = network(clock, 0.01)
    assert carrying.carry(10, 100.0, Deadline(9.0, clock)) == pytest.approx(100.1)
    assert carrying.carry(5, 100.0, Deadline(9.0, clock)) == pytest.approx(100.15)
    clock.now = 200.0
    assert carrying.carry(5, 200.0, Deadline(9.0, clock)) == pytest.approx(200.05)


def test_a_pull_that_is_given_up_leaves_the_network_to_others() -> None:
    """It waits no longer than to its deadline and a look more, and what it did not pull costs nobody anything."""
    clock = Clock()
    carrying = network(clock, 1.0)
    with pytest.raises(OutOfTime):
        carrying.carry(1000, clock.now, Deadline(2.0, clock))
    assert clock.now <= 102.0 + POLL_S
    assert carrying.carry(1, clock.now, Deadline(9.0, clock)) <= 102.0 + 2 * POLL_S + 1.0
    cancelled = Deadline(99.0, clock)
    cancelled.cancel()
    with pytest.raises(OutOfTime):
        carrying.carry(1, clock.now, cancelled)


@contextmanager
def holding(names: tuple[object, ...] = ("model", 16)) -> Iterator[tuple[Holder, list[bytes], list[int]]]:
    """A holder of stand-ins, behind its doors; nothing may stay pinned."""
    memory = simulated_memory(2 * BLOCKS, names=names)  # half of a pool may be leased
    cache, keys = PooledHolder(memory), keys_of(BLOCKS)
    blocks = cache.store(keys)  # with known contents: what comes must be those
    holder = Holder("holder", 7, memory, cache)
    with TransferServer(holder):
        yield holder, keys, memory.digests(blocks)
        end = time.monotonic() + PATIENCE_S
        while cache.pinned:
            assert time.monotonic() < end, "blocks are still pinned"
            time.sleep(0.001)
    memory.close()


@pytest.mark.parametrize(
    "transport", [LocalTransport(), ShmTransport(), TcpTransport()], ids=lambda transport: transport.name
)
def test_a_pull_lasts_as_long_as_its_blocks_take(transport: LocalTransport | ShmTransport | TcpTransport) -> None:
    """By the network's clock; all of them arrive as the holder has them, and the puller's counts tell the time."""
    clock, pool = Clock(), simulated_memory(BLOCKS, names=("model", 16))
    with holding() as (holder, keys, told):
        puller = Puller(pool, [network(clock, 0.2).over(transport)])
        result = puller.pull(holder.lease(keys), keys, range(BLOCKS), PATIENCE_S)
        assert (result.blocks, result.transport, result.reason) == (BLOCKS, transport.name, "")
        assert clock.now == pytest.approx(100 + 0.2 * BLOCKS)
        assert pool.digests(range(BLOCKS)) == told
        puller.close()
    pool.close()


def test_the_lease_lasts_as_long_as_the_pull() -> None:
    """The holder keeps the blocks meanwhile; a pull that is given up gives them back, and brings nothing."""
    pool = simulated_memory(BLOCKS, names=("model", 16))
    began, deadline = threading.Event(), Deadline(PATIENCE_S)

    def sleep(seconds: float) -> None:
        began.set()
        time.sleep(min(seconds, 0.01))

    with holding() as (holder, keys, _):
        puller = Puller(pool, [SimulatedNetwork(MAX_LEASE_S, sleep=sleep).over(LocalTransport())])
        ticket = holder.lease(keys)
        results = []
        pulling = threading.Thread(target=lambda: results.append(puller.pull(ticket, keys, range(BLOCKS), deadline)))
        pulling.start()
        assert began.wait(PATIENCE_S)
        assert holder.leases.blocks == BLOCKS
        deadline.cancel()
        pulling.join(PATIENCE_S)
        assert [(result.blocks, result.reason) for result in results] == [(0, "local: given up")]
        assert not pool.pieces.any()
        puller.close()
    pool.close()


def test_stand_ins_of_another_model_stay_where_they_are() -> None:
    """Or of blocks of another size: the holder refuses."""
    pool = simulated_memory(BLOCKS, names=("model", 32))
    with holding() as (holder, keys, _):
        puller = Puller(pool, [network(Clock(), 0.2).over(LocalTransport())])
        result = puller.pull(holder.lease(keys), keys, range(BLOCKS), PATIENCE_S)
        assert result.blocks == 0
        assert "layout" in result.reason
        puller.close()
    pool.close()


class Told:
    """A transport that goes nowhere, and keeps the deadline that it was given."""

    name = "local"

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def reaches(self, offer: Offer) -> bool:
        return True

    def connect(self, offer: Offer, deadline: Deadline) -> Channel:
        self.seconds.append(deadline.seconds)
        raise TransferFailed("nowhere")


def test_pulls_have_the_time_that_a_busy_network_takes() -> None:
    """Not that of their stand-ins, which are small: others may be on the network before them."""
    told = Told()
    with two([told]) as (a, b):
        a.answer(prompt("first"))
        puller = Puller(b.memory, [told], secret=SECRET)
        slow = PeerBlocks(b.thread, puller, SECRET, slowest_block_s=SLOWEST * 0.5)
        asyncio.run(slow.fetch(prompt("second"), a.ticket(prompt("second"))))
        slow.close()
    assert told.seconds[0] == START_S + 10 * SLOWEST * 0.5
