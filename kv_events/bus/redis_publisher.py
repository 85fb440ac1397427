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
    TRANSFER_S,
    TTL_S,
    StreamId,
    answer,
    connect,
    last_entry,
    said,
    snapshot_key,
    without_login,
)
from kv_events.bus.redis_window import Window
from kv_events.bus.url import BusUrl
from kv_events.events import Snapshot
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
MAX_SUPERSEDED_S = 30.0  # between looks at a stream that is another's: it expires TTL_S after that one was heard last

WRITE_SNAPSHOT = """
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
local at = last and last[1] or ''
if at ~= ARGV[1] then
    return at
end
if ARGV[2] ~= '' then
    if not last then
        redis.call('DEL', KEYS[1])
    end
    redis.call('XADD', KEYS[1], 'MINID', '=', ARGV[2], ARGV[2], 'start', '')
end
redis.call('SET', KEYS[2], ARGV[3], 'EX', ARGV[4])
redis.call('EXPIRE', KEYS[1], ARGV[4])
return false
"""
"""Of the keys of stream and snapshot, and: where the stream must be, where it starts anew (or ''), the snapshot, TTL_S.
Answers where the stream is if that is elsewhere, having written nothing. (A stream whose entries were all deleted would
refuse IDs smaller than theirs, so it is deleted.)"""


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
        self._away = False  # failures were told of
        self._superseded = False  # it was told that the stream is another's

    async def close(self) -> None:
        """Close the connection."""
        await self._redis.aclose()

    async def run(self) -> None:
        """Publish until the log is closed and its end is written, or may not be.

        A stream that is another's is only looked at, until it is gone: what is there may be a newer start of this
        worker, but also what a later one, or a clock that was ahead, left behind.
        """
        from redis.exceptions import RedisError

        signal = Signal()
        self._log.subscribe(signal)
        try:
            while True:
                longest_s = MAX_RETRY_S
                try:
                    if await self._attach():
                        await self._publish(signal)
                    return
                except _Superseded as error:
                    if self._log.closed:
                        return
                    longest_s = MAX_SUPERSEDED_S
                    level = logging.DEBUG if self._superseded else logging.ERROR
                    logger.log(level, "%s: %s; nothing is published there until that is gone", self._where, error)
                    self._superseded = True
                except (Trimmed, _Lost) as error:
                    logger.info("%s: %s; looking where it stands", self._where, error)
                except (RedisError, OSError) as error:
                    self._tell(logging.WARNING, f"{said(error)}; trying until events can be published there")
                except Exception as error:  # a defect here must not end the stream for good
                    self._tell(logging.ERROR, f"{error!r}; trying again", exc_info=True)
                delay_s = min(longest_s, FIRST_RETRY_S * 2.0 ** min(self._failures, 10))
                self._failures += 1
                await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
        finally:
            self._log.unsubscribe(signal)

    # What happens once after each connection or surprise.

    async def _attach(self) -> bool:
        """Find out where the stream stands, and begin it where need be; false when its end is written already."""
        last = await last_entry(self._redis, self._stream)
        if self._is_over(last):
            return False
        log, at = self._log, last[0] if last else None
        if at is None or at.epoch != log.epoch or at.position < log.first_seq:
            await self._begin(at)
        else:
            self._resume(at.position)
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

    async def _begin(self, at: StreamId | None) -> None:
        """Start the stream, which is at `at`, at the oldest batch that the log keeps, together with a snapshot."""
        first = self._log.first_seq  # before the snapshot, which then joins whatever is appended meanwhile
        snapshot = await asyncio.to_thread(self._log.snapshot)
        if first:  # the oldest may be gone by the time that they are sent
            first += (snapshot.next_seq - first) // 4
        await self._set_snapshot(at, snapshot, StreamId(self._log.epoch, first))
        self._window = Window(first, snapshot.next_seq, max_batches=self._max_batches, max_bytes=self._max_bytes)
        self._trimmed = first

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
        first = window.first
        trim = ("MINID", "~", str(StreamId(self._log.epoch, first + 1))) if first > self._trimmed else ()
        self._add(pipe, entries[-1], *trim)
        replies = await answer(pipe.execute(raise_on_error=False))
        for entry, reply in zip(entries, replies, strict=True):
            if reply is None:
                raise _Lost("it is gone")
            if isinstance(reply, Exception):
                raise _Lost(said(reply)) if "equal or smaller" in str(reply) else reply
            window.add(len(entry.payload))
        self._trimmed = first
        self._written()
        return len(entries)

    def _add(self, pipe: Any, entry: LoggedBatch, *trim: str) -> None:
        stream_id = StreamId(entry.batch.epoch, entry.batch.seq + 1)
        pipe.execute_command("XADD", self._stream, "NOMKSTREAM", *trim, str(stream_id), BATCH, entry.payload)

    async def _write_snapshot(self) -> None:
        """Replace the snapshot by one of now, once the stream has got so far."""
        snapshot = await asyncio.to_thread(self._log.snapshot)
        window = self._kept()
        while window.next < snapshot.next_seq:
            await self._send_next()
        await self._set_snapshot(StreamId(self._log.epoch, window.next), snapshot)
        window.snapshot_taken(snapshot.next_seq)

    async def _set_snapshot(self, at: StreamId | None, snapshot: Snapshot, start: StreamId | None = None) -> None:
        """Write it, and a new start, if the stream is at `at`, and so this publisher's. Raises _Lost."""
        data = await asyncio.to_thread(encode_snapshot, snapshot)
        ids = (str(at or ""), str(start or ""))
        writing = self._redis.eval(WRITE_SNAPSHOT, 2, self._stream, self._snapshot_key, *ids, data, str(TTL_S))
        found = await answer(writing, TRANSFER_S)
        if found is not None:
            raise _Lost(f"it is at {found!r}, not at {at}")
        self._refreshed_s = self._snapshot_s = asyncio.get_running_loop().time()
        self._written()

    async def _refresh(self) -> None:
        """Let both keys live on."""
        pipe = self._redis.pipeline(transaction=False)
        pipe.expire(self._stream, TTL_S)
        pipe.expire(self._snapshot_key, TTL_S)
        if not all(await answer(pipe.execute())):
            raise _Lost("it, or its snapshot, is gone")
        self._refreshed_s = asyncio.get_running_loop().time()
        self._written()

    async def _say_goodbye(self) -> None:
        end = StreamId(self._log.epoch, self._kept().next + 1)
        adding = self._redis.execute_command("XADD", self._stream, "NOMKSTREAM", str(end), END, b"")
        if await answer(adding) is None:
            raise _Lost("it is gone")

    def _kept(self) -> Window:
        assert self._window is not None, "attached"
        return self._window

    def _written(self) -> None:
        """Redis took something."""
        if self._away or self._superseded:
            logger.info("%s: events of worker %s are published", self._where, self._log.worker)
        self._failures, self._away, self._superseded = 0, False, False

    def _tell(self, level: int, what: str, *, exc_info: bool = False) -> None:
        """Once in each outage."""
        logger.log(logging.DEBUG if self._away else level, "%s: %s", self._where, what, exc_info=exc_info)
        self._away = True


def _within(entries: list[LoggedBatch], size_bytes: int) -> list[LoggedBatch]:
    """As many of the first entries as have no more payload than that, but one at least."""
    for count, entry in enumerate(entries):
        size_bytes -= len(entry.payload)
        if size_bytes < 0:
            return entries[: max(1, count)]
    return entries
