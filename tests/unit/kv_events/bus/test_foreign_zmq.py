"""A vLLM or SGLang server's events over ZeroMQ, read as any worker's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from kv_events.bus import EventSource, foreign_zmq, zmq_dialect
from kv_events.bus.follow import follow
from kv_events.bus.foreign_zmq import ForeignZmqSource
from kv_events.bus.url import open_source, parse_bus_url
from kv_events.view import WorkerView
from radix import make_tree
from radix.hashing import BlockHasher, derive_salt
from rhizome.errors import Unavailable
from tests.support.vllm_server import VllmServer, removed, stored

PATIENCE_S = 60.0
GOLDEN = Path(__file__).parents[3] / "golden"


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, PATIENCE_S))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def held(source: EventSource) -> set[int]:
    return set((await source.snapshot()).block_hashes.tolist())


async def until_held(source: EventSource, *hashes: int) -> None:
    while await held(source) != set(hashes):
        await asyncio.sleep(0.005)


@asynccontextmanager
async def followed(source: EventSource, view: WorkerView) -> AsyncIterator[None]:
    following = asyncio.create_task(follow(source, view, first_delay_s=0.001, max_delay_s=0.01))
    try:
        yield
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


FRAMINGS = [
    {"topic": b"kv-events"},
    {"topic": b"", "topic_in_replay": False},
    {"topic": None},
]


@pytest.mark.parametrize("framing", FRAMINGS, ids=["topics", "no topic in replays", "no topic at all"])
@pytest.mark.parametrize("dialect", ["", "&dialect=vllm", "&dialect=sglang"])
def test_what_was_said_before_and_what_comes_is_known(framing: dict[str, Any], dialect: str) -> None:
    """Whatever framing the server has, and whether the dialect is told or found out."""

    async def test() -> None:
        with VllmServer(**framing) as server:
            server.publish(stored([11, 12]))
            server.publish(stored([13], 12), removed([11]))
            async with open_source(server.url + dialect) as source:
                await until_held(source, 12, 13)
                server.publish(stored([14], 13))
                await until_held(source, 12, 13, 14)

    run(test())


def test_a_view_follows_a_foreign_server() -> None:
    """As it follows a worker of ours: batches in order, digests that agree."""

    async def test() -> None:
        with VllmServer(topic=b"kv@pod-7@model") as server:
            server.publish(stored([11, 12]))
            tree = make_tree()
            view = WorkerView("pod-7", 0, tree)
            async with open_source(server.url) as source, followed(source, view):
                await until(lambda: view.synced)
                for block in range(100, 150):
                    server.publish(stored([block], block - 1 if block > 100 else 12))
                await until(lambda: tree.count(0) == 52)
                assert view.synced
                assert view.digest == (await source.snapshot()).digest

    run(test())


def test_a_lost_message_is_replayed() -> None:
    """A batch that the PUB socket dropped is asked for: when the next one shows the gap, or when nothing comes."""

    async def test() -> None:
        with VllmServer() as server:
            server.publish(stored([11]))
            async with open_source(server.url) as source:
                await until_held(source, 11)
                server.publish(stored([12], 11), lost=True)
                server.publish(stored([13], 12))
                await until_held(source, 11, 12, 13)
                server.publish(stored([14], 13), lost=True)
                await until_held(source, 11, 12, 13, 14)

    run(test())


def test_a_restarted_server_starts_anew() -> None:
    """What its former process held is forgotten, and its stream is another epoch's."""

    async def test() -> None:
        with VllmServer() as server:
            server.publish(stored([11, 12]))
            server.publish(stored([13], 12))
            url, ports = server.url, (server.port, server.replay_port)
            async with open_source(url) as source:
                await until_held(source, 11, 12, 13)
                epoch = (await source.snapshot()).epoch
                async with aclosing(source.subscribe(epoch, 0)) as batches:
                    await anext(batches)
                    server.__exit__()
                    with VllmServer(*ports) as successor:
                        successor.publish(stored([21]))
                        await until_held(source, 21)
                        assert (await source.snapshot()).epoch > epoch
                        assert {batch.epoch async for batch in batches} == {epoch}

    run(test())


def test_a_server_without_a_replay_socket_is_followed_from_now_on() -> None:
    """After a bounded wait; a lost message costs what was known, as nobody can tell what it said."""

    async def test() -> None:
        with VllmServer(replays=False) as server:
            server.publish(stored([11]))
            server.flush()
            async with open_source(server.url + "&dialect=vllm") as source:
                await source.snapshot()
                server.publish(stored([12], 11))
                await until_held(source, 12)
                server.publish(stored([13], 12), lost=True)
                server.publish(stored([14]))
                await until_held(source, 14)

    run(test())


@pytest.mark.parametrize("further", [[], [{"a": 1}]], ids=["known", "longer"])
def test_a_server_without_a_replay_socket_is_told_by_its_messages(further: list[Any]) -> None:
    """Where the URL names no dialect; batches of a later release may have further elements."""

    async def test() -> None:
        with VllmServer(replays=False) as server:
            async with open_source(server.url) as source:
                first = asyncio.create_task(source.snapshot())
                block = 100
                while not first.done():
                    server.publish_payload(msgpack.packb([time.time(), [stored([block])], 0, *further]))
                    block += 1
                    await asyncio.sleep(0.01)
                await first
                assert isinstance(await source.source(), ForeignZmqSource)  # type: ignore[attr-defined]

    run(test())


