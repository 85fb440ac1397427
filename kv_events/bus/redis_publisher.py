"""A worker's log, published as a stream in Redis: a task beside the worker, which Redis cannot hold up.

The log's ring is all that is kept while Redis is away. See kv_events.bus.redis_stream for the layout of the stream.
"""

from __future__ import annotations

import asyncio
import logging
import random
from contextlib import suppress
from typing import Any

from kv_events.bus.memory import Signal
from kv_events.bus.redis_stream import (
    BATCH,
    END,
    START,
    TTL_S,
    StreamId,
    connect,
    last_entry,
    said,
    snapshot_key,
    without_login,
)
from kv_events.bus.redis_window import Window
from kv_events.bus.url import BusUrl
from kv_events.log import EventLog, LoggedBatch
from kv_events.snapshot_bytes import encode_snapshot
from rhizome.errors import Trimmed

logger = logging.getLogger(__name__)

KEPT_BATCHES = 8192  # 80 s of 10 ms steps, as the log keeps: a reader that is away for longer takes the snapshot
KEPT_BYTES = 32 * 2**20  # of payload: reading more than that costs more than a snapshot
PIPELINED_BATCHES = 256  # a round trip; encoding as many takes some milliseconds of the worker's event loop
PIPELINED_BYTES = 4 * 2**20  # of payload; a larger batch goes alone
REFRESH_S = 10.0  # the keys' life is prolonged, which also shows whether they are there
SNAPSHOT_S = 30.0  # the oldest snapshot of a worker that goes on: a bad entry in the stream is healed after that
FIRST_RETRY_S, MAX_RETRY_S = 0.1, 5.0


class _Superseded(Exception):
    """The stream is another's."""


class _Lost(Exception):
    """The stream is not as this publisher left it."""


