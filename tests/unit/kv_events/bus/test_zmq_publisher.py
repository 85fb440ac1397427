"""What a worker of ours publishes over ZeroMQ, read in plain pyzmq as vLLM's consumers do; and hostile peers."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq

from kv_events.bus import zmq_publisher
from kv_events.bus.url import BusUrl, open_source, parse_bus_url, publishing
from kv_events.bus.zmq_publisher import PAGE_BATCHES, ZmqPublisher
from kv_events.events import BlockStored
from kv_events.log import EventLog
from rhizome.errors import InvalidRequest

PATIENCE_S = 60.0
END = b"\xff" * 8


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, PATIENCE_S))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def append(log: EventLog, *hashes: int) -> None:
    log.append([BlockStored(np.array(hashes, dtype=np.uint64), 0, 16)], 1.25)


class Consumer:
    """A consumer's sockets: SUB, and DEALER or REQ."""

    def __init__(self, url: str, topic: bytes = b"", asking: int = zmq.DEALER) -> None:
        bus = parse_bus_url(url)
        self._context = zmq.Context()
        self.live = self._context.socket(zmq.SUB)
        self.live.setsockopt(zmq.SUBSCRIBE, topic)
        self.live.setsockopt(zmq.SNDHWM, 0)  # of subscriptions
        self.live.connect(f"tcp://{bus.address}")
        self.asking = self._context.socket(asking)
        self.asking.connect(f"tcp://{bus.host}:{bus.replay_port}")

    async def receive(self, socket: zmq.Socket[bytes]) -> list[bytes]:
        while not socket.poll(0):
            await asyncio.sleep(0.001)
        return socket.recv_multipart()

    async def replay(self, seq: int) -> list[list[bytes]]:
        """All answers to a request, the end with them."""
        self.asking.send_multipart([b"", struct.pack(">Q", seq)])
        answers = []
        while not answers or answers[-1][-2:] != [END, b""]:
            answers.append(await self.receive(self.asking))
        return answers

    async def subscribed(self, log: EventLog) -> list[bytes]:
        """The first live message: something is appended until one comes."""
        while not self.live.poll(1):
            append(log, 2**60 + log.next_seq)
            await asyncio.sleep(0.001)
        return self.live.recv_multipart()

    def close(self) -> None:
        self._context.destroy(linger=0)


@asynccontextmanager
async def published(log: EventLog, topic: str = "kv@w0@m") -> AsyncIterator[tuple[ZmqPublisher, str]]:
    publisher = ZmqPublisher(log, topic)
    try:
        port, replay = await publisher.start("127.0.0.1", 0, 0)
        yield publisher, BusUrl("zmq", host="127.0.0.1", port=port, replay_port=replay).url
    finally:
        await publisher.close()


@asynccontextmanager
async def consumer(url: str, **options: Any) -> AsyncIterator[Consumer]:
    made = Consumer(url, **options)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize(
    ("topic", "asked", "subscribed", "hears"),
    [
        ("", "kv@w0@m", b"", True),
        ("", "kv@w0@m", b"kv@", True),
        ("", "kv@w0@m", b"kv@w1", False),
        ("", "", b"kv@w0@", True),
        ("own", "kv@w0@m", b"own", True),
    ],
)
def test_live_batches_come_as_vllm_sends_them(topic: str, asked: str, subscribed: bytes, hears: bool) -> None:
    """[topic, 8-byte big-endian number, msgpack], to whoever subscribed to a prefix of the topic."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        url = f"zmq://127.0.0.1:0?topic={topic}" if topic else "zmq://127.0.0.1:0"
        async with publishing(log, url, topic=asked) as where:
            async with consumer(where, topic=subscribed) as reader, consumer(where) as witness:
                await witness.subscribed(log)
                if not hears:
                    assert not reader.live.poll(50)
                    return
                name, number, payload = await reader.subscribed(log)
                assert name.decode() == (topic or asked or "kv@w0@")
                (seq,) = struct.unpack(">Q", number)
                ts, events, rank = msgpack.unpackb(payload)[:3]
                assert (ts, rank) == (1.25, 0)
                assert events[0]["block_hashes"] == [2**60 + seq]

    run(test())


def test_a_dealer_gets_what_is_kept_and_the_end() -> None:
    """From the number on that it asks for, or the oldest kept one."""

    async def test() -> None:
        log = EventLog("w0", 5, 16, capacity=PAGE_BATCHES + 40)
        for block in range(1, PAGE_BATCHES + 51):
            append(log, block)
        async with published(log) as (_, url), consumer(url) as reader:
            for asked in (PAGE_BATCHES + 45, 20, 0, 10_000, 2**64 - 3):
                answers = await reader.replay(asked)
                assert answers[-1] == [b"", b"", END, b""]
                expected = range(max(asked, log.first_seq), log.next_seq)
                assert [struct.unpack(">Q", answer[2])[0] for answer in answers[:-1]] == list(expected)
                assert all(answer[:2] == [b"", b"kv@w0@m"] for answer in answers[:-1])
                if answers[:-1]:
                    assert answers[0][3] == log.read(expected[0], 1)[0].payload

    run(test())


def test_a_req_gets_the_first_answer() -> None:
    """Of as many as there are; the end, where there is none."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        for block in range(1, 6):
            append(log, block)
        async with published(log) as (_, url):
            third = [b"kv@w0@m", struct.pack(">Q", 3), log.read(3, 1)[0].payload]
            for asked, answer in ((3, third), (5, [b"", END, b""])):
                async with consumer(url, asking=zmq.REQ) as reader:
                    reader.asking.send(struct.pack(">Q", asked))
                    assert await reader.receive(reader.asking) == answer

    run(test())


