"""Traces are read as published, written as read, and refused with a line that says what to mend."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.traces import trace as module
from deploy.traces.trace import Trace, TraceRequest, read_trace, write_trace
from rhizome.errors import InvalidRequest

LINE = {"timestamp": 0, "input_length": 1000, "output_length": 7, "hash_ids": [0, 1]}


def written(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def refusal(path: Path, block_size: int | None = None) -> str:
    with pytest.raises(InvalidRequest) as caught:
        read_trace(path, block_size)
    return str(caught.value)


def test_mooncakes_lines_are_read_as_published(tmp_path: Path) -> None:
    """Milliseconds become seconds from the first arrival; unknown fields are skipped; blank lines, too."""
    path = tmp_path / "small_trace.jsonl"
    path.write_text(
        json.dumps(LINE | {"timestamp": 3000, "extra": 1}) + "\n\n" + json.dumps(LINE | {"timestamp": 4500})
    )
    trace = read_trace(path)
    assert (trace.name, trace.block_size) == ("small_trace", 512)
    assert trace.requests == (TraceRequest(0.0, 1000, 7, (0, 1)), TraceRequest(1.5, 1000, 7, (0, 1)))
    assert trace.duration_s == 1.5


def test_extra_fields_are_taken_and_block_size_is_of_the_file(tmp_path: Path) -> None:
    """Session, tenant, priority and block size are read where a line has them."""
    extra = {"session_id": 12, "tenant": "a", "priority": -2, "block_size": 500}
    trace = read_trace(written(tmp_path / "t.jsonl", LINE | extra))
    assert trace.block_size == 500
    assert trace.requests[0] == TraceRequest(0.0, 1000, 7, (0, 1), "12", "a", -2)


def test_requests_are_sorted_by_time_and_equal_times_stay_in_order(tmp_path: Path) -> None:
    """A recording has its lines in order of ending; the order of arrival is what counts."""
    lines = [LINE | {"timestamp": at, "output_length": n} for n, at in enumerate((50, 20, 50, 20), 1)]
    trace = read_trace(written(tmp_path / "t.jsonl", *lines))
    assert [(request.arrival_s, request.output_tokens) for request in trace.requests] == [
        (0.0, 2),
        (0.0, 4),
        (pytest.approx(0.03), 1),
        (pytest.approx(0.03), 3),
    ]


def test_one_id_less_or_more_is_forgiven_and_an_output_of_none_is_one(tmp_path: Path) -> None:
    """Publications differ in whether the last, partial block counts."""
    lines = [LINE | {"hash_ids": [0]}, LINE | {"hash_ids": [0, 1, 2], "output_length": 0}]
    first, second = read_trace(written(tmp_path / "t.jsonl", *lines)).requests
    assert (first.block_ids, second.block_ids, second.output_tokens) == ((0,), (0, 1), 1)


def test_ids_of_blocks_become_ids_of_prefixes(tmp_path: Path) -> None:
    """Equal ids behind different ones are different prefixes; equal prefixes stay equal."""
    lines = [LINE | {"hash_ids": ids} for ids in ([5, 5], [6, 5], [5, 5], [6, 6])]
    chains = [request.block_ids for request in read_trace(written(tmp_path / "t.jsonl", *lines)).requests]
    assert chains[0] == chains[2]
    assert chains[1][0] == chains[3][0]
    assert len({block for chain in chains for block in chain}) == 5


def test_bailians_traces_are_read_with_their_units(tmp_path: Path) -> None:
    """Their timestamps are seconds, their blocks 16 tokens, and chats that name a parent are one session."""
    chat = {"input_length": 20, "output_length": 3, "type": "text", "turn": 1, "hash_ids": [1, 2]}
    lines = [
        chat | {"chat_id": 7, "parent_chat_id": -1, "timestamp": 61.5},
        chat | {"chat_id": 8, "parent_chat_id": 7, "timestamp": 63.0, "turn": 2},
        chat | {"chat_id": 9, "parent_chat_id": 8, "timestamp": 64.0, "turn": 3},
        chat | {"chat_id": 10, "parent_chat_id": -1, "timestamp": 64.5},
    ]
    trace = read_trace(written(tmp_path / "t.jsonl", *lines))
    assert trace.block_size == 16
    assert [request.arrival_s for request in trace.requests] == [0, 1.5, 2.5, 3]
    assert [request.session for request in trace.requests] == ["7", "7", "7", "10"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"timestamp": -1}, "timestamp is -1"),
        ({"timestamp": float("nan")}, "timestamp is nan"),
        ({"timestamp": True}, "timestamp is True"),
        ({"timestamp": None}, "timestamp is None"),
        ({"input_length": 0}, "input_length is 0"),
        ({"input_length": 1.5}, "input_length is 1.5"),
        ({"input_length": 2**24 + 1}, "input_length is 16777217"),
        ({"output_length": -1}, "output_length is -1"),
        ({"hash_ids": 3}, "hash_ids is 3"),
        ({"hash_ids": []}, "len(hash_ids) is 0: 2 ids"),
        ({"hash_ids": [1, 2, 3, 4]}, "len(hash_ids) is 4: 2 ids"),
        ({"hash_ids": [1, "a"]}, "hash_ids[1] is 'a'"),
        ({"hash_ids": [1, 2**64]}, "hash_ids[1] is 18446744073709551616"),
        ({"tenant": ["x"]}, "tenant is ['x']"),
        ({"session_id": "x" * 257}, "session_id is"),
        ({"priority": 2**31}, "priority is 2147483648"),
        ({"block_size": 0}, "block_size is 0"),
        ({"block_size": 500}, "block_size is 500: 512, as on the lines before"),
    ],
)
def test_refusals_name_file_line_field_value_and_limit(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    """Whatever is wrong on line 2 is said so that it can be found and mended."""
    path = written(tmp_path / "t.jsonl", LINE, LINE | change)
    assert f"{path}, line 2: {told}" in refusal(path)


@pytest.mark.parametrize("text", ["x", "[1]", "[" * 100_000, '{"timestamp": ' + "9" * 5000 + "}"])
def test_what_is_not_a_json_object_is_refused(tmp_path: Path, text: str) -> None:
    """Broken, nested without end or with numbers without end: one kind of error."""
    (tmp_path / "t.jsonl").write_text(text)
    assert "line 1: line is" in refusal(tmp_path / "t.jsonl")


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    """A missing file, an empty one, one that is not gzip and one that is cut."""
    assert "a file that can be read" in refusal(tmp_path / "none.jsonl")
    assert "at least one request" in refusal(written(tmp_path / "empty.jsonl"))
    (tmp_path / "no.jsonl.gz").write_bytes(b"no gzip")
    assert "a file that can be read" in refusal(tmp_path / "no.jsonl.gz")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(LINE).encode())[:-12])
    assert "a file that can be read" in refusal(tmp_path / "cut.jsonl.gz")


def test_lines_and_counts_have_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without newlines, or with too many requests or ids, is refused before memory runs out."""
    path = written(tmp_path / "t.jsonl", LINE, LINE, LINE)
    for name, limit, told in (("MAX_LINE", 40, "line 1: line"), ("MAX_REQUESTS", 2, "line 3: requests is 3")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, limit)
            assert told in refusal(path)
    monkeypatch.setattr(module, "MAX_BLOCK_IDS", 5)
    assert "line 3: hash_ids is 6" in refusal(path)


