"""Blocks from a socket, received and digested by the native core."""

from __future__ import annotations

import errno
import random
import socket
import threading
import time
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radix.backend import native
from worker.transfer.deadline import Deadline
from worker.transfer.digests import digests_of
from worker.transfer.errors import OutOfTime, TransferFailed
from worker.transfer.memory import BlockLayout, BlockMemory
from worker.transfer.transports.sockets import SocketWire
from worker.transfer.transports.tcp import SocketStream, TcpChannel

pytestmark = pytest.mark.skipif(native is None, reason="the native core is not there")
BLOCKS = 9


def pool(planes: int, piece_bytes: int) -> BlockMemory:
    layout = BlockLayout(planes * piece_bytes, planes)
    return BlockMemory(bytearray(BLOCKS * layout.block_bytes), layout, BLOCKS)


def sent(data: bytes, connected: socket.socket, chance: random.Random) -> None:
    """In pieces of any size, some of them with a pause in between; then the end."""
    at = 0
    while at < len(data):
        size = chance.choice([1, 63, 64, 1000, 100_000, 100_000])
        connected.sendall(data[at : at + size])
        at += size
        if chance.random() < 0.05:
            time.sleep(0.001)
    connected.shutdown(socket.SHUT_WR)


@settings(max_examples=50)
@given(
    st.integers(1, 5),
    st.integers(4, 40).map(lambda stripes: 64 * stripes) | st.sampled_from([65_536, 200_000 // 64 * 64]),
    st.lists(st.integers(0, BLOCKS - 1), unique=True, min_size=1),
    st.integers(0, 2**32),
)
def test_blocks_arrive_in_their_slots_with_their_digests(
    planes: int, piece_bytes: int, slots: list[int], seed: int
) -> None:
    """However the stream is cut; nothing else is written, and nothing that follows is taken."""
    memory, chance = pool(planes, piece_bytes), random.Random(seed)
    data = chance.randbytes(len(slots) * memory.layout.block_bytes)
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(each) for each in socket.socketpair())
        sender = threading.Thread(target=sent, args=(data + b"next", theirs, chance))
        sender.start()
        wire, receiver = SocketWire(ours), memory.receiver(slots)
        assert receiver is not None
        assert wire.receive_blocks(receiver, len(data), Deadline(30.0).left) == len(data)
        rest = bytearray(4)
        assert wire.receive([memoryview(rest)], Deadline(30.0).left) == 4
        sender.join()
    assert (b"".join(memory.views(slots)), rest) == (data, b"next")
    assert receiver.digests.tolist() == digests_of(memory.pieces, slots)
    assert not memory.pieces[:, sorted(set(range(BLOCKS)) - set(slots))].any()


def test_a_stream_that_ends_or_stops_is_noticed() -> None:
    """Its end as such, silence at the deadline, a closed socket as an error; digests are of whole blocks only."""
    memory = pool(2, 512)
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(each) for each in socket.socketpair())
        channel = TcpChannel(SocketStream(ours))
        theirs.sendall(bytes(1500))
        with pytest.raises(OutOfTime):
            channel.digested(memory, [1, 2], Deadline(0.05))
        receiver = memory.receiver([1, 2])
        assert receiver is not None
        theirs.sendall(bytes(1500))
        theirs.close()
        with pytest.raises(TransferFailed, match="hung up, 1500 bytes into blocks of 2048"):
            channel.digested(memory, [1, 2], Deadline(30.0))
        assert receiver.receive(-1, 1.0) == errno.EBADF
        channel.close()
        with pytest.raises(TransferFailed, match="cannot receive"):
            channel.digested(memory, [1, 2], Deadline(30.0))


def test_what_does_not_fit_is_refused() -> None:
    """Slots beyond the pool, pieces that are no stripes, memory that may not be written."""
    assert native is not None
    memory = pool(1, 256)
    with pytest.raises(ValueError, match="slots is 9: 0 to 8"):
        memory.receiver([9])
    assert pool(1, 260).receiver([0]) is None
    locked = memory.pieces.copy()
    locked.flags.writeable = False
    with pytest.raises(TypeError, match="writable"):
        native.BlockReceiver(locked, np.array([0], dtype=np.uint32))
