"""What every transport of KV blocks does, whatever happens. A further one is one more line in TRANSPORTS."""

from __future__ import annotations

import asyncio
import atexit
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache

import grpc
import pytest

from rhizome.errors import InvalidRequest, NotServed, Overloaded
from rhizome.transfer_ticket import TransferTicket, sign
from tests.support.block_transfer import LAYOUT, PooledHolder, content, held, keys_of
from worker.transfer.deadline import Deadline
from worker.transfer.holder import Holder
from worker.transfer.memory import BlockLayout, BlockMemory
from worker.transfer.puller import Puller, PullResult
from worker.transfer.server import TransferServer
from worker.transfer.transports import Transport
from worker.transfer.transports import grpc as grpc_module
from worker.transfer.transports.grpc import GrpcTransport, aio_handlers
from worker.transfer.transports.local import LocalTransport
from worker.transfer.transports.nixl import INSTALL, NixlEndpoint, NixlTransport, has_nixl
from worker.transfer.transports.shm import ShmTransport
from worker.transfer.transports.tcp import TcpTransport

SECRET = b"a fleet's secret"
PATIENCE_S = 30.0
BLOCKS = 48
LARGE = BlockLayout(2 << 20, tag=LAYOUT.tag)  # two in a batch of a stream
PLANES = BlockLayout(24_000, planes=6, tag=LAYOUT.tag)

TRANSPORTS = ("local", "shm", "tcp", "grpc", "nixl")


@cache
def _endpoints(layout: BlockLayout) -> tuple[NixlEndpoint, NixlEndpoint]:
    """Agents take a while to start, so all tests share them, and their memory."""
    here, there = (NixlEndpoint(BlockMemory.shared(layout, BLOCKS)) for _ in range(2))
    for endpoint in (here, there):
        atexit.register(endpoint.close)  # else the interpreter's end may find their threads in native code
    return here, there


