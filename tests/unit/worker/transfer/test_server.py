"""The holder's doors: who may come in, how many, and what becomes of nonsense; and which door a puller takes."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rhizome.errors import InvalidRequest
from tests.support.block_transfer import LAYOUT, PooledHolder, content, held, keys_of, private_memory, pull_once
from worker.transfer import server as server_module
from worker.transfer.holder import Holder
from worker.transfer.memory import BlockMemory
from worker.transfer.messages import HEADER, Kind, frame
from worker.transfer.puller import Puller
from worker.transfer.server import TransferServer
from worker.transfer.transports import Offer
from worker.transfer.transports.grpc import CHUNK_BYTES, chunks
from worker.transfer.transports.local import LocalTransport
from worker.transfer.transports.shm import ShmTransport, host_identity
from worker.transfer.transports.tcp import TcpTransport

KEYS = keys_of(4)
PATIENCE_S = 20.0


@pytest.fixture
def holder() -> Iterator[Holder]:
    """Of four blocks, behind all doors that cost nothing."""
    memory = BlockMemory.shared(LAYOUT, 8)
    cache = PooledHolder(memory)
    cache.store(KEYS)
    holder = Holder("holder", 1, memory, cache, max_leased_blocks=100)
    with TransferServer(holder):
        yield holder
    cache.check()


def door(holder: Holder) -> tuple[str, int]:
    return next(Offer.parse(offer).host_port() for offer in holder.offers if offer.startswith("tcp:"))


def ended(connected: socket.socket) -> bool:
    """Whether the other end hangs up, saying nothing."""
    connected.settimeout(PATIENCE_S)
    try:
        return connected.recv(100) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(100),
        HEADER.pack(b"RZT1", Kind.PULL, 2**32 - 1),
        HEADER.pack(b"RZT1", Kind.RELEASE, 17) + bytes(17),
        HEADER.pack(b"RZT1", Kind.GRANT, 0),
        HEADER.pack(b"RZT1", 77, 0),
        frame(Kind.RELEASE, b"short"),
        frame(Kind.ATTACH),
    ],
    ids=["http", "zeros", "endless", "too long", "an answer", "unknown", "short", "no nixl"],
)
def test_nonsense_ends_a_connection(holder: Holder, sent: bytes) -> None:
    """That one only: others are served."""
    with socket.create_connection(door(holder)) as connected:
        connected.sendall(sent)
        assert ended(connected)
    pool = private_memory(4)
    assert pull_once(pool, [TcpTransport()], holder.lease(KEYS), KEYS, [0, 1, 2, 3], PATIENCE_S).blocks == 4


def test_a_pull_that_cannot_be_read_is_answered(holder: Holder) -> None:
    """With the reason, and the connection stays."""
    with socket.create_connection(door(holder)) as connected:
        connected.settimeout(PATIENCE_S)
        for payload, says in ((b"", b"at least"), (struct.pack("<B3xIIQI16s", 9, 0, 1, 1, 1, bytes(16)), b"how is 9")):
            connected.sendall(frame(Kind.PULL, payload))
            _, kind, size = HEADER.unpack(connected.recv(HEADER.size, socket.MSG_WAITALL))
            assert kind == Kind.REFUSED
            assert says in connected.recv(size, socket.MSG_WAITALL)
    assert holder.counts.refused == 2


def test_connections_are_bounded(holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is closed at once; there is room again when one leaves."""
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 2)
    first, second = socket.create_connection(door(holder)), socket.create_connection(door(holder))
    with socket.create_connection(door(holder)) as third:
        assert ended(third)
    first.close()
    end = time.monotonic() + PATIENCE_S
    while True:
        with socket.create_connection(door(holder)) as another:
            another.sendall(frame(Kind.PULL, b""))
            another.settimeout(PATIENCE_S)
            try:
                if another.recv(4) == b"RZT1":
                    break
            except ConnectionResetError:
                pass
        assert time.monotonic() < end
    second.close()


