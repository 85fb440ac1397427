"""`grpc`: the same stream in messages of at most 1 MiB: the slowest, and the way where only gRPC is let through.

Methods take and give bytes as `worker.transfer.messages` says; the proto files do not know them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from typing import Any

import grpc

from rhizome import rpc
from rhizome.errors import InvalidRequest, Overloaded
from worker.transfer.deadline import Deadline
from worker.transfer.errors import OutOfTime, Refused, TransferFailed
from worker.transfer.holder import Holder, Pieces
from worker.transfer.leases import MAX_LEASE_S
from worker.transfer.messages import ASKED, HEADER, Kind, decode_release, read_header
from worker.transfer.transports import Offer
from worker.transfer.transports.stream import Refill, StreamChannel

SERVICE = "rhizome.v1.BlockTransfer"
CHUNK_BYTES = 1 << 20
RELEASE_S = 0.5
MAX_PULLS = 64  # of one holder at once: each has a batch, of 4 MiB or one block, in memory
MAX_CHANNELS = 64  # to as many holders; the longest unused goes


def aio_handlers(holder: Holder, threads: Executor) -> grpc.GenericRpcHandler:
    """What to add to a gRPC server of asyncio with `add_generic_rpc_handlers`. Its loop only sends: batches are made
    ready in `threads`, one at a time.

    Given generators, such a server keeps a thread for ever for each call that is cancelled; hence coroutines.
    """
    pulls = 0

    async def pull(payload: bytes, context: rpc.Context) -> None:
        nonlocal pulls
        if pulls >= MAX_PULLS:
            await rpc.abort(context, Overloaded(f"{pulls} pulls are under way here, and {MAX_PULLS} is the limit"))
        pulls += 1
        try:
            with suppress(Refused, TimeoutError):  # whoever asked sees the stream end
                async with asyncio.timeout(MAX_LEASE_S):
                    await answer(payload, context)
        finally:
            pulls -= 1

    async def answer(payload: bytes, context: rpc.Context) -> None:
        loop, pieces = asyncio.get_running_loop(), holder.serve(payload)
        while messages := await loop.run_in_executor(threads, _next_messages, pieces):
            for message in messages:
                await context.write(message)

    async def release(payload: bytes, context: rpc.Context) -> bytes:
        try:
            holder.release(decode_release(payload))
        except InvalidRequest as error:
            await rpc.abort(context, error)
        return b""

    methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Pull": grpc.unary_stream_rpc_method_handler(pull),
        "Release": grpc.unary_unary_rpc_method_handler(release),
    }
    return grpc.method_handlers_generic_handler(SERVICE, methods)


def _next_messages(answer: Iterator[Pieces]) -> list[bytes]:
    """Of the next batch; empty: that was all."""
    pieces = next(answer, None)
    return [] if pieces is None else list(chunks(pieces))


def chunks(pieces: Pieces) -> Iterator[bytes]:
    """The same bytes in messages of about equal size, none over the limit."""
    total = sum(map(len, pieces))
    size = -(-total // -(-total // CHUNK_BYTES))
    chunk: list[memoryview] = []
    room = size
    for piece in pieces:
        rest = memoryview(piece)
        while rest:
            chunk.append(rest[:room])
            rest, room = rest[room:], room - len(chunk[-1])
            if room == 0:
                yield b"".join(chunk)
                chunk, room = [], size
    if chunk:
        yield b"".join(chunk)


class GrpcStream:
    """A call for each PULL."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._pull: Any = channel.unary_stream(f"/{SERVICE}/Pull")
        self._release: Any = channel.unary_unary(f"/{SERVICE}/Release")
        self._call: Any = None
        self._answer = Refill(iter(()))

    def send(self, message: bytes, deadline: Deadline) -> None:
        """See Stream."""
        kind, _ = read_header(message[: HEADER.size], ASKED)
        if kind is not Kind.PULL:
            raise TransferFailed(f"{kind.name} has no answer here")
        self._call = self._pull(message[HEADER.size :], timeout=deadline.left())
        deadline.on_cancel(self._call.cancel)
        self._answer = Refill(map(memoryview, self._call))

    def read_into(self, views: Sequence[memoryview], deadline: Deadline) -> int:
        """See Stream."""
        deadline.left()
        try:
            return self._answer.read_into(views)
        except grpc.RpcError as error:
            deadline.left()
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise OutOfTime(f"not done within {deadline.seconds:g} s") from None
            raise TransferFailed(f"{error.code().name}: {error.details()}") from None

    def release(self, lease_id: bytes) -> None:
        """See Stream. Waits, as a call that nobody waits for is cancelled."""
        try:
            self._release(lease_id, timeout=RELEASE_S)
        except grpc.RpcError as error:
            raise TransferFailed(f"{error.code().name}: {error.details()}") from None

    def close(self) -> None:
        """See Stream."""
        if self._call is not None:
            self._call.cancel()


class GrpcTransport:
    """See the module."""

    name = "grpc"

    def __init__(
        self, open_channel: Callable[[str], grpc.Channel] = grpc.insecure_channel, *, verify: bool = True
    ) -> None:
        """`open_channel` brings credentials, where the fleet has them."""
        self._open_channel = open_channel
        self._verify = verify
        self._lock = threading.Lock()
        self._channels: dict[str, grpc.Channel] = {}

    def reaches(self, offer: Offer) -> bool:  # noqa: ARG002 - whoever offers it can be reached
        """See Transport."""
        return True

    def connect(self, offer: Offer, deadline: Deadline) -> StreamChannel:
        """See Transport."""
        deadline.left()
        with self._lock:
            channel = self._channels.pop(offer.address, None) or self._open_channel(offer.address)
            self._channels[offer.address] = channel
            if len(self._channels) > MAX_CHANNELS:
                self._channels.pop(next(iter(self._channels))).close()
        return StreamChannel(GrpcStream(channel), verify=self._verify)

    def close(self) -> None:
        """Close what is open."""
        with self._lock:
            for channel in self._channels.values():
                channel.close()
            self._channels.clear()
