"""What `verify` finds in streams and recordings, and what it does not hold against them."""

from __future__ import annotations

import asyncio
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from kv_events.bus import Resync
from kv_events.bus.follow import follow
from kv_events.bus.memory import MemoryEventSource
from kv_events.events import BlockStored, EventBatch
from kv_events.inspect import recording
from kv_events.inspect.recording import RecordingReader, RecordingWriter
from kv_events.inspect.verify import RecordingVerdict, StreamVerdict, Verifier, verify_recording
from kv_events.log import EventLog
from kv_events.wire import encode
from radix.reference import ReferenceTree
from tests.support.recordings import Fleet, blocks, recorded


def verify(path: Path) -> RecordingVerdict:
    with RecordingReader(path) as reader:
        return verify_recording(reader)


def append(log: EventLog, *hashes: int) -> EventBatch:
    return log.append([BlockStored(blocks(*hashes), 0, 16)], 0.0)


def wrong(batch: EventBatch) -> EventBatch:
    """As if a bit had flipped in a hash."""
    return batch._replace(events=(BlockStored(blocks(2**40), 0, 16),))


class Case:
    """One stream to verify."""

    def __init__(self) -> None:
        self.log = EventLog("w0", 1, 16)
        append(self.log, 1, 2)
        self.verifier = Verifier(ReferenceTree()).consumer("w0")
        assert self.verifier.restore(self.log.snapshot())

    def offer(self, *batches: EventBatch) -> list[Resync]:
        return [self.verifier.offer(batch) for batch in batches]

    @property
    def verdict(self) -> StreamVerdict:
        return self.verifier.verdict()


def test_a_whole_recording_is_whole(tmp_path: Path) -> None:
    """Every worker's digest is recomputed to the end, over restarts too."""
    fleet = Fleet()
    with RecordingWriter((tmp_path / "a").open("wb")) as writer:
        fleet.begin(writer)
        fleet.record(writer, 100)
        fleet.restart("worker-1")
        fleet.record(writer, 100)
    verdict = verify(tmp_path / "a")
    assert verdict.ok
    assert verdict.complete
    for stream in verdict.streams:
        log = fleet.logs[stream.name]
        assert (stream.epoch, stream.next_seq, stream.digest) == (log.epoch, log.next_seq, log.digest)
        assert (stream.blocks, stream.snapshots) == (len(log), 1)
        assert stream.restarts == (stream.name == "worker-1")
    assert sum(stream.applied for stream in verdict.streams) == 200
    assert json.dumps([stream.as_json() for stream in verdict.streams])


def test_the_first_difference_is_named() -> None:
    """Worker, epoch and sequence number of the batch whose digest is not what the events make; found within it."""
    case = Case()
    good, bad, after = append(case.log, 3), append(case.log, 4), append(case.log, 5)
    assert case.offer(good, wrong(bad), after) == [Resync.NONE, Resync.SNAPSHOT, Resync.SNAPSHOT]
    assert case.verdict.mismatches == 1
    assert case.verdict.first is not None
    assert case.verdict.first[1:] == (1, 2)
    assert bad.digest.hex() in str(case.verdict.first)
    assert "at batch 2 of epoch 1" in str(case.verdict.first)
    assert case.verifier.restore(case.log.snapshot())
    assert case.offer(append(case.log, 6)) == [Resync.NONE]
    assert (case.verdict.mismatches, case.verdict.ok) == (1, False)
    assert case.verdict.digest == case.log.digest


def test_what_the_network_does_is_no_harm_where_nothing_is_lost() -> None:
    """Duplicates, late batches, those of an old epoch and of another worker, and a restart."""
    case = Case()
    batches = [append(case.log, block) for block in range(3, 8)]
    assert case.offer(*batches[:2], batches[3]) == [Resync.NONE, Resync.NONE, Resync.REPLAY]
    assert case.offer(batches[2], batches[2], batches[4])[-1] is Resync.NONE
    new = EventLog("w0", 2, 16)
    case.offer(append(new, 1), batches[0], append(EventLog("other", 9, 16), 1), append(new, 2))
    verdict = case.verdict
    assert verdict.ok
    assert (verdict.duplicates, verdict.late, verdict.stale, verdict.restarts) == (1, 1, 2, 1)
    assert (verdict.epoch, verdict.next_seq, verdict.digest) == (2, 2, new.digest)


def test_lost_batches_are_counted_where_a_snapshot_goes_on() -> None:
    """In one epoch, and from the start of another."""
    case = Case()
    append(case.log, 3)
    append(case.log, 4)
    assert case.offer(append(case.log, 5)) == [Resync.REPLAY]
    assert case.verifier.restore(case.log.snapshot())
    assert case.verdict.lost == 3, "the one that waits is in the snapshot, and was not checked"
    assert case.verdict.first is not None
    assert case.verdict.first[1:] == (1, 1)
    new = EventLog("w0", 2, 16)
    append(new, 1)
    assert case.verifier.restore(new.snapshot())
    assert (case.verdict.lost, case.verdict.restarts) == (4, 1)
    assert case.verdict.digest == new.digest


