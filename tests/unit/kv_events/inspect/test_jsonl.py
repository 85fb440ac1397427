"""Recordings as JSON lines: nothing is lost either way, and what is not right is named by its line."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_events import wire
from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, EventBatch, Snapshot, UnknownEvent
from kv_events.inspect.jsonl import header_line, read_lines, record_line, record_lines
from kv_events.inspect.recording import Record, RecordingReader, RecordingWriter, RecordKind
from kv_events.snapshot_bytes import encode_snapshot
from rhizome.errors import InvalidRequest
from tests.support.recordings import Fleet, blocks


class Kept(io.BytesIO):
    """A file whose bytes outlive it."""

    def close(self) -> None:
        if not self.closed:
            self.data = self.getvalue()
        super().close()


def recording(*, other_writer: bool = False) -> bytes:
    """With everything in it."""
    fleet, file = Fleet(), Kept()
    with RecordingWriter(file, 123456789012345678) as writer:
        fleet.begin(writer)
        fleet.record(writer, 100)
        fleet.begin(writer)
        fleet.restart("worker-1")
        fleet.record(writer, 50)
        writer.mark("worker-1", "a mark, \u00e4", fleet.time_ns)
        if other_writer:
            payload = msgpack.packb(
                [5, [["AllBlocksCleared"], ["New", 1, 2]], 0, 1, "worker-2", 9, 0, bytes(16), "more"]
            )
            writer.batch_bytes("worker-2", payload, 9, 0, fleet.time_ns)
            name, batch = fleet.step()
            writer.batch("zmq://other", batch, fleet.time_ns)
            writer.snapshot("zmq://other", fleet.logs[name].snapshot(), fleet.time_ns)
    return file.data


def lines_of(data: bytes) -> list[str]:
    with RecordingReader(io.BytesIO(data)) as reader:
        return list(record_lines(reader.created_ns, reader.records()))


def written(lines: list[str]) -> bytes:
    file = Kept()
    read_lines(lines, lambda created_ns: RecordingWriter(file, created_ns))
    return file.data


@pytest.mark.parametrize("other_writer", [False, True])
def test_a_recording_survives_the_way_to_lines_and_back(other_writer: bool) -> None:
    """To the last byte of the file, even what another writer wrote in its own way."""
    data = recording(other_writer=other_writer)
    lines = lines_of(data)
    assert written(lines) == data
    assert lines_of(written(lines)) == lines
    assert sum("payload" in json.loads(line) for line in lines) == other_writer
    assert sum("name" in json.loads(line) for line in lines) == 2 * other_writer


hashes = st.lists(st.integers(1, 2**64 - 1), max_size=4).map(lambda values: blocks(*values))
media = st.sampled_from(["GPU", "CPU", "", "\u2603 x"])
tokens = st.none() | st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4).map(
    lambda v: np.array(v, dtype=np.uint32)
)
events = st.one_of(
    st.builds(BlockStored, hashes, st.integers(0, 2**64 - 1), st.integers(0, 2**20), tokens, media),
    st.builds(BlockRemoved, hashes, media),
    st.just(AllBlocksCleared()),
    st.builds(UnknownEvent, st.just("New")),
)
counts = st.integers(0, 2**63 - 1)
times = st.floats(allow_nan=False, allow_infinity=False)
batches = st.builds(
    EventBatch,
    st.sampled_from(["w0", "\u00e4 b"]),
    st.integers(1, 2**63 - 1),
    counts,
    st.lists(events, max_size=4).map(tuple),
    st.binary(min_size=16, max_size=16),
    times,
)


@settings(max_examples=200)
@given(batches, st.integers(0, 2**64 - 1))
def test_every_batch_survives_as_a_line(batch: EventBatch, time_ns: int) -> None:
    """Its very bytes, and no number that jq would round."""
    payload = wire.encode(batch)
    line = record_line(Record(RecordKind.BATCH, batch.worker, time_ns, payload, 0))
    told = json.loads(line)
    assert "payload" not in told
    _only_exact_numbers({name: value for name, value in told.items() if name != "ts"})
    with RecordingReader(io.BytesIO(written([header_line(0), line]))) as reader:
        (record,) = reader.records()
    assert record[:4] == (RecordKind.BATCH, batch.worker, time_ns, payload)


def _only_exact_numbers(value: Any) -> None:
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            _only_exact_numbers(each)
    assert not isinstance(value, int) or value < 2**53


@given(
    st.lists(st.tuples(st.integers(1, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(1, 7)), max_size=5),
    st.booleans(),
)
def test_every_snapshot_survives_as_a_line(rows: list[tuple[int, int, int]], tiers: bool) -> None:
    """With tiers and without."""
    masks = np.array([mask for _, _, mask in rows], dtype=np.uint8) if tiers else None
    held = blocks(*(block for block, _, _ in rows)), blocks(*(parent for _, parent, _ in rows))
    payload = encode_snapshot(Snapshot("w0", 7, 2**60, bytes(range(16)), 16, *held, masks))
    line = record_line(Record(RecordKind.SNAPSHOT, "w0", 5, payload, 0))
    with RecordingReader(io.BytesIO(written([header_line(0), line]))) as reader:
        (record,) = reader.records()
    assert record[:4] == (RecordKind.SNAPSHOT, "w0", 5, payload)


def batch_line(**changes: Any) -> str:
    event = {"type": "BlockStored", "block_hashes": ["a"], "parent_block_hash": None, "block_size": 16, "medium": "GPU"}
    line = {"kind": "batch", "worker": "w0", "time_ns": "5", "epoch": 1, "seq": 0, "digest": "0" * 32, "ts": 1.5}
    return json.dumps(line | {"events": [event | changes.pop("event", {})]} | changes)


def test_lines_that_people_write_are_taken() -> None:
    """Short hashes, numbers or strings, empty lines between."""
    lines = [header_line(0), "", batch_line(), "  ", batch_line(seq="1", time_ns=6, ts=2)]
    with RecordingReader(io.BytesIO(written(lines))) as reader:
        first, second = (record.batch() for record in reader.records())
    (event,) = first.events
    assert isinstance(event, BlockStored)
    assert event.block_hashes.tolist() == [10]
    assert (second.seq, second.ts) == (1, 2.0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "it is not JSON"),
        ("[]", "a JSON object is needed"),
        ("[" * 100_000, "it is not JSON|recursion"),
        ("{}", "worker is None: str is needed"),
        ('{"kind": "cake", "worker": "w", "time_ns": "0"}', "kind is 'cake'"),
        (batch_line(worker=""), "worker is empty"),
        (batch_line(worker="x" * 500), "exceeds|worker"),
        (batch_line(time_ns="x"), "time_ns is 'x'"),
        (batch_line(time_ns=-1), "time_ns is -1"),
        (batch_line(time_ns=1.5), "time_ns is 1.5"),
        (batch_line(time_ns="9" * 50), "time_ns is '999"),
        (batch_line(epoch=0), "epoch is 0"),
        (batch_line(seq=2**63), "seq is "),
        (batch_line(digest="xy"), "digest is 'xy': 32 hexadecimal digits"),
        (batch_line(ts="now"), "ts is 'now': a finite number"),
        (batch_line().replace("1.5", "NaN"), "ts is nan"),
        (batch_line().replace("1.5", "9" * 400), "int too large|finite"),
        (batch_line(events={}), "events is {}: list is needed"),
        (batch_line(events=[5]), "event is 5: a JSON object is needed"),
        (batch_line(event={"type": 5}), "type is 5: str is needed"),
        (batch_line(event={"block_hashes": ["0"]}), "block_hashes hold 0"),
        (batch_line(event={"block_hashes": [12]}), "block_hashes hold 12: 1 to 16 hexadecimal digits"),
        (batch_line(event={"block_hashes": ["+f"]}), "'\\+f': 1 to 16 hexadecimal digits"),
        (batch_line(event={"block_hashes": ["0" * 17]}), "1 to 16 hexadecimal digits"),
        (batch_line(event={"token_ids": [-1]}), "out of bounds"),
        (batch_line(event={"token_ids": [True]}), "token_ids hold other than integers"),
        (batch_line(event={"block_size": -1}), "block_size is -1"),
        (batch_line(event={"type": "x" * 500}), "unknown kind"),
        (batch_line(payload="!!"), "payload is not base64"),
        (batch_line(payload=base64.b64encode(b"junk").decode()), "batch|msgpack"),
    ],
)
def test_what_is_not_right_is_named_by_its_line(line: str, message: str) -> None:
    """As a refusal of line 2, with the field."""
    with pytest.raises(InvalidRequest, match=f"(?s)line is 2: .*({message})"):
        written([header_line(0), line])


def snapshot_line(**changes: Any) -> str:
    head = {"kind": "snapshot", "worker": "w0", "time_ns": "5", "epoch": 1, "next_seq": 0, "digest": "0" * 32}
    body = {"block_size": 16, "block_hashes": ["a"], "parent_hashes": ["0"], "tier_masks": None}
    return json.dumps(head | body | changes)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (snapshot_line(parent_hashes=[]), "must be as many as block_hashes, 1"),
        (snapshot_line(tier_masks=[1, 1]), "must be as many as block_hashes, 1"),
        (snapshot_line(tier_masks=[256]), "out of bounds"),
        (snapshot_line(block_size=2**40), "block_size is 1099511627776: 0 to 1048576"),
        (snapshot_line(block_size=0), "block_size is 0"),
        (snapshot_line(epoch=0), "epoch is 0"),
    ],
)
def test_what_is_not_right_in_a_snapshot_is_named(line: str, message: str) -> None:
    """Like a batch's."""
    with pytest.raises(InvalidRequest, match=f"line is 2: .*({message})"):
        written([header_line(0), line])


@pytest.mark.parametrize("lines", [[], ["\n"], ["{}"], [batch_line()], [header_line(0).replace("1", "2", 1)]])
def test_a_header_comes_first(lines: list[str]) -> None:
    """Of a version that is known."""
    with pytest.raises(InvalidRequest, match="line is 1: "):
        written(lines)


@pytest.mark.skipif(shutil.which("jq") is None, reason="no jq: apt-get install jq")
def test_jq_keeps_every_hash() -> None:
    """Which it would not, were they numbers."""
    lines = lines_of(recording())
    query = "select(.events) | .events[] | .block_hashes? // empty | .[]"
    done = subprocess.run(
        ["jq", "-r", query], input="\n".join(lines), capture_output=True, text=True, check=True, timeout=60
    )
    events = [event for line in lines for event in json.loads(line).get("events", [])]
    assert done.stdout.split() == [block for event in events for block in event.get("block_hashes", [])]
    assert len(done.stdout.split()) > 100
