"""Several streams in one tree, each with its view and its numbers."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest

from kv_events.bus import Resync
from kv_events.bus.follow import follow
from kv_events.bus.memory import MemoryEventSource
from kv_events.events import BlockRemoved, BlockStored, EventBatch
from kv_events.inspect import observer as observer_module
from kv_events.inspect.observer import Observer
from kv_events.inspect.stats import StreamNumbers
from kv_events.log import EventLog
from rhizome.errors import InvalidRequest
from tests.support.recordings import Fleet, blocks


def append(log: EventLog, *hashes: int) -> EventBatch:
    return log.append([BlockStored(blocks(*hashes), 0, 16)], 0.0)


def numbers(observer: Observer, name: str = "w0") -> StreamNumbers:
    return observer.report(name, 0.0).numbers


def test_streams_share_a_tree_and_nothing_else() -> None:
    """Each is in step, by its number; the tree answers for all."""
    fleet, observer = Fleet(), Observer()
    for name, log in fleet.logs.items():
        observer.restore(name, log.snapshot(), 1.0)
    for name, batch in fleet.steps(300):
        assert observer.offer(name, batch, fleet.time_ns / 1e9) is Resync.NONE
    assert observer.names == ["worker-0", "worker-1", "worker-2"]
    for number, name in enumerate(observer.names):
        report, log = observer.report(name, fleet.time_ns / 1e9), fleet.logs[name]
        assert (report.number, report.worker, report.synced) == (number, name, True)
        assert report.digest == observer.tree.digest(number) == log.digest
        assert report.numbers.blocks == observer.tree.count(number) == len(log)
    assert len(observer.reports(0.0)) == 3
    observer.tree.check()


def test_numbers_follow_what_applies_not_what_comes() -> None:
    """A duplicate stores nothing, what waits for a gap is stored once that closes, a snapshot is no store."""
    log, observer = EventLog("w0", 1, 16), Observer()
    append(log, 90)
    observer.restore("w0", log.snapshot(), 1.0)
    first, second, third = append(log, 1, 2), append(log, 3), append(log, 4)
    assert observer.offer("w0", first, 1.0) is Resync.NONE
    assert observer.offer("w0", first, 1.0) is Resync.NONE
    assert numbers(observer).stored == 2
    assert observer.offer("w0", third, 1.0) is Resync.REPLAY
    assert (numbers(observer).stored, numbers(observer).blocks) == (2, 3)
    assert observer.offer("w0", second, 1.0) is Resync.NONE
    assert (numbers(observer).stored, numbers(observer).blocks, numbers(observer).batches) == (4, 5, 4)
    counts = observer.report("w0", 0.0).counts
    assert (counts.applied, counts.duplicates, counts.gaps, counts.resyncs) == (3, 1, 1, 1)


def test_a_snapshot_keeps_the_age_of_blocks_and_batches_that_waited_for_it_count() -> None:
    """A block stored before lives on; one that the snapshot brought has no lifetime; one that it lacks is forgotten."""
    log, observer = EventLog("w0", 1, 16), Observer()
    observer.restore("w0", log.snapshot(), 0.0)
    observer.offer("w0", append(log, 1, 2), 10.0)
    append(log, 3)
    log.append([BlockRemoved(blocks(2))], 0.0)
    snapshot = log.snapshot()
    assert observer.offer("w0", append(log, 4), 11.0) is Resync.REPLAY
    assert observer.restore("w0", snapshot, 12.0)
    assert (numbers(observer).stored, numbers(observer).removed, numbers(observer).blocks) == (3, 0, 3)
    observer.offer("w0", log.append([BlockRemoved(blocks(1, 3))], 0.0), 20.0)
    assert numbers(observer).mean_lifetime_s == 10.0, "of block 1 alone"
    assert numbers(observer).removed == 2


def test_a_restart_takes_all_blocks_away() -> None:
    """They count as removed, when the new epoch is first seen."""
    observer = Observer()
    old, new = EventLog("w0", 1, 16), EventLog("w0", 2, 16)
    observer.offer("w0", append(old, 1, 2), 10.0)
    observer.offer("w0", append(new, 3), 14.0)
    assert (numbers(observer).removed, numbers(observer).mean_lifetime_s, numbers(observer).blocks) == (2, 4.0, 1)
    observer.offer("w0", append(old, 9), 15.0)
    assert observer.report("w0", 0.0).counts.stale == 1


def test_a_stream_is_called_as_its_user_calls_it() -> None:
    """The worker's own name is learned; another worker's batches on it change nothing."""
    log, observer = EventLog("w0", 1, 16), Observer()
    observer.add("zmq://here")
    assert observer.view("zmq://here") is None
    assert observer.position("zmq://here") == observer.position("nowhere") == (0, 0)
    assert observer.report("zmq://here", 0.0).worker == ""
    assert observer.restore("zmq://here", log.snapshot(), 0.0)
    observer.offer("zmq://here", append(log, 1), 0.0)
    observer.offer("zmq://here", append(EventLog("other", 1, 16), 7), 0.0)
    report = observer.report("zmq://here", 0.0)
    assert (report.worker, report.counts.stale, report.numbers.blocks) == ("w0", 1, 1)
    assert observer.number("zmq://here") == 0


def test_a_bad_snapshot_changes_nothing() -> None:
    """Neither the tree nor the numbers."""
    log, observer = EventLog("w0", 1, 16), Observer()
    observer.restore("w0", log.snapshot(), 0.0)
    observer.offer("w0", append(log, 1), 1.0)
    assert not observer.restore("w0", replace(log.snapshot(), digest=bytes(16)), 2.0)
    report = observer.report("w0", 3.0)
    assert (report.synced, report.numbers.blocks, report.counts.bad_snapshots) == (True, 1, 1)
    observer.offer("w0", append(log, 2), 4.0)
    assert numbers(observer).stored == 2


def test_the_follow_loop_drives_a_stream() -> None:
    """As a consumer, with a clock."""

    async def test() -> None:
        log, observer, now = EventLog("w0", 1, 16), Observer(), iter(range(1000))
        append(log, 1)
        consumer = observer.consumer("w0", lambda: float(next(now)))
        consumer.malformed()  # before anything is known there is nothing to count it on
        following = asyncio.create_task(follow(MemoryEventSource(log), consumer))
        for block in range(2, 50):
            append(log, block)
            await asyncio.sleep(0)
        while consumer.position() != (1, 49):
            await asyncio.sleep(0.001)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        consumer.malformed()
        report = observer.report("w0", 0.0)
        assert (report.synced, report.digest, report.counts.malformed) == (True, log.digest, 1)

    asyncio.run(asyncio.wait_for(test(), 30))


def test_a_report_is_json() -> None:
    """Plain values, one level; what is not known is null."""
    observer = Observer()
    observer.offer("w0", append(EventLog("w0", 1, 16), 1), 5.0)
    told = json.loads(json.dumps(observer.report("w0", 6.0).as_json()))
    assert (told["name"], told["epoch"], told["blocks"], told["stored"], told["gaps"]) == ("w0", 1, 1, 1, 0)
    assert told["mean_lifetime_s"] is None
    assert told["digest"] == observer.tree.digest(0).hex()


def test_streams_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the workers that a tree knows."""
    monkeypatch.setattr(observer_module, "MAX_WORKERS", 2)
    observer = Observer()
    assert [observer.add(name) for name in ("a", "b", "a")] == [0, 1, 0]
    with pytest.raises(InvalidRequest, match="streams is 3: at most 2"):
        observer.add("c")
