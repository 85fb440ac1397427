"""The loop that keeps a consumer in step with a source, whatever happens between them."""

from __future__ import annotations

import asyncio
import logging
import random
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from typing import NoReturn
from weakref import WeakKeyDictionary

from kv_events.bus import EventConsumer, EventSource, Resync
from kv_events.events import EventBatch
from kv_events.wire import WireError
from rhizome.errors import Conflict, Trimmed, Unavailable

logger = logging.getLogger(__name__)


class _OutOfStep(Exception):
    """The consumer asks for a snapshot."""


async def follow(
    source: EventSource,
    consumer: EventConsumer,
    *,
    name: str = "events",
    first_delay_s: float = 0.1,
    max_delay_s: float = 5.0,
) -> NoReturn:
    """Feed `consumer` from `source` until cancelled: snapshot, subscribe, replay and reconnect as they are needed.

    After a failure the next try comes at once, after further ones with a delay that doubles up to `max_delay_s`, less
    up to a half at random so that many routers do not fall on a worker together. A batch that leads further than any
    before starts that anew: one that comes again and again from a snapshot before it, and is bad, does not. What is not
    a batch is counted, and logged once. `name` begins what is logged.
    """
    failures = malformed = 0
    furthest = consumer.position()
    needs_snapshot = furthest == (0, 0)
    while True:
        try:
            if needs_snapshot:
                await _take_snapshot(source, consumer)
                needs_snapshot = False
            async with aclosing(source.subscribe(*consumer.position())) as batches:
                async for batch in batches:
                    await _offer(source, consumer, batch)
                    if (position := consumer.position()) > furthest:
                        furthest, failures = position, 0
            raise Unavailable("the worker ended its stream")
        except Unavailable as error:
            problem: Exception = error
        except WireError as error:
            problem, needs_snapshot = error, True
            consumer.malformed()
            malformed += 1
            if malformed == 1:
                logger.warning("%s: %s; further ones that are malformed are counted, not told", name, error)
        except (Trimmed, Conflict, _OutOfStep) as error:
            problem, needs_snapshot = error, True
        failures += 1
        logger.log(logging.INFO if failures == 1 else logging.DEBUG, "%s: %s; trying again", name, problem)
        if failures > 1:
            delay_s = min(max_delay_s, first_delay_s * 2.0 ** min(failures - 2, 30))
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter


FETCHED_AT_ONCE = 4
"""Snapshots in memory before they are taken over: 64 MiB of four workers with a million blocks each. A router that
starts beside a large fleet fetches the next ones meanwhile, and does not hold them all."""

PLACE_S = 2.0
"""For a fetch, before another one begins beside it: workers that do not answer hold nobody up for longer."""


@dataclass(slots=True)
class _Turns:
    """Of a loop that follows many workers."""

    fetching: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(FETCHED_AT_ONCE))
    restoring: asyncio.Lock = field(default_factory=asyncio.Lock)  # the loop does other things between two snapshots


_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, _Turns] = WeakKeyDictionary()


async def _take_snapshot(source: EventSource, consumer: EventConsumer) -> None:
    """Raises _OutOfStep when it does not do, and what the source raises."""
    loop = asyncio.get_running_loop()
    turns = _turns.setdefault(loop, _Turns())
    await turns.fetching.acquire()
    with ExitStack() as place:
        place.callback(turns.fetching.release)
        giving_up = loop.call_later(PLACE_S, place.close)
        try:
            snapshot = await source.snapshot()
        finally:
            giving_up.cancel()
        async with turns.restoring:
            await asyncio.sleep(0)
            if not consumer.restore(snapshot):
                raise _OutOfStep("the snapshot is of an old epoch or does not verify")


async def catch_up(source: EventSource, consumer: EventConsumer, needed: Resync) -> None:
    """Fetch what a consumer that is being followed lacks, though no batch shows it. Raises what the source raises, and
    Unavailable where that does not do."""
    if needed is Resync.REPLAY:
        try:
            for missing in await source.replay(*consumer.position()):
                needed = consumer.offer(missing)
        except (Trimmed, Conflict):
            needed = Resync.SNAPSHOT
    if needed is Resync.SNAPSHOT:
        try:
            await _take_snapshot(source, consumer)
        except _OutOfStep as error:
            raise Unavailable(str(error)) from error


async def _offer(source: EventSource, consumer: EventConsumer, batch: EventBatch) -> None:
    """Raises _OutOfStep when a replay does not do."""
    needed = consumer.offer(batch)
    if needed is Resync.REPLAY:
        for missing in await source.replay(*consumer.position()):
            needed = consumer.offer(missing)
    if needed is not Resync.NONE:
        raise _OutOfStep(f"batch {batch.seq} of epoch {batch.epoch} leaves the digests apart, or a gap")
