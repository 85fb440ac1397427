"""RedisEventSource: reads a worker's stream from Redis. See kv_events.bus.redis_stream for its layout."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from kv_events import wire
from kv_events.bus import MAX_REPLAY_BATCHES, MAX_REPLAY_BYTES
from kv_events.bus.redis_stream import (
    BATCH,
    BLOCK_S,
    END,
    START,
    TRANSFER_S,
    StreamId,
    answer,
    connect,
    last_entry,
    snapshot_key,
    unavailable,
    without_login,
)
from kv_events.bus.url import BusUrl
from kv_events.events import EventBatch, Snapshot
from kv_events.snapshot_bytes import MAX_SNAPSHOT_BYTES, decode_snapshot
from kv_events.wire import WireError
from rhizome.errors import Conflict, Trimmed, Unavailable

READ_ENTRIES = 128
"""A round trip. Publishers of ours bound what a stream keeps, and so what these hold: whoever else may write to a Redis
could fill its readers' memory."""


class RedisEventSource:
    """An EventSource over a stream in Redis. See kv_events.bus.EventSource."""

    def __init__(self, bus: BusUrl) -> None:
        """Connects when it is used. Raises InvalidRequest for credentials that cannot be read."""
        self._where = str(without_login(bus))
        self._stream = bus.name
        self._redis: Any = connect(bus)

    async def close(self) -> None:
        """Close all connections."""
        await self._redis.aclose()

    async def subscribe(self, epoch: int, from_seq: int) -> AsyncGenerator[EventBatch, None]:
        with unavailable(self._where):
            at, _ = await self._ends(epoch, from_seq)
            while True:
                blocking = self._redis.xread({self._stream: str(at)}, count=READ_ENTRIES, block=int(1000 * BLOCK_S))
                read = await answer(blocking, BLOCK_S)
                if not read:  # quiet, or the stream is gone or another one
                    await self._ends(at.epoch, at.position)
                for entry in read[0][1] if read else ():
                    batch = self._next(at, entry)
                    if batch is None:
                        await self._check_end(at)
                        return
                    yield batch
                    at = StreamId(at.epoch, at.position + 1)

    async def replay(self, epoch: int, from_seq: int) -> list[EventBatch]:
        batches: list[EventBatch] = []
        with unavailable(self._where):
            at, newest = await self._ends(epoch, from_seq)
            size_bytes = 0
            if newest.position - from_seq > MAX_REPLAY_BATCHES:
                raise Trimmed(f"{self._where}: {newest.position - from_seq} events are more than a replay holds")
            while at < newest:
                first = str(StreamId(at.epoch, at.position + 1))
                entries = await answer(self._redis.xrange(self._stream, first, str(newest), count=READ_ENTRIES))
                if not entries:
                    raise Trimmed(f"{self._where}: events up to {newest} were there, and are gone")
                for entry in entries:
                    batch = self._next(at, entry)
                    if batch is None:
                        raise WireError(f"entries follow the end at {at}")
                    batches.append(batch)
                    size_bytes += sum(map(len, entry[1].values()))
                    at = StreamId(at.epoch, at.position + 1)
                if size_bytes > MAX_REPLAY_BYTES:
                    raise WireError(f"the replay holds more than {MAX_REPLAY_BYTES} bytes")
        return batches

    async def snapshot(self) -> Snapshot:
        with unavailable(self._where):
            newest = await self._newest()
            data = await answer(self._redis.getrange(snapshot_key(self._stream), 0, MAX_SNAPSHOT_BYTES), TRANSFER_S)
        if not data:
            raise Unavailable(f"{self._where}: no snapshot is there")
        snapshot = await asyncio.to_thread(decode_snapshot, data)  # many blocks take a while
        if snapshot.epoch != newest.epoch:
            raise Unavailable(f"{self._where}: the snapshot is of epoch {snapshot.epoch}, not {newest.epoch}")
        return snapshot

    async def _newest(self) -> StreamId:
        """Epoch and position that the stream has reached. Raises Unavailable when there is no stream."""
        last = await last_entry(self._redis, self._stream)
        if last is None:
            raise Unavailable(f"{self._where}: no events are there")
        newest, fields = last
        return StreamId(newest.epoch, newest.position - (END in fields))

    async def _ends(self, epoch: int, from_seq: int) -> tuple[StreamId, StreamId]:
        """Where to read on, and the newest position. Raises Conflict, Unavailable."""
        newest = await self._newest()
        if epoch not in (0, newest.epoch):
            raise Conflict(f"{self._where}: this is epoch {newest.epoch}, {epoch} was asked for")
        if not 0 <= from_seq <= newest.position:
            raise Conflict(f"{self._where}: the next event is {newest.position}, {from_seq} was asked for")
        return StreamId(newest.epoch, from_seq), newest

    async def _check_end(self, at: StreamId) -> None:
        """An end with something of its epoch after it is none. Raises WireError."""
        newest = await self._newest()
        if newest.epoch == at.epoch and newest > at:
            raise WireError(f"entries follow the end at {at}")

    def _next(self, at: StreamId, entry: tuple[Any, dict[bytes, bytes] | None]) -> EventBatch | None:
        """The batch after a position; None for the end. Raises Conflict, Trimmed, WireError."""
        found, fields = StreamId.parse(entry[0]), entry[1] or {}
        if found.epoch != at.epoch:
            raise Conflict(f"{self._where}: this is epoch {found.epoch}, {at.epoch} was asked for")
        if found.position != at.position + 1 or START in fields:
            kept_from = found.position - (START not in fields)
            raise Trimmed(f"{self._where}: events are kept from {kept_from} on, {at.position} was asked for")
        if END in fields:
            return None
        if BATCH not in fields:
            raise WireError(f"entry {found} has no batch")
        batch = wire.decode(fields[BATCH])
        if (batch.epoch, batch.seq + 1) != found:
            raise WireError(f"entry {found} holds batch {batch.seq} of epoch {batch.epoch}")
        return batch
