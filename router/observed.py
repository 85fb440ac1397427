"""Servers whose KV events a router indexes and to which it routes nothing: vLLM, SGLang, or another fleet's workers.

What they hold is in the tree, in the lists of workers and in explanations. Serving through them needs their serving
protocol, which no router speaks yet.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

from kv_events.bus import EventSource
from kv_events.bus.follow import follow
from kv_events.bus.redis_stream import without_login
from kv_events.bus.url import BusUrl, open_source, parse_bus_url
from kv_events.events import EventBatch, Snapshot
from rhizome.errors import InvalidRequest, Unavailable
from rhizome.validate import check_name
from router.core import Router
from router.fleet import ModelCard

logger = logging.getLogger(__name__)

RETRY_S = 5.0

LONGEST_PROMPT = 2**24
LARGEST_VOCABULARY = 2**31
"""Of a model that nobody serves here: its limits are not known."""


@dataclass(frozen=True, slots=True)
class Observed:
    """A server to observe: what it is called here, and where its events are read."""

    worker_id: str
    bus: BusUrl


def parse_observed(text: str) -> Observed:
    """Of NAME=URL. Raises InvalidRequest.

    A zmq URL that names a model and a block size gives a foreign server's blocks the fleet's keys; without them its
    blocks are indexed under its own hashes, which no prompt of the fleet's has.
    """
    name, separator, url = text.partition("=")
    if not separator:
        raise InvalidRequest("observe", text, "NAME=URL, as in vllm-0=zmq://10.0.0.5:5557?model=MODEL&block_size=16")
    check_name("observe", name)
    bus = parse_bus_url(url)
    if bus.scheme == "zmq" and not bus.worker:
        bus = replace(bus, worker=name)
    return Observed(name, bus)


def observed_card(servers: Sequence[Observed], model: str) -> ModelCard:
    """What a prompt's keys are made by where no worker serves a model and observed servers do, by their URLs.

    `model` is empty where there is only one. Raises Unavailable where no URL tells, InvalidRequest where several do.
    """
    sizes: dict[str, int] = {}
    for server in servers:
        if server.bus.model:
            sizes.setdefault(server.bus.model, server.bus.block_size)
    if not sizes:
        raise Unavailable("no worker is registered, and no observed server's URL has model= and block_size=")
    if not model and len(sizes) > 1:
        raise InvalidRequest("model", model, f"several are observed, name one of: {', '.join(sorted(sizes))}")
    name = model or next(iter(sizes))
    if name not in sizes:
        known = ", ".join(sorted(sizes))
        raise Unavailable(f"no worker is registered, and no observed server's URL has model={name!r}, only: {known}")
    return ModelCard(name, LONGEST_PROMPT, LARGEST_VOCABULARY, sizes[name], "")


def warn_of_other_block_sizes(servers: Sequence[Observed], model: str, block_size: int) -> None:
    """For servers whose URLs give their blocks the keys of another size than the fleet's: no prompt will match them."""
    for server in servers:
        if server.bus.model == model and server.bus.block_size != block_size:
            logger.warning(
                "observed worker %s: its URL says block_size=%d, but the workers of model %s have blocks of %d tokens: "
                "nothing of it will match (the server's own block size does not matter)",
                server.worker_id,
                server.bus.block_size,
                model,
                block_size,
            )


@asynccontextmanager
async def observing(router: Router, servers: Sequence[Observed], secret: bytes) -> AsyncIterator[None]:
    """Keep the router's index in step with all `servers` until left. Raises InvalidRequest for a name given twice."""
    for server in servers:
        router.observe(server.worker_id, str(without_login(server.bus)))
    tasks = [asyncio.create_task(_follow(router, server, secret)) for server in servers]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class RenamedSource:
    """An EventSource whose worker goes by another name here: a worker of another fleet keeps its own on its bus."""

    def __init__(self, source: EventSource, worker_id: str) -> None:
        self._source = source
        self._worker_id = worker_id

    async def subscribe(self, epoch: int, from_seq: int) -> AsyncGenerator[EventBatch, None]:
        async with aclosing(self._source.subscribe(epoch, from_seq)) as batches:
            async for batch in batches:
                yield self._renamed(batch)

    async def replay(self, epoch: int, from_seq: int) -> list[EventBatch]:
        return list(map(self._renamed, await self._source.replay(epoch, from_seq)))

    async def snapshot(self) -> Snapshot:
        return replace(await self._source.snapshot(), worker=self._worker_id)

    def _renamed(self, batch: EventBatch) -> EventBatch:
        return batch if batch.worker == self._worker_id else batch._replace(worker=self._worker_id)


async def _follow(router: Router, server: Observed, secret: bytes) -> None:
    view = router.view(server.worker_id)
    while True:
        try:
            async with open_source(server.bus, secret=secret) as source:
                await follow(RenamedSource(source, server.worker_id), view, name=server.worker_id)
        except Exception:  # a defect here must not leave a server without its index for good
            logger.exception("observed worker %s: following its events failed", server.worker_id)
            await asyncio.sleep(RETRY_S)
