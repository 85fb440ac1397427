"""A router's links to its workers: the end of an event stream that was lost."""

from __future__ import annotations

import asyncio

import numpy as np

from kv_events.bus.memory import MemoryEventSource
from kv_events.events import BlockStored, EventBatch
from kv_events.log import EventLog
from router.core import Router
from router.fleet import ModelCard, WorkerInfo
from router.links import Links, WorkerLink


def test_the_lost_end_of_a_stream_is_fetched() -> None:
    """Two reports of a position that the view has not reached lead to a replay; a worker that tells nothing, another
    incarnation and an unknown worker to none. Once the worker is retired nothing is applied."""
    router, log = Router(), EventLog("w", 1, 16)
    router.register(WorkerInfo("w", 1, "127.0.0.1:1", ModelCard("m", 100, 10, 16, ""), 10, 4, 4, 64), 0.0)

    def append(block: int) -> EventBatch:
        return log.append([BlockStored(np.array([block], np.uint64), 0, 16)], 0.0)

    async def test() -> None:
        links = Links(router)
        link = links._links["w"] = WorkerLink(router.fleet.get("w").info)
        link.source = MemoryEventSource(log)
        view = router.view("w")
        view.offer(append(1))
        append(2)
        for _ in range(2):
            links.told("w", 1, 0)
            links.told("w", 2, log.next_seq)
            links.told("v", 1, log.next_seq)
        assert len(links._tasks) == 0
        for _ in range(2):
            links.told("w", 1, log.next_seq)
        assert link.catching_up
        await link.catching_up
        assert view.synced
        assert view.digest == log.digest
        append(3)
        for _ in range(2):
            links.told("w", 1, log.next_seq)
        links.retire("w")
        await asyncio.gather(link.catching_up, return_exceptions=True)
        assert view.position() == (1, 2)
        await link.close()
        await links.close()

    asyncio.run(test())
