"""A stream between holder and puller in which one message goes wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from worker.transfer.deadline import Deadline
from worker.transfer.errors import OutOfTime, Refused, TransferFailed
from worker.transfer.holder import Holder
from worker.transfer.memory import BlockMemory
from worker.transfer.messages import HEADER, How
from worker.transfer.transports import Offer
from worker.transfer.transports.shm import ShmChannel
from worker.transfer.transports.stream import Refill, StreamChannel

FAULTS = ("breaks", "ends", "stalls", "lost", "cut", "flipped", "twice", "swapped", "garbage")


@dataclass(slots=True)
class Fault:
    """What happens to message `number`, counted over both directions. `done` once it did."""

    kind: str
    number: int
    count: int = 0
    done: bool = False

    def strikes(self) -> bool:
        """Whether the next message is the one."""
        self.count += 1
        if self.count - 1 == self.number and not self.done:
            self.done = True
            return True
        return False


class FaultyStream:
    """Calls in place of messages, as LocalStream; what a holder sends at a time is one message."""

    def __init__(self, holder: Holder, fault: Fault) -> None:
        self._holder, self._fault = holder, fault
        self._answer = Refill(iter(()))

    def send(self, message: bytes, deadline: Deadline) -> None:
        """See Stream."""
        kind = self._fault.kind if self._fault.strikes() else ""
        payload = message[HEADER.size :]
        if kind in ("breaks", "stalls"):
            raise _error(kind)
        if kind == "flipped":
            payload = _flipped(payload)
        elif kind == "cut":
            payload = payload[: len(payload) // 2]
        elif kind == "garbage":
            payload = bytes(range(256))
        silent = kind in ("lost", "ends")
        self._answer = Refill(iter(()) if silent else self._pieces(payload))

    def read_into(self, views: Sequence[memoryview], deadline: Deadline) -> int:
        """See Stream."""
        return self._answer.read_into(views)

    def release(self, lease_id: bytes) -> None:
        """See Stream."""
        if self._fault.strikes():
            raise TransferFailed("broken")
        self._holder.release(lease_id)

    def close(self) -> None:
        """See Stream."""

    def _pieces(self, payload: bytes) -> Iterator[memoryview]:
        held: bytes | None = None
        try:
            for pieces in self._holder.serve(payload):
                message = b"".join(pieces)
                kind = self._fault.kind if self._fault.strikes() else ""
                if kind in ("breaks", "stalls"):
                    raise _error(kind)
                if kind == "ends":
                    return
                if kind == "swapped":
                    held = message
                    continue
                if kind == "flipped":
                    message = _flipped(message)
                elif kind == "cut":
                    message = message[: len(message) // 2]
                elif kind == "garbage":
                    message = bytes(range(256)) * (len(message) // 256 + 1)
                if kind != "lost":
                    yield memoryview(message)
                if kind == "twice":
                    yield memoryview(message)
                if held is not None:
                    yield memoryview(held)
                    held = None
        except Refused:
            return


def _error(kind: str) -> Exception:
    return TransferFailed("broken") if kind == "breaks" else OutOfTime("not done within 0 s")


def _flipped(message: bytes) -> bytes:
    changed = bytearray(message)
    changed[2 * len(changed) // 3] ^= 16
    return bytes(changed)


class FaultyTransport:
    """Reaches one holder, through a faulty stream; reads its memory if `how` says so."""

    def __init__(self, name: str, holder: Holder, fault: Fault, how: How) -> None:
        self.name = name
        self._holder, self._fault, self._how = holder, fault, how

    def reaches(self, offer: Offer) -> bool:
        """See Transport."""
        return True

    def connect(self, offer: Offer, deadline: Deadline) -> StreamChannel:
        """See Transport."""
        stream = FaultyStream(self._holder, self._fault)
        if self._how is How.IN_STREAM:
            return StreamChannel(stream)
        memory = self._holder.memory
        source = BlockMemory(memory.pieces.reshape(-1), memory.layout, memory.num_blocks)
        source.generations = memory.generations
        return ShmChannel(stream, source)
