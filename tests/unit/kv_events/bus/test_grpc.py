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
        ({"epoch": 0}, "no epoch"),
        ({"digest": b""}, "no digest"),
    ],
)
def test_a_torn_snapshot_is_refused(changes: dict[str, Any], error: str) -> None:
    """With WireError, whichever column does not fit."""

    class Torn(KvEventsService):
        async def snapshot(self, request: pb.SnapshotRequest, context: Context) -> None:
            fields = {"epoch": 5, "digest": bytes(16), "total_blocks": 2, "block_hashes": bytes(16)}
            chunk = pb.SnapshotChunk(**{**fields, "parent_hashes": bytes(16), **changes})
            await context.write(chunk.SerializeToString())

    async def test() -> None:
        async with grpc_server(Torn(EventLog("w0", 5, 16))) as port:
            source = GrpcEventSource(f"127.0.0.1:{port}")
            with pytest.raises(wire.WireError, match=error):
                await source.snapshot()
            await source.close()

    asyncio.run(test())