def test_a_stream_that_ends_in_a_gap_is_not_whole() -> None:
    """It may be that the rest comes; it did not yet."""
    case = Case()
    missing = append(case.log, 3)
    case.offer(append(case.log, 4))
    assert Case.verdict.fget is not None
    open_gap, ok = case.verdict.open_gap, case.verdict.ok
    assert (open_gap, ok) == (True, False)
    assert case.verdict.first == ("batches are missing", 1, 1)
    assert case.offer(missing) == [Resync.NONE]
    assert not case.verdict.open_gap


def test_snapshots_are_checked_against_their_digest_and_against_the_events() -> None:
    """A false one changes nothing; one that differs from what the events told is told."""
    case = Case()
    assert not case.verifier.restore(replace(case.log.snapshot(), digest=bytes(16)))
    assert case.verdict.bad_snapshots == 1
    other = EventLog("w0", 1, 16)
    append(other, 9)
    assert case.verifier.restore(other.snapshot())
    assert case.verdict.bad_snapshots == 2
    assert case.verdict.digest == case.log.digest
    old = EventLog("w0", 1, 16)
    case.offer(append(EventLog("w0", 3, 16), 4))
    assert not case.verifier.restore(old.snapshot())
    assert case.verdict.stale == 1


def test_a_recording_that_was_cut_off_is_said_to_be(tmp_path: Path) -> None:
    """Its streams are right as far as they go."""
    recorded(tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(data[:-10])
    verdict = verify(tmp_path / "a")
    assert (verdict.complete, verdict.damage, verdict.ok) == (False, "", False)
    assert all(stream.ok for stream in verdict.streams)


def test_damage_is_told_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes before it is verified."""
    monkeypatch.setattr(recording, "CHUNK_BYTES", 2000)
    recorded(tmp_path / "a")
    data = bytearray((tmp_path / "a").read_bytes())
    with RecordingReader(tmp_path / "a") as reader:
        offset = sorted({record.offset for record in reader.records()})[3]
    data[offset + 100] ^= 1
    (tmp_path / "a").write_bytes(data)
    verdict = verify(tmp_path / "a")
    assert f"at byte {offset}" in verdict.damage
    assert not verdict.ok
    assert sum(stream.applied for stream in verdict.streams) > 10


def test_a_record_that_is_no_batch_is_told(tmp_path: Path) -> None:
    """And the rest is verified."""
    fleet = Fleet(workers=1)
    with RecordingWriter((tmp_path / "a").open("wb")) as writer:
        fleet.begin(writer)
        fleet.record(writer, 5)
        writer.batch_bytes("worker-0", b"junk", 1, 5, 0)
        writer.snapshot_bytes("worker-0", b"junk", 1, 0)
        fleet.record(writer, 5)
    verdict = verify(tmp_path / "a")
    (stream,) = verdict.streams
    assert (stream.malformed, stream.applied, stream.ok) == (2, 10, False)
    assert verdict.index_differs, "it counts a batch where there is none"


def test_an_index_that_tells_of_other_batches_is_noticed(tmp_path: Path) -> None:
    """The batches themselves are right."""
    fleet = Fleet(workers=1)
    with RecordingWriter((tmp_path / "a").open("wb")) as writer:
        fleet.begin(writer)
        for name, batch in fleet.steps(5):
            writer.batch_bytes(name, encode(batch), 7, batch.seq, 0)
    verdict = verify(tmp_path / "a")
    assert (verdict.index_differs, verdict.streams[0].ok, verdict.ok) == (True, True, False)


def test_a_live_stream_is_verified_while_it_is_followed() -> None:
    """Mismatches heal and are told nevertheless."""

    async def test() -> None:
        log = EventLog("w0", 1, 16)
        consumer = Verifier().consumer("w0")
        following = asyncio.create_task(follow(MemoryEventSource(log), consumer, first_delay_s=0.001))
        for block in range(1, 100):
            append(log, block)
            await asyncio.sleep(0)
        while consumer.position() != (1, 99):
            await asyncio.sleep(0.001)
        consumer.offer(wrong(append(log, 500)))
        append(log, 501)
        while not (consumer.position() == (1, 101) and consumer.verdict().digest == log.digest):
            await asyncio.sleep(0.001)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        verdict = consumer.verdict()
        assert (verdict.mismatches, verdict.ok) == (1, False)

    asyncio.run(asyncio.wait_for(test(), 30))


def test_progress_is_told_in_bytes(tmp_path: Path) -> None:
    """Never back, and not past the file."""
    recorded(tmp_path / "a")
    told: list[int] = []
    data = (tmp_path / "a").read_bytes()
    with RecordingReader(io.BytesIO(data)) as reader:
        verify_recording(reader, told.append)
    assert told == sorted(told)
    assert 0 < told[0] <= told[-1] < len(data)
