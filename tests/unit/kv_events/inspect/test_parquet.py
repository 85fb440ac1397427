"""Recordings as Parquet files: nothing is lost either way."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgpack
import pytest

from kv_events.inspect import parquet as exports
from kv_events.inspect.parquet import ParquetExporter, read_parquet
from kv_events.inspect.recording import Record, RecordingReader, RecordingWriter, RecordKind
from kv_events.wire import WireError
from rhizome.errors import InvalidRequest
from tests.support.recordings import Fleet

arrow = pytest.importorskip("pyarrow", reason="no pyarrow: pip install 'rhizome[parquet]'")
tables: Any = pytest.importorskip("pyarrow.parquet")


def record(path: Path, steps: int = 100) -> Fleet:
    """A recording with everything in it."""
    fleet = Fleet()
    with RecordingWriter(path.open("wb"), 123456789012345678) as writer:
        fleet.begin(writer)
        fleet.record(writer, steps)
        fleet.begin(writer)
        fleet.restart("worker-1")
        fleet.record(writer, 50)
        writer.mark("worker-1", "a mark, \u00e4", fleet.time_ns)
        events = [["AllBlocksCleared"], ["New", 1, 2]]
        payload = msgpack.packb([5, events, 0, 1, "worker-2", 9, 0, bytes(16), "more"])
        writer.batch_bytes("worker-2", payload, 9, 0, fleet.time_ns)
        name, batch = fleet.step()
        writer.batch("zmq://other", batch, fleet.time_ns)
        writer.snapshot("zmq://other", fleet.logs[name].snapshot(), fleet.time_ns)
    return fleet


def export(path: Path, to: Path) -> None:
    with RecordingReader(path) as reader, ParquetExporter(to, reader.created_ns) as exporter:
        for each in reader.records():
            exporter.add(each)


def back(path: Path, to: Path) -> list[int]:
    rows: list[int] = []
    read_parquet(path, lambda created_ns: RecordingWriter(to.open("wb"), created_ns), rows.append)
    return rows


@pytest.mark.parametrize("group_rows", [1, 7, 2**14])
def test_a_recording_survives_the_way_to_parquet_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_rows: int
) -> None:
    """To the last byte, however it is cut into groups and reads."""
    monkeypatch.setattr(exports, "GROUP_ROWS", group_rows)
    monkeypatch.setattr(exports, "READ_ROWS", group_rows)
    record(tmp_path / "a")
    export(tmp_path / "a", tmp_path / "b")
    rows = back(tmp_path / "b", tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()
    assert rows == sorted(rows)
    assert rows[-1] == tables.ParquetFile(tmp_path / "b").metadata.num_rows


def test_the_rows_are_what_one_would_query(tmp_path: Path) -> None:
    """An event a row, hashes as unsigned integers, times as times."""
    fleet = record(tmp_path / "a")
    export(tmp_path / "a", tmp_path / "b")
    table = tables.read_table(tmp_path / "b")
    assert str(table.schema.field("time").type) == "timestamp[ns, tz=UTC]"
    assert str(table.schema.field("block_hashes").type.value_type) == "uint64"
    kinds = table.column("kind").to_pylist()
    assert kinds.count("mark") == 1
    assert kinds.count("snapshot") == 7
    stored = [
        row for row in table.select(["type", "block_hashes", "worker"]).to_pylist() if row["type"] == "BlockStored"
    ]
    assert len(stored) > 50
    assert {row["worker"] for row in stored} == set(fleet.logs)
    assert all(row["block_hashes"] for row in stored)


def test_groups_are_bounded_by_hashes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large snapshots do not pile up in memory."""
    monkeypatch.setattr(exports, "GROUP_HASHES", 100)
    record(tmp_path / "a")
    export(tmp_path / "a", tmp_path / "b")
    assert tables.ParquetFile(tmp_path / "b").metadata.num_row_groups > 3


def test_without_pyarrow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for act in (lambda: ParquetExporter(tmp_path / "b", 0), lambda: back(tmp_path / "b", tmp_path / "c")):
        with pytest.raises(InvalidRequest, match=r"pip install 'rhizome\[parquet\]'"):
            act()


def test_what_is_no_export_is_refused(tmp_path: Path) -> None:
    """Other files, other tables, exports with other columns, and a file that is not there."""
    (tmp_path / "junk").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    tables.write_table(arrow.table({"a": [1]}), tmp_path / "other")
    metadata = {"format": "rhizome-events", "version": "1", "created_ns": "0"}
    tables.write_table(arrow.table({"a": [1]}).replace_schema_metadata(metadata), tmp_path / "columns")
    for name, message in (
        ("junk", "that can be read"),
        ("other", "`rhizome events convert` wrote"),
        ("columns", "just the columns"),
    ):
        with pytest.raises(InvalidRequest, match=f"file is .*{name}.*{message}"):
            back(tmp_path / name, tmp_path / "c")
    with pytest.raises(FileNotFoundError):
        back(tmp_path / "missing", tmp_path / "c")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("kind", "cake", "kind is 'cake'"),
        ("name", None, ""),
        ("digest", None, ""),
        ("block_hashes", None, ""),
        ("block_hashes", [0], "block_hashes hold 0"),
        ("block_size", None, ""),
        ("epoch", -1, ""),
        ("ts", float("nan"), "ts is nan"),
        ("payload", b"junk", ""),
        ("time", None, ""),
    ],
)
def test_what_is_not_right_is_named_by_its_record(tmp_path: Path, column: str, value: Any, message: str) -> None:
    """Nothing else is raised, whatever a table holds."""
    fleet = Fleet(workers=1)
    with RecordingWriter((tmp_path / "a").open("wb")) as writer:
        fleet.record(writer, 20)
    export(tmp_path / "a", tmp_path / "b")
    table = tables.read_table(tmp_path / "b")
    rows = table.to_pydict() | {"time": table.column("time").cast("int64").to_pylist()}
    at = rows["type"].index("BlockStored")
    rows[column][at] = value
    tables.write_table(arrow.Table.from_pydict(rows, table.schema), tmp_path / "b")
    with pytest.raises(InvalidRequest, match=f"record is {rows['record'][at]}: .*{message}"):
        back(tmp_path / "b", tmp_path / "c")


def test_times_that_parquet_cannot_hold_are_refused(tmp_path: Path) -> None:
    """Past the year 2262."""
    with ParquetExporter(tmp_path / "b", 0) as exporter, pytest.raises(WireError, match="less than 2\\^63"):
        exporter.add(Record(RecordKind.MARK, "w", 2**63, b"", 0))
