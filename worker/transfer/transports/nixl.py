"""`nixl`: the puller reads the holder's memory through NVIDIA's NIXL over UCX; control goes over TCP.

Optional: the extra `nixl`, which is PyPI's `nixl-cu13`: it runs on hosts without a GPU; it needs torch, but no CUDA.
(PyPI's `nixl` imports torch to choose between it and `nixl-cu12`, and brings both.) It must be switched on: whoever
reaches its listeners and knows an address can read the memory, without a ticket. They stay on loopback
(UCX_NET_DEVICES=lo) unless told otherwise.
"""

from __future__ import annotations

import os
import struct
import threading
import time
import uuid
from collections.abc import Generator, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rhizome.errors import InvalidRequest
from worker.transfer.deadline import Deadline
from worker.transfer.errors import OutOfTime, TransferFailed
from worker.transfer.memory import TAG_BYTES, BlockLayout, BlockMemory
from worker.transfer.messages import Grant, How, Kind, frame
from worker.transfer.transports import Batch, Offer
from worker.transfer.transports.stream import StreamChannel
from worker.transfer.transports.tcp import SocketStream, connect_tcp

INSTALL = "pip install 'rhizome[nixl]'"
MODULES = ("nixl_cu13", "nixl_cu12", "nixl_rocm")
WINDOW_BYTES = 16 << 20  # read at a time: enough to be fast, and what may be under way when a deadline passes
SPINS = 200  # looks at a transfer's state before sleeping between them
POLL_S = 50e-6
IDLE_POLL_S = 0.02  # while nobody reads: peers that did still take leave of UCX

_ATTACHED = struct.Struct(f"<QQII{TAG_BYTES}s")  # address, block_bytes, planes, num_blocks, tag; then metadata


def has_nixl() -> bool:
    """Whether it is installed."""
    return any(find_spec(module) is not None for module in MODULES)


