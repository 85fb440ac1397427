"""A holder in a process of its own, which is killed or stopped at any time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from threading import Thread

import pytest

from rhizome.transfer_ticket import TransferTicket, read_signed, sign
from tests.support.block_transfer import PooledHolder, content, held, keys_of, pull_once
from worker.transfer.holder import Holder
from worker.transfer.memory import BlockLayout, BlockMemory
from worker.transfer.puller import Puller
from worker.transfer.server import TransferServer
from worker.transfer.transports import Transport
from worker.transfer.transports.nixl import INSTALL, NixlEndpoint, NixlTransport, has_nixl
from worker.transfer.transports.shm import ShmTransport
from worker.transfer.transports.tcp import TcpTransport

LAYOUT = BlockLayout(512 << 10)
KEYS = keys_of(24)
SLOTS = [(7 * at) % 24 for at in range(24)]
PATIENCE_S = 60.0


def hold(connection: Connection, stop_at: int, nixl: bool) -> None:
    """The holder's process. It says so, and stops working, when block `stop_at` is to be digested."""
    memory = BlockMemory.shared(LAYOUT, 32)
    cache = PooledHolder(memory)
    blocks = cache.store(KEYS)
    digests = memory.digests

    def paused(told: Sequence[int]) -> list[int]:
        if blocks[stop_at] in told:
            connection.send("now")
            time.sleep(PATIENCE_S)
        return digests(told)

    if stop_at:
        memory.digests = paused  # type: ignore[method-assign]
    holder = Holder("holder", 1, memory, cache, max_leased_blocks=100)
    with TransferServer(holder, nixl=NixlEndpoint(memory) if nixl else None):
        connection.send(holder.lease(KEYS[:3]))  # for its offers
        connection.recv()


@contextmanager
def holding(stop_at: int, *, nixl: bool = False) -> Iterator[tuple[int, Connection, bytes]]:
    """The process's id, the other end of its pipe, and a ticket for all keys."""
    spawning = get_context("spawn")
    here, there = spawning.Pipe()
    child = spawning.Process(target=hold, args=(there, stop_at, nixl), daemon=True)
    child.start()
    try:
        assert child.pid is not None
        assert here.poll(PATIENCE_S)
        offers = read_signed(b"", here.recv(), 0).offers
        ticket = TransferTicket("holder", 1, int((time.time() + 50) * 1000), b"".join(KEYS), offers)
        yield child.pid, here, sign(b"", ticket)
    finally:
        child.kill()
        child.join()


def checked(pool: BlockMemory, blocks: int) -> None:
    """The first blocks are right, and the other slots zero."""
    for at, slot in enumerate(SLOTS):
        assert held(pool, slot) == (content(KEYS[at], LAYOUT) if at < blocks else bytes(LAYOUT.block_bytes))


@pytest.mark.parametrize("transport", [ShmTransport, TcpTransport])
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_holder_that_dies_or_hangs_on_the_way(transport: Callable[[], Transport], kill: signal.Signals) -> None:
    """What came before it counts; a dead one is noticed at once, one that hangs at the deadline."""
    pool = BlockMemory.shared(LAYOUT, 32)
    with holding(stop_at=20) as (pid, connection, ticket):

        def strike() -> None:
            assert connection.poll(PATIENCE_S)
            os.kill(pid, kill)

        striking = Thread(target=strike)
        striking.start()
        started = time.monotonic()
        patience_s = 1.0 if kill is signal.SIGSTOP else PATIENCE_S
        result = pull_once(pool, [transport()], ticket, KEYS, SLOTS, patience_s)
        striking.join()
    assert time.monotonic() - started < PATIENCE_S / 2
    assert 16 <= result.blocks <= 20
    assert "within 1 s" in result.reason if kill is signal.SIGSTOP else "hung up" in result.reason or result.reason
    checked(pool, result.blocks)


def test_a_pull_crosses_processes_and_both_ways_agree() -> None:
    """The same bytes from shared memory and over TCP."""
    with holding(stop_at=0) as (_, _, ticket):
        transports: tuple[Transport, ...] = (ShmTransport(), TcpTransport())
        for transport in transports:
            pool = BlockMemory.shared(LAYOUT, 32)
            assert pull_once(pool, [transport], ticket, KEYS[:16], SLOTS[:16], PATIENCE_S).blocks == 16
            checked(pool, 16)


@pytest.mark.skipif(not has_nixl(), reason=f"nixl is not here: {INSTALL}")
def test_what_nixl_cannot_take_back_is_kept_apart() -> None:
    """The holder stops after it granted: slots that UCX may still write are told, and free again, zero, when the holder
    goes on."""
    pool = BlockMemory.shared(LAYOUT, 32)
    endpoint = NixlEndpoint(pool)
    with holding(stop_at=0, nixl=True) as (pid, _, ticket):
        puller, read = Puller(pool, [NixlTransport(endpoint)]), endpoint.read

        def stopped(*arguments: object) -> None:
            os.kill(pid, signal.SIGSTOP)
            read(*arguments)  # type: ignore[arg-type]

        endpoint.read = stopped  # type: ignore[method-assign]
        result = puller.pull(ticket, KEYS[:16], SLOTS[:16], 1.0)
        assert (result.blocks, pool.in_flight) == (0, set(SLOTS[:16])), result
        os.kill(pid, signal.SIGCONT)
        end = time.monotonic() + PATIENCE_S
        while pool.in_flight:
            assert time.monotonic() < end
            time.sleep(0.005)
        checked(pool, 0)
        endpoint.read = read  # type: ignore[method-assign]
        assert puller.pull(ticket, KEYS[:16], SLOTS[:16], PATIENCE_S).blocks == 16
        puller.close()
    endpoint.close()
