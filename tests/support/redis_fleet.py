"""Workers that publish to a Redis of the tests, and routers that follow them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from kv_events.bus import redis as redis_bus
from kv_events.bus import redis_publisher, redis_source, redis_stream
from kv_events.bus.follow import follow
from kv_events.bus.redis import open_source
from kv_events.bus.url import parse_bus_url
from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored
from kv_events.log import EventLog
from kv_events.view import WorkerView
from radix import make_tree
from radix.tree import PrefixTree

PATIENCE_S = 60.0


def be_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timeouts and delays that suit tests: what happens is the same, sooner."""
    monkeypatch.setattr(redis_stream, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(redis_source, "BLOCK_S", 0.2)
    for module in (redis_source, redis_publisher):
        monkeypatch.setattr(module, "TRANSFER_S", 0.5)
    for name, value in {"FIRST_RETRY_S": 0.01, "MAX_RETRY_S": 0.05, "MAX_SUPERSEDED_S": 0.05, "REFRESH_S": 0.1}.items():
        monkeypatch.setattr(redis_publisher, name, value)


class Worker:
    """A log that changes at random, by a seed."""

    def __init__(self, epoch: int = 5, capacity: int = 64, seed: int = 1) -> None:
        self.log = EventLog("w0", epoch, 16, capacity)
        self._random = random.Random(seed * 1000 + epoch)

    def go_on(self, batches: int) -> None:
        """So many steps, without letting any other task run: nothing that they need can be anybody's answer."""
        for _ in range(batches):
            blocks = np.array(self._random.sample(range(1, 200), 4), dtype=np.uint64)
            event = BlockStored(blocks, 0, 16) if self._random.random() < 0.6 else BlockRemoved(blocks)
            self.log.append([AllBlocksCleared()] if self._random.random() < 0.02 else [event], 0.0)

    async def run(self, batches: int) -> None:
        """So many steps while others run."""
        for _ in range(batches):
            self.go_on(1)
            await asyncio.sleep(0.0005)


@asynccontextmanager
async def published(worker: Worker, url: str, **kept: int) -> AsyncIterator[str]:
    """The worker's log at a URL; yields the one to read at."""
    async with redis_bus.publish(worker.log, parse_bus_url(url), **kept) as told:
        yield told


@asynccontextmanager
async def router(url: str, tree: PrefixTree | None = None) -> AsyncIterator[WorkerView]:
    """A view that follows the stream, in a tree of its own or a given one."""
    view = WorkerView("w0", 0, tree or make_tree())
    async with open_source(parse_bus_url(url)) as source:
        following = asyncio.create_task(follow(source, view, first_delay_s=0.001, max_delay_s=0.05))
        try:
            yield view
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


async def in_step(view: WorkerView, worker: Worker) -> None:
    """Wait until the view stands where the worker does; it then has its digest."""
    await until(lambda: view.synced and view.position() == (worker.log.epoch, worker.log.next_seq))
    assert view.digest == worker.log.digest


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, PATIENCE_S))
