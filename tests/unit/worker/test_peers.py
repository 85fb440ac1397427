"""Two engines on threads of their own, one pulling from the other: what arrives is used, whatever fails is computed."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest

from rhizome.errors import RhizomeError
from rhizome.transfer_ticket import TransferTicket, sign
from tests.support.memory_runner import MemoryRunner, reference_answer
from tests.unit.worker.test_engine import GREEDY, idle_and_nothing_lost, make_engine, request
from worker import peers as peers_module
from worker.engine import EngineStatus, Output
from worker.engine_thread import EngineThread
from worker.peers import MAX_PULLS, EngineBlocks, PeerBlocks
from worker.scheduler import SchedulerConfig
from worker.sequence import EngineRequest
from worker.transfer.deadline import Deadline
from worker.transfer.holder import Holder
from worker.transfer.memory import BlockLayout, BlockMemory
from worker.transfer.puller import Puller
from worker.transfer.server import TransferServer
from worker.transfer.transports import Transport
from worker.transfer.transports.local import LocalTransport
from worker.transfer.transports.tcp import TcpTransport

CONFIG = SchedulerConfig(
    num_blocks=40, block_size=4, max_model_len=120, max_batched_tokens=16, max_running=4, max_waiting=4
)
LAYOUT = BlockLayout(CONFIG.block_size * 8, tag=b"tokens-in-blocks")
SECRET = b"the secret of a fleet"
PROMPT = [1 + at * 7 % 39 for at in range(42)]  # ten full blocks
PATIENCE_S = 30.0


class Peer:
    """An engine on its thread, its blocks for others, and its pulls."""

    def __init__(self, name: str, stack: ExitStack, transports: Sequence[Transport]) -> None:
        self.runner = MemoryRunner(CONFIG.num_blocks, CONFIG.block_size)
        self.memory = BlockMemory(self.runner.memory, LAYOUT, CONFIG.num_blocks)
        self.thread = EngineThread(make_engine(CONFIG, runner=self.runner))
        self.holder = Holder(name, 7, self.memory, EngineBlocks(self.thread), secret=SECRET)
        self.peers = PeerBlocks(self.thread, Puller(self.memory, transports, secret=SECRET), SECRET)
        self.thread.start()
        stack.callback(self.thread.stop)
        self.server = stack.enter_context(TransferServer(self.holder))
        stack.callback(self.peers.close)

    def answer(self, asked: EngineRequest) -> list[int]:
        outputs: queue.SimpleQueue[Output | RhizomeError] = queue.SimpleQueue()
        self.thread.submit(asked, outputs.put)
        tokens: list[int] = []
        while True:
            output = outputs.get(timeout=PATIENCE_S)
            assert isinstance(output, Output)
            tokens.append(output.token.token_id)
            if output.request_finished:
                return tokens

    def ticket(self, asked: EngineRequest, **changed: object) -> bytes:
        expires_unix_ms = int(time.time() * 1000) + 30_000
        keys = asked.keys.tobytes()
        ticket = TransferTicket(self.holder.worker_id, self.holder.epoch, expires_unix_ms, keys, self.holder.offers)
        return sign(SECRET, replace(ticket, **changed))  # type: ignore[arg-type]

    def status(self) -> EngineStatus:
        return self.thread.call(self.thread.engine.status).result(PATIENCE_S)

    def nothing_is_held(self) -> None:
        """Wait for leases to be released; then every block is accounted for."""
        until(lambda: not self.status().blocks_in_use and not len(self.holder.leases))
        self.thread.call(lambda: idle_and_nothing_lost(self.thread.engine)).result(PATIENCE_S)


def until(condition: Callable[[], bool]) -> None:
    """Wait for it."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.002)


@contextmanager
def two(transports: Sequence[Transport] = (LocalTransport(),)) -> Iterator[tuple[Peer, Peer]]:
    """Holder and puller; nothing may be held at the end."""
    with ExitStack() as stack:
        peers = Peer("a", stack, transports), Peer("b", stack, transports)
        yield peers
        for peer in peers:
            peer.nothing_is_held()


