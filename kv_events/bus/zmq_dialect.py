"""DialectSource: events at a zmq:// URL, whoever publishes there. Who it is shows when they are first read."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

import zmq

from kv_events.bus import zmq_frames as frames
from kv_events.bus.url import BusUrl
from kv_events.bus.zmq import ZmqEventSource
from kv_events.bus.zmq_sockets import LoopSocket, asker, subscriber
from kv_events.events import EventBatch, Snapshot
from kv_events.foreign.dialects import dialect_of
from kv_events.wire import WireError
from rhizome.errors import Unavailable

if TYPE_CHECKING:
    from kv_events.bus.foreign_zmq import ForeignZmqSource

TELL_S = 3.0
"""For the first answer or message. Servers look at their replay socket every 0.1 s; ours answers at once."""


ANSWER_S = 0.5
"""For an answer after a message in vLLM's shape: one of ours that publishes for others is read by its answers."""


class DialectSource:
    """An EventSource over a ZmqPublisher of ours or, where that is not what answers, a foreign server."""

    def __init__(self, bus: BusUrl, secret: bytes = b"") -> None:
        """`bus` is a zmq:// URL, `secret` the fleet's. Nothing is reached yet."""
        self._bus = bus
        self._secret = secret
        self._source: ZmqEventSource | ForeignZmqSource | None = None
        self._telling = asyncio.Lock()

    @property
    def foreign(self) -> bool:
        """Whether it is known to be a foreign server: it sends no digests, those of its batches are made here."""
        return self._source is not None and not isinstance(self._source, ZmqEventSource)

    async def source(self) -> ZmqEventSource | ForeignZmqSource:
        """A ZmqEventSource or a ForeignZmqSource. Raises Unavailable when nobody is there to tell which."""
        async with self._telling:
            if self._source is None:
                if self._bus.dialect == "auto" and await is_ours(self._bus):
                    self._source = ZmqEventSource(self._bus)
                else:
                    from kv_events.bus.foreign_zmq import ForeignZmqSource

                    self._source = ForeignZmqSource(self._bus, self._secret)
            return self._source

    async def subscribe(self, epoch: int, from_seq: int) -> AsyncGenerator[EventBatch, None]:
        async with aclosing((await self.source()).subscribe(epoch, from_seq)) as batches:
            async for batch in batches:
                yield batch

    async def replay(self, epoch: int, from_seq: int) -> list[EventBatch]:
        return await (await self.source()).replay(epoch, from_seq)

    async def snapshot(self) -> Snapshot:
        return await (await self.source()).snapshot()

    async def close(self) -> None:
        """Leave the publisher."""
        if isinstance(self._source, ZmqEventSource):
            self._source.close()
        elif self._source is not None:
            await self._source.close()


async def is_ours(bus: BusUrl) -> bool:
    """Whether a publisher of ours is there, by its answer to a probe or, if it is sooner and ours, its first batch;
    False, too, for one that does neither. Raises Unavailable when nobody is there."""
    live = subscriber(bus.topic.encode())
    monitor = LoopSocket.monitoring(live, zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
    asking = asker(bus.host, bus.replay_port)
    live.connect(bus.host, bus.port)
    answered = asyncio.create_task(_answered(asking))
    hearing = {answered, asyncio.create_task(_published(live))}
    try:
        told, _ = await asyncio.wait(hearing, timeout=TELL_S, return_when=asyncio.FIRST_COMPLETED)
        if told:
            if not any(task.result() for task in told) and answered not in told:
                told, _ = await asyncio.wait({answered}, timeout=ANSWER_S)
            return any(task.result() for task in told)
        connected = False
        while (message := monitor.take()) is not None:
            connected = struct.unpack_from("=H", message[0])[0] == zmq.EVENT_HANDSHAKE_SUCCEEDED
        if not connected:
            raise Unavailable(f"nobody publishes at {bus}")
        return False
    finally:
        for task in hearing:
            task.cancel()
        try:
            await asyncio.gather(*hearing, return_exceptions=True)
        finally:  # cancelled once more, too
            for socket in (asking, monitor, live):
                socket.close()


async def _answered(asking: LoopSocket) -> bool:
    await asking.send_within([b"", frames.PROBE], TELL_S)
    message = await asking.receive() or []
    try:
        frames.decode_answer(message)
    except WireError:
        return False
    return True


async def _published(live: LoopSocket) -> bool:
    message = await live.receive() or [b""]
    try:
        return dialect_of(message[-1]) == "rhizome"
    except WireError:
        return False
