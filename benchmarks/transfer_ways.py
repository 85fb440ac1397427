"""The ways of blocks that the transfer benchmark compares: ours, and each of the others bare."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import grpc
import numpy as np

from benchmarks.transfer_holder import BARE_SERVICE, Doors, bench_keys, calls, receive_all, shuffled
from worker.transfer.memory import BlockMemory
from worker.transfer.puller import Puller
from worker.transfer.transports import Transport

PATIENCE_S = 60.0

Lease = Callable[[int, bool], bytes]
"""A ticket of the holder's process for so many keys, whose digests are told or not."""


class Way(Protocol):
    """Moves the first keys' blocks into slots, once for each `move`; what is before a clock starts is `ready`."""

    def ready(self, count: int) -> None:
        """So many blocks come next."""
        ...

    def move(self, slots: Sequence[int]) -> None:
        """Move them."""
        ...


class Memcpy:
    """Per-block copies from another pool of this process: the limit."""

    def __init__(self, memory: BlockMemory, source: BlockMemory) -> None:
        self._into, self._from = memory.pieces[0], source.pieces[0]
        self._blocks = shuffled(source.num_blocks, 2)

    def ready(self, count: int) -> None:
        """Nothing to do."""

    def move(self, slots: Sequence[int]) -> None:
        """Block by block."""
        into, source = self._into, self._from
        for slot, block in zip(slots, self._blocks[: len(slots)], strict=True):
            into[slot] = source[block]


class Ours:
    """A pull under a ticket."""

    def __init__(
        self, stack: ExitStack, memory: BlockMemory, transport: Transport, lease: Lease, *, digests: bool = True
    ) -> None:
        self._puller = Puller(memory, [transport])
        stack.callback(self._puller.close)
        self._lease, self._digests = lease, digests
        self._ticket = b""
        self._keys = bench_keys(memory.num_blocks)

    def ready(self, count: int) -> None:
        """Have the blocks leased."""
        self._ticket = self._lease(count, self._digests)

    def move(self, slots: Sequence[int]) -> None:
        """Pull them."""
        result = self._puller.pull(self._ticket, self._keys[: len(slots)], slots, PATIENCE_S)
        assert result.blocks == len(slots), result


class BareSocket:
    """The same scatter and gather, over TCP, and nothing else."""

    def __init__(self, stack: ExitStack, memory: BlockMemory, doors: Doors) -> None:
        self._memory = memory
        self._socket = stack.enter_context(socket.create_connection(("127.0.0.1", doors.socket_port)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ready(self, count: int) -> None:
        """Nothing to do."""

    def move(self, slots: Sequence[int]) -> None:
        """Say how many, and read them."""
        self._socket.sendall(len(slots).to_bytes(8, "little"))
        for views in calls(self._memory, slots):
            receive_all(self._socket, views)


class BareGrpc:
    """A stream of messages of 1 MiB, copied to the slots."""

    def __init__(self, stack: ExitStack, memory: BlockMemory, doors: Doors) -> None:
        self._memory = memory
        channel = stack.enter_context(grpc.insecure_channel(doors.grpc_address))
        self._pull: Any = channel.unary_stream(f"/{BARE_SERVICE}/Pull")

    def ready(self, count: int) -> None:
        """Nothing to do."""

    def move(self, slots: Sequence[int]) -> None:
        """Say how many, and copy what comes."""
        size, at = self._memory.layout.block_bytes, 0
        into = self._memory.views(slots)
        for message in self._pull(len(slots).to_bytes(8, "little")):
            view = memoryview(message)
            for start in range(0, len(view), size):
                into[at][:] = view[start : start + size]
                at += 1
        assert at == len(slots)


class BareNixl:
    """One READ of all blocks over UCX, by lists that were prepared once, polled until it is done."""

    def __init__(self, agent: Any, memory: BlockMemory, doors: Doors) -> None:
        assert doors.nixl is not None
        metadata, address = doors.nixl
        self._agent = agent
        agent.register_memory(agent.get_reg_descs([(memory.address, memory.size_bytes, 0, "")], "DRAM"))
        self._name = agent.add_remote_agent(metadata).decode()
        self._there = agent.prep_xfer_dlist(self._name, _places(address, memory), "DRAM")
        self._here = agent.prep_xfer_dlist("NIXL_INIT_AGENT", _places(memory.address, memory), "DRAM")
        self._blocks = shuffled(memory.num_blocks, 2)

    def ready(self, count: int) -> None:
        """Nothing to do."""

    def move(self, slots: Sequence[int]) -> None:
        """Read them."""
        agent = self._agent
        handle = agent.make_prepped_xfer("READ", self._here, list(slots), self._there, self._blocks[: len(slots)])
        state = agent.transfer(handle)
        while state == "PROC":
            time.sleep(0)
            state = agent.check_xfer_state(handle)
        handle.release()
        assert state == "DONE", state


def _places(address: int, memory: BlockMemory) -> np.ndarray[Any, np.dtype[np.uint64]]:
    size = memory.layout.block_bytes
    places = np.zeros((memory.num_blocks, 3), dtype=np.uint64)
    places[:, 0] = address + np.arange(memory.num_blocks, dtype=np.uint64) * np.uint64(size)
    places[:, 1] = size
    return places
