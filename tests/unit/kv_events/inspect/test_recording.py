"""Recordings: what was written is read, what was cut off is read as far as it goes, and damage is told."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_events import wire
from kv_events.events import EventBatch, Snapshot, UnknownEvent
from kv_events.inspect import recording, recording_format
from kv_events.inspect.observer import Observer
from kv_events.inspect.recording import (
    FLUSH_NS,
    Record,
    RecordingError,
    RecordingReader,
    RecordingWriter,
    RecordKind,
)
from kv_events.inspect.recording_format import FOOTER_BYTES, FRAME_BYTES, HEADER_BYTES, IndexEntry, Span, thinned
from kv_events.log import EventLog
from kv_events.snapshot_bytes import encode_snapshot
from rhizome.errors import InvalidRequest
from tests.support.recordings import START_NS, STEP_NS, Fleet, recorded


class Kept(io.BytesIO):
    """A file whose bytes outlive it."""

    def close(self) -> None:
        if not self.closed:
            self.data = self.getvalue()
        super().close()


def small_chunks(monkeypatch: pytest.MonkeyPatch, size: int = 2000) -> None:
    monkeypatch.setattr(recording, "CHUNK_BYTES", size)


def bytes_of(steps: int = 200, close: bool = True) -> bytes:
    """A recording; of a recorder that was killed after its last flush, unless it is closed."""
    fleet, file = Fleet(), Kept()
    writer = RecordingWriter(file, START_NS)
    fleet.begin(writer)
    fleet.record(writer, steps)
    if not close:
        writer.flush()
        return file.getvalue()
    writer.close()
    return file.data


def read(data: bytes) -> list[Record]:
    with RecordingReader(io.BytesIO(data)) as reader:
        return list(reader.records())


def test_what_was_written_is_read(tmp_path: Path) -> None:
    """Kinds, names, times and payloads, in their order."""
    fleet = Fleet(workers=2)
    written: list[tuple[RecordKind, str, int, bytes]] = []
    with RecordingWriter((tmp_path / "a").open("wb"), 5) as writer:
        for name, log in fleet.logs.items():
            writer.snapshot(name, log.snapshot(), fleet.time_ns)
            written.append((RecordKind.SNAPSHOT, name, fleet.time_ns, encode_snapshot(log.snapshot())))
        for name, batch in fleet.steps(50):
            writer.batch(name, batch, fleet.time_ns)
            written.append((RecordKind.BATCH, name, fleet.time_ns, wire.encode(batch)))
        writer.mark("worker-1", "gap before 7", fleet.time_ns)
        written.append((RecordKind.MARK, "worker-1", fleet.time_ns, b"gap before 7"))
        assert writer.records == len(written)
    with RecordingReader(tmp_path / "a") as reader:
        assert reader.complete
        assert reader.created_ns == 5
        assert [record[:4] for record in reader.records()] == written
        assert list(reader.records())[-1].mark() == "gap before 7"


def test_a_recording_replays_to_the_same_digest(tmp_path: Path) -> None:
    """An observer fed from the file stands where the workers stood, their former state included."""
    fleet = recorded(tmp_path / "a")
    observer = Observer()
    with RecordingReader(tmp_path / "a") as reader:
        for record in reader.records():
            observer.play(record)
    assert observer.names == list(fleet.logs)
    for name, log in fleet.logs.items():
        report = observer.report(name, fleet.time_ns / 1e9)
        assert report.synced
        assert (report.epoch, report.next_seq, report.digest) == (log.epoch, log.next_seq, log.digest)


def test_the_summary_comes_from_the_index_and_without_one_from_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both say the same, but for whether the recording is whole."""
    small_chunks(monkeypatch)
    whole, cut = bytes_of(), bytes_of(close=False)
    with RecordingReader(io.BytesIO(whole)) as reader:
        from_index = reader.summary()
    with RecordingReader(io.BytesIO(cut)) as reader:
        from_records = reader.summary()
        assert (reader.complete, from_records.complete) == (False, False)
    assert from_index.complete
    assert from_index.chunks > 5
    assert from_index.records == 203
    assert (from_index.first_ns, from_index.last_ns) == (START_NS, START_NS + 200 * STEP_NS)
    assert sum(worker.batches for worker in from_index.workers.values()) == 200
    assert all(worker.snapshots == 1 for worker in from_index.workers.values())
    from_records.complete, from_records.size_bytes = True, len(whole)
    assert from_index == from_records
    for worker in from_index.workers.values():
        (span,) = worker.spans.values()
        assert (span.first_seq, span.last_seq) == (0, span.batches - 1)


