"""`rhizome events stats` of live streams: what was there before, and what cannot be reached."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator

import numpy as np
import pytest

from deploy.events.following import Following
from deploy.events.stats import StatsOptions, run_stats
from deploy.events.targets import Stream, Targets
from kv_events.events import BlockStored, EventBatch, Snapshot
from kv_events.inspect.observer import Observer
from kv_events.log import EventLog
from rhizome.errors import Unavailable
from router.service import running_router


class OldSnapshot:
    """A bus that keeps a snapshot of long ago, and all batches since, as Redis does."""

    def __init__(self, log: EventLog) -> None:
        self.log = log
        self.kept = log.snapshot()
        self.batches: list[EventBatch] = []
        self.said = asyncio.Event()

    def say(self, block: int, ts: float) -> None:
        self.batches.append(self.log.append([BlockStored(np.array([block], np.uint64), 0, 16)], ts))

    async def subscribe(self, epoch: int, from_seq: int) -> AsyncGenerator[EventBatch, None]:
        for batch in self.batches[from_seq:]:
            yield batch
        await self.said.wait()
        yield self.batches[-1]
        await asyncio.Event().wait()

    async def replay(self, epoch: int, from_seq: int) -> list[EventBatch]:
        return self.batches[from_seq:]

    async def snapshot(self) -> Snapshot:
        return self.kept


def test_what_was_published_before_is_held_and_in_no_rate_or_lag() -> None:
    """The batches between a bus's snapshot and now count as the snapshot does; what comes after them counts."""

    async def main() -> None:
        source, observer = OldSnapshot(EventLog("w", 1, 16)), Observer()
        for block in range(1, 6):
            source.say(block, time.time() - 1000)
        targets = Targets("bus")
        targets.add(Stream("w", "bus", source))
        followed = Following(targets, lambda name: observer.consumer(name, time.time))
        try:
            await followed.refresh()
            async with asyncio.timeout(30):
                while observer.position("w") != (1, 5):
                    await asyncio.sleep(0.01)
                before = observer.report("w", time.time()).numbers
                source.say(6, time.time())
                source.said.set()
                while observer.position("w") != (1, 6):
                    await asyncio.sleep(0.01)
            after = observer.report("w", time.time()).numbers
        finally:
            await followed.close()
        assert (before.blocks, before.stored, before.batches) == (5, 0, 0)
        assert (before.stored_per_s, before.batches_per_s, before.lag_p99_s, before.reuse) == (0, 0, None, None)
        assert (after.blocks, after.stored, after.batches) == (6, 1, 1)
        assert after.lag_p99_s is not None
        assert after.lag_p99_s < 900

    asyncio.run(main())


def test_a_worker_that_cannot_be_reached_has_a_row_with_its_state(capsys: pytest.CaptureFixture[str]) -> None:
    """As an observed server has that is down; that nothing was reached at all is an error besides."""

    async def main(as_json: bool) -> None:
        async with running_router(observe=["vllm-0=grpc://127.0.0.1:1"]) as address:
            with pytest.raises(Unavailable, match="vllm-0: "):
                await run_stats(StatsOptions(f"router://{address}", for_s=0.3, as_json=as_json))

    asyncio.run(main(as_json=False))
    _, row = capsys.readouterr().out.splitlines()
    assert row.startswith("vllm-0 ")
    assert row.endswith("not reached")
    asyncio.run(main(as_json=True))
    told = json.loads(capsys.readouterr().out)
    assert (told["name"], told["state"], told["blocks"]) == ("vllm-0", "not reached", 0)
