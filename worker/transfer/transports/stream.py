"""Blocks in a stream of bytes: what `local`, `tcp` and `grpc` share, each bringing a stream of its own."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Protocol

from worker.transfer.deadline import Deadline
from worker.transfer.errors import TransferFailed
from worker.transfer.memory import BlockLayout, BlockMemory
from worker.transfer.messages import (
    ANSWERED,
    BATCH,
    HEADER,
    Grant,
    How,
    Kind,
    PullRequest,
    batch_head_size,
    decode_grant,
    encode_pull,
    frame,
    read_batch_head,
    read_header,
    refusal,
)
from worker.transfer.transports import Batch

DIGESTED_BYTES = 512 << 10  # received at a time, then digested: while they are in the processor's cache


class Stream(Protocol):
    """A puller's end."""

    def send(self, message: bytes, deadline: Deadline) -> None:
        """A whole message."""
        ...

    def read_into(self, views: Sequence[memoryview], deadline: Deadline) -> int:
        """Fill all views, in order. Returns how many bytes came: fewer only if the stream ended."""
        ...

    def release(self, lease_id: bytes) -> None:
        """Send a RELEASE, without waiting."""
        ...

    def close(self) -> None: ...


class StreamChannel:
    """Pulls over a stream; those that read the holder's memory take only digests from it."""

    how = How.IN_STREAM

    def __init__(self, stream: Stream, *, verify: bool = True) -> None:
        """`verify=False` only to measure what digests cost."""
        self.stream = stream
        self.verify = verify

    def open(self, ticket: bytes, first: int, count: int, layout: BlockLayout, deadline: Deadline) -> Grant:
        """See Channel."""
        request = PullRequest(ticket, first, count, layout, self.how)
        self.stream.send(encode_pull(request), deadline)
        return decode_grant(self.answer(Kind.GRANT, deadline), request)

    def answer(self, expected: Kind, deadline: Deadline) -> bytes:
        """The payload of the next message. Raises Refused if it says so."""
        kind, size = read_header(self._read(HEADER.size, deadline), ANSWERED)
        payload = self._read(size, deadline)
        if kind is Kind.REFUSED:
            raise refusal(payload)
        if kind is not expected:
            raise TransferFailed(f"{kind.name} where {expected.name} was due")
        return payload

    def fetch(self, grant: Grant, memory: BlockMemory, slots: Sequence[int], deadline: Deadline) -> Generator[Batch]:
        """See Channel."""
        step = max(1, DIGESTED_BYTES // memory.layout.block_bytes) if self.verify else grant.batch_blocks
        for batch in grant.batches():
            told = self.head(len(batch), deadline)
            found: list[int] = []
            for start in range(batch.start, batch.stop, step):
                some = slots[start : min(start + step, batch.stop)]
                self._fill(memory.views(some), deadline)
                if self.verify:
                    found += memory.digests(some)
            yield Batch(told, found if self.verify else None)

    def head(self, blocks: int, deadline: Deadline) -> list[int]:
        """Read a batch's head: what is told of its blocks."""
        head = bytearray(batch_head_size(blocks))
        came = self.stream.read_into([memoryview(head)], deadline)
        if came < BATCH.size:
            raise TransferFailed(f"the holder hung up, {came} bytes into a batch's head")
        told = read_batch_head(head, blocks)
        if came < len(head):
            raise TransferFailed(f"the holder hung up, {came} bytes into a batch's head")
        return told

    def _fill(self, views: Sequence[memoryview], deadline: Deadline) -> None:
        came, due = self.stream.read_into(views, deadline), sum(map(len, views))
        if came < due:
            raise TransferFailed(f"the holder hung up, {came} bytes into blocks of {due}")

    def release(self, lease_id: bytes) -> None:
        """See Channel."""
        self.stream.release(lease_id)

    def close(self) -> None:
        """See Channel."""
        self.stream.close()

    def attach(self, deadline: Deadline) -> bytes:
        """What the holder tells about its memory."""
        self.stream.send(frame(Kind.ATTACH), deadline)
        return self.answer(Kind.ATTACHED, deadline)

    def _read(self, size: int, deadline: Deadline) -> bytes:
        data = bytearray(size)
        came = self.stream.read_into([memoryview(data)], deadline)
        if came < size:
            raise TransferFailed(f"the holder hung up, {came} bytes into a message of {size}")
        return bytes(data)


class Refill:
    """Bytes that come in pieces of any size, handed out in views of any size."""

    def __init__(self, pieces: Iterator[memoryview]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def read_into(self, views: Sequence[memoryview]) -> int:
        """Fill the views; pieces are asked for only while room is left. Returns how many bytes came."""
        came = 0
        for view in views:
            at = 0
            while at < len(view):
                if not self._rest:
                    piece = next(self._pieces, None)
                    if piece is None:
                        return came
                    self._rest = piece
                size = min(len(self._rest), len(view) - at)
                view[at : at + size] = self._rest[:size]
                self._rest = self._rest[size:]
                at += size
                came += size
        return came
