"""What only the gRPC transport can get wrong; the contract suite has the rest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from kv_events import wire
from kv_events.bus.grpc import GrpcEventSource, KvEventsService
from kv_events.log import EventLog
from rhizome.rpc import SERVER_OPTIONS, Context
from rhizome.v1 import worker_pb2 as pb


@asynccontextmanager
async def grpc_server(events: KvEventsService) -> AsyncIterator[int]:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((events.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(grace=None)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"block_hashes": bytes(8)}, "8 bytes of hashes and 16 of parents: 16 are needed"),
        ({"parent_hashes": bytes(24)}, "goes on past its 2 blocks"),
        ({"tier_masks": b"\1"}, "1 masks of tiers: none or 2 are needed"),
        ({"tier_masks": b"\1" * 3}, "goes on past its 2 blocks"),
        ({"epoch": 0}, "epoch is 0: 1 to"),
        ({"next_seq": 2**63}, "next_seq is"),
        ({"block_size": 0}, "block_size is 0: 1 to"),
        ({"worker_id": "w" * 257}, "worker has 257 bytes"),
        ({"digest": b""}, "digest has 0 bytes"),
    ],
)
def test_a_torn_snapshot_is_refused(changes: dict[str, Any], error: str) -> None:
    """With WireError, whichever column does not fit."""

    class Torn(KvEventsService):
        async def snapshot(self, request: pb.SnapshotRequest, context: Context) -> None:
            fields = {"worker_id": "w0", "epoch": 5, "digest": bytes(16), "block_size": 16, "total_blocks": 2}
            fields["block_hashes"] = bytes(16)
            chunk = pb.SnapshotChunk(**{**fields, "parent_hashes": bytes(16), **changes})
            await context.write(chunk.SerializeToString())

    async def test() -> None:
        async with grpc_server(Torn(EventLog("w0", 5, 16))) as port:
            source = GrpcEventSource(f"127.0.0.1:{port}")
            with pytest.raises(wire.WireError, match=error):
                await source.snapshot()
            await source.close()

    asyncio.run(test())


async def _raises_wire_error(service: type[KvEventsService], match: str) -> None:
    """All three of a source's calls."""
    async with grpc_server(service(EventLog("w0", 5, 16))) as port:
        source = GrpcEventSource(f"127.0.0.1:{port}")
        with pytest.raises(wire.WireError, match=match):
            await anext(source.subscribe(0, 0))
        with pytest.raises(wire.WireError, match=match):
            await source.replay(0, 0)
        with pytest.raises(wire.WireError, match=match):
            await source.snapshot()
        await source.close()


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff\x01", b"\x0a\xff", b"\x12\x09short"])
def test_what_is_no_message_at_all_is_a_wire_error(data: bytes) -> None:
    """Whatever a peer sends in place of protobuf."""

    class Garbled(KvEventsService):
        async def subscribe(self, request: Any, context: Context) -> None:
            await context.write(data)

        replay = snapshot = subscribe

    asyncio.run(_raises_wire_error(Garbled, "not a "))


def test_a_replay_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its reader has no memory left."""
    monkeypatch.setattr("kv_events.bus.grpc.MAX_REPLAY_BYTES", 1000)
    log = EventLog("w0", 5, 16)
    log.append([], 1.0)
    frame = pb.EventFrame(payload=log.read(0, 1)[0].payload).SerializeToString()

    class Endless(KvEventsService):
        async def replay(self, request: pb.ReplayRequest, context: Context) -> None:
            while True:
                await context.write(frame)

    async def test() -> None:
        async with grpc_server(Endless(EventLog("w0", 5, 16))) as port:
            source = GrpcEventSource(f"127.0.0.1:{port}")
            with pytest.raises(wire.WireError, match="more than 1000 bytes"):
                await source.replay(0, 0)
            await source.close()

    asyncio.run(test())