def prompt(name: str, tokens: list[int] = PROMPT, **fields: object) -> EngineRequest:
    return request(name, tokens, **fields)  # type: ignore[arg-type]


def expected(tokens: list[int] = PROMPT) -> list[int]:
    return reference_answer(tokens, GREEDY, 0, CONFIG.max_model_len)


@pytest.mark.parametrize("transport", [LocalTransport(), TcpTransport()], ids=lambda transport: transport.name)
def test_what_a_peer_holds_is_pulled_and_not_computed(transport: Transport) -> None:
    """All full blocks of the prompt come over; the answer is that of one engine; events tell of the blocks."""
    with two([transport]) as (a, b):
        a.answer(prompt("first"))
        asyncio.run(b.peers.fetch(prompt("second"), a.ticket(prompt("second"))))
        assert b.answer(prompt("second")) == expected()
        assert b.thread.engine.event_log.snapshot().block_hashes.size >= 10
        status = b.status()
        assert status.cached_prompt_tokens == 40
        assert (status.transfers.pulled_blocks, status.transfers.pulled_bytes) == (10, 10 * LAYOUT.block_bytes)
        assert (status.transfers.pull_transport, status.transfers.pulls_short) == (transport.name, 0)
        assert a.status().transfers.lent_blocks == 10


def test_only_what_is_lacking_travels() -> None:
    """Three blocks are here already: seven come. A second fetch brings nothing, and asks nobody."""
    with two() as (a, b):
        a.answer(prompt("first"))
        b.answer(prompt("short", PROMPT[:13]))
        for _ in range(2):
            asyncio.run(b.peers.fetch(prompt("second"), a.ticket(prompt("second"))))
        assert b.answer(prompt("second")) == expected()
        assert (b.status().transfers.pulls, b.status().transfers.pulled_blocks) == (1, 7)


def test_a_peer_that_holds_less_than_the_ticket_says_gives_what_it_has() -> None:
    """The rest is computed."""
    with two() as (a, b):
        a.answer(prompt("first", PROMPT[:21]))
        asyncio.run(b.peers.fetch(prompt("second"), a.ticket(prompt("second"))))
        assert b.answer(prompt("second")) == expected()
        assert b.status().cached_prompt_tokens == 20
        assert b.status().transfers.pulls_short == 1


BAD_TICKETS = {
    "expired": {"expires_unix_ms": 1},
    "of an earlier epoch": {"epoch": 6},
    "for another worker": {"holder": "c"},
    "to nowhere": {"offers": ("tcp://127.0.0.1:9",)},
    "without offers": {"offers": ()},
    "for other keys": {"keys": bytes(160)},
}


@pytest.mark.parametrize("changed", BAD_TICKETS.values(), ids=BAD_TICKETS)
def test_a_ticket_that_does_not_hold_costs_a_computation(changed: dict[str, object]) -> None:
    """Nothing is pulled, nothing is held, and the answer is the same."""
    with two([LocalTransport(), TcpTransport()]) as (a, b):
        a.answer(prompt("first"))
        asyncio.run(b.peers.fetch(prompt("second"), a.ticket(prompt("second"), **changed)))
        assert b.answer(prompt("second")) == expected()
        assert b.status().transfers.pulled_blocks == 0


def test_a_ticket_of_somebody_else_and_rubbish_are_not_believed() -> None:
    """Nobody is asked for anything."""
    with two() as (a, b):
        a.answer(prompt("first"))
        for signed in (a.ticket(prompt("second"))[:-1] + b"?", b"rubbish"):
            asyncio.run(b.peers.fetch(prompt("second"), signed))
        assert b.status().transfers.pulls == a.status().transfers.lent_blocks == 0