def test_the_goodbye_is_a_batch_without_events_to_others() -> None:
    """A consumer of vLLM's decodes it and goes on."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        async with published(log) as (_, url), consumer(url) as reader:
            topic, number, payload = await reader.subscribed(log)
            log.close()
            while struct.unpack(">Q", number)[0] < log.next_seq:
                topic, number, payload = await reader.receive(reader.live)
            assert topic == b"kv@w0@m"
            assert msgpack.unpackb(payload)[:3] == [0.0, [], 0]

    run(test())


def test_strict_readers_of_vllms_shape_get_nothing_more() -> None:
    """With dialect=vllm live and replayed batches have three elements, and no goodbye follows them."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        async with publishing(log, "zmq://127.0.0.1:0?dialect=vllm") as url:
            assert parse_bus_url(url).dialect == "vllm"
            async with consumer(url) as reader:
                _, _, payload = await reader.subscribed(log)
                assert [type(each) for each in msgpack.unpackb(payload)] == [float, list, int]
                *answers, _ = await reader.replay(0)
                assert len(answers) == log.next_seq
                for answer in answers:
                    assert [type(each) for each in msgpack.unpackb(answer[-1])] == [float, list, int]
                while reader.live.poll(1):
                    reader.live.recv_multipart()
                log.close()
                assert not reader.live.poll(50)

    run(test())


MALFORMED = [
    [],
    [b""],
    [b"", b"1234567"],
    [b"", b"123456789"],
    [b"x", b"12345678"],
    [b"12345678"],
    [b"", b"", b"12345678"],
    [b"", b"rhizome/1", b"12345678", b""],
    [b"", b"rhizome/1", b"12345678", b"\xc1"],
    [b"", b"rhizome/1", b"1", b"\x92\x01\x02"],
    [b"", b"rhizome/1", b"12345678", msgpack.packb([7, 1, 2])],
    [b"", b"rhizome/1", b"12345678", msgpack.packb([1, "x", 2])],
    [b"", b"rhizome/1", b"12345678", msgpack.packb([1, -1, 2])],
    [b"", b"rhizome/1", b"12345678", msgpack.packb([1, 5, True])],
    [b"", b"rhizome/1", b"12345678", msgpack.packb([2, 2**63, 0])],
    [b"", b"rhizome/1", b"12345678", msgpack.packb({})],
    [b"", b"rhizome/1", b"12345678", b"\x91" * 200],
    [b"", b"rhizome/2", b"12345678", msgpack.packb([0, b""])],
    [b""] * 1_000,
]


def test_malformed_requests_are_counted_and_ignored() -> None:
    """Whatever comes: the next good request is answered."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        append(log, 1)
        async with published(log) as (publisher, url), consumer(url) as reader:
            for frames in MALFORMED:
                reader.asking.send_multipart(frames or [b""])
            assert len(await reader.replay(0)) == 2
            assert publisher.counts.malformed == len(MALFORMED)

    run(test())


def test_a_request_that_is_too_large_ends_its_connection() -> None:
    """Before it is read; others are served."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        append(log, 1)
        async with published(log) as (publisher, url), consumer(url) as hostile, consumer(url) as reader:
            hostile.asking.send_multipart([b"", bytes(2**24)])
            assert len(await reader.replay(0)) == 2
            assert publisher.counts.malformed == 0

    run(test())


