"""ZmqPublisher: a worker's log on a PUB and a ROUTER socket, as vLLM publishes, and more for our own readers."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Coroutine
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, cast

import zmq

from kv_events.bus import zmq_frames as frames
from kv_events.bus.memory import tail
from kv_events.bus.zmq_sockets import QUEUED_MESSAGES, LoopSocket
from kv_events.log import EventLog, LoggedBatch
from kv_events.snapshot_bytes import encode_snapshot
from kv_events.wire import WireError, encode
from rhizome.errors import Conflict, InvalidRequest, Trimmed

logger = logging.getLogger(__name__)

PAGE_BATCHES = 256
PAGE_BYTES = 2**18
"""Of batches in one answer (one batch at least), or of a snapshot: what the loop is held for, and what a peer that asks
and does not read may pile up, times QUEUED_ANSWERS."""

QUEUED_ANSWERS = 32
MAX_RUNNING = 64
"""Foreign replays and snapshots at work at once. Further ones are refused."""

KEPT_SNAPSHOTS = 4
"""Readers fetch one piece by piece; the oldest goes when a further one is made, and its readers start again."""

STALLED_REPLAY_S = 10.0  # without a free place in the asker's queue, before a foreign replay is given up
STALL_LOOK_S = 0.002
BIND_PATIENCE_S = 1.0  # libzmq gives a port back some time after it says so
GOODBYE_LINGER_MS = 500
MAX_TOPICS = 4096  # subscribed to at once that are remembered: 1 MB


@dataclass(slots=True)
class PublisherCounts:
    """Since the start."""

    published: int = 0  # batches handed to libzmq, which drops what a slow subscriber has no room for
    skipped: int = 0  # batches that nobody had subscribed to
    requests: int = 0
    malformed: int = 0  # requests that were ignored
    refused: int = 0  # requests over a bound, and answers that their asker left no room for
    abandoned: int = 0  # foreign replays that were not finished


class ZmqPublisher:
    """See above. Made and closed in the event loop that it serves from; the engine only ever appends to the log."""

    def __init__(self, log: EventLog, topic: str, *, for_others: bool = False) -> None:
        """`for_others`: batches without our own fields, and no goodbye, for readers that take vLLM's shape strictly."""
        self.counts = PublisherCounts()
        self._log = log
        self._for_others = for_others
        self._topic = topic.encode()
        self._topics: dict[bytes, None] = {}  # that somebody has subscribed to, oldest first
        self._many_topics = False  # more than are remembered
        self._tasks: set[asyncio.Task[None]] = set()
        self._replays: dict[bytes, asyncio.Task[None]] = {}  # by who asked
        self._snapshots: dict[int, bytes] = {}
        self._snapshots_begun = secrets.randbits(60)  # tokens of a former process are not taken for these
        self._snapshot_lock = asyncio.Lock()
        # XPUB is PUB that says what is subscribed to.
        self._live = LoopSocket(zmq.XPUB, sndhwm=QUEUED_MESSAGES, maxmsgsize=frames.MAX_REQUEST_BYTES)
        self._asked = LoopSocket(
            zmq.ROUTER,
            router_mandatory=1,  # a full queue is an error, not a hole in the answer
            sndhwm=QUEUED_ANSWERS,
            rcvhwm=QUEUED_ANSWERS,
            maxmsgsize=frames.MAX_REQUEST_BYTES,
        )

    async def start(self, host: str, port: int, replay_port: int) -> tuple[int, int]:
        """Bind and serve; returns both ports. Raises InvalidRequest when one is taken."""
        ports = await _bind(self._live, host, port), await _bind(self._asked, host, replay_port)
        seq = self._log.next_seq
        for work in (self._publish(seq), self._watch_subscriptions(), self._answer()):
            self._start_task(work)
        await asyncio.sleep(0)  # from here on appends are heard of
        return ports

    async def close(self) -> None:
        """Stop serving. What was published may still leave for a moment."""
        for task in list(self._tasks):
            task.cancel()
        try:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:  # cancelled meanwhile, too
            self._asked.close()
            self._live.close(GOODBYE_LINGER_MS)

    def _start_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("events over zmq: %r", error, exc_info=error)

    # The PUB socket.

    async def _publish(self, seq: int) -> None:
        """Batches from `seq` on, then the goodbye. Never waits for a subscriber."""
        while True:
            try:
                async with aclosing(tail(self._log, 0, seq)) as entries:
                    async for entry in entries:
                        seq = entry.batch.seq + 1
                        if self._topics or self._many_topics:
                            self._live.send([self._topic, *self._numbered(entry)])
                            self.counts.published += 1
                        else:
                            self.counts.skipped += 1
                break
            except Trimmed:  # the engine was faster than this loop: subscribers see the gap, and ask
                seq = self._log.next_seq
        if not self._for_others:
            bye = frames.goodbye(self._log.epoch, seq)
            self._live.send([self._topic, frames.number_bytes(seq), bye])

    def _numbered(self, entry: LoggedBatch) -> tuple[bytes, bytes]:
        payload = encode(entry.batch, own_fields=False) if self._for_others else entry.payload
        return frames.number_bytes(entry.batch.seq), payload

    async def _watch_subscriptions(self) -> None:
        while True:
            change = await self._live.receive()
            if change is None or len(change) != 1 or change[0][:1] not in (b"\0", b"\1"):
                continue  # an XPUB passes on whatever else a peer sends
            topic = change[0][1:]
            if change[0][0] == 0:
                self._topics.pop(topic, None)
                continue
            self._topics[topic] = None
            if len(self._topics) > MAX_TOPICS:
                del self._topics[next(iter(self._topics))]
                self._many_topics = True

    # The ROUTER socket.

    async def _answer(self) -> None:
        while True:
            message = await self._asked.receive()
            if message is None:
                continue
            self.counts.requests += 1
            identity = message[0]
            try:
                number, request = frames.decode_request(message[1:])
            except WireError as error:
                self.counts.malformed += 1
                logger.debug("events over zmq: %s", error)
                continue
            self._take(identity, number, request)
            await asyncio.sleep(0)  # a flood of requests is not all that this loop does

    def _take(self, identity: bytes, number: int, request: frames.Request) -> None:
        match request:
            case frames.StateRequest(proof):
                self._send(identity, number, self._state(proven=proof in self._topics), [])
            case frames.ReplayRequest():
                self._send(identity, number, *self._page(request))
            case _ if len(self._tasks) >= MAX_RUNNING:
                self.counts.refused += 1
                if isinstance(request, frames.SnapshotRequest):
                    self._send(identity, number, self._state(frames.Status.BUSY, "too many ask for snapshots"), [])
            case frames.SnapshotRequest():
                self._start_task(self._send_piece(identity, number, request))
            case frames.ForeignReplay(from_seq):
                if (former := self._replays.get(identity)) is not None:
                    former.cancel()  # who asks anew has given up on it
                task = self._replays[identity] = self._start_task(self._replay_foreign(identity, from_seq))
                task.add_done_callback(lambda _: self._replays.get(identity) is task and self._replays.pop(identity))

    def _page(self, request: frames.ReplayRequest) -> tuple[frames.Answer, list[bytes]]:
        payloads: list[bytes] = []
        size = 0
        try:
            self._log.check_epoch(request.epoch)
            for entry in self._log.read(request.from_seq, PAGE_BATCHES):
                payloads.append(entry.payload)
                size += len(entry.payload)
                if size >= PAGE_BYTES:
                    break
        except Conflict as error:
            return self._state(frames.Status.CONFLICT, str(error)), []
        except Trimmed as error:
            return self._state(frames.Status.TRIMMED, str(error)), []
        return self._state(), payloads

    async def _replay_foreign(self, identity: bytes, from_seq: int) -> None:
        """All that is kept from `from_seq` to the newest, and the end."""
        seq, end = from_seq, self._log.next_seq
        try:
            while seq < end:
                try:
                    entries = self._log.read(max(seq, self._log.first_seq), PAGE_BATCHES)
                except Trimmed:
                    continue  # what was the first is so no longer
                for entry in entries:
                    seq = entry.batch.seq
                    await self._press(identity, [b"", self._topic, *self._numbered(entry)])
                seq += 1
                await asyncio.sleep(0)
            await self._press(identity, frames.END_OF_REPLAY)
        except (zmq.ZMQError, TimeoutError):  # it has left, or reads no more
            self.counts.abandoned += 1

    async def _press(self, identity: bytes, message: list[bytes]) -> None:
        """Send as soon as the asker's queue has room: libzmq does not say when that is."""
        if not self._asked.send([identity, *message]):
            async with asyncio.timeout(STALLED_REPLAY_S):
                while not self._asked.send([identity, *message]):
                    await asyncio.sleep(STALL_LOOK_S)

    async def _send_piece(self, identity: bytes, number: int, request: frames.SnapshotRequest) -> None:
        try:
            token = request.token or await self._fresh_snapshot()
        except WireError as error:  # too large to be sent
            self._send(identity, number, self._state(frames.Status.BUSY, str(error)), [])
            return
        data = self._snapshots.get(token)
        if data is None or request.offset > len(data):
            self._send(identity, number, self._state(frames.Status.TRIMMED, "this snapshot is not kept any more"), [])
            return
        piece = data[request.offset : request.offset + PAGE_BYTES]
        self._send(identity, number, self._state(token=token, total=len(data)), [piece])

    async def _fresh_snapshot(self) -> int:
        """The token of a snapshot that was begun after this was called: one for all who ask at once."""
        begun = self._snapshots_begun
        async with self._snapshot_lock:
            if self._snapshots_begun == begun or self._snapshots_begun not in self._snapshots:
                self._snapshots_begun += 1
                token = self._snapshots_begun
                data = await asyncio.to_thread(lambda: encode_snapshot(self._log.snapshot()))
                self._snapshots[token] = data
                if len(self._snapshots) > KEPT_SNAPSHOTS:
                    del self._snapshots[min(self._snapshots)]
            return self._snapshots_begun

    def _state(
        self,
        status: frames.Status = frames.Status.OK,
        detail: str = "",
        *,
        proven: bool = False,
        token: int = 0,
        total: int = 0,
    ) -> frames.Answer:
        detail = detail.encode()[: frames.MAX_DETAIL_BYTES].decode(errors="ignore")
        closed = self._log.closed  # before the number: nothing is appended after it
        return frames.Answer(
            status, detail, self._log.worker, self._log.epoch, self._log.next_seq, closed, proven, token, total
        )

    def _send(self, identity: bytes, number: int, answer: frames.Answer, parts: list[bytes]) -> None:
        sent = False
        with suppress(zmq.ZMQError):  # it has left
            sent = self._asked.send([identity, *frames.encode_answer(number, answer, parts)])
        self.counts.refused += not sent


async def _bind(socket: LoopSocket, host: str, port: int) -> int:
    name = f"[{host}]" if ":" in host else host
    deadline = asyncio.get_running_loop().time() + BIND_PATIENCE_S
    while True:
        try:
            socket.raw.bind(f"tcp://{name}:{port or '*'}")
        except zmq.ZMQError as error:
            if error.errno == zmq.EADDRINUSE and asyncio.get_running_loop().time() < deadline:
                await asyncio.sleep(0.02)
                continue
            raise InvalidRequest("events_url", f"zmq://{name}:{port}", f"a free port of this host ({error})") from error
        endpoint = cast(bytes, socket.raw.get(zmq.LAST_ENDPOINT))
        return int(endpoint.rstrip(b"\0").rpartition(b":")[2])