def test_a_summary_takes_records_that_cannot_be_read() -> None:
    """Without an index: they count as records, and are nobody's batches."""
    file = io.BytesIO()
    writer = RecordingWriter(file)
    writer.batch_bytes("w0", b"junk", 1, 0, 5)
    writer.snapshot_bytes("w0", b"junk", 1, 6)
    writer.flush()
    with RecordingReader(io.BytesIO(file.getvalue())) as reader:
        summary = reader.summary()
    assert (summary.records, summary.workers["w0"].batches, summary.workers["w0"].snapshots) == (2, 0, 0)


def test_a_recording_that_was_cut_off_anywhere_is_read_up_to_its_last_whole_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the length: what is read is a prefix, never damage, and the reader says that it is not complete."""
    small_chunks(monkeypatch)
    data = bytes_of()
    everything = read(data)
    longest = 0
    for length in [*range(HEADER_BYTES, len(data), 61), *range(len(data) - 300, len(data))]:
        with RecordingReader(io.BytesIO(data[:length])) as reader:
            assert not reader.complete
            found = list(reader.records())
        assert found == everything[: len(found)]
        whole = [record for record in everything if record.offset < length]
        assert longest <= len(found) <= len(whole)
        longest = len(found)
    assert longest == len(everything), "the last ones only lack the index"


def test_what_a_killed_recorder_leaves_lacks_five_seconds_at_most() -> None:
    """Records are flushed as time goes by, without the recorder's doing."""
    fleet, file = Fleet(), io.BytesIO()
    writer = RecordingWriter(file)
    fleet.begin(writer)
    times = []
    for name, batch in fleet.steps(1500):
        writer.batch(name, batch, fleet.time_ns)
        times.append(fleet.time_ns)
    found = [record.time_ns for record in read(file.getvalue()) if record.kind is RecordKind.BATCH]
    assert found == times[: len(found)]
    assert times[-1] - found[-1] <= FLUSH_NS


def test_every_flipped_bit_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By an error that names the place."""
    small_chunks(monkeypatch)
    data = bytes_of(60)
    chance = random.Random(3)
    for at in [*range(HEADER_BYTES + FRAME_BYTES), *chance.sample(range(len(data)), 300)]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << chance.randrange(8)
        with pytest.raises(RecordingError) as caught:
            read(bytes(damaged))
        assert 0 <= caught.value.offset <= len(data)
        assert f"at byte {caught.value.offset}" in str(caught.value)


def test_bytes_that_are_lost_doubled_or_appended_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk that is gone or there twice, and whatever follows the footer."""
    small_chunks(monkeypatch)
    data = bytes_of()
    first, second, third = sorted({record.offset for record in read(data)})[:3]
    for damaged in (
        data[:second] + data[third:],
        data[:third] + data[second:],
        data[:first] + data[second:third] + data[first:second] + data[third:],
        data + b"\0",
        data + data,
    ):
        with pytest.raises(RecordingError):
            read(damaged)


def test_what_is_no_recording_is_refused() -> None:
    """Nothing, other files, another version."""
    other_version = bytearray(bytes_of(1))
    other_version[8] = 2
    header = bytes(other_version[: HEADER_BYTES - 8])
    for data, message in (
        (b"", "not a recording"),
        (b"PK\3\4" + bytes(100), "not a recording"),
        (bytes_of(1)[:20], "a header has 32"),
        (recording_format._checked(header), "version is 2: this release reads 1"),
    ):
        with pytest.raises(RecordingError, match=message):
            RecordingReader(io.BytesIO(data))


