"""Events of unmodified vLLM and SGLang servers over ZeroMQ: ForeignZmqSource makes an ordinary EventSource of them."""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any

import zmq

from kv_events.bus import zmq_frames as frames
from kv_events.bus.memory import Publication, PublicationSource
from kv_events.bus.url import BusUrl
from kv_events.bus.zmq_sockets import LoopSocket, asker, subscriber
from kv_events.foreign.mapper import IdentityMapper, KeyMapper, Mapper
from kv_events.foreign.stream import ForeignStream
from rhizome.errors import Unavailable

logger = logging.getLogger(__name__)

CONNECT_S = 0.5  # before a replay socket counts as not there
ANSWER_S = 1.0  # before a replay counts as over without its end: servers look at their socket every 0.1 s
SETTLE_S = 8.0  # for the first replay, or for finding that there is none
GONE_S = 3.0  # without a connection, before a server counts as gone: a restart takes longer, a hiccup does not
IDLE_CHECKS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Without a message, before the replay socket is asked whether one was missed: a PUB drops what a full queue does not
hold, and begins a subscription a moment after it was made. The last one goes on."""
MAX_ANSWERS = 2**20  # of one replay; vLLM keeps 10,000 batches by default

_CONNECTED = zmq.EVENT_HANDSHAKE_SUCCEEDED
_DISCONNECTED = zmq.EVENT_DISCONNECTED


class _Ended:
    """Whether a replay's end came."""

    answered = False


