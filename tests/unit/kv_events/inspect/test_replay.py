"""A recording becomes worker logs again, with every number and digest that it had."""

from __future__ import annotations

import asyncio
import io
import math
from pathlib import Path

import msgpack
import pytest

from kv_events import wire
from kv_events.bus import Resync
from kv_events.bus.follow import follow
from kv_events.bus.memory import MemoryEventSource
from kv_events.events import EventBatch, UnknownEvent
from kv_events.inspect.observer import Observer
from kv_events.inspect.recorder import Recorder
from kv_events.inspect.recording import Record, RecordingReader, RecordingWriter, RecordKind
from kv_events.inspect.replay import Pace, Replayer, ReplayLog
from kv_events.log import EventLog
from kv_events.view import WorkerView
from radix import make_tree
from rhizome.errors import Conflict, InvalidRequest, Trimmed
from tests.support.recordings import Fleet, recorded


def records(path: Path) -> list[Record]:
    with RecordingReader(path) as reader:
        return list(reader.records())


def replayed(path: Path) -> Replayer:
    replayer = Replayer()
    for record in records(path):
        replayer.take(record)
    return replayer


def test_a_log_that_begins_with_a_snapshot_goes_on_as_its_worker_did() -> None:
    """Same numbers, same digests, same bytes, same snapshot; what came before is trimmed."""
    fleet = Fleet(workers=1)
    list(fleet.steps(50))
    log = fleet.logs["worker-0"]
    copy = ReplayLog(log.snapshot())
    assert (copy.next_seq, copy.digest, len(copy)) == (50, log.digest, len(log))
    for _, batch in fleet.steps(50):
        copy.append_recorded(batch, None)
        assert copy.read(batch.seq, 1)[0].payload == wire.encode(batch)
        assert copy.digest == batch.digest
    mine, own = copy.snapshot(), log.snapshot()
    assert (mine.next_seq, mine.digest) == (own.next_seq, own.digest)
    assert mine.block_hashes.tolist() == own.block_hashes.tolist()
    assert mine.parent_hashes.tolist() == own.parent_hashes.tolist()
    with pytest.raises(Trimmed):
        copy.read(49, 1)
    with pytest.raises(Conflict):
        copy.read(101, 1)


def test_every_stream_comes_out_as_recorded(tmp_path: Path) -> None:
    """To the worker's own digest; one log a worker."""
    fleet = recorded(tmp_path / "a")
    streams = replayed(tmp_path / "a").streams
    assert streams.keys() == fleet.logs.keys()
    for name, stream in streams.items():
        assert stream.equal
        assert stream.log is not None
        assert stream.log.digest == stream.recorded_digest == fleet.logs[name].digest
        assert (stream.log.epoch, stream.log.next_seq, stream.logs) == (1, fleet.logs[name].next_seq, 1)
    assert sum(stream.batches for stream in streams.values()) == 200


def test_a_restart_and_lost_batches_go_on_in_new_logs(tmp_path: Path) -> None:
    """As whoever follows the published logs needs it: take() says when."""
    fleet = Fleet(workers=1)
    with RecordingWriter((tmp_path / "a").open("wb")) as writer:
        fleet.begin(writer)
        fleet.record(writer, 10)
        list(fleet.steps(5))
        fleet.begin(writer)
        fleet.record(writer, 10)
        fleet.restart("worker-0")
        fleet.record(writer, 10)
        fleet.begin(writer)  # which tells nothing new
        fleet.restart("worker-0")
        list(fleet.steps(3))
        fleet.begin(writer)
        fleet.record(writer, 10)
    replayer, starts = Replayer(), []
    for record in records(tmp_path / "a"):
        if (stream := replayer.take(record)) is not None:
            assert stream.log is not None
            starts.append((stream.log.epoch, stream.log.first_seq))
    assert starts == [(1, 0), (1, 15), (2, 0), (3, 3)]
    assert replayer.streams["worker-0"].equal
    assert replayer.streams["worker-0"].logs == 4


def test_a_digest_that_does_not_come_out_is_told(tmp_path: Path) -> None:
    """The first one by its place; it is replayed as it was, so whoever follows sees it, too."""
    fleet = Fleet(workers=1)
    with RecordingWriter((tmp_path / "a").open("wb")) as writer:
        fleet.begin(writer)
        fleet.record(writer, 5)
        name, batch = fleet.step()
        writer.batch(name, batch._replace(digest=b"x" * 16), 0)
        fleet.record(writer, 5)
    stream = replayed(tmp_path / "a").streams["worker-0"]
    assert (stream.differences, stream.equal) == (1, False)
    assert stream.first_difference == (1, 5, b"x" * 16, batch.digest)
    assert stream.log is not None
    assert stream.log.read(5, 1)[0].batch.digest == b"x" * 16