class NixlEndpoint:
    """This process's NIXL agent, with a pool's memory registered: what a holder shows and a puller reads into."""

    def __init__(self, memory: BlockMemory, *, insecure: bool = False) -> None:
        """`insecure`: listen on all interfaces. Raises InvalidRequest where NIXL is not installed or does not start."""
        if not insecure:
            os.environ.setdefault("UCX_NET_DEVICES", "lo")
        os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
        module = next((module for module in MODULES if find_spec(module) is not None), None)
        if module is None:
            raise InvalidRequest("transfer", "nixl", INSTALL)
        api: Any = import_module(f"{module}._api")
        self.memory = memory
        self.lock = threading.Lock()  # around all calls of the agent
        # Its own progress thread would take half a core or more, always: ours runs while somebody reads.
        config = api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self.agent: Any = api.nixl_agent(f"rhizome-{uuid.uuid4()}", config)
        if "UCX" not in self.agent.backends:
            raise InvalidRequest("transfer", "nixl", "its UCX backend must start")
        whole = self.agent.get_reg_descs([(memory.address, memory.size_bytes, 0, "")], "DRAM")
        self._registered = self.agent.register_memory(whole)
        self._slots = self.agent.prep_xfer_dlist(
            "NIXL_INIT_AGENT", _places(memory.address, memory.layout, memory.num_blocks), "DRAM"
        )
        self._reading = threading.Condition()
        self._readers = 0
        self._closed = False
        self._left: dict[Any, tuple[str, Sequence[int]]] = {}  # transfer -> its holder's agent, and its slots
        self._remotes: dict[str, tuple[Any, int]] = {}  # agent -> its places, and how many channels use them
        self._progress = threading.Thread(target=self._make_progress, name="rhizome-nixl", daemon=True)
        self._progress.start()

    def attached(self) -> bytes:
        """The answer to an ATTACH."""
        layout = self.memory.layout
        with self.lock:
            metadata = self.agent.get_agent_metadata()
        where = _ATTACHED.pack(
            self.memory.address, layout.block_bytes, layout.planes, self.memory.num_blocks, layout.tag
        )
        return frame(Kind.ATTACHED, where, metadata)

    def begin(self) -> None:
        """Somebody is about to read our memory: answer what UCX asks for, until `end`."""
        with self._reading:
            self._readers += 1
            self._reading.notify()

    def end(self) -> None:
        """One reader less."""
        with self._reading:
            self._readers -= 1

    def _make_progress(self) -> None:
        pause = IDLE_POLL_S
        while True:
            with self._reading:
                self._reading.wait(pause)
                if self._closed:
                    return
                pause = POLL_S if self._readers or self._left else min(2 * pause, IDLE_POLL_S)
            with self.lock:
                self.agent.get_new_notifs()
            self._look_after()

    def add_remote(self, address: int, num_blocks: int, metadata: bytes) -> str:
        """Know a holder's agent and its blocks. Returns the agent's name."""
        with self.lock:
            raw = self.agent.add_remote_agent(metadata)
            name = raw.decode() if isinstance(raw, bytes) else str(raw)
            places, users = self._remotes.get(name, (None, 0))
            if places is None:
                places = self.agent.prep_xfer_dlist(name, _places(address, self.memory.layout, num_blocks), "DRAM")
            self._remotes[name] = (places, users + 1)
            return name

    def remove_remote(self, name: str) -> None:
        """One channel less; the last one's end disconnects."""
        with self.lock:
            places, users = self._remotes.pop(name)
            if users > 1:
                self._remotes[name] = (places, users - 1)
            else:
                places.release()
                self.agent.remove_remote_agent(name)

    def read(self, name: str, blocks: Sequence[int], num_blocks: int, slots: Sequence[int], deadline: Deadline) -> None:
        """Read a holder's blocks into slots. Raises TransferFailed or OutOfTime.

        UCX may go on writing after a transfer was cancelled, and in any case after a deadline: these slots are in the
        memory's `in_flight` until it no longer does.
        """
        planes = self.memory.layout.planes
        there = [plane * num_blocks + block for block in blocks for plane in range(planes)]
        here = [plane * self.memory.num_blocks + slot for slot in slots for plane in range(planes)]
        with self.lock:
            handle = self.agent.make_prepped_xfer("READ", self._slots, here, self._remotes[name][0], there)
            state = self.agent.transfer(handle)
        spins = 0
        while state == "PROC":
            spins += 1
            time.sleep(0 if spins < SPINS else POLL_S)
            try:
                deadline.left()
            except OutOfTime:
                self._leave(handle, name, slots)
                raise
            with self.lock:
                state = self.agent.check_xfer_state(handle)
        with self.lock:
            handle.release()
        if state != "DONE":
            raise TransferFailed(f"nixl: the transfer ended as {state}")

    def _leave(self, handle: Any, name: str, slots: Sequence[int]) -> None:
        """Let a transfer come to its end in the background: when the holder goes on, or UCX finds that it is gone."""
        self.memory.in_flight.update(slots)
        with self.lock:
            places, users = self._remotes[name]
            self._remotes[name] = (places, users + 1)
        with self._reading:
            self._left[handle] = (name, slots)
            self._reading.notify()

    def _look_after(self) -> None:
        """Those that were left and have ended since: nothing writes into their slots any more."""
        for handle, (name, slots) in list(self._left.items()):
            with self.lock:
                try:
                    if self.agent.check_xfer_state(handle) == "PROC":
                        continue
                    handle.release()
                except Exception:  # noqa: S110 - NIXL's own: the connection is gone, and the transfer with it
                    pass
            del self._left[handle]
            self.remove_remote(name)
            self.memory.zero(slots)
            self.memory.in_flight.difference_update(slots)

    def close(self) -> None:
        """Forget the memory."""
        with self._reading:
            self._closed = True
            self._reading.notify()
        self._progress.join()
        with self.lock:
            self._slots.release()
            self.agent.deregister_memory(self._registered)


