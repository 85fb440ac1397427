"""Events over gRPC: KvEventsService serves a worker's log, GrpcEventSource reads it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any, TypeVar

import grpc
import numpy as np
from google.protobuf.message import DecodeError, Message

from kv_events import wire
from kv_events.bus import MAX_REPLAY_BATCHES, MAX_REPLAY_BYTES
from kv_events.bus.memory import READ_BATCHES, pages
from kv_events.events import EventBatch, Snapshot
from kv_events.log import EventLog, LoggedBatch
from kv_events.snapshot_bytes import MAX_SNAPSHOT_BLOCKS, check_header
from radix.digest import DIGEST_BYTES
from rhizome import rpc
from rhizome.errors import Conflict, InvalidRequest, Trimmed, Unavailable
from rhizome.v1 import worker_pb2 as pb

M = TypeVar("M", bound=Message)

SNAPSHOT_CHUNK_BLOCKS = 2**16  # 1 MiB
FRAME_BYTES = 2**18  # of payloads in a message (one at least): what a slow reader keeps its worker from letting go
CALL_TIMEOUT_S = 30.0  # for a replay or a snapshot, whole

_HASH_BYTES = 8


class KvEventsService:
    """rhizome.v1.KvEvents over a log. `log.close()` ends subscriptions."""

    def __init__(self, log: EventLog) -> None:
        self._log = log

    def handler(self) -> grpc.GenericRpcHandler:
        """What a grpc.aio server serves."""
        return grpc.method_handlers_generic_handler(
            "rhizome.v1.KvEvents",
            {
                "Subscribe": rpc.streaming(pb.SubscribeRequest, self.subscribe),
                "Replay": rpc.streaming(pb.ReplayRequest, self.replay),
                "Snapshot": rpc.streaming(pb.SnapshotRequest, self.snapshot),
            },
        )

    async def subscribe(self, request: pb.SubscribeRequest, context: rpc.Context) -> None:
        """The kept batches from a sequence number on, then live ones."""
        async with aclosing(pages(self._log, request.epoch, request.from_seq)) as read:
            async for entries in read:
                for frame in _frames(entries):
                    await context.write(frame)

    async def replay(self, request: pb.ReplayRequest, context: rpc.Context) -> None:
        """The kept batches from a sequence number to the newest."""
        self._log.check_epoch(request.epoch)
        seq, end = request.from_seq, max(request.from_seq, self._log.next_seq)
        entries = self._log.read(seq, READ_BATCHES)
        while entries and seq < end:
            for frame in _frames(entries):
                await context.write(frame)
            seq += len(entries)
            entries = self._log.read(seq, READ_BATCHES)

    async def snapshot(self, request: pb.SnapshotRequest, context: rpc.Context) -> None:
        """Every block held."""
        snapshot = await asyncio.to_thread(self._log.snapshot)  # sorting many blocks takes a while
        for chunk in _chunks(snapshot):
            await context.write(chunk.SerializeToString())


@asynccontextmanager
async def publish(log: EventLog, host: str, port: int) -> AsyncIterator[int]:
    """Serve nothing but `log` at an address until left; yields the port, a free one for 0.

    Raises InvalidRequest when it cannot be bound.
    """
    server = grpc.aio.server(options=rpc.SERVER_OPTIONS)
    server.add_generic_rpc_handlers((KvEventsService(log).handler(),))
    name = f"[{host}]" if ":" in host else host
    try:
        bound = server.add_insecure_port(f"{name}:{port}")
    except RuntimeError as error:
        raise InvalidRequest("events_url", f"grpc://{name}:{port}", f"the port must be free ({error})") from error
    await server.start()
    try:
        yield bound
    finally:
        await server.stop(grace=None)


def _frames(entries: Sequence[LoggedBatch]) -> Iterator[bytes]:
    """Messages that hold these batches: many each, as one costs a hundred times what a batch does."""
    seq, payloads, size_bytes = entries[0].batch.seq, list[bytes](), 0
    for entry in entries:
        if payloads and size_bytes + len(entry.payload) > FRAME_BYTES:
            yield pb.EventFrame(seq=seq, payload=payloads[0], more=payloads[1:]).SerializeToString()
            seq, payloads, size_bytes = entry.batch.seq, [], 0
        payloads.append(entry.payload)
        size_bytes += len(entry.payload)
    yield pb.EventFrame(seq=seq, payload=payloads[0], more=payloads[1:]).SerializeToString()


def _chunks(snapshot: Snapshot) -> Iterator[pb.SnapshotChunk]:
    """At least one chunk, so that an empty snapshot says so."""
    total = len(snapshot.block_hashes)
    for start in range(0, max(1, total), SNAPSHOT_CHUNK_BLOCKS):
        part = slice(start, start + SNAPSHOT_CHUNK_BLOCKS)
        yield pb.SnapshotChunk(
            worker_id=snapshot.worker,
            epoch=snapshot.epoch,
            next_seq=snapshot.next_seq,
            digest=snapshot.digest,
            total_blocks=total,
            block_size=snapshot.block_size,
            block_hashes=snapshot.block_hashes[part].astype("<u8", copy=False).tobytes(),
            parent_hashes=snapshot.parent_hashes[part].astype("<u8", copy=False).tobytes(),
            tier_masks=b"" if snapshot.tier_masks is None else snapshot.tier_masks[part].tobytes(),
        )


class GrpcEventSource:
    """An EventSource over a worker's KvEvents service. See kv_events.bus.EventSource."""

    def __init__(self, target: str | grpc.aio.Channel) -> None:
        """`target` is a worker's host:port, or a channel to it, which stays the caller's to close."""
        self._own: grpc.aio.Channel | None = None
        if isinstance(target, str):
            target = self._own = grpc.aio.insecure_channel(target, options=rpc.CHANNEL_OPTIONS)
        self._channel = target

    async def close(self) -> None:
        """Close the channel, if it was made here."""
        if self._own is not None:
            await self._own.close()

    async def subscribe(self, epoch: int, from_seq: int) -> AsyncGenerator[EventBatch, None]:
        call = self._call("Subscribe", pb.SubscribeRequest(epoch=epoch, from_seq=from_seq))
        try:
            with _translated():
                async for data in call:
                    frame = _parsed(pb.EventFrame, data)
                    yield wire.decode(frame.payload)
                    for payload in frame.more:
                        yield wire.decode(payload)
        finally:
            call.cancel()

    async def replay(self, epoch: int, from_seq: int) -> list[EventBatch]:
        call = self._call("Replay", pb.ReplayRequest(epoch=epoch, from_seq=from_seq), timeout_s=CALL_TIMEOUT_S)
        batches: list[EventBatch] = []
        size_bytes = 0
        try:
            with _translated():
                async for data in call:
                    frame = _parsed(pb.EventFrame, data)
                    size_bytes += len(data)
                    if len(batches) + 1 + len(frame.more) > MAX_REPLAY_BATCHES:
                        raise wire.WireError(f"the replay holds more than {MAX_REPLAY_BATCHES} batches")
                    if size_bytes > MAX_REPLAY_BYTES:
                        raise wire.WireError(f"the replay holds more than {MAX_REPLAY_BYTES} bytes")
                    batches.append(wire.decode(frame.payload))
                    batches += map(wire.decode, frame.more)
        finally:
            call.cancel()
        return batches

    async def snapshot(self) -> Snapshot:
        call = self._call("Snapshot", pb.SnapshotRequest(), timeout_s=CALL_TIMEOUT_S)
        first: pb.SnapshotChunk | None = None
        hashes, parents, masks = bytearray(), bytearray(), bytearray()  # all that is kept of further chunks
        try:
            with _translated():
                async for data in call:
                    chunk = _parsed(pb.SnapshotChunk, data)
                    first = first or chunk
                    hashes += chunk.block_hashes
                    parents += chunk.parent_hashes
                    masks += chunk.tier_masks
                    received = max(len(hashes) // _HASH_BYTES, len(parents) // _HASH_BYTES, len(masks))
                    if received > min(first.total_blocks, MAX_SNAPSHOT_BLOCKS):
                        raise wire.WireError(f"the snapshot goes on past its {first.total_blocks} blocks")
        finally:
            call.cancel()
        if first is None:
            raise wire.WireError("the snapshot is empty")
        return _assembled(first, bytes(hashes), bytes(parents), bytes(masks))

    def _call(self, method: str, request: Message, timeout_s: float | None = None) -> Any:
        """Answers stay bytes, to be parsed by `_parsed`: of what is no message, gRPC itself would make None."""
        call: Any = self._channel.unary_stream(
            f"/rhizome.v1.KvEvents/{method}", request_serializer=type(request).SerializeToString
        )
        return call(request, timeout=timeout_s)


def _parsed(message_type: type[M], data: bytes) -> M:
    try:
        return message_type.FromString(data)
    except DecodeError as error:
        raise wire.WireError(f"not a {message_type.DESCRIPTOR.name}: {error}") from error


def _assembled(first: pb.SnapshotChunk, hashes: bytes, parents: bytes, masks: bytes) -> Snapshot:
    expected = first.total_blocks * _HASH_BYTES
    if len(hashes) != expected or len(parents) != expected:
        raise wire.WireError(
            f"the snapshot has {len(hashes)} bytes of hashes and {len(parents)} of parents: {expected} are needed"
        )
    if len(masks) not in (0, first.total_blocks):
        raise wire.WireError(f"the snapshot has {len(masks)} masks of tiers: none or {first.total_blocks} are needed")
    check_header(len(first.worker_id.encode()), first.epoch, first.next_seq, first.block_size)
    if len(first.digest) != DIGEST_BYTES:
        raise wire.WireError(f"the snapshot's digest has {len(first.digest)} bytes: {DIGEST_BYTES} are needed")
    return Snapshot(
        worker=first.worker_id,
        epoch=first.epoch,
        next_seq=first.next_seq,
        digest=first.digest,
        block_size=first.block_size,
        block_hashes=np.frombuffer(hashes, dtype="<u8").astype(np.uint64, copy=False),
        parent_hashes=np.frombuffer(parents, dtype="<u8").astype(np.uint64, copy=False),
        tier_masks=np.frombuffer(masks, dtype=np.uint8) if masks else None,
    )


@contextmanager
def _translated() -> Iterator[None]:
    """gRPC's errors as ours, so that nobody else has to know gRPC."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        details = error.details() or error.code().name
        match error.code():
            case grpc.StatusCode.OUT_OF_RANGE:
                raise Trimmed(details) from error
            case grpc.StatusCode.FAILED_PRECONDITION:
                raise Conflict(details) from error
            case grpc.StatusCode.UNIMPLEMENTED:
                limit = "no worker's events are served there; those of a router's workers are at router://HOST:PORT"
                raise Unavailable(f"UNIMPLEMENTED: {limit}") from error
            case _:
                raise Unavailable(f"{error.code().name}: {details}") from error