class Gate:
    """A transport that stops before it opens a way."""

    name = "local"

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self._inner = LocalTransport()

    def reaches(self, offer: object) -> bool:
        return self._inner.reaches(offer)  # type: ignore[arg-type]

    def connect(self, offer: object, deadline: Deadline) -> object:
        self.reached.set()
        while not self.open.wait(0.005):
            deadline.left()
        return self._inner.connect(offer, deadline)  # type: ignore[arg-type]


def test_the_engine_goes_on_while_blocks_are_pulled() -> None:
    """Others are answered meanwhile, by the worker that pulls."""
    gate = Gate()
    with two([gate]) as (a, b):  # type: ignore[list-item]
        a.answer(prompt("first"))
        pulling = threading.Thread(target=lambda: asyncio.run(b.peers.fetch(prompt("r"), a.ticket(prompt("r")))))
        pulling.start()
        assert gate.reached.wait(PATIENCE_S)
        other = [5] * 30
        assert b.answer(prompt("other", other)) == expected(other)
        assert b.status().blocks_in_use == 10
        gate.open.set()
        pulling.join()
        assert b.answer(prompt("r")) == expected()
        assert b.status().transfers.pulled_blocks == 10


def test_a_client_that_goes_away_ends_the_pull() -> None:
    """Its slots come back."""
    gate = Gate()

    async def leave(a: Peer, b: Peer) -> None:
        fetching = asyncio.create_task(b.peers.fetch(prompt("r"), a.ticket(prompt("r"))))
        await asyncio.to_thread(gate.reached.wait, PATIENCE_S)
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching

    with two([gate]) as (a, b):  # type: ignore[list-item]
        a.answer(prompt("first"))
        asyncio.run(leave(a, b))
        b.nothing_is_held()
        assert b.status().transfers.pulled_blocks == 0


def test_the_cache_is_cleared_while_others_read_and_pull() -> None:
    """What was pinned stays as it was until it is given back, and is then free."""
    gate = Gate()
    with two([gate]) as (a, b):  # type: ignore[list-item]
        a.answer(prompt("first"))
        ticket = a.holder.lease([key.tobytes() for key in prompt("r").keys])
        held = a.status().blocks_in_use
        pulling = threading.Thread(target=lambda: asyncio.run(b.peers.fetch(prompt("r"), ticket)))
        pulling.start()
        assert gate.reached.wait(PATIENCE_S)
        for peer in (a, b):
            peer.thread.call(peer.thread.engine.clear_cache).result(PATIENCE_S)
        a.answer(prompt("other", [8] * 60))
        assert held == 10
        gate.open.set()
        pulling.join()
        assert b.answer(prompt("r")) == expected()
        assert b.status().transfers.pulled_blocks == 10


def hand_over(a: Peer, asked: EngineRequest) -> tuple[tuple[int, ...], bytes]:
    """The first token and the ticket of a request that ends with it."""
    outputs: queue.SimpleQueue[Output | RhizomeError] = queue.SimpleQueue()
    a.thread.submit(replace(asked, hold=True), outputs.put)
    output = outputs.get(timeout=PATIENCE_S)
    assert isinstance(output, Output)
    assert output.request_finished
    return (output.token.token_id,), output.ticket


@pytest.mark.parametrize("known", [0, 13, 41], ids=["nothing", "three blocks", "all blocks"])
def test_one_prefills_and_another_decodes(known: int) -> None:
    """The blocks that lack travel, those that are there are counted; the lease ends, with a pull or without."""
    with two() as (a, b):
        a.thread.engine.lend = a.holder.lend
        if known:
            b.answer(prompt("earlier", PROMPT[:known]))
        first, ticket = hand_over(a, prompt("r"))
        assert a.status().blocks_in_use == len(a.holder.leases) * 10 == 10
        rest = prompt("r", answered=first)
        asyncio.run(b.peers.fetch(rest, ticket))
        assert [*first, *b.answer(rest)] == expected()
        transfers = b.status().transfers
        assert transfers.skipped_blocks == known // CONFIG.block_size
        assert transfers.pulled_blocks == 10 - known // CONFIG.block_size