@contextmanager
def asyncio_serves(holder: Holder) -> Iterator[str]:
    """A gRPC server's address, in a loop on a thread of its own. When it ends, no thread is kept by a call that was
    cancelled."""

    async def started(threads: ThreadPoolExecutor) -> tuple[grpc.aio.Server, str]:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((aio_handlers(holder, threads),))
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        return server, address

    loop = asyncio.new_event_loop()
    runner = threading.Thread(target=loop.run_forever)
    runner.start()
    try:
        with ThreadPoolExecutor(2) as threads:
            server, address = asyncio.run_coroutine_threadsafe(started(threads), loop).result(PATIENCE_S)
            yield address
            asyncio.run_coroutine_threadsafe(server.stop(None), loop).result(PATIENCE_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        runner.join()
        loop.close()


class Pair:
    """A holder behind a server, and a puller that knows one transport."""

    def __init__(self, stack: ExitStack, transport: str, layout: BlockLayout) -> None:
        self.name = transport
        self.memory, self.pool = BlockMemory.shared(layout, BLOCKS), BlockMemory.shared(layout, BLOCKS)
        if transport == "nixl":
            self.memory, self.pool = (endpoint.memory for endpoint in _endpoints(layout))
            self.memory.__dict__.pop("digests", None)
            self.pool.zero(range(BLOCKS))
        self.cache = PooledHolder(self.memory)
        self.clock_ahead_s = 0.0
        self.holder = Holder(
            "holder",
            7,
            self.memory,
            self.cache,
            secret=SECRET,
            max_leased_blocks=4 * BLOCKS,
            clock=lambda: time.monotonic() + self.clock_ahead_s,
        )
        self.down = stack.enter_context(ExitStack())  # ends what serves the holder
        self.transport = self._transport(stack, layout)
        self.puller = Puller(self.pool, [self.transport], secret=SECRET)
        stack.callback(self.puller.close)

    def _transport(self, stack: ExitStack, layout: BlockLayout) -> Transport:
        nixl: NixlEndpoint | None = None
        others: tuple[str, ...] = ()
        transport: Transport
        if self.name == "nixl":
            here, there = _endpoints(layout)
            nixl, transport = here, NixlTransport(there)
        elif self.name == "grpc":
            others = (f"grpc://{self.down.enter_context(asyncio_serves(self.holder))}",)
            transport = GrpcTransport()
            stack.callback(transport.close)
        else:
            transport = {"local": LocalTransport, "shm": ShmTransport, "tcp": TcpTransport}[self.name]()
        self.down.enter_context(TransferServer(self.holder, nixl=nixl))
        self.holder.offers += others
        return transport

    def ticket(self, keys: list[bytes], **changes: object) -> bytes:
        """As a router makes one, without asking the holder before."""
        told: dict[str, object] = {
            "holder": "holder",
            "epoch": 7,
            "expires_unix_ms": int((time.time() + 30) * 1000),
            "keys": b"".join(keys),
            "offers": self.holder.offers,
        }
        secret = changes.pop("secret", SECRET)
        assert isinstance(secret, bytes)
        return sign(secret, TransferTicket(**{**told, **changes}))  # type: ignore[arg-type]

    def pull(
        self, ticket: bytes, keys: list[bytes], slots: list[int], deadline: Deadline | float = PATIENCE_S
    ) -> PullResult:
        return self.puller.pull(ticket, keys, slots, deadline)

    def check(self, result: PullResult, keys: list[bytes], slots: list[int]) -> None:
        """What counts is right, nothing else was left behind, and all blocks are free again."""
        layout = self.pool.layout
        for at, slot in enumerate(slots):
            expected = content(keys[at], layout) if at < result.blocks else bytes(layout.block_bytes)
            assert held(self.pool, slot) == expected, f"block {at} in slot {slot}"
        for slot in set(range(BLOCKS)) - set(slots):
            assert held(self.pool, slot) == bytes(layout.block_bytes), f"slot {slot} was nobody's"
        self.freed()

    def freed(self) -> None:
        """Nothing stays pinned, when what is under way has come through."""
        until(lambda: self.cache.pinned == 0)
        assert self.holder.leases.blocks == 0
        self.cache.check()


def until(condition: Callable[[], bool]) -> None:
    """Wait for it."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.001)


@pytest.fixture(params=TRANSPORTS)
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "nixl" and not has_nixl():
        pytest.skip(f"nixl is not here: {INSTALL}")
    return request.param


@contextmanager
def paired(name: str, layout: BlockLayout = LAYOUT) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(stack, name, layout)


@pytest.fixture
def pair(name: str) -> Iterator[Pair]:
    with paired(name) as made:
        yield made


@pytest.fixture
def large(name: str) -> Iterator[Pair]:
    """With blocks of which two make a batch."""
    with paired(name, LARGE) as made:
        yield made


def shuffled(count: int) -> list[int]:
    slots = list(range(BLOCKS))
    random.Random(count).shuffle(slots)
    return slots[:count]


@pytest.mark.parametrize("layout", [LAYOUT, PLANES, LARGE], ids=["small", "planes", "large"])
def test_every_block_arrives_in_its_slot(name: str, layout: BlockLayout) -> None:
    """Whole, wherever it lies on both ends; and when it is over, the holder's blocks are free again."""
    with paired(name, layout) as pair:
        keys, slots = keys_of(13), shuffled(13)
        pair.cache.store(keys_of(5, "other"))
        pair.cache.store(keys)
        result = pair.pull(pair.holder.lease(keys), keys, slots)
        assert (result.blocks, result.reason, result.transport) == (13, "", pair.transport.name)
        assert result.size_bytes == 13 * layout.block_bytes
        pair.check(result, keys, slots)


def test_only_what_is_lacking_travels(pair: Pair) -> None:
    """A puller that holds the beginning asks for the rest of a ticket, by key."""
    keys, slots = keys_of(9), shuffled(4)
    pair.cache.store(keys)
    result = pair.pull(pair.holder.lease(keys), keys[3:7], slots)
    assert result.blocks == 4
    assert pair.holder.counts.blocks_told == 4
    pair.check(result, keys[3:7], slots)


def test_a_ticket_can_be_made_by_a_router(pair: Pair) -> None:
    """Nothing was leased before; the holder pins what it has of the ticket's blocks when it is shown."""
    keys, slots = keys_of(9), shuffled(9)
    pair.cache.store(keys[:6])
    result = pair.pull(pair.ticket(keys), keys, slots)
    assert result.blocks == 6
    assert "only 6 of 9" in result.reason
    pair.check(result, keys, slots)


def test_one_channel_serves_many_pulls(pair: Pair) -> None:
    """One after another, and after one that was refused."""
    keys, slots = keys_of(4), shuffled(4)
    pair.cache.store(keys)
    assert pair.pull(pair.ticket(keys_of(3, "x")), keys_of(3, "x"), slots[:3]).blocks == 0
    for _ in range(5):
        result = pair.pull(pair.holder.lease(keys), keys, slots)
        assert result.blocks == 4
    pair.check(result, keys, slots)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"secret": b"of another fleet"}, "not signed"),
        ({"epoch": 6}, "of epoch 6, this is holder of epoch 7"),
        ({"holder": "else"}, "for else of epoch 7"),
        ({"expires_unix_ms": 1_000}, "expired"),
        ({"other key": True}, "a block of this ticket"),
        ({"offers": ("pigeon://coop", "nonsense")}, "offers pigeon://coop, nonsense"),
        ({"offers": ()}, "offers nothing"),
    ],
)
def test_a_ticket_that_does_not_hold_moves_nothing(pair: Pair, changes: dict[str, object], says: str) -> None:
    """It says why, and the slots stay as they were."""
    keys, slots = keys_of(3), shuffled(3)
    pair.cache.store(keys)
    changes = dict(changes)
    named = [b"another block...", *keys[1:]] if changes.pop("other key", None) else keys
    result = pair.pull(pair.ticket(named, **changes), keys, slots)
    assert result.blocks == 0
    assert says in result.reason
    assert pair.holder.counts.blocks_told == 0
    pair.check(result, keys, slots)


