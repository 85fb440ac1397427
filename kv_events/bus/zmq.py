"""Events over ZeroMQ: ZmqEventSource reads what ZmqPublisher publishes, and foreign servers are told apart."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from kv_events import wire
from kv_events.bus import MAX_REPLAY_BATCHES, MAX_REPLAY_BYTES, EventSource
from kv_events.bus import zmq_frames as frames
from kv_events.bus.url import BusUrl
from kv_events.bus.zmq_publisher import ZmqPublisher
from kv_events.bus.zmq_sockets import LoopSocket, asker, subscriber
from kv_events.events import EventBatch, Snapshot
from kv_events.log import EventLog
from kv_events.snapshot_bytes import decode_snapshot
from kv_events.wire import WireError
from rhizome.errors import Conflict, Trimmed, Unavailable

logger = logging.getLogger(__name__)

CONNECT_S = 1.0  # before a publisher counts as not there
ANSWER_S = 1.0  # before a request is sent once more
TRIES = 3
SNAPSHOT_S = 30.0  # for a snapshot to be made: a million blocks take a second
IDLE_CHECK_S = 0.5
"""Without a batch, before the publisher is asked where it stands: the last one may have been dropped, or the publisher
be gone or another, which libzmq does not say."""
PROOF_S = 1.0  # for a subscription to be in force; afterwards the idle check finds what was missed
MAX_RESTARTS = 3  # of a snapshot whose pieces are not kept any more


@asynccontextmanager
async def publish(log: EventLog, bus: BusUrl) -> AsyncIterator[str]:
    """Publish `log` until left; yields the URL to read it at. See kv_events.bus.url.publishing."""
    for_others = bus.dialect in ("vllm", "sglang")
    topic = bus.topic or frames.topic_of(log.worker, bus.model)
    publisher = ZmqPublisher(log, topic, for_others=for_others)
    try:
        port, replay_port = await publisher.start(bus.host, bus.port, bus.replay_port)
        dialect = "vllm" if for_others else "rhizome"
        yield BusUrl("zmq", host=bus.host, port=port, replay_port=replay_port, dialect=dialect).url
    finally:
        await publisher.close()


@asynccontextmanager
async def open_source(bus: BusUrl, *, secret: bytes = b"") -> AsyncIterator[EventSource]:
    """The events at a zmq:// URL, in whichever dialect. See kv_events.bus.url.open_source."""
    if bus.dialect == "rhizome":
        source = ZmqEventSource(bus)
        try:
            yield source
        finally:
            source.close()
    else:
        from kv_events.bus.zmq_dialect import DialectSource

        told_apart = DialectSource(bus, secret)
        try:
            yield told_apart
        finally:
            await told_apart.close()