def test_a_frame_that_would_inflate_beyond_what_it_says_is_refused() -> None:
    """A bomb costs no more than it claims, and it cannot claim more than zlib can do."""
    raw = bytes(10**6)
    frame = recording_format.pack_frame(recording_format.CHUNK, 0, raw, 0, 0, 0)
    head = recording_format.parse_frame(frame[:FRAME_BYTES], 0)
    small = recording_format.Frame(*(getattr(head, name) for name in head.__slots__[:3]), 10, *(0, 0, 0), head.check, 0)
    with pytest.raises(RecordingError, match="does not inflate to 10 bytes"):
        recording_format.inflate(small, frame[FRAME_BYTES:])
    fields = (recording_format.CHUNK, 0, 100, 2**27, 0, 0, 0, bytes(16))
    boasting = recording_format._checked(recording_format._FRAME.pack(*fields))
    with pytest.raises(RecordingError, match="100 bytes inflate to 134217728"):
        recording_format.parse_frame(boasting, 0)


@pytest.mark.parametrize("close", [True, False], ids=["indexed", "cut off"])
def test_records_are_found_by_worker_time_and_position(monkeypatch: pytest.MonkeyPatch, close: bool) -> None:
    """With an index and without; with one, chunks before are not read."""
    small_chunks(monkeypatch)
    data = bytes_of(close=close)
    everything = read(data)
    with RecordingReader(io.BytesIO(data)) as reader:
        assert list(reader.records(workers=["worker-1"])) == [one for one in everything if one.worker == "worker-1"]
        for from_ns in (0, START_NS, START_NS + 77 * STEP_NS, START_NS + 77 * STEP_NS + 1, START_NS + 10**12):
            assert list(reader.records(from_ns=from_ns)) == [one for one in everything if one.time_ns >= from_ns]
        for seq in (0, 1, 30, 50):
            found = reader.records(["worker-2"], position=("worker-2", 1, seq))
            batches = [one.batch().seq for one in found if one.kind is RecordKind.BATCH]
            assert batches == list(range(batches[0], batches[-1] + 1))
            assert batches[0] <= seq <= batches[-1]
            assert not close or seq - batches[0] < 30
        if close:
            assert not list(reader.records(position=("worker-2", 1, 1000)))
            assert not list(reader.records(position=("worker-9", 1, 0)))
            damaged = data[: HEADER_BYTES + FRAME_BYTES] + b"!" + data[HEADER_BYTES + FRAME_BYTES + 1 :]
            late = RecordingReader(io.BytesIO(damaged))
            assert len(list(late.records(from_ns=START_NS + 150 * STEP_NS))) == 51


def test_a_large_record_has_a_chunk_of_its_own() -> None:
    """A snapshot of 100,000 blocks beside small batches."""
    log = EventLog("w0", 1, 16)
    hashes = np.random.default_rng(1).integers(1, 2**63, 100_000, dtype=np.uint64)
    file = Kept()
    with RecordingWriter(file) as writer:
        writer.snapshot("w0", log.snapshot(), 1)
        snapshot = Snapshot("w0", 1, 7, bytes(16), 16, hashes, hashes)
        writer.snapshot("w0", snapshot, 2)
        writer.batch("w0", EventBatch("w0", 1, 7, (), bytes(16), 0.0), 3)
    records = read(file.data)
    assert np.array_equal(records[1].snapshot().block_hashes, hashes)
    assert len({record.offset for record in records}) == 3


def test_times_do_not_go_back() -> None:
    """A recorder's clock may."""
    file = Kept()
    with RecordingWriter(file) as writer:
        for time_ns in (5, 3, 9):
            writer.mark("w0", "", time_ns)
    assert [record.time_ns for record in read(file.data)] == [5, 5, 9]


def test_what_has_no_bytes_is_refused_and_nothing_is_written() -> None:
    """An event without a kind, a name that is none."""
    file = Kept()
    with RecordingWriter(file) as writer:
        with pytest.raises(wire.WireError, match="unknown kind"):
            writer.batch("w0", EventBatch("w0", 1, 0, (UnknownEvent(""),), bytes(16), 0.0), 1)
        for name in ("", "x" * 300):
            with pytest.raises(wire.WireError, match="a worker's name"):
                writer.mark(name, "", 1)
    assert not read(file.data)