def test_a_given_block_size_must_agree_with_the_file(tmp_path: Path) -> None:
    """It is for files that say nothing, and no way to overrule one that does."""
    path = written(tmp_path / "t.jsonl", LINE | {"block_size": 500})
    assert read_trace(path, 500).block_size == 500
    assert "500: 512, as was asked for" in refusal(path, 512)
    assert read_trace(written(tmp_path / "u.jsonl", LINE), 600).block_size == 600
    assert "block_size is 0" in refusal(path, 0)


requests = st.lists(
    st.builds(
        TraceRequest,
        st.integers(0, 10**9).map(lambda us: us / 1e6),
        st.integers(1, 64),
        st.integers(1, 100),
        st.just(()),
        st.text(max_size=5),
        st.text(max_size=5),
        st.integers(-5, 5),
    ),
    min_size=1,
    max_size=8,
)


@settings(deadline=None, max_examples=50)
@given(made=requests, block_size=st.sampled_from([7, 16, 512]), zipped=st.booleans())
def test_what_is_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, made: list[TraceRequest], block_size: int, zipped: bool
) -> None:
    """Write, read: the same requests, times to the microsecond."""
    from dataclasses import replace

    made = sorted(made, key=lambda request: request.arrival_s)
    made = [replace(r, block_ids=tuple(range(-(-r.input_tokens // block_size)))) for r in made]
    path = tmp_path_factory.mktemp("traces") / ("t.jsonl.gz" if zipped else "t.jsonl")
    write_trace(Trace("t", block_size, tuple(made)), path)
    back = read_trace(path)
    assert (back.name, back.block_size) == ("t", block_size)
    for ours, theirs in zip(made, back.requests, strict=True):
        assert theirs.arrival_s == pytest.approx(ours.arrival_s - made[0].arrival_s, abs=1e-6)
        assert replace(theirs, arrival_s=0.0) == replace(ours, arrival_s=0.0)


def test_scaling_and_cutting() -> None:
    """Twice the speed halves the arrivals and changes nothing else; a head is the first requests."""
    trace = Trace("t", 512, tuple(TraceRequest(float(at), 10, 1, (0,)) for at in (0, 2, 6)))
    assert [request.arrival_s for request in trace.scaled(2).requests] == [0, 1, 3]
    assert [request.arrival_s for request in trace.head(2).requests] == [0, 2]
    assert len(trace.head(9)) == 3
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidRequest, match="speed"):
            trace.scaled(wrong)
    with pytest.raises(InvalidRequest, match="requests is 0"):
        trace.head(0)
