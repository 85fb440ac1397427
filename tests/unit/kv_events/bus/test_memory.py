"""What only the memory transport can get wrong; the contract suite has the rest."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing

import numpy as np
import pytest

from kv_events.bus.memory import READ_BATCHES, MemoryEventSource, PublishedEventSource, published, tail
from kv_events.events import BlockStored
from kv_events.log import EventLog
from rhizome.errors import InvalidRequest, Unavailable


def append(log: EventLog, block: int) -> None:
    log.append([BlockStored(np.array([block], dtype=np.uint64), 0, 16)], 0.0)


def test_a_name_is_published_once() -> None:
    """And again once it has been left."""
    first, second = EventLog("w0", 5, 16), EventLog("w0", 6, 16)
    with published(first, "once"):
        with pytest.raises(InvalidRequest, match="memory://once"):
            with published(second, "once"):
                pass
        assert asyncio.run(PublishedEventSource("once").snapshot()).epoch == 5
    with published(second, "once"):
        assert asyncio.run(PublishedEventSource("once").snapshot()).epoch == 6


def test_withdrawing_ends_subscriptions_in_other_threads() -> None:
    """Each in its own loop; one whose loop is over does no harm."""
    log = EventLog("w0", 5, 16)
    append(log, 1)
    reading = threading.Barrier(3)
    ended = []

    def read() -> None:
        async def follow() -> None:
            async with aclosing(PublishedEventSource("shared").subscribe(0, 0)) as batches:
                await anext(batches)
                reading.wait()
                with pytest.raises(Unavailable):
                    await anext(batches)
                ended.append(True)

        asyncio.run(follow())

    with published(log, "shared"):
        left = PublishedEventSource("shared").subscribe(0, 0)
        asyncio.run(left.__anext__())  # type: ignore[arg-type]
        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        reading.wait()
    for thread in threads:
        thread.join(30)
    assert ended == [True, True]


def test_a_long_log_does_not_hold_the_loop() -> None:
    """Who reads thousands of batches lets other tasks run between them."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        for block in range(1, 8 * READ_BATCHES):
            append(log, block)
        log.close()
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.create_task(other())
        async with aclosing(tail(log, 0, 0)) as entries:
            assert len([entry async for entry in entries]) == 8 * READ_BATCHES - 1
        assert turns >= 7
        task.cancel()

    asyncio.run(test())


def test_the_source_of_a_log_reads_it() -> None:
    """Without a name."""

    async def test() -> None:
        log = EventLog("w0", 5, 16)
        append(log, 1)
        assert len(await MemoryEventSource(log).replay(5, 0)) == 1

    asyncio.run(test())