def test_a_server_that_is_not_there_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it came and after it left; a subscription ends."""
    monkeypatch.setattr(zmq_dialect, "TELL_S", 0.5)

    async def test() -> None:
        with VllmServer() as server:
            url, ports = server.url, (server.port, server.replay_port)
        for dialect in ("auto", "vllm"):
            async with open_source(f"{url}&dialect={dialect}") as nobody:
                with pytest.raises(Unavailable):
                    await nobody.snapshot()
        monkeypatch.undo()
        monkeypatch.setattr(foreign_zmq, "GONE_S", 0.5)
        with VllmServer(*ports) as server:
            server.publish(stored([11]))
            async with open_source(url) as source:
                async with aclosing(source.subscribe(0, 0)) as batches:
                    await anext(batches)
                    server.__exit__()
                    with pytest.raises(Unavailable):
                        await anext(batches)
                with pytest.raises(Unavailable):
                    await source.snapshot()

    run(test())


@pytest.mark.parametrize("option", ["", "&worker=mine"])
def test_the_worker_is_called_as_the_topic_says(option: str) -> None:
    """`kv@worker@model`; or as the URL says."""

    async def test() -> None:
        with VllmServer(topic=b"kv@pod-7@some/model") as server:
            server.publish(stored([11]))
            async with open_source(server.url + option) as source:
                assert (await source.snapshot()).worker == ("mine" if option else "pod-7")
        with VllmServer() as server:
            server.publish(stored([11]))
            async with open_source(server.url + option) as source:
                assert (await source.snapshot()).worker == ("mine" if option else f"127.0.0.1:{server.port}")

    run(test())


def test_blocks_get_the_fleets_keys() -> None:
    """Of the model and block size that the URL tells, under the fleet's secret: a router finds them."""

    async def test() -> None:
        with VllmServer() as server:
            server.publish(stored([11, 12], block_size=16))
            secret = b"a secret of the fleet"
            async with open_source(server.url + "&model=m&block_size=8", secret=secret) as source:
                snapshot = await source.snapshot()
            keys = BlockHasher(8, derive_salt("m"), secret).keys(np.arange(32, dtype=np.uint32))
            assert snapshot.block_size == 8
            assert set(snapshot.block_hashes.tolist()) == set(keys[:, 0].tolist())

    run(test())


def test_what_is_no_batch_is_passed_over() -> None:
    """Frames that are no message of this kind, another server's topic: what is known stays."""

    async def test() -> None:
        with VllmServer() as server:
            server.publish(stored([11]))
            async with open_source(server.url) as source:
                await until_held(source, 11)
                server.publish_raw(b"kv-events", b"\xff" * 8, b"")
                server.publish_raw(b"kv-events")
                server.publish_raw(b"kv-events", b"1", b"2", b"3", b"4")
                server.publish_raw(b"kv-events-of-another", bytes(8), b"")
                server.publish(stored([12], 11))
                await until_held(source, 11, 12)

    run(test())


def test_a_poisoned_batch_costs_what_was_known() -> None:
    """Nobody can tell what it said; the stream goes on behind it."""

    async def test() -> None:
        with VllmServer() as server:
            server.publish(stored([11]))
            async with open_source(server.url) as source:
                await until_held(source, 11)
                server.publish_payload(b"\xc1 poison")
                server.publish(stored([12]))
                await until_held(source, 12)

    run(test())


@pytest.mark.parametrize("server", ["vllm-0.32-int", "vllm-0.32-bytes-cbor", "sglang-0.5.23-default"])
def test_captured_streams_are_read(server: str) -> None:
    """Frames of real servers, half of them before the reader comes, some of the others lost: all is known at last."""
    payloads = [path.read_bytes() for path in sorted((GOLDEN / server / "live").glob("*.payload"))]
    assert payloads

    async def everything(lossy: bool) -> tuple[int, bytes]:
        with VllmServer() as publisher:
            half = len(payloads) // 2
            for payload in payloads[:half]:
                publisher.publish_payload(payload)
            async with open_source(publisher.url) as source:
                await source.snapshot()
                for number, payload in enumerate(payloads[half:]):
                    publisher.publish_payload(payload, lost=lossy and number % 2 == 0)
                foreign = source.source  # type: ignore[attr-defined]
                stream = (await foreign()).stream
                await until(lambda: stream.next_seq == len(payloads))
                assert (stream.counts.lost, stream.counts.malformed) == (0, 0)
                return stream.counts.applied, (await source.snapshot()).digest

    async def test() -> None:
        assert await everything(lossy=True) == await everything(lossy=False)

    run(test())


def test_a_defect_in_reading_ends_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever follows it is told, to open another one: a server that is connected and not read is not in step."""

    async def test() -> None:
        with VllmServer() as server:
            source = ForeignZmqSource(parse_bus_url(server.url))
            await until_held(source)
            assert source.stream is not None
            monkeypatch.setattr(source.stream, "offer", None)
            server.publish(stored([11]))
            await until(lambda: source._gone)
            source._gone = False  # as a new connection has it
            with pytest.raises(RuntimeError, match="not read any more"):
                await source.snapshot()
            await source.close()

    run(test())