def test_who_says_nothing_is_not_waited_for(holder: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection without a word keeps its thread only so long."""
    monkeypatch.setattr(server_module, "FIRST_WORD_S", 0.05)
    with socket.create_connection(door(holder)) as connected:
        assert ended(connected)


@pytest.mark.parametrize(
    "address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:1", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:70000"]
)
def test_blocks_leave_the_host_only_by_an_explicit_word(holder: Holder, address: str) -> None:
    """Tickets and blocks go in the clear: loopback is the default, and another address an error."""
    with pytest.raises(InvalidRequest):
        TransferServer(holder, tcp=address)


def test_an_address_in_use_is_an_error(holder: Holder) -> None:
    """And nothing stays open of what was opened before."""
    host, port = door(holder)
    with pytest.raises(InvalidRequest, match="in use"), TransferServer(holder, tcp=f"{host}:{port}"):
        pass


def test_the_best_that_both_have_is_taken(holder: Holder) -> None:
    """By the puller's order; what it took is in the result and in the counts."""
    pool = private_memory(4)
    for transports, expected in (
        ([LocalTransport(), ShmTransport(), TcpTransport()], "local"),
        ([ShmTransport(), TcpTransport()], "shm"),
        ([TcpTransport(), ShmTransport()], "tcp"),
    ):
        puller = Puller(pool, transports)  # type: ignore[arg-type]
        result = puller.pull(holder.lease(KEYS), KEYS, [3, 0, 2, 1], PATIENCE_S)
        assert (result.transport, result.blocks, len(result.attempts)) == (expected, 4, 1)
        counts = puller.counts[expected]
        assert (counts.pulls, counts.failed, counts.blocks, counts.size_bytes) == (1, 0, 4, 4 * LAYOUT.block_bytes)
        puller.close()


def test_memory_of_another_host_is_not_tried(holder: Holder) -> None:
    """An offer of shared memory is for processes that share its host and network namespace."""
    shm = ShmTransport()
    assert not shm.reaches(Offer("shm", "0123456789abcdef/rhizome-1"))
    assert shm.reaches(Offer("shm", f"{host_identity()}/rhizome-1"))
    assert not LocalTransport().reaches(Offer("local", "another process/1"))


def test_the_next_best_is_taken_where_the_best_does_not_answer(holder: Holder) -> None:
    """And the result tells both attempts."""
    holder.offers = (f"shm://{host_identity()}/rhizome-gone", *(each for each in holder.offers if "tcp" in each))
    pool = private_memory(4)
    ways = [ShmTransport(), TcpTransport()]
    result = pull_once(pool, ways, holder.lease(KEYS), KEYS, [0, 1, 2, 3], PATIENCE_S)
    assert [attempt.transport for attempt in result.attempts] == ["shm", "tcp"]
    assert "refused" in result.attempts[0].error
    assert (result.blocks, result.reason) == (4, "")
    assert held(pool, 3) == content(KEYS[3], LAYOUT)


def test_private_memory_is_not_offered() -> None:
    """A pool that cannot be mapped is reached by the other ways."""
    memory = private_memory(2)
    holder = Holder("holder", 1, memory, PooledHolder(memory))
    with TransferServer(holder, tcp=None):
        assert [Offer.parse(offer).transport for offer in holder.offers] == ["local"]


def test_shared_memory_leaves_no_name_behind(holder: Holder) -> None:
    """A crash leaves nothing in /dev/shm, nor a socket's file."""
    assert not [path for path in Path("/dev/shm").iterdir() if "rhizome" in path.name]


@pytest.mark.parametrize("url", ["", "tcp", "tcp://", "://a", "tcp://" + "a" * 300])
def test_offers_are_urls(url: str) -> None:
    """Others are refused."""
    with pytest.raises(InvalidRequest):
        Offer.parse(url)


@pytest.mark.parametrize("address", ["a", ":1", "a:", "a:0", "a:65536", "a:b"])
def test_addresses_are_host_and_port(address: str) -> None:
    """Others are refused."""
    with pytest.raises(InvalidRequest):
        Offer("tcp", address).host_port()


@pytest.mark.parametrize(
    "sizes", [[1], [CHUNK_BYTES], [CHUNK_BYTES + 1], [192, CHUNK_BYTES], [7, 3 * CHUNK_BYTES, 5, 5]]
)
def test_grpc_messages_are_bounded_and_even(sizes: list[int]) -> None:
    """The same bytes, none over 1 MiB, no dwarf after a giant."""
    pieces = [bytes([at]) * size for at, size in enumerate(sizes)]
    made = list(chunks(pieces))  # type: ignore[arg-type]
    assert b"".join(made) == b"".join(pieces)
    assert max(map(len, made)) <= CHUNK_BYTES
    assert max(map(len, made)) - min(map(len, made)) <= len(made)
