"""A recording's streams as event sources."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from kv_events.bus.follow import follow
from kv_events.bus.recorded import RecordedSource, recorded_sources
from kv_events.events import EventBatch, Snapshot
from kv_events.inspect.recording import RecordingWriter
from kv_events.log import EventLog
from kv_events.view import WorkerView
from radix import make_tree
from radix.digest import EMPTY_DIGEST
from rhizome.errors import Conflict, Trimmed, Unavailable
from tests.support.recordings import Fleet, recorded


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 30))


async def taken(source: RecordedSource, epoch: int, from_seq: int) -> list[tuple[int, int]]:
    async with aclosing(source.subscribe(epoch, from_seq)) as batches:
        return [(batch.epoch, batch.seq) async for batch in batches]


def seqs(epoch: int, first: int, end: int) -> list[tuple[int, int]]:
    return [(epoch, seq) for seq in range(first, end)]


class Story:
    """A recording of one worker, told piece by piece."""

    def __init__(self, path: Path) -> None:
        self.fleet = Fleet(workers=1)
        self.writer = RecordingWriter(path.open("wb"))

    @property
    def log(self) -> EventLog:
        return self.fleet.logs["worker-0"]

    def works(self, steps: int, *, seen: bool = True) -> list[EventBatch]:
        """The worker takes some steps."""
        batches = [batch for _, batch in self.fleet.steps(steps)]
        for batch in batches if seen else []:
            self.writer.batch("worker-0", batch, self.fleet.time_ns)
        return batches

    def asked(self) -> Snapshot:
        """The recorder takes a snapshot."""
        self.writer.snapshot("worker-0", self.log.snapshot(), self.fleet.time_ns)
        return self.log.snapshot()


def test_each_stream_of_a_recording_is_a_source(tmp_path: Path) -> None:
    """By name; its snapshot comes first, then its batches, then the end."""
    fleet = recorded(tmp_path / "a")

    async def test() -> None:
        sources = recorded_sources(tmp_path / "a")
        assert sources.keys() == fleet.logs.keys()
        for name, source in sources.items():
            log = fleet.logs[name]
            snapshot = await source.snapshot()
            assert snapshot.worker == name
            found = await taken(source, snapshot.epoch, snapshot.next_seq)
            assert found == seqs(1, snapshot.next_seq, log.next_seq)
            snapshot = await source.snapshot()
            assert (snapshot.next_seq, snapshot.digest) == (log.next_seq, log.digest)

    run(test())


def test_a_position_is_found_in_the_recording(tmp_path: Path) -> None:
    """With an epoch or with any; Trimmed for what was before it, Conflict for what it does not reach."""
    story = Story(tmp_path / "a")
    story.works(5, seen=False)
    story.asked()
    story.works(10)
    story.writer.close()

    async def test() -> None:
        for epoch in (0, 1):
            source = RecordedSource(tmp_path / "a", "worker-0")
            assert await taken(source, epoch, 8) == seqs(1, 8, 15)
            assert await taken(source, epoch, 5) == seqs(1, 5, 15)
            assert await taken(source, epoch, 15) == []
            assert [batch.seq for batch in await source.replay(epoch, 12)] == [12, 13, 14]
            with pytest.raises(Trimmed):
                await taken(source, epoch, 4)
            with pytest.raises(Conflict):
                await taken(source, epoch, 16)
        with pytest.raises(Conflict):
            await taken(RecordedSource(tmp_path / "a", "worker-0"), 2, 7)

    run(test())


def test_what_came_out_of_order_comes_in_order(tmp_path: Path) -> None:
    """A gap that was healed by a replay is none."""
    story = Story(tmp_path / "a")
    story.asked()
    batches = story.works(8, seen=False)
    for batch in [*batches[:2], batches[5], *batches[2:6], batches[1], *batches[6:]]:
        story.writer.batch("worker-0", batch, story.fleet.time_ns)
    story.writer.close()
    run(_follows(tmp_path / "a", story.log, seqs(1, 0, 8)))


def test_where_the_recorder_took_a_snapshot_its_follower_does(tmp_path: Path) -> None:
    """Lost batches, a restart that was missed, and one that was seen."""
    story = Story(tmp_path / "a")
    story.asked()
    story.works(5)
    story.works(5, seen=False)
    story.asked()
    story.works(5)
    story.fleet.restart("worker-0")
    story.works(3, seen=False)
    story.asked()
    story.works(4)
    story.fleet.restart("worker-0")
    story.works(4)
    story.writer.close()
    run(_follows(tmp_path / "a", story.log, [*seqs(1, 0, 5), *seqs(1, 10, 15), *seqs(2, 3, 7), *seqs(3, 0, 4)]))


def test_a_wrong_batch_is_healed_by_the_snapshot_that_healed_the_recorder(tmp_path: Path) -> None:
    """As the digest tells."""
    story = Story(tmp_path / "a")
    story.asked()
    story.works(5)
    (wrong,) = story.works(1, seen=False)
    story.writer.batch("worker-0", wrong._replace(digest=bytes(15) + b"x"), story.fleet.time_ns)
    story.asked()
    story.works(5)
    story.writer.close()
    run(_follows(tmp_path / "a", story.log, seqs(1, 0, 11)))


def test_where_nothing_is_recorded_there_is_no_snapshot(tmp_path: Path) -> None:
    """And no batch."""
    story = Story(tmp_path / "a")
    story.writer.mark("worker-0", "hello", 0)
    story.writer.close()

    async def test() -> None:
        source = RecordedSource(tmp_path / "a", "worker-0")
        with pytest.raises(Unavailable, match="neither a snapshot nor a first batch"):
            await source.snapshot()
        with pytest.raises(Conflict, match="it is not recorded"):
            await taken(RecordedSource(tmp_path / "a", "worker-0"), 0, 0)

    run(test())


def test_a_stream_that_begins_with_its_worker_needs_no_snapshot(tmp_path: Path) -> None:
    """It begins with nothing."""
    story = Story(tmp_path / "a")
    story.works(6)
    story.writer.close()

    async def test() -> None:
        source = RecordedSource(tmp_path / "a", "worker-0")
        snapshot = await source.snapshot()
        assert (snapshot.epoch, snapshot.next_seq, snapshot.digest) == (1, 0, EMPTY_DIGEST)
        assert await taken(source, 1, 0) == seqs(1, 0, 6)

    run(test())


class Witness(WorkerView):
    """A view that notes what it is given."""

    def __init__(self) -> None:
        super().__init__("worker-0", 0, make_tree())
        self.seen: list[tuple[int, int]] = []

    def offer(self, batch: EventBatch) -> Any:
        self.seen.append((batch.epoch, batch.seq))
        return super().offer(batch)


async def _follows(path: Path, log: EventLog, expected: list[tuple[int, int]]) -> None:
    """A follower gets these batches, and ends where the worker stood."""
    view = Witness()
    following = asyncio.create_task(follow(RecordedSource(path, "worker-0"), view, first_delay_s=0.001))
    while not (view.position() == (log.epoch, log.next_seq) and view.synced):
        await asyncio.sleep(0.001)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    assert view.digest == log.digest
    assert view.seen == expected
