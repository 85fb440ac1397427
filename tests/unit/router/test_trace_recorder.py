"""A router's recording is a trace that can be read, and no request waits for it or fails by it."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from deploy.traces.reuse import measure_reuse
from deploy.traces.trace import read_trace
from rhizome.errors import InvalidRequest
from rhizome.v1 import generation_pb2
from router import trace_recorder
from router.trace_recorder import RecordedRequest, TraceRecorder, recording_trace, trace_line


def request(arrived_s: float, hashes: list[int], tail: int = 3, block_size: int = 16) -> RecordedRequest:
    """A request with so many full blocks and some tokens more."""
    tokens = len(hashes) * block_size + tail
    return RecordedRequest(arrived_s, block_size, tokens, np.array(hashes, np.uint64), "", 0)


def chunk(completion_tokens: int = 0) -> bytes:
    """A piece of an answer; the last one tells how many tokens there were."""
    usage = generation_pb2.Usage(completion_tokens=completion_tokens) if completion_tokens else None
    return generation_pb2.GenerateChunk(token_ids=[1], usage=usage).SerializeToString()


def test_a_recording_is_read_as_a_trace(tmp_path: Path) -> None:
    """Arrivals, lengths, session, tenant, priority and shared prefixes come back; lines are in order of ending."""
    path = tmp_path / "seen.jsonl"
    second = request(102.5, [2**64 - 1, 7, 9])
    second.session, second.tenant, second.priority = "s", "t", 3
    for piece in (chunk(1), chunk(), chunk(40)):
        second.delivered(piece)
    with recording_trace(path, 100.0) as recorder:
        assert recorder is not None
        recorder.record(second)
        recorder.record(request(101.0, [2**64 - 1, 7, 8]))
    assert (recorder.written, recorder.left_out) == (2, 0)
    trace = read_trace(path)
    assert trace.block_size == 16
    assert [r.arrival_s for r in trace.requests] == [0, 1.5]
    assert [(r.input_tokens, r.output_tokens, r.session, r.tenant, r.priority) for r in trace.requests] == [
        (51, 1, "", "", 0),
        (51, 40, "s", "t", 3),
    ]
    assert measure_reuse(trace).hits == [0, 2]


def test_prediction_and_outcome_are_recorded() -> None:
    """Both from the arrival on; neither where there was no first token."""
    seen = request(100.0, [5])
    assert "ttft_ms" not in json.loads(trace_line(seen, 100.0, b"k"))
    seen.predicted_s = 100.25
    assert "predicted_ttft_ms" not in json.loads(trace_line(seen, 100.0, b"k"))
    seen.first_token_s = 100.5
    line = json.loads(trace_line(seen, 100.0, b"k"))
    assert (line["predicted_ttft_ms"], line["ttft_ms"]) == (250.0, 500.0)


def test_ids_tell_nothing_about_the_hashes() -> None:
    """They depend on the recording's key, fit JSON's exact integers and are no block hashes."""
    ids = [json.loads(trace_line(request(0, [5, 6]), 0, key))["hash_ids"] for key in (b"a", b"a", b"b")]
    assert ids[0] == ids[1] != ids[2]
    assert all(each < 2**53 and each not in (5, 6) for each in ids[0])


def test_an_answer_that_was_cut_counts_its_pieces() -> None:
    """The first piece alone told of its tokens; nothing delivered is nothing, and what is no message is a piece."""
    cut = request(0, [1])
    assert cut.output_tokens() == 0
    for piece in (chunk(1), chunk(), chunk()):
        cut.delivered(piece)
    assert cut.output_tokens() == 3
    cut.delivered(b"\xff no message")
    assert cut.output_tokens() == 4


def test_size_is_bounded_and_lines_stay_whole() -> None:
    """At the limit the recording ends with its last whole line, and the rest is counted."""
    file = io.BytesIO()
    line = len(trace_line(request(0.0, [1]), 0.0, b"k"))
    recorder = TraceRecorder(file, 0.0, max_bytes=3 * line + 30)
    for _ in range(6):
        recorder.record(request(0.0, [1]))
    recorder.close()
    assert recorder.written + recorder.left_out == 6
    assert 2 <= recorder.written <= 3
    assert len(file.getvalue().splitlines()) == recorder.written
    assert all(json.loads(each) for each in file.getvalue().splitlines())


class SlowFile(io.BytesIO):
    """Writes nothing before it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may = threading.Event()

    def write(self, line: bytes) -> int:  # type: ignore[override]
        self.may.wait()
        return super().write(line)


def test_a_slow_disk_costs_lines_and_no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """record() returns at once; what does not fit the queue is left out and counted."""
    monkeypatch.setattr(trace_recorder, "MAX_PENDING", 2)
    file = SlowFile()
    recorder = TraceRecorder(file, 0.0)
    for _ in range(10):
        recorder.record(request(0.0, [1]))
    assert recorder.left_out >= 7
    file.may.set()
    recorder.close()
    assert recorder.written + recorder.left_out == 10


def test_an_error_of_the_disk_ends_the_recording_only() -> None:
    """Later requests are counted; closing works."""

    class Broken(io.BytesIO):
        def write(self, line: bytes) -> int:  # type: ignore[override]
            raise OSError("no space left")

    recorder = TraceRecorder(Broken(), 0.0)
    for _ in range(3):
        recorder.record(request(0.0, [1]))
    recorder.close()
    assert (recorder.written, recorder.left_out) == (0, 3)


def test_other_block_sizes_are_left_out(tmp_path: Path) -> None:
    """A trace has one block size: the first request's."""
    with recording_trace(tmp_path / "t.jsonl", 0.0) as recorder:
        assert recorder is not None
        recorder.record(request(0.0, [1]))
        recorder.record(request(0.0, [1], block_size=32))
    assert (recorder.written, recorder.left_out) == (1, 1)


def test_no_file_is_overwritten(tmp_path: Path) -> None:
    """An old recording stays; without a path there is no recorder."""
    path = tmp_path / "t.jsonl"
    path.write_text("old")
    with pytest.raises(InvalidRequest, match="record_trace"):
        with recording_trace(path, 0.0):
            pass
    assert path.read_text() == "old"
    with recording_trace(None, 0.0) as recorder:
        assert recorder is None