class ForeignZmqSource(PublicationSource):
    """An EventSource over a foreign server, which is read from the first use on until `close`.

    What the server says goes into a ForeignStream, whose log is what subscriptions read. Where the URL tells a model
    and a block size, its blocks get the keys that the fleet's routers look for under `secret`; else they keep their
    hashes.
    """

    def __init__(self, bus: BusUrl, secret: bytes = b"") -> None:
        """`bus` is a zmq:// URL. Nothing is reached yet."""
        self._bus = bus
        self._secret = secret
        self._stream: ForeignStream | None = None  # from when the server's name is known
        self._published: Publication | None = None
        self._topic: bytes | None = None  # of the first message: one server has one
        self._connected = False
        self._gone = False
        self._failure: Exception | None = None  # a defect: what is read from here on is not to be trusted
        self._heard = asyncio.Event()  # something to look after for the task that asks for replays
        self._settled = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._closing: list[LoopSocket] = []
        self.malformed = 0  # messages that are no numbered batch, or of another topic

    @property
    def stream(self) -> ForeignStream | None:
        """What is known of the server, and counts of what happened; None before its first answer."""
        return self._stream

    async def publication(self) -> Publication:
        """See PublicationSource. The first call waits until what the server keeps has been replayed.

        Raises RuntimeError after a defect here: the source is to be closed, and another one opened.
        """
        if not self._tasks:
            self._start()
        if not self._settled.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(SETTLE_S):
                    await self._settled.wait()
        if self._failure is not None:
            raise RuntimeError(f"events of {self._bus} are not read any more") from self._failure
        if self._stream is None or self._gone:
            raise Unavailable(f"no server publishes at {self._bus}")
        log = self._stream.log
        if self._published is None or self._published.log is not log or self._published.withdrawn:
            self._published = Publication(log)
        return self._published

    async def close(self) -> None:
        """Leave the server; subscriptions end."""
        for task in self._tasks:
            task.cancel()
        try:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:  # cancelled meanwhile, too
            for socket in self._closing:
                socket.close()
            if self._stream is not None:
                self._stream.close()

    def _start(self) -> None:
        live = subscriber(self._bus.topic.encode())
        monitor = LoopSocket.monitoring(live, _CONNECTED | _DISCONNECTED)
        live.connect(self._bus.host, self._bus.port)
        self._closing = [monitor, live]
        for work in (self._watch(monitor), self._read(live), self._ask()):
            self._tasks.append(asyncio.create_task(self._reported(work)))

    async def _reported(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            logger.exception("events of %s are not read any more", self._bus)
            self._failure = error
            self._withdraw()

    # The connection.

    async def _watch(self, monitor: LoopSocket) -> None:
        """What becomes of the connection, as libzmq says."""
        patience_s: float | None = GONE_S
        while True:
            message = await monitor.receive(patience_s)
            if message is None:
                patience_s = None
                self._withdraw()
                continue
            (event,) = struct.unpack_from("=H", message[0])
            self._connected = event == _CONNECTED
            patience_s = None if self._connected else GONE_S
            if self._connected:
                self._gone = False
                self._settled.clear()
                if self._stream is not None:
                    self._stream.connected()
                self._heard.set()

    def _withdraw(self) -> None:
        """The server is gone."""
        self._gone = True
        self._settled.set()
        if self._published is not None:
            self._published.withdraw()

    # The PUB socket.

    async def _read(self, live: LoopSocket) -> None:
        while True:
            message = await live.receive()
            if message is None:
                continue
            if (numbered := self._numbered(message)) is not None:
                self._named().offer(*numbered)
                self._heard.set()

    def _numbered(self, message: list[bytes]) -> tuple[int, bytes] | None:
        """Number and payload of `[topic, number, payload]`, or without the topic, if this is the server's."""
        *topics, number, payload = message if len(message) in (2, 3) else [b"", b""]
        if len(number) != frames.NUMBER_BYTES or number == frames.END:
            self._count_malformed("a message is no numbered batch")
            return None
        if topics:
            self._topic = topics[0] if self._topic is None else self._topic
            if topics[0] != self._topic:
                self._count_malformed(
                    f"topic {topics[0]!r:.99} besides {self._topic!r:.99}: name one in the URL (topic=)"
                )
                return None
        return frames.number_of(number), payload

    def _count_malformed(self, problem: str) -> None:
        self.malformed += 1
        logger.log(logging.WARNING if self.malformed == 1 else logging.DEBUG, "%s: %s", self._bus, problem)

    def _named(self) -> ForeignStream:
        """The stream; made when its worker's name has to be known, as far as it is."""
        if self._stream is None:
            bus = self._bus
            told = frames.worker_in(self._topic or b"") or frames.worker_in(bus.topic.encode())
            mapper: Mapper = IdentityMapper()
            if bus.model:
                mapper = KeyMapper(bus.model, bus.block_size, adapter=bus.adapter, secret=self._secret)
            epoch = time.time_ns() // 1_000_000  # grows from start to start
            self._stream = ForeignStream(bus.worker or told or bus.address, mapper, epoch)
            self._stream.connected()
        return self._stream

    # The ROUTER socket.

    async def _ask(self) -> None:
        """Replays, as the stream needs them; and while nothing comes, whether something was missed."""
        idle = 0
        while True:
            self._heard.clear()
            if self._connected and (self._stream is None or self._stream.needs_replay):
                await self._replay()
                continue
            if self._stream is not None and self._connected:
                self._settled.set()
            try:
                async with asyncio.timeout(IDLE_CHECKS_S[min(idle, len(IDLE_CHECKS_S) - 1)]):
                    await self._heard.wait()
                idle = 0
            except TimeoutError:
                idle += 1
                if self._connected and self._stream is not None and self._stream.in_step:
                    await self._replay_missed(self._stream)

    async def _replay(self) -> None:
        """One replay, from its beginning to its end or a bounded wait."""
        begun = self._stream
        asked = begun.begin_replay() if begun is not None else 0
        ended = _Ended()
        async with aclosing(self._answers(asked, ended)) as answers:
            async for number, payload in answers:
                if begun is None:  # the first answer tells who it is
                    begun = self._named()
                    begun.begin_replay()
                begun.replayed(number, payload)
        if begun is None:
            begun = self._named()
            begun.begin_replay()
        begun.end_replay(answered=ended.answered)

    async def _replay_missed(self, stream: ForeignStream) -> None:
        async with aclosing(self._answers(stream.next_seq, _Ended())) as answers:
            async for number, payload in answers:
                stream.offer(number, payload)

    async def _answers(self, from_seq: int, ended: _Ended) -> AsyncGenerator[tuple[int, bytes], None]:
        """What the server keeps from `from_seq` on; `ended` tells whether its end came."""
        asking = asker(
            self._bus.host, self._bus.replay_port
        )  # a socket of its own: no late answer is taken for one to this
        try:
            if not await asking.send_within([b"", frames.number_bytes(from_seq)], CONNECT_S):
                return
            for _ in range(MAX_ANSWERS):
                message = await asking.receive(ANSWER_S)
                if message is None:
                    return
                if len(message) in (3, 4) and message[-2:] == [frames.END, b""]:
                    ended.answered = True
                    return
                if message[0] == b"" and (numbered := self._numbered(message[1:])) is not None:
                    yield numbered
        finally:
            asking.close()