def test_names_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording has no more workers than a tree."""
    monkeypatch.setattr(recording, "MAX_WORKERS", 2)
    with RecordingWriter(io.BytesIO()) as writer:
        for name in ("a", "b", "a"):
            writer.mark(name, "", 1)
        with pytest.raises(InvalidRequest, match="at most 2 in one recording"):
            writer.mark("c", "", 1)


def test_the_index_stays_small_however_long_the_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries are joined; seeking and the summary stay right."""
    small_chunks(monkeypatch, 300)
    monkeypatch.setattr(recording, "MAX_INDEX_SPANS", 40)
    data = bytes_of(400)
    everything = read(data)
    with RecordingReader(io.BytesIO(data)) as reader:
        assert reader._entries is not None
        assert len(reader._entries) < 20
        summary = reader.summary()
        assert summary.chunks == len({record.offset for record in everything}) > 100
        assert summary.records == 403
        from_ns = START_NS + 300 * STEP_NS
        assert list(reader.records(from_ns=from_ns)) == [one for one in everything if one.time_ns >= from_ns]


@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 2), st.integers(0, 50)), max_size=5), max_size=9))
def test_joined_entries_tell_what_their_chunks_told(batches: list[list[tuple[int, int, int]]]) -> None:
    """Thinning an index loses no batch, no record and no chunk."""

    def entry(offset: int, held: list[tuple[int, int, int]]) -> IndexEntry:
        made = IndexEntry(offset, 1, offset, offset + 1, len(held))
        for worker, epoch, seq in held:
            made.spans.setdefault((worker, epoch), Span()).add(Span(0, 1, seq, seq))
        return made

    def totals(entries: list[IndexEntry]) -> tuple[int, int, int, IndexEntry]:
        everything = IndexEntry(0, 0, 0, 0, 0)
        for each in entries:
            everything.add(each)
        return len(entries), everything.chunks, everything.records, everything

    before = totals([entry(offset, held) for offset, held in enumerate(batches)])
    after = totals(thinned([entry(offset, held) for offset, held in enumerate(batches)]))
    assert after[0] == (before[0] + 1) // 2
    assert after[1:3] == before[1:3]
    assert after[3].spans == before[3].spans
    assert after[3].last_ns == before[3].last_ns


@settings(max_examples=300)
@given(st.binary(max_size=200), st.integers(0, 2**16), st.integers(0, 255))
def test_no_bytes_raise_anything_but_a_recording_error(junk: bytes, at: int, length: int) -> None:
    """Junk alone, and in the place of parts of a recording."""
    for data in (junk, junk.join([_SMALL[: at % len(_SMALL)], _SMALL[at % len(_SMALL) + length :]])):
        try:
            with RecordingReader(io.BytesIO(data)) as reader:
                reader.summary()
                for record in reader.records():
                    if record.kind is RecordKind.BATCH:
                        record.batch()
        except wire.WireError:
            pass


def test_a_forged_index_is_refused_before_it_is_believed() -> None:
    """Checks are no defence against forgers: places, counts and workers of an index are looked at."""
    good = IndexEntry(HEADER_BYTES, 1, 0, 0, 1)

    def parsed(names: list[str], entries: list[IndexEntry], number: int, cut: int = 0) -> None:
        raw = recording_format.pack_index(names, entries)
        frame = recording_format.pack_frame(recording_format.INDEX, number, raw, len(entries), 0, 0)
        recording_format.parse_index(raw[: len(raw) - cut], recording_format.parse_frame(frame[:FRAME_BYTES], 10_000))

    parsed(["w"], [good], 1)
    strange = IndexEntry(HEADER_BYTES, 1, 0, 0, 1, {(1, 1): Span()})
    for names, entries, number, cut, message in (
        (["w"], [good], 2, 0, "does not list the 2 chunks"),
        (["w"], [good], 1, 1, "ends too early"),
        ([""], [good], 1, 0, "a worker's name"),
        (["w"], [strange], 1, 0, "worker 1 of 1"),
        (["w"], [IndexEntry(5, 1, 0, 0, 1)], 1, 0, "where none can be"),
        (["w"], [good, good], 2, 0, "where none can be"),
        (["w"], [good, IndexEntry(20_000, 1, 0, 0, 1)], 2, 0, "where none can be"),
    ):
        with pytest.raises(RecordingError, match=message):
            parsed(names, entries, number, cut)


_SMALL = bytes_of(20)
assert len(_SMALL) > FOOTER_BYTES
