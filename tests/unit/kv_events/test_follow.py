"""The follow loop against a source that fails in every way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from kv_events.bus import Resync
from kv_events.bus import follow as follow_module
from kv_events.bus.follow import catch_up, follow
from kv_events.bus.memory import MemoryEventSource
from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, EventBatch, Snapshot
from kv_events.log import EventLog
from kv_events.view import WorkerView
from kv_events.wire import WireError
from radix import make_tree
from rhizome.errors import Conflict, Trimmed, Unavailable


def append(log: EventLog, *hashes: int) -> EventBatch:
    return log.append([BlockStored(np.array(hashes, dtype=np.uint64), 0, 16)], 0.0)


class Troubled:
    """A source whose next answers are replaced: `trouble[method]` is consumed call by call, batch by batch."""

    def __init__(self, log: EventLog) -> None:
        self._real = MemoryEventSource(log)
        self.snapshots: list[Exception | Callable[[Snapshot], Snapshot] | None] = []
        self.replays: list[Exception] = []
        self.batches: dict[int, Exception | Callable[[EventBatch], EventBatch] | None] = {}  # by seq, once
        self.calls: list[str] = []

    async def subscribe(self, epoch: int, from_seq: int) -> AsyncGenerator[EventBatch, None]:
        self.calls.append("subscribe")
        async for batch in self._real.subscribe(epoch, from_seq):
            trouble = self.batches.pop(batch.seq, _keep)
            if isinstance(trouble, Exception):
                raise trouble
            if trouble is not None:
                yield trouble(batch)

    async def replay(self, epoch: int, from_seq: int) -> list[EventBatch]:
        self.calls.append("replay")
        if self.replays:
            raise self.replays.pop(0)
        return await self._real.replay(epoch, from_seq)

    async def snapshot(self) -> Snapshot:
        self.calls.append("snapshot")
        trouble = self.snapshots.pop(0) if self.snapshots else None
        if isinstance(trouble, Exception):
            raise trouble
        snapshot = await self._real.snapshot()
        return trouble(snapshot) if trouble else snapshot


def _keep(batch: EventBatch) -> EventBatch:
    return batch


def flip(batch: EventBatch) -> EventBatch:
    return batch._replace(events=(BlockStored(np.array([2**50], dtype=np.uint64), 0, 16),))


def spoil(snapshot: Snapshot) -> Snapshot:
    return replace(snapshot, digest=bytes(16))


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 30))


async def until_in_step(view: WorkerView, log: EventLog) -> None:
    while not (view.synced and view.position() == (log.epoch, log.next_seq)):
        await asyncio.sleep(0.001)
    assert view.digest == log.digest


async def followed(source: Troubled, log: EventLog, appends: int) -> WorkerView:
    """A view after `appends` more batches."""
    view = WorkerView("w0", 0, make_tree())
    following = asyncio.create_task(follow(source, view, first_delay_s=0.001, max_delay_s=0.01))
    try:
        await until_in_step(view, log)
        for block in range(appends):
            append(log, 100 + block)
        await until_in_step(view, log)
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    assert following.cancelled()
    return view


@pytest.mark.parametrize("error", [Unavailable("away"), WireError("torn"), Trimmed("gone"), Conflict("other")])
def test_an_error_in_the_stream_is_followed_by_another_try(error: Exception) -> None:
    """A lost connection resumes from the position; anything else takes a snapshot."""

    async def test() -> None:
        log = EventLog("w0", 3, 16)
        append(log, 1)
        source = Troubled(log)
        source.batches = {3: error}
        await followed(source, log, 5)
        again = ["subscribe"] if isinstance(error, Unavailable) else ["snapshot", "subscribe"]
        assert source.calls == ["snapshot", "subscribe", *again]

    run(test())


def test_a_loop_that_follows_many_does_other_things_between_snapshots() -> None:
    """However many come at once: a router that starts beside a fleet answers requests meanwhile."""

    async def test() -> None:
        restored: list[str] = []
        between: list[int] = []

        class Watched(WorkerView):
            def restore(self, snapshot: Snapshot) -> bool:
                restored.append(self.worker_name)
                return super().restore(snapshot)

        async def other() -> None:
            while True:
                between.append(len(restored))
                await asyncio.sleep(0)

        logs = [EventLog(f"w{worker}", 1, 16) for worker in range(20)]
        tree = make_tree()
        tasks = [asyncio.create_task(other())]
        for worker, log in enumerate(logs):
            append(log, 1)
            view = Watched(log.worker, worker, tree)
            tasks.append(asyncio.create_task(follow(MemoryEventSource(log), view)))
        while len(restored) < len(logs):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert all(after - before <= 1 for before, after in pairwise(between))

    run(test())


def test_few_snapshots_are_fetched_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many workers are followed; those that do not answer keep the others from it for a moment only."""
    monkeypatch.setattr(follow_module, "PLACE_S", 0.05)

    async def test() -> None:
        fetching: set[str] = set()
        most = 0

        class Watched(MemoryEventSource):
            def __init__(self, log: EventLog) -> None:
                super().__init__(log)
                self._worker = log.worker

            async def snapshot(self) -> Snapshot:
                nonlocal most
                fetching.add(self._worker)
                most = max(most, len(fetching))
                await asyncio.sleep(0.001)
                fetching.remove(self._worker)
                return await super().snapshot()

        class Mute(MemoryEventSource):
            async def snapshot(self) -> Snapshot:
                return await asyncio.Future()

        logs = [EventLog(f"w{worker}", 1, 16) for worker in range(24)]
        views = [WorkerView(log.worker, index, make_tree()) for index, log in enumerate(logs)]
        tasks = []
        for index, (log, view) in enumerate(zip(logs, views, strict=True)):
            append(log, 1)
            tasks.append(asyncio.create_task(follow((Mute if index < 8 else Watched)(log), view)))
        for log, view in list(zip(logs, views, strict=True))[8:]:
            await until_in_step(view, log)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert 1 <= most <= follow_module.FETCHED_AT_ONCE

    run(test())