class ZmqEventSource:
    """An EventSource over a ZmqPublisher. See kv_events.bus.EventSource.

    The PUB socket brings what is new, the ROUTER socket all that is missing: what came before the subscription, what a
    full queue dropped, what was lost with a connection. So a subscription is as gapless as the worker's log.
    """

    def __init__(self, bus: BusUrl) -> None:
        """`bus` is a zmq:// URL. Nothing is reached yet."""
        self._bus = bus
        self._asking: LoopSocket | None = None
        self._lock = asyncio.Lock()  # one request at a time
        self._closed = False
        self._numbers = itertools.count(secrets.randbits(32))

    def close(self) -> None:
        """Close the connection for requests; subscriptions end."""
        self._closed = True
        if self._asking is not None:
            self._asking.close()
            self._asking = None

    async def subscribe(self, epoch: int, from_seq: int) -> AsyncGenerator[EventBatch, None]:
        proof = frames.PROOF_PREFIX + secrets.token_bytes(16)
        live = subscriber(self._bus.topic.encode(), proof)
        live.connect(self._bus.host, self._bus.port)
        try:
            state = await self._state_at(proof)
            if epoch not in (0, state.epoch):
                raise Conflict(f"{state.worker}: this is epoch {state.epoch}, {epoch} was asked for")
            epoch, seq, newest = state.epoch, from_seq, -1
            behind = True  # the first page is asked for in any case: it tells Conflict and Trimmed
            while True:
                while behind:
                    state, payloads = await self._page(epoch, seq)
                    for payload in payloads:
                        yield _batch(payload, state.worker, epoch, seq)
                        seq += 1
                    behind = bool(payloads) and seq < state.next_seq
                if state.closed and seq >= state.next_seq:
                    return
                message = await live.receive(IDLE_CHECK_S)
                if message is None:
                    state = await self._current_state(epoch)
                    behind = seq < state.next_seq
                    continue
                number, payload = _live(message)
                if frames.is_goodbye(payload, epoch, number):
                    state = replace(state, closed=True, next_seq=number)
                    behind = seq < number
                elif number > seq:
                    behind = True  # that brings this one, too
                elif payload[:1] == frames.FOR_OTHERS:
                    if number <= newest:  # a publisher's numbers rise: this is another one
                        await self._current_state(epoch)
                    behind = number == seq  # the answer has our own fields
                else:
                    batch = _batch(payload, state.worker, epoch, number)
                    if number == seq:
                        seq += 1
                        yield batch
                newest = number
        finally:
            live.close()

    async def replay(self, epoch: int, from_seq: int) -> list[EventBatch]:
        batches: list[EventBatch] = []
        size_bytes = 0
        while True:
            state, payloads = await self._page(epoch, from_seq)
            size_bytes += sum(map(len, payloads))
            epoch = state.epoch  # the pages are of one stream
            for payload in payloads:
                batches.append(_batch(payload, state.worker, epoch, from_seq))
                from_seq += 1
            if not payloads or from_seq >= state.next_seq:
                return batches
            if len(batches) >= MAX_REPLAY_BATCHES:
                raise WireError(f"the replay holds more than {MAX_REPLAY_BATCHES} batches")
            if size_bytes > MAX_REPLAY_BYTES:
                raise WireError(f"the replay holds more than {MAX_REPLAY_BYTES} bytes")

    async def snapshot(self) -> Snapshot:
        for _ in range(MAX_RESTARTS):
            try:
                return await asyncio.to_thread(decode_snapshot, await self._snapshot_bytes())
            except Trimmed as error:
                problem = error
        raise Unavailable(f"the snapshot is made anew faster than it can be read ({problem})")

    async def _snapshot_bytes(self) -> bytes:
        """Raises Trimmed when the publisher does not keep it for long enough."""
        answer, parts = await self._ask(frames.SnapshotRequest(), SNAPSHOT_S)
        data = bytearray()
        while True:
            if len(parts) != 1 or not parts[0] or len(data) + len(parts[0]) > answer.total:
                raise WireError(f"a piece of a snapshot of {answer.total} bytes does not fit behind {len(data)}")
            data += parts[0]
            if len(data) == answer.total:
                return bytes(data)
            total = answer.total
            answer, parts = await self._ask(frames.SnapshotRequest(answer.token, len(data)))
            if answer.total != total:
                raise WireError(f"the snapshot has {total} bytes, then {answer.total}")

    async def _state_at(self, proof: bytes) -> frames.Answer:
        """Where the publisher stands, once it knows of the subscription: all batches from there on will come."""
        loop = asyncio.get_running_loop()
        state, _ = await self._ask(frames.StateRequest(proof))
        deadline = loop.time() + PROOF_S
        while not state.proven and loop.time() < deadline:
            await asyncio.sleep(0.002)
            state, _ = await self._ask(frames.StateRequest(proof))
        return state

    async def _current_state(self, epoch: int) -> frames.Answer:
        state, _ = await self._ask(frames.StateRequest())
        if state.epoch != epoch:
            raise Unavailable(f"{state.worker} has started anew: epoch {epoch} is over, this is {state.epoch}")
        return state

    async def _page(self, epoch: int, seq: int) -> tuple[frames.Answer, list[bytes]]:
        return await self._ask(frames.ReplayRequest(epoch, seq))

    async def _ask(self, request: frames.Request, patience_s: float | None = None) -> tuple[frames.Answer, list[bytes]]:
        """The answer, when it is none of an error. Raises Unavailable when there is none in time, Conflict, Trimmed."""
        async with self._lock:
            if self._closed:
                raise Unavailable(f"the source {self._bus} is closed")
            if self._asking is None:
                self._asking = asker(self._bus.host, self._bus.replay_port)
            answer, parts = await self._exchange(self._asking, request, patience_s or ANSWER_S * TRIES)
        match answer.status:
            case frames.Status.CONFLICT:
                raise Conflict(answer.detail)
            case frames.Status.TRIMMED:
                raise Trimmed(answer.detail)
            case frames.Status.BUSY:
                raise Unavailable(answer.detail)
        return answer, parts

    async def _exchange(
        self, asking: LoopSocket, request: frames.Request, patience_s: float
    ) -> tuple[frames.Answer, list[bytes]]:
        number = next(self._numbers)
        message = frames.encode_request(number, request)
        for _ in range(TRIES):  # requests change nothing: a second one, for an answer that got lost, does no harm
            if not await asking.send_within(message, CONNECT_S):
                break
            deadline = asyncio.get_running_loop().time() + patience_s / TRIES
            while (left_s := deadline - asyncio.get_running_loop().time()) > 0:
                reply = await asking.receive(left_s)
                if reply is None:
                    break
                answered, answer, parts = frames.decode_answer(reply)
                if answered == number:
                    return answer, parts
        raise Unavailable(f"nobody answers at {self._bus}")


def _live(message: list[bytes]) -> tuple[int, bytes]:
    if len(message) != 3:
        raise WireError(f"a message has {len(message)} frames: topic, number and payload are needed")
    return frames.number_of(message[1]), message[2]


def _batch(payload: bytes, worker: str, epoch: int, seq: int) -> EventBatch:
    """The batch, if it is that one. Raises WireError for other bytes, Unavailable for another epoch."""
    batch = wire.decode(payload)
    if batch.epoch != epoch:
        raise Unavailable(f"{batch.worker} has started anew: epoch {epoch} is over, this is {batch.epoch}")
    if batch.worker != worker or batch.seq != seq:
        raise WireError(f"batch {seq} of {worker} claims to be {batch.seq} of {batch.worker}")
    return batch