class RedisPublisher:
    """Keeps a stream in Redis in step with a log. The engine appends to the log, and knows nothing of this."""

    def __init__(
        self, log: EventLog, bus: BusUrl, *, kept_batches: int = KEPT_BATCHES, kept_bytes: int = KEPT_BYTES
    ) -> None:
        """Redis need not be there yet. Raises InvalidRequest for credentials that cannot be read."""
        self._log = log
        self._where = str(without_login(bus))
        self._stream, self._snapshot_key = bus.name, snapshot_key(bus.name)
        self._max_batches, self._max_bytes = kept_batches, kept_bytes
        self._redis: Any = connect(bus)
        self._window: Window | None = None  # what the stream keeps of this epoch; None: it has not begun
        self._trimmed = 0  # the position before which entries were let go
        self._refreshed_s = self._snapshot_s = 0.0  # when, on the loop's clock
        self._failures = 0  # in a row

    async def close(self) -> None:
        """Close the connection."""
        await self._redis.aclose()

    async def run(self) -> None:
        """Publish until the log is closed and its end is written, or the stream is found to be another's."""
        from redis.exceptions import RedisError

        signal = Signal()
        self._log.subscribe(signal)
        try:
            while True:
                try:
                    if await self._attach():
                        await self._publish(signal)
                    return
                except _Superseded as error:
                    logger.error("%s: %s; nothing is published there any more", self._where, error)
                    return
                except (Trimmed, _Lost) as error:
                    logger.info("%s: %s; looking where it stands", self._where, error)
                except (RedisError, OSError) as error:
                    level = logging.DEBUG if self._failures else logging.WARNING  # said once an outage
                    logger.log(level, "%s: %s; trying until events can be published there", self._where, said(error))
                except Exception:  # a defect here must not end the stream for good
                    logger.log(logging.ERROR, "%s: publishing failed", self._where, exc_info=not self._failures)
                delay_s = min(MAX_RETRY_S, FIRST_RETRY_S * 2.0 ** min(self._failures, 10))
                self._failures += 1
                await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
        finally:
            self._log.unsubscribe(signal)

    # What happens once after each connection or surprise.

    async def _attach(self) -> bool:
        """Find out where the stream stands, and begin it where need be; false when its end is written already."""
        from redis.exceptions import WatchError

        async with self._redis.pipeline() as pipe:
            await pipe.watch(self._stream)
            last = await last_entry(pipe, self._stream)
            if self._is_over(last):
                return False
            log, position = self._log, last[0].position if last else -1
            goes_on = last is not None and last[0].epoch == log.epoch and log.first_seq <= position <= log.next_seq
            try:
                if not goes_on:
                    await self._begin(pipe, is_new=last is None)
            except WatchError:
                raise _Lost("somebody else wrote to it") from None
        if goes_on:
            self._resume(position)
            await self._write_snapshot()
        return True

    def _is_over(self, last: tuple[StreamId, Any] | None) -> bool:
        """Whether the stream has this log's end. Raises _Superseded when its last entry cannot be of this log."""
        if last is None:
            return False
        newest, fields = last
        if newest == (self._log.epoch, self._log.next_seq + 1) and END in fields:
            return True
        if newest > (self._log.epoch, self._log.next_seq):
            raise _Superseded(
                f"it is at {newest}, and worker {self._log.worker} at {self._log.epoch}-{self._log.next_seq}: a newer "
                "start of this worker, or another one, publishes there"
            )
        return False

    async def _begin(self, pipe: Any, *, is_new: bool) -> None:
        """Start the stream at the oldest batch that the log keeps, in one transaction with a snapshot."""
        first = self._log.first_seq  # before the snapshot, which then joins whatever is appended meanwhile
        snapshot = await asyncio.to_thread(self._log.snapshot)
        if first:  # the oldest may be gone by the time that they are sent
            first += (snapshot.next_seq - first) // 4
        start = StreamId(self._log.epoch, first)
        data = await asyncio.to_thread(encode_snapshot, snapshot)
        pipe.multi()
        if is_new:
            pipe.delete(self._stream)  # one whose entries were all deleted would refuse smaller IDs
        pipe.execute_command("XADD", self._stream, "MINID", "=", str(start), str(start), START, b"")
        pipe.expire(self._stream, TTL_S)
        pipe.set(self._snapshot_key, data, ex=TTL_S)
        await pipe.execute()
        self._window = Window(first, snapshot.next_seq, max_batches=self._max_batches, max_bytes=self._max_bytes)
        self._trimmed = first
        self._written(snapshot=True)

    def _resume(self, position: int) -> None:
        """Go on from a position of this epoch that the stream has reached: its entries may be more than are known of,
        when an answer was lost, or fewer, when Redis came back with less."""
        window = self._window
        if window is None or not window.first <= window.next <= position:
            self._window = Window(position, position, max_batches=self._max_batches, max_bytes=self._max_bytes)
            self._trimmed = position
            return
        for entry in self._log.read(window.next, position - window.next):
            window.add(len(entry.payload))

    # What happens all the time.

    async def _publish(self, signal: Signal) -> None:
        loop = asyncio.get_running_loop()
        while True:
            closed = self._log.closed  # before reading: a close after it is seen next time
            sent = await self._send_next()
            window = self._kept()
            age_s = loop.time() - self._snapshot_s
            if window.snapshot_is_old or (window.snapshot_is_behind and age_s >= SNAPSHOT_S):
                await self._write_snapshot()
            elif closed and not sent:
                await self._say_goodbye()
                return
            elif loop.time() - self._refreshed_s >= REFRESH_S:
                await self._refresh()
            elif not sent:
                with suppress(TimeoutError):
                    async with asyncio.timeout(REFRESH_S):
                        await signal.wait()

    async def _send_next(self) -> int:
        """Send what is new, as much as goes in one round trip; returns how many batches. Raises Trimmed."""
        window = self._kept()
        entries = _within(self._log.read(window.next, PIPELINED_BATCHES), PIPELINED_BYTES)
        if not entries:
            return 0
        pipe = self._redis.pipeline(transaction=False)
        for entry in entries[:-1]:
            self._add(pipe, entry)
        if window.first > self._trimmed:
            self._add(pipe, entries[-1], "MINID", "~", str(StreamId(self._log.epoch, window.first + 1)))
        else:
            self._add(pipe, entries[-1])
        for entry, reply in zip(entries, await pipe.execute(raise_on_error=False), strict=True):
            if reply is None:
                raise _Lost("it is gone")
            if isinstance(reply, Exception):
                raise _Lost(said(reply)) if "equal or smaller" in str(reply) else reply
            window.add(len(entry.payload))
        self._trimmed = window.first
        self._written()
        return len(entries)

    def _add(self, pipe: Any, entry: LoggedBatch, *trim: str) -> None:
        stream_id = StreamId(entry.batch.epoch, entry.batch.seq + 1)
        pipe.execute_command("XADD", self._stream, "NOMKSTREAM", *trim, str(stream_id), BATCH, entry.payload)

    async def _write_snapshot(self) -> None:
        """Replace the snapshot by one of now, once the stream has got so far; not where the stream is another's."""
        from redis.exceptions import WatchError

        snapshot = await asyncio.to_thread(self._log.snapshot)
        data = await asyncio.to_thread(encode_snapshot, snapshot)
        window = self._kept()
        while window.next < snapshot.next_seq:
            await self._send_next()
        async with self._redis.pipeline() as pipe:
            await pipe.watch(self._stream)
            last = await last_entry(pipe, self._stream)
            if last is None or last[0] != (self._log.epoch, window.next):
                raise _Lost(f"it is at {last and last[0]}, not at {self._log.epoch}-{window.next}")
            pipe.multi()
            pipe.set(self._snapshot_key, data, ex=TTL_S)
            pipe.expire(self._stream, TTL_S)
            try:
                await pipe.execute()
            except WatchError:
                raise _Lost("somebody else wrote to it") from None
        window.snapshot_taken(snapshot.next_seq)
        self._written(snapshot=True)

    async def _refresh(self) -> None:
        """Let both keys live on."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.expire(self._stream, TTL_S)
            pipe.expire(self._snapshot_key, TTL_S)
            if not all(await pipe.execute()):
                raise _Lost("it, or its snapshot, is gone")
        self._refreshed_s = asyncio.get_running_loop().time()
        self._written()

    async def _say_goodbye(self) -> None:
        end = StreamId(self._log.epoch, self._kept().next + 1)
        reply = await self._redis.execute_command("XADD", self._stream, "NOMKSTREAM", str(end), END, b"")
        if reply is None:
            raise _Lost("it is gone")

    def _kept(self) -> Window:
        assert self._window is not None, "attached"
        return self._window

    def _written(self, *, snapshot: bool = False) -> None:
        """Redis took something."""
        if self._failures:
            logger.info("%s: events of worker %s are published", self._where, self._log.worker)
        self._failures = 0
        if snapshot:
            self._refreshed_s = self._snapshot_s = asyncio.get_running_loop().time()


def _within(entries: list[LoggedBatch], size_bytes: int) -> list[LoggedBatch]:
    """As many of the first entries as have no more payload than that, but one at least."""
    for count, entry in enumerate(entries):
        size_bytes -= len(entry.payload)
        if size_bytes < 0:
            return entries[: max(1, count)]
    return entries
