"""What `top` shows of real routers and real streams."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deploy.events.top_model import Picture, ShareWindow, TopModel, WorkerRow, watching
from kv_events.bus.url import publishing
from kv_events.events import BlockRemoved, BlockStored
from kv_events.inspect.words import KeyRange
from kv_events.log import EventLog
from radix.keys import Hashes
from rhizome.errors import InvalidRequest, Unavailable
from tests.support.recordings import recorded
from tests.support.router_cluster import PROMPT, Cluster, with_cluster


def hashes(*values: int) -> Hashes:
    return np.array(values, dtype=np.uint64)


async def until(model: TopModel, holds: Callable[[Picture], bool]) -> Picture:
    """Look until it is so."""
    async with asyncio.timeout(30):
        while not holds(picture := await model.look()):
            await asyncio.sleep(0.02)
    return picture


def row(picture: Picture, name: str) -> WorkerRow:
    return next(row for row in picture.workers if row.name == name)


def test_a_share_is_of_the_last_seconds() -> None:
    """From counters that only grow; from none where they begin anew."""
    window = ShareWindow(window_s=10)
    assert window.tokens == (0, 0)
    window.add(0, 1000, 900)
    assert window.tokens == (0, 0)
    window.add(5, 1100, 950)
    assert window.tokens == (100, 50)
    window.add(12, 1200, 950)
    assert window.tokens == (200, 50)
    window.add(16, 1300, 1050)
    assert window.tokens == (200, 100)
    window.add(17, 5, 5)
    assert window.tokens == (0, 0)


def test_a_router_tells_shares_hot_prefixes_and_who_is_there() -> None:
    """Workers with their numbers, the prefixes of its matches with their holders; then one leaves."""

    async def test(running: Cluster) -> None:
        first, second = [await running.join(name) for name in ("worker-0", "worker-1")]
        await running.ready(2)
        first.hold(PROMPT[:160])
        held = second.hold(PROMPT[:320])
        await running.until(lambda entry: entry is not None and entry.indexed_blocks == held, "worker-1")
        async with watching(f"router://{running.address}") as model:
            await until(model, lambda picture: row(picture, "worker-1").blocks == held)
            await running.client.explain(token_ids=PROMPT)
            await until(model, lambda picture: bool(picture.prefixes))
            for prompt, cached in ((100, 10), (300, 160)):
                first.status.prompt_tokens, first.status.cached_prompt_tokens = prompt, cached
                await first.heartbeat(running.address)
                await asyncio.sleep(1.1)  # a router is asked once a second
                picture = await model.look()
            assert picture.by_hits
            assert row(picture, "worker-0").hit_share == picture.totals.hit_share == 0.75
            assert row(picture, "worker-1").hit_share is None
            assert (row(picture, "worker-0").in_flight, row(picture, "worker-0").state) == (0, "in step")
            assert picture.totals.blocks == 10 + 20
            assert [(hot.depth, hot.holders) for hot in picture.prefixes] == [(20, ("worker-1",))]
            await running.client.set_draining("worker-0", True)
            await until(model, lambda picture: row(picture, "worker-0").state == "draining")
            cut = await model.cut(None, "worker-0", 10)
            assert (cut.blocks, len(cut.top.children[0].holders)) == (10, 2)
            await second.deregister(running.address)
            picture = await until(model, lambda picture: len(picture.workers) == 1)
            cut = await model.cut(None, None, 10)
            assert cut.blocks == 10, "what a worker held that left is held no more"

    with_cluster(test)


def test_a_router_that_is_gone_is_told_and_streams_go_on() -> None:
    """The tables stay, with what the workers themselves say."""

    async def main() -> None:
        from router.service import running_router
        from tests.support.scripted_worker import serving_worker

        async with asyncio.timeout(60):
            async with running_router(lease_s=60) as address:
                worker = serving_worker(address, "worker-0")
                scripted = await worker.__aenter__()
                model_there = watching(f"router://{address}")
                model = await model_there.__aenter__()
                await until(model, lambda picture: picture.workers[0].state == "in step")
            picture = await until(model, lambda picture: bool(picture.problem))
            assert "UNAVAILABLE" in picture.problem
            held = scripted.hold(PROMPT)
            await until(model, lambda picture: row(picture, "worker-0").blocks == held)
            await worker.__aexit__(None, None, None)
            await until(model, lambda picture: row(picture, "worker-0").state not in ("in step", "behind"))
            await model_there.__aexit__(None, None, None)

    asyncio.run(main())


def test_a_plain_stream_has_large_prefixes() -> None:
    """Under the name that its batches carry; nothing is known of requests."""
    log = EventLog("w", 1, 16)
    log.append([BlockStored(hashes(1, 2, 3), 0, 16), BlockStored(hashes(4), 3, 16), BlockStored(hashes(5), 3, 16)], 0.0)

    async def main() -> None:
        async with publishing(log, "grpc://127.0.0.1:0") as url, watching(url) as model:
            picture = await until(model, lambda picture: len(picture.prefixes) == 3)
            assert (picture.by_hits, picture.workers[0].name) == (False, "w")
            assert picture.workers[0].hit_share is picture.workers[0].in_flight is picture.totals.in_flight is None
            large = picture.prefixes[0]
            assert (large.block_hash, large.depth, large.below) == (3, 3, 2)
            log.append([BlockRemoved(hashes(5))], 0.0)
            picture = await until(model, lambda picture: picture.workers[0].blocks == 4)
            assert picture.workers[0].removed_per_s > 0
            assert (await model.cut(KeyRange(3, 3), None, 10)).top.blocks == 2
            with pytest.raises(InvalidRequest, match="no block that is held"):
                await model.cut(KeyRange(5, 5), None, 10)
            assert (await model.cut(None, "w", 10)).blocks == 4

    asyncio.run(main())


def test_what_is_not_live_is_refused(tmp_path: Path) -> None:
    """A recording has statistics instead; nobody at the other end of a bus is an error."""
    recorded(tmp_path / "some.rhz")

    async def watch(target: str) -> None:
        async with watching(target):
            pass

    with pytest.raises(InvalidRequest, match="rhizome events stats"):
        asyncio.run(watch(str(tmp_path / "some.rhz")))
    with pytest.raises(Unavailable):
        asyncio.run(watch("grpc://127.0.0.1:1"))