def test_the_holder_checks_tickets_itself(pair: Pair) -> None:
    """A puller that believes any ticket gets nothing for one of another fleet."""
    keys, slots = keys_of(3), shuffled(3)
    pair.cache.store(keys)
    credulous = Puller(pair.pool, [pair.transport], secret=b"of another fleet")
    result = credulous.pull(pair.ticket(keys, secret=b"of another fleet"), keys, slots, PATIENCE_S)
    assert result.blocks == 0
    assert "not signed" in result.reason
    assert pair.holder.counts.refused == 1
    credulous.close()
    pair.check(result, keys, slots)


def test_blocks_of_another_layout_are_refused(name: str) -> None:
    """Another size, split or meaning: said before anything is sent."""
    with paired(name) as pair, paired(name, PLANES) as other:
        keys, slots = keys_of(3), shuffled(3)
        pair.cache.store(keys)
        result = other.pull(pair.ticket(keys), keys, slots)
        assert result.blocks == 0
        assert "layout" in result.reason or "blocks are" in result.reason
        pair.freed()


def test_a_broken_block_does_not_count(large: Pair) -> None:
    """Nor what follows it: what came before it does, and broken bytes are wiped."""
    keys, slots = keys_of(7), shuffled(7)
    blocks = large.cache.store(keys)
    digests = large.memory.digests

    def flipped(told: Sequence[int]) -> list[int]:
        return [digest ^ (block == blocks[4]) for block, digest in zip(told, digests(told), strict=True)]

    large.memory.digests = flipped  # type: ignore[method-assign]
    result = large.pull(large.ticket(keys), keys, slots)
    assert result.blocks == 4
    assert "block 4 arrived broken" in result.reason
    large.check(result, keys, slots)


def test_what_ends_a_lease_ends_the_pull(large: Pair) -> None:
    """The blocks before it count, if any; those after are never taken for what they may no longer be."""
    keys, slots = keys_of(8), shuffled(8)
    blocks = large.cache.store(keys)
    digests = large.memory.digests

    def reused(told: Sequence[int]) -> list[int]:
        if blocks[5] in told:
            large.clock_ahead_s = 1e6
            large.holder.expire()
            large.memory.zero(blocks)
        return digests(told)

    large.memory.digests = reused  # type: ignore[method-assign]
    result = large.pull(large.ticket(keys), keys, slots)
    assert result.blocks <= 4
    assert "lease ended" in result.reason or "broken" in result.reason
    large.check(result, keys, slots)


def test_a_slow_holder_is_given_up(large: Pair) -> None:
    """At the deadline, with what came until then; and nothing is written afterwards."""
    keys, slots = keys_of(8), shuffled(8)
    blocks = large.cache.store(keys)
    digests, go_on = large.memory.digests, threading.Event()

    def stuck(told: Sequence[int]) -> list[int]:
        if blocks[4] in told and large.name != "local":  # where it would be the puller who is stuck
            go_on.wait()
        elif blocks[4] in told:
            time.sleep(0.3)
        return digests(told)

    large.memory.digests = stuck  # type: ignore[method-assign]
    started = time.monotonic()
    result = large.pull(large.ticket(keys), keys, slots, 0.25)
    assert time.monotonic() - started < PATIENCE_S / 2
    if large.name != "local" or result.blocks < 8:  # it looks at the time between batches
        assert result.blocks <= 6
        assert "within 0.25 s" in result.reason
    go_on.set()
    large.check(result, keys, slots)


def test_a_pull_can_be_given_up(large: Pair) -> None:
    """By another thread, at any time, long before its deadline."""
    keys, slots = keys_of(6), shuffled(6)
    blocks = large.cache.store(keys)
    digests, go_on = large.memory.digests, threading.Event()
    deadline = Deadline(PATIENCE_S)

    def stuck(told: Sequence[int]) -> list[int]:
        if blocks[2] in told:
            deadline.cancel()
            if large.name != "local":
                go_on.wait()
        return digests(told)

    large.memory.digests = stuck  # type: ignore[method-assign]
    result = large.pull(large.ticket(keys), keys, slots, deadline)
    assert result.blocks <= (4 if large.name == "local" else 2)
    assert "given up" in result.reason
    go_on.set()
    large.check(result, keys, slots)