def test_what_cannot_be_replayed_is_left_out(tmp_path: Path) -> None:
    """Marks, another worker's batches, events that nobody knows."""
    fleet = Fleet(workers=1)
    with RecordingWriter((tmp_path / "a").open("wb")) as writer:
        writer.mark("worker-0", "hello", 0)
        fleet.begin(writer)
        writer.batch("worker-0", EventBatch("other", 9, 0, (), bytes(16), 0.0), 0)
        fleet.record(writer, 5)
    assert replayed(tmp_path / "a").streams["worker-0"].equal
    payload = msgpack.packb([0.0, [{"type": "New"}], 0, wire.VERSION, "w0", 1, 0, bytes(16)])
    replayer = Replayer()
    assert replayer.take(Record(RecordKind.BATCH, "w0", 0, payload, 0)) is replayer.streams["w0"]
    assert replayer.streams["w0"].equal


def test_a_stream_without_a_snapshot_begins_with_its_worker(tmp_path: Path) -> None:
    """Batch 0 is enough; a later one alone is not."""
    fleet = Fleet(workers=1)
    with RecordingWriter((tmp_path / "a").open("wb")) as writer:
        fleet.record(writer, 5)
    stream = replayed(tmp_path / "a").streams["worker-0"]
    assert (stream.equal, stream.batches) == (True, 5)
    with RecordingWriter((tmp_path / "b").open("wb")) as writer:
        fleet.record(writer, 5)
    stream = replayed(tmp_path / "b").streams["worker-0"]
    assert (stream.log, stream.batches) == (None, 0)


def test_what_a_follower_saw_and_recorded_replays_to_the_same(tmp_path: Path) -> None:
    """Recorded from a worker over a bus, replayed, followed: three digests, all equal."""

    async def followed(log: EventLog, recorder: Recorder | None = None) -> bytes:
        view = WorkerView("worker-0", 0, make_tree())
        consumer = view if recorder is None else recorder.consumer("worker-0")
        following = asyncio.create_task(follow(MemoryEventSource(log), consumer))
        while consumer.position() != (log.epoch, log.next_seq):
            await asyncio.sleep(0.001)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        return view.digest if recorder is None else recorder.observer.tree.digest(0)

    fleet = Fleet(workers=1)
    list(fleet.steps(300))
    log = fleet.logs["worker-0"]
    with RecordingWriter((tmp_path / "a").open("wb")) as writer:
        recorder = Recorder(writer, Observer(), lambda: fleet.time_ns)
        assert asyncio.run(followed(log, recorder)) == log.digest
    stream = replayed(tmp_path / "a").streams["worker-0"]
    assert stream.log is not None
    assert asyncio.run(followed(stream.log)) == log.digest


def test_records_are_due_at_their_times_over_the_speed() -> None:
    """The first one now; with an endless speed, all."""
    twice, at_once = Pace(2.0), Pace(math.inf)
    assert [twice.due_s(n * 10**9) for n in (5, 6, 9)] == [0.0, 0.5, 2.0]
    assert [at_once.due_s(n * 10**9) for n in (5, 6, 9)] == [0.0, 0.0, 0.0]
    for speed in (0.0, -1.0, math.nan):
        with pytest.raises(InvalidRequest, match="speed is "):
            Pace(speed)


def test_a_recorder_that_is_full_writes_no_more() -> None:
    """Exactly as many batches as were wanted, of all streams together."""
    fleet = Fleet(workers=2)
    recorder = Recorder(RecordingWriter(io.BytesIO()), Observer(), lambda: fleet.time_ns, max_batches=5)
    streams = {name: recorder.consumer(name) for name in fleet.logs}
    for name, batch in fleet.steps(9):
        assert streams[name].offer(batch) is Resync.NONE
    assert (recorder.full, recorder.batches, recorder.writer.records) == (True, 5, 5)


def test_a_recorder_writes_what_heals_a_stream_and_says_why() -> None:
    """Gaps and their replays, mismatches and their snapshots, what has no bytes, what is no batch."""
    file, fleet = io.BytesIO(), Fleet(workers=1)
    log = fleet.logs["worker-0"]
    recorder = Recorder(RecordingWriter(file), Observer(), lambda: fleet.time_ns)
    stream = recorder.consumer()
    stream.malformed()  # of nobody knows whom
    assert stream.restore(log.snapshot())
    stream.malformed()
    batches = [batch for _, batch in fleet.steps(6)]
    for batch in (batches[0], batches[3], batches[4], *batches[1:4]):
        stream.offer(batch)
    stream.offer(EventBatch("worker-0", 1, 5, (UnknownEvent("BlockStored"),), bytes(16), 0.0))
    assert not stream.restore(EventLog("other", 1, 16).snapshot())
    assert stream.restore(log.snapshot())
    recorder.writer.flush()
    with RecordingReader(io.BytesIO(file.getvalue())) as reader:
        told = [
            str(one.batch().seq) if one.kind is RecordKind.BATCH else one.mark() if one.kind is RecordKind.MARK else "S"
            for one in reader.records()
        ]
    gap = "replay asked for at batch 1 of epoch 1"
    assert told[:9] == ["S", "malformed: not a batch", "0", "3", gap, "4", "1", "2", "3"]
    assert told[9].startswith("not written: 'BlockStored' is no unknown kind")
    assert told[10:] == ["S", "the snapshot was refused", "S"]
    assert (recorder.batches, recorder.unwritten) == (6, 1)
    assert stream.position() == (1, 6)