def test_what_is_not_a_batch_is_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """By name, however often it comes; the view ends right."""

    async def test() -> None:
        log = EventLog("w0", 3, 16)
        source = Troubled(log)
        source.batches = {1: WireError("torn"), 3: WireError("torn again")}
        source.snapshots = [WireError("torn, too")]
        view = WorkerView("w0", 0, make_tree())
        following = asyncio.create_task(follow(source, view, name="worker w0", first_delay_s=0.001, max_delay_s=0.01))
        for block in range(6):
            append(log, 100 + block)
            await until_in_step(view, log)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        assert view.counts.malformed == 3

    run(test())
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert warning.getMessage().startswith("worker w0: torn, too")


def test_a_bad_batch_that_comes_again_from_an_old_snapshot_is_not_tried_without_pause() -> None:
    """Batches before it that fit, again and again, are no progress: the delay grows until a newer snapshot is there."""

    class Stale(Troubled):
        """Its snapshot is an old one, and one of its batches is bad for good."""

        def __init__(self, log: EventLog) -> None:
            super().__init__(log)
            self.old = log.snapshot()

        async def subscribe(self, epoch: int, from_seq: int) -> AsyncGenerator[EventBatch, None]:
            self.calls.append("subscribe")
            async for batch in self._real.subscribe(epoch, from_seq):
                yield flip(batch) if batch.seq == 3 else batch

        async def snapshot(self) -> Snapshot:
            self.calls.append("snapshot")
            return self.old

    async def test() -> None:
        log = EventLog("w0", 3, 16)
        source = Stale(log)
        for block in range(6):
            append(log, 100 + block)
        view = WorkerView("w0", 0, make_tree())
        following = asyncio.create_task(follow(source, view, first_delay_s=0.001, max_delay_s=0.2))
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        while source.calls.count("snapshot") < 10:
            await asyncio.sleep(0.001)
        assert loop.time() - start_s > 0.12  # at least half of 1, 2, 4 ... 128 ms
        source.old = log.snapshot()
        await until_in_step(view, log)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)

    run(test())


def test_a_lost_batch_is_replayed() -> None:
    """On the same subscription."""

    async def test() -> None:
        log = EventLog("w0", 3, 16)
        source = Troubled(log)
        source.batches = {2: None}
        view = await followed(source, log, 6)
        assert source.calls == ["snapshot", "subscribe", "replay"]
        assert view.counts.gaps == 1

    run(test())