def test_a_peer_that_asks_and_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is queued for it is bounded; the loop and others are not held up."""
    monkeypatch.setattr(zmq_publisher, "STALLED_REPLAY_S", 0.2)

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        hashes = np.arange(1, 3_000, dtype=np.uint64) << np.uint64(40)
        for _ in range(1_000):  # 27 MB
            log.append([BlockStored(hashes, 0, 16)], 0.0)
        async with published(log) as (publisher, url), consumer(url) as hostile, consumer(url) as reader:
            hostile.asking.setsockopt(zmq.RCVHWM, 1)
            hostile.asking.setsockopt(zmq.RCVBUF, 4096)
            bus = parse_bus_url(url)
            hostile.asking.disconnect(f"tcp://{bus.host}:{bus.replay_port}")
            hostile.asking.connect(f"tcp://{bus.host}:{bus.replay_port}")
            hostile.asking.send_multipart([b"", bytes(8)])
            assert len(await reader.replay(995)) == 6
            await until(lambda: publisher.counts.abandoned == 1)
            assert len(await reader.replay(0)) == 1_001

    run(test())


def test_many_replays_at_once_are_bounded() -> None:
    """Who asks anew gives up its former request; others over the bound are refused, and served later."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        for block in range(1, 3_000):
            append(log, block)
        async with published(log) as (publisher, url), consumer(url) as hasty, consumer(url) as reader:
            for _ in range(200):
                hasty.asking.send_multipart([b"", bytes(8)])
            assert len(await reader.replay(2_990)) == 10
            await until(lambda: publisher.counts.requests == 201)
            assert len(publisher._tasks) <= zmq_publisher.MAX_RUNNING

    run(test())


def test_subscriptions_without_end_cost_little() -> None:
    """Topics that somebody subscribes to are remembered up to a bound; batches come all the same."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        async with published(log) as (publisher, url), consumer(url, topic=b"kv@") as reader, consumer(url) as hostile:
            for number in range(zmq_publisher.MAX_TOPICS + 100):
                hostile.live.setsockopt(zmq.SUBSCRIBE, b"topic %d" % number)
            await until(lambda: publisher._many_topics)
            assert len(publisher._topics) <= zmq_publisher.MAX_TOPICS
            await reader.subscribed(log)
            async with open_source(url) as source:
                assert (await source.snapshot()).next_seq == log.next_seq

    run(test())


def test_nothing_is_encoded_while_nobody_listens() -> None:
    """The wire form of a batch is made when somebody wants it."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        async with published(log) as (publisher, url):
            append(log, 1)
            await until(lambda: publisher.counts.skipped == 1)
            assert log.read(0, 1)[0]._payload is None
            async with consumer(url) as reader:
                await reader.subscribed(log)
                assert publisher.counts.published > 0

    run(test())


def test_an_engine_that_outruns_the_publisher_is_followed_again() -> None:
    """What was trimmed before it could be published is skipped: a gap, that readers see."""

    async def test() -> None:
        log = EventLog("w0", 5, 16, capacity=4)
        async with published(log) as (_, url), consumer(url) as reader:
            await reader.subscribed(log)
            for block in range(1, 1_000):
                append(log, block)
            last = log.next_seq
            await asyncio.sleep(0.01)
            append(log, 5_000)
            while struct.unpack(">Q", (await reader.receive(reader.live))[1])[0] != last:
                pass

    run(test())


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1"])
def test_only_loopback_is_bound_without_the_operators_word(host: str) -> None:
    """Prompts' hashes are nobody else's business."""

    async def test() -> None:
        with pytest.raises(InvalidRequest, match="loopback"):
            async with publishing(EventLog("w0", 5, 16), f"zmq://{host}:0"):
                pass

    run(test())


def test_ipv6_is_spoken() -> None:
    """An address in brackets."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        append(log, 1)
        async with publishing(log, "zmq://[::1]:0") as url, open_source(url) as source:
            assert len(await source.replay(5, 0)) == 1

    run(test())