def test_of_a_prompt_that_is_too_much_to_lend_the_beginning_travels() -> None:
    """As much as there is room for, once and again; where there is none, all is computed, and nothing is kept."""
    with two() as (a, b):
        a.thread.engine.lend = a.holder.lend
        a.holder.leases.max_blocks = 8
        first, ticket = hand_over(a, prompt("r"))
        _, second = hand_over(a, prompt("s", [*PROMPT[:4], *[9] * 30]))
        assert a.status().blocks_in_use == a.holder.leases.blocks == 8
        assert second == b""
        rest = prompt("r", answered=first)
        asyncio.run(b.peers.fetch(rest, ticket))
        assert [*first, *b.answer(rest)] == expected()
        assert (b.status().transfers.pulled_blocks, b.status().transfers.pulls_short) == (8, 0)


def test_pulls_that_wait_for_their_turn_all_come() -> None:
    """More at once than there are threads for."""
    gate = Gate()

    async def all_of(a: Peer, b: Peer) -> None:
        asked = [prompt(f"r{number}", [1 + number, *PROMPT[1:5]]) for number in range(MAX_PULLS + 3)]
        fetching = [asyncio.create_task(b.peers.fetch(each, a.ticket(each))) for each in asked]
        await asyncio.to_thread(gate.reached.wait, PATIENCE_S)
        gate.open.set()
        await asyncio.gather(*fetching)

    with two([gate]) as (a, b):  # type: ignore[list-item]
        for number in range(MAX_PULLS + 3):
            a.answer(prompt(f"r{number}", [1 + number, *PROMPT[1:5]]))
        asyncio.run(all_of(a, b))
        assert b.status().transfers.pulled_blocks == MAX_PULLS + 3


def test_pulls_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is computed at once, before the others had their turn."""
    monkeypatch.setattr(peers_module, "MAX_PULLS", 1)
    gate = Gate()

    async def all_of(a: Peer, b: Peer) -> None:
        asked = [prompt(f"r{number}") for number in range(1 + CONFIG.max_waiting)]
        fetching = [asyncio.create_task(b.peers.fetch(each, a.ticket(each))) for each in asked]
        await asyncio.to_thread(gate.reached.wait, PATIENCE_S)
        await asyncio.wait_for(b.peers.fetch(prompt("more"), a.ticket(prompt("more"))), PATIENCE_S)
        assert not any(task.done() for task in fetching)
        gate.open.set()
        await asyncio.gather(*fetching)
        assert b.status().transfers.pulls == 1  # and the others found it there
        await b.peers.fetch(prompt("again"), a.ticket(prompt("again")))

    with two([gate]) as (a, b):  # type: ignore[list-item]
        a.answer(prompt("first"))
        asyncio.run(all_of(a, b))
        assert b.status().transfers.skipped_blocks == 10 * (CONFIG.max_waiting + 1)


def test_a_request_that_lacks_nothing_does_not_wait_for_its_holder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder is told that its blocks are not needed as soon as it can be reached; as much waits for that as may."""
    monkeypatch.setattr(peers_module, "MAX_RELEASES", 3)
    reachable, released = threading.Event(), list[bytes]()

    async def fetch_often(b: Peer, tickets: list[bytes]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            for ticket in tickets:
                await b.peers.fetch(prompt("r"), ticket)

    with two() as (a, b):
        release = b.peers._puller.release

        def release_when_reachable(ticket: bytes) -> None:
            reachable.wait()
            released.append(ticket)
            release(ticket)

        monkeypatch.setattr(b.peers._puller, "release", release_when_reachable)
        a.answer(prompt("first"))
        b.answer(prompt("second"))
        keys = [key.tobytes() for key in prompt("r").keys[:4]]
        tickets = [a.holder.lease(keys) for _ in range(4)]
        try:
            asyncio.run(fetch_often(b, tickets))
            assert (len(a.holder.leases), released) == (4, [])
        finally:
            reachable.set()
        until(lambda: len(a.holder.leases) == 1)
        assert released == tickets[:3]
        a.holder.close()  # as if it had expired, which the last one will