def _places(address: int, layout: BlockLayout, num_blocks: int) -> NDArray[np.uint64]:
    """Each piece's address, length and device, plane by plane: [planes * num_blocks, 3]."""
    places = np.zeros((layout.planes * num_blocks, 3), dtype=np.uint64)
    places[:, 0] = address + np.arange(len(places), dtype=np.uint64) * np.uint64(layout.piece_bytes)
    places[:, 1] = layout.piece_bytes
    return places


class NixlChannel(StreamChannel):
    """Reads the holder's memory window by window."""

    how = How.FROM_MEMORY

    def __init__(
        self, stream: SocketStream, endpoint: NixlEndpoint, deadline: Deadline, *, verify: bool = True
    ) -> None:
        super().__init__(stream, verify=verify)
        told = self.attach(deadline)
        if len(told) < _ATTACHED.size:
            raise TransferFailed(f"ATTACHED of {len(told)} bytes")
        address, block_bytes, planes, self._num_blocks, tag = _ATTACHED.unpack_from(told)
        layout = endpoint.memory.layout
        if (block_bytes, planes, tag) != (layout.block_bytes, layout.planes, layout.tag):
            raise TransferFailed(f"the holder's blocks are {block_bytes} bytes in {planes} planes, tag {tag.hex()}")
        if not 0 < self._num_blocks * block_bytes < 2**63 - address:
            raise TransferFailed(f"ATTACHED tells {self._num_blocks} blocks at {address:#x}")
        if self._num_blocks * planes > MAX_PLACES:
            raise TransferFailed(f"ATTACHED tells {self._num_blocks} blocks: at most {MAX_PLACES // planes}")
        self._endpoint = endpoint
        try:
            self._name = endpoint.add_remote(address, self._num_blocks, told[_ATTACHED.size :])
        except Exception as error:
            raise TransferFailed(f"nixl: {error}") from None

    def fetch(self, grant: Grant, memory: BlockMemory, slots: Sequence[int], deadline: Deadline) -> Generator[Batch]:
        """See Channel."""
        blocks = grant.blocks.tolist()
        if max(blocks, default=0) >= self._num_blocks:
            raise TransferFailed(f"GRANT of block {max(blocks)} of {self._num_blocks}")
        batches = grant.batches()
        window = max(1, WINDOW_BYTES // (memory.layout.block_bytes * grant.batch_blocks))
        for start in range(0, len(batches), window):
            part = batches[start : start + window]
            span = slice(part[0].start, part[-1].stop)
            try:
                self._endpoint.read(self._name, blocks[span], self._num_blocks, slots[span], deadline)
            except (TransferFailed, OutOfTime):
                raise
            except Exception as error:
                deadline.left()
                raise TransferFailed(f"nixl: {error}") from None
            for batch in part:
                told = self.head(len(batch), deadline)
                yield Batch(told, memory.digests([slots[at] for at in batch]) if self.verify else None)

    def close(self) -> None:
        """See Channel."""
        super().close()
        self._endpoint.remove_remote(self._name)


MAX_PLACES = 1 << 22  # pieces of a holder's pool, 24 bytes each


class NixlTransport:
    """See the module."""

    name = "nixl"

    def __init__(self, endpoint: NixlEndpoint, *, verify: bool = True) -> None:
        self._endpoint = endpoint
        self._verify = verify

    def reaches(self, offer: Offer) -> bool:  # noqa: ARG002 - whoever offers it can be reached
        """See Transport."""
        return True

    def connect(self, offer: Offer, deadline: Deadline) -> NixlChannel:
        """See Transport."""
        stream = SocketStream(connect_tcp(offer, deadline))
        try:
            return NixlChannel(stream, self._endpoint, deadline, verify=self._verify)
        except BaseException:
            stream.close()
            raise