def test_many_pull_at_once(pair: Pair) -> None:
    """From one holder, by one puller, each into slots of its own."""
    keys = keys_of(8)
    pair.cache.store(keys)
    parts = [shuffled(BLOCKS)[start : start + 8] for start in range(0, BLOCKS, 8)]

    def pull(slots: list[int]) -> list[int]:
        return [pair.pull(pair.ticket(keys), keys, slots).blocks for _ in range(4)]

    with ThreadPoolExecutor(len(parts)) as threads:
        assert list(threads.map(pull, parts)) == [[8] * 4] * len(parts)
    for slots in parts:
        assert [held(pair.pool, slot) for slot in slots] == [content(key, LAYOUT) for key in keys]
    pair.freed()


def test_a_lease_that_nobody_uses_ends(pair: Pair) -> None:
    """Its blocks are free when its time is over, without anybody's word."""
    keys = keys_of(5)
    pair.cache.store(keys)
    ticket = pair.holder.lease(keys, ttl_s=0.05)
    pair.freed()
    assert pair.holder.counts.expired == 1
    slots = shuffled(5)
    time.sleep(0.06)
    result = pair.pull(ticket, keys, slots)
    assert "expired" in result.reason
    pair.check(result, keys, slots)


def test_leases_are_bounded(pair: Pair) -> None:
    """They keep only so much of a cache from being used; who asks for more is told so."""
    keys = keys_of(6)
    pair.cache.store(keys)
    pair.holder.leases.max_blocks = 10
    first, second = pair.holder.lease(keys), pair.holder.lease(keys)
    with pytest.raises(Overloaded):
        pair.holder.lease(keys)
    slots = shuffled(6)
    assert pair.pull(second, keys, slots).blocks in (0, 4)
    result = pair.pull(first, keys, slots)
    assert result.blocks == 6
    pair.check(result, keys, slots)


def test_who_holds_nothing_says_so(pair: Pair) -> None:
    """To who leases, and to who pulls."""
    keys, slots = keys_of(2), shuffled(2)
    with pytest.raises(NotServed):
        pair.holder.lease(keys)
    result = pair.pull(pair.ticket(keys), keys, slots)
    assert "none of these" in result.reason
    pair.check(result, keys, slots)


@pytest.mark.parametrize("slots", [[0, 0], [0, BLOCKS], [-1, 0], [1]], ids=str)
def test_slots_must_be_the_pools(pair: Pair, slots: list[int]) -> None:
    """Each once, and one for each key: anything else is a bug of the caller's, and raised."""
    keys = keys_of(2)
    pair.cache.store(keys)
    with pytest.raises(InvalidRequest):
        pair.pull(pair.ticket(keys), keys, slots)


def test_a_holder_that_is_gone_is_told_at_once(pair: Pair) -> None:
    """Also where a channel to it is kept from before; nothing is written."""
    keys, slots = keys_of(2), shuffled(2)
    pair.cache.store(keys)
    ticket = pair.ticket(keys)
    assert pair.pull(ticket, keys, slots).blocks == 2
    pair.freed()
    pair.down.close()
    if pair.name == "local":  # it is gone when the object is
        return
    pair.pool.zero(slots)
    started = time.monotonic()
    result = pair.pull(ticket, keys, slots)
    assert time.monotonic() - started < PATIENCE_S / 2
    assert result.blocks == 0
    assert result.attempts[0].error
    pair.check(result, keys, slots)


def test_pulls_over_grpc_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is refused at once, and there is room again when one ends."""
    monkeypatch.setattr(grpc_module, "MAX_PULLS", 1)
    with paired("grpc") as pair, ThreadPoolExecutor(1) as beside:
        keys, slots = keys_of(3), shuffled(6)
        pair.cache.store(keys)
        digests, entered, go_on = pair.memory.digests, threading.Event(), threading.Event()

        def stuck(told: Sequence[int]) -> list[int]:
            entered.set()
            go_on.wait(PATIENCE_S)
            return digests(told)

        pair.memory.digests = stuck  # type: ignore[method-assign]
        first = beside.submit(pair.pull, pair.ticket(keys), keys, slots[:3])
        try:
            assert entered.wait(PATIENCE_S)
            refused = pair.pull(pair.ticket(keys), keys, slots[3:], PATIENCE_S / 10)
            assert "RESOURCE_EXHAUSTED: 1 pulls are under way here" in refused.reason
        finally:
            go_on.set()
        assert first.result().blocks == 3
        until(lambda: pair.pull(pair.ticket(keys), keys, slots[3:]).blocks == 3)
        pair.freed()