def test_a_replay_that_is_trimmed_becomes_a_snapshot() -> None:
    """The batches that are missing are not kept any more."""

    async def test() -> None:
        log = EventLog("w0", 3, 16)
        source = Troubled(log)
        source.batches = {2: None}
        source.replays = [Trimmed("gone")]
        await followed(source, log, 6)
        assert source.calls == ["snapshot", "subscribe", "replay", "snapshot", "subscribe"]

    run(test())


@pytest.mark.parametrize("trouble", [None, Trimmed("gone"), Conflict("another epoch")])
def test_a_view_that_lacks_the_end_of_a_stream_catches_up(trouble: Exception | None) -> None:
    """By a replay, and by a snapshot where there is none."""

    async def test() -> None:
        log = EventLog("w0", 3, 16)
        source, view = Troubled(log), WorkerView("w0", 0, make_tree())
        view.offer(append(log, 1))
        append(log, 2)
        source.replays = [trouble] if trouble else []
        await catch_up(source, view, Resync.REPLAY)
        assert source.calls == (["replay", "snapshot"] if trouble else ["replay"])
        await until_in_step(view, log)

    run(test())


def test_catching_up_by_a_bad_snapshot_says_so() -> None:
    """The caller tries again later."""

    async def test() -> None:
        log = EventLog("w0", 3, 16)
        source, view = Troubled(log), WorkerView("w0", 0, make_tree())
        append(log, 1)
        source.snapshots = [spoil]
        with pytest.raises(Unavailable, match="does not verify"):
            await catch_up(source, view, Resync.SNAPSHOT)

    run(test())


def test_a_wrong_batch_is_healed_by_a_snapshot() -> None:
    """The digest shows it, and the view ends right."""

    async def test() -> None:
        log = EventLog("w0", 3, 16)
        source = Troubled(log)
        source.batches = {2: flip, 4: flip}
        view = await followed(source, log, 6)
        assert view.counts.mismatches >= 1
        assert source.calls.count("snapshot") == 1 + view.counts.mismatches

    run(test())


def test_snapshots_are_tried_until_one_verifies() -> None:
    """Unreachable, spoiled and torn ones are nothing to build on."""

    async def test() -> None:
        log = EventLog("w0", 3, 16)
        append(log, 1)
        source = Troubled(log)
        source.snapshots = [Unavailable("away"), spoil, WireError("torn"), spoil, None]
        view = await followed(source, log, 2)
        assert source.calls == ["snapshot"] * 5 + ["subscribe"]
        assert view.counts.bad_snapshots == 2

    run(test())


def test_a_view_that_a_cap_cuts_short_is_followed_in_peace() -> None:
    """One snapshot, however little of it there was room for, then the stream; and another when there is room."""

    async def test() -> None:
        log = EventLog("w0", 3, 16)
        append(log, *range(1, 9))
        source = Troubled(log)
        view = WorkerView("w0", 0, make_tree(max_blocks=4))
        following = asyncio.create_task(follow(source, view, first_delay_s=0.001, max_delay_s=0.01))
        for block in range(10, 30):
            append(log, block)
            while view.position() != (3, log.next_seq):
                await asyncio.sleep(0.001)
        assert view.truncated
        assert source.calls == ["snapshot", "subscribe"]
        log.append([AllBlocksCleared(), BlockStored(np.array([5], dtype=np.uint64), 0, 16)], 0.0)
        await until_in_step(view, log)
        append(log, 30, 31, 32, 33, 34)
        log.append([BlockRemoved(np.array([5, 30, 31], dtype=np.uint64))], 0.0)
        await until_in_step(view, log)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        assert source.calls == ["snapshot", "subscribe"] * 2

    run(test())


def test_a_view_that_knows_its_position_needs_no_snapshot() -> None:
    """A follower that starts again with the view it had subscribes from there."""

    async def test() -> None:
        log = EventLog("w0", 3, 16)
        view = WorkerView("w0", 0, make_tree())
        view.offer(append(log, 1))
        append(log, 2)
        source = Troubled(log)
        following = asyncio.create_task(follow(source, view))
        await until_in_step(view, log)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        assert source.calls == ["subscribe"]

    run(test())
