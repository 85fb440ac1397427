"""Events over Redis: a worker's log published as a Redis Stream, and read from there (layout: redis_stream.py)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kv_events.bus.redis_publisher import KEPT_BATCHES, KEPT_BYTES, RedisPublisher
from kv_events.bus.redis_source import RedisEventSource
from kv_events.bus.redis_stream import without_login
from kv_events.bus.url import BusUrl
from kv_events.log import EventLog

GOODBYE_S = 1.0  # for what is left to send when the worker ends


@asynccontextmanager
async def open_source(bus: BusUrl) -> AsyncIterator[RedisEventSource]:
    """The events of a stream, until left. Raises InvalidRequest for credentials that cannot be read."""
    source = RedisEventSource(bus)
    try:
        yield source
    finally:
        await source.close()


@asynccontextmanager
async def publish(
    log: EventLog, bus: BusUrl, *, kept_batches: int = KEPT_BATCHES, kept_bytes: int = KEPT_BYTES
) -> AsyncIterator[str]:
    """Publish `log` until left; where it is closed by then, its goodbye too. Yields the URL without a login.

    Redis need not be there yet. Raises InvalidRequest for credentials that cannot be read.
    """
    publisher = RedisPublisher(log, bus, kept_batches=kept_batches, kept_bytes=kept_bytes)
    task = asyncio.create_task(publisher.run())
    try:
        yield without_login(bus).url
    finally:
        try:
            if log.closed:
                await asyncio.wait({task}, timeout=GOODBYE_S)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await publisher.close()
