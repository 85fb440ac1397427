"""Events within a process: the log itself, read from an event loop. The grpc bus serves from the same tail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from kv_events.events import EventBatch, Snapshot
from kv_events.log import EventLog, LoggedBatch

READ_BATCHES = 256
"""Taken from the log at a time: what one subscriber holds."""


class MemoryEventSource:
    """An EventSource over the log of a worker in the same process. See kv_events.bus.EventSource."""

    def __init__(self, log: EventLog) -> None:
        self._log = log

    async def subscribe(self, epoch: int, from_seq: int) -> AsyncGenerator[EventBatch, None]:
        async with aclosing(tail(self._log, epoch, from_seq)) as entries:
            async for entry in entries:
                yield entry.batch

    async def replay(self, epoch: int, from_seq: int) -> list[EventBatch]:
        self._log.check_epoch(epoch)
        return self._log.since(from_seq)

    async def snapshot(self) -> Snapshot:
        return self._log.snapshot()


async def tail(log: EventLog, epoch: int, from_seq: int) -> AsyncGenerator[LoggedBatch, None]:
    """What `log` keeps from `from_seq` on, then what is appended, until it is closed.

    Raises Conflict for another epoch or a position that the log has not reached, Trimmed when batches that were not
    read yet are gone. Nothing is queued: however slow the reader, it holds READ_BATCHES batches at most.
    """
    log.check_epoch(epoch)
    signal = _Signal()
    log.subscribe(signal)
    try:
        while True:
            closed = log.closed  # before reading: a close after it is seen next time
            entries = log.read(from_seq, READ_BATCHES)
            for entry in entries:
                yield entry
            from_seq += len(entries)
            if not entries:
                if closed:
                    return
                await signal.wait()
    finally:
        log.unsubscribe(signal)


class _Signal:
    """Carries "something is new" from any thread to the loop that made it, at most once until it is heard."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._pending = False

    def __call__(self) -> None:
        if not self._pending:
            self._pending = True
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        await self._event.wait()
        self._event.clear()
        self._pending = False  # before the log is read: whoever finds it set has appended already
