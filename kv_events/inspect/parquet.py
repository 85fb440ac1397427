"""Recordings as Parquet files, and back: a row an event, for DuckDB, pandas and the like. Needs the extra `parquet`.

Columns: `record` (number, from 0), `kind` (batch, snapshot or mark), `name` (of the stream), `worker`, `time` (of
receipt), `epoch`, `seq` (of a snapshot: the next batch's), `digest`, `ts`; of an event `event` (number within its
batch), `type`, `block_hashes`, `parent_block_hash` (null at the root), `token_ids` (null where none are told),
`block_size`, `medium`; of a snapshot `block_hashes`, `parent_hashes`, `tier_masks` (null: all on the device alone),
`block_size`; of a mark `text`. A batch without events has one row, in which `type` is null. `payload` is there where
kv_events.wire would write a batch otherwise than it was recorded; it stands for all the rest when the file is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from kv_events import wire
from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventBatch, Snapshot, UnknownEvent
from kv_events.inspect.recording import Record, RecordingWriter, RecordKind
from kv_events.snapshot_bytes import decode_snapshot, encode_snapshot
from kv_events.wire import WireError
from rhizome.errors import InvalidRequest

FORMAT = b"rhizome-events"
VERSION = b"1"

GROUP_ROWS = 2**14
GROUP_HASHES = 2**20
"""A row group is written when it has as many: what is held in memory, unless one snapshot has more."""

READ_ROWS = 2**10  # at a time

Row = dict[str, Any]


class ParquetExporter:
    """Writes records to a Parquet file."""

    def __init__(self, path: Path, created_ns: int) -> None:
        """Raises InvalidRequest where pyarrow is missing, OSError where the file cannot be written."""
        arrow, parquet = _arrow(), _pyarrow("pyarrow.parquet")
        metadata = {b"format": FORMAT, b"version": VERSION, b"created_ns": str(created_ns).encode()}
        self._schema = _schema(arrow).with_metadata(metadata)
        self._table = arrow.Table
        self._file = parquet.ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[Row] = []
        self._hashes = 0
        self._records = 0

    def __enter__(self) -> ParquetExporter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, record: Record) -> None:
        """The next record. Raises WireError where its payload is none."""
        if record.time_ns >= 2**63:
            raise WireError(f"a record's time is {record.time_ns} ns: Parquet has less than 2^63")
        head = {"record": self._records, "kind": record.kind.name.lower(), "name": record.worker}
        for row in _rows(record):
            self._rows.append(head | {"time": record.time_ns} | row)
            self._hashes += len(row.get("block_hashes", ()))
        self._records += 1
        if len(self._rows) >= GROUP_ROWS or self._hashes >= GROUP_HASHES:
            self._flush()

    def close(self) -> None:
        """Write what is left, and the file's end."""
        try:
            self._flush()
        finally:
            self._file.close()

    def _flush(self) -> None:
        if self._rows:
            self._file.write_table(self._table.from_pylist(self._rows, self._schema))
        self._rows, self._hashes = [], 0


def row_count(path: Path) -> int:
    """The rows of a Parquet file. Raises as read_parquet does."""
    with _opened(path) as file:
        return int(file.metadata.num_rows)


def read_parquet(
    path: Path, make_writer: Callable[[int], RecordingWriter], progress: Callable[[int], None] = lambda _: None
) -> int:
    """Write a Parquet file into a recording, and close it; returns how many records. `make_writer` is told when the
    recording was created, in ns, and `progress` of rows. Raises InvalidRequest for what is not such a file, or is not
    right in it, OSError where it cannot be opened."""
    with _opened(path) as file:
        metadata = file.schema_arrow.metadata or {}
        if metadata.get(b"format") != FORMAT or metadata.get(b"version") != VERSION:
            raise InvalidRequest("file", str(path), "a Parquet file that `rhizome events convert` wrote")
        if not file.schema_arrow.remove_metadata().equals(_schema(_arrow())):
            raise InvalidRequest("file", str(path), "a Parquet file with just the columns of an export")
        with make_writer(_created(metadata)) as writer:
            for number, rows in groupby(_read_rows(file, progress), key=itemgetter("record")):
                _write(number, list(rows), writer)
        return writer.records


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    arrow, parquet = _arrow(), _pyarrow("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InvalidRequest("file", str(path), f"a Parquet file that can be read ({error})") from error


def _created(metadata: dict[bytes, bytes]) -> int:
    told = metadata.get(b"created_ns", b"0")
    return min(int(told), 2**64 - 1) if told.isdigit() and len(told) <= 20 else 0


def _rows(record: Record) -> list[Row]:
    match record.kind:
        case RecordKind.BATCH:
            batch = record.batch()
            head: Row = {name: getattr(batch, name) for name in ("worker", "epoch", "seq", "digest", "ts")}
            if wire.encode(batch) != record.payload:
                head["payload"] = record.payload
            events = [{"event": place} | _event_row(event) for place, event in enumerate(batch.events)]
            return [head | event for event in events or [{}]]
        case RecordKind.SNAPSHOT:
            return [_snapshot_row(record.snapshot())]
        case _:
            return [{"text": record.mark()}]


def _event_row(event: Event) -> Row:
    match event:
        case BlockStored():
            return {
                "type": "BlockStored",
                "block_hashes": event.block_hashes,
                "parent_block_hash": event.parent_hash or None,
                "token_ids": event.token_ids,
                "block_size": event.block_size,
                "medium": event.medium,
            }
        case BlockRemoved():
            return {"type": "BlockRemoved", "block_hashes": event.block_hashes, "medium": event.medium}
        case AllBlocksCleared():
            return {"type": "AllBlocksCleared"}
        case UnknownEvent():
            return {"type": event.kind}


def _snapshot_row(snapshot: Snapshot) -> Row:
    return {
        "worker": snapshot.worker,
        "epoch": snapshot.epoch,
        "seq": snapshot.next_seq,
        "digest": snapshot.digest,
        "block_size": snapshot.block_size,
        "block_hashes": snapshot.block_hashes,
        "parent_hashes": snapshot.parent_hashes,
        "tier_masks": snapshot.tier_masks,
    }


def _read_rows(file: Any, progress: Callable[[int], None]) -> Iterator[Row]:
    done = 0
    for batch in file.iter_batches(READ_ROWS):
        times = batch.column("time").cast("int64")  # Python's own have no ns
        batch = batch.set_column(batch.schema.get_field_index("time"), "time", times)
        yield from batch.to_pylist()
        done += batch.num_rows
        progress(done)


def _write(number: int, rows: list[Row], writer: RecordingWriter) -> None:
    first = rows[0]
    try:
        name, time_ns = first["name"], first["time"]
        match first["kind"]:
            case "batch":
                payload = first["payload"] or wire.encode(_batch(rows))
                batch = wire.decode(payload)  # what is written can be read
                writer.batch_bytes(name, payload, batch.epoch, batch.seq, time_ns)
            case "snapshot":
                payload = encode_snapshot(_snapshot(first))
                writer.snapshot_bytes(name, payload, decode_snapshot(payload).epoch, time_ns)
            case "mark":
                writer.mark(name, first["text"], time_ns)
            case kind:
                raise ValueError(f"kind is {kind!r}: snapshot, batch and mark are known")
    except (WireError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise InvalidRequest("record", number, str(error)) from error


def _batch(rows: list[Row]) -> EventBatch:
    first = rows[0]
    events = tuple(_event(row) for row in rows if row["type"] is not None)
    return EventBatch(first["worker"], first["epoch"], first["seq"], events, first["digest"], first["ts"])


def _event(row: Row) -> Event:
    match row["type"]:
        case "BlockStored":
            tokens = None if row["token_ids"] is None else np.array(row["token_ids"], dtype=np.uint32)
            parent = row["parent_block_hash"] or 0
            return BlockStored(_hashes(row["block_hashes"]), parent, row["block_size"], tokens, row["medium"])
        case "BlockRemoved":
            return BlockRemoved(_hashes(row["block_hashes"]), row["medium"])
        case "AllBlocksCleared":
            return AllBlocksCleared()
        case kind:
            return UnknownEvent(kind)


def _snapshot(row: Row) -> Snapshot:
    hashes, parents = _hashes(row["block_hashes"]), _hashes(row["parent_hashes"])
    masks = None if row["tier_masks"] is None else np.array(row["tier_masks"], dtype=np.uint8)
    if len(parents) != len(hashes) or (masks is not None and len(masks) != len(hashes)):
        raise ValueError(f"parent_hashes and tier_masks must be as many as block_hashes, {len(hashes)}")
    position = row["epoch"], row["seq"]
    return Snapshot(row["worker"], *position, row["digest"], row["block_size"], hashes, parents, masks)


def _hashes(values: Iterable[int]) -> Any:
    return np.array(list(values), dtype=np.uint64)


def _schema(arrow: Any) -> Any:
    hashes, text = arrow.list_(arrow.uint64()), arrow.dictionary(arrow.int32(), arrow.string())
    return arrow.schema(
        [
            ("record", arrow.int64()),
            ("kind", text),
            ("name", text),
            ("time", arrow.timestamp("ns", "UTC")),
            ("worker", text),
            ("epoch", arrow.int64()),
            ("seq", arrow.int64()),
            ("digest", arrow.binary(16)),
            ("ts", arrow.float64()),
            ("event", arrow.int32()),
            ("type", text),
            ("block_hashes", hashes),
            ("parent_block_hash", arrow.uint64()),
            ("token_ids", arrow.list_(arrow.uint32())),
            ("block_size", arrow.int32()),
            ("medium", text),
            ("parent_hashes", hashes),
            ("tier_masks", arrow.list_(arrow.uint8())),
            ("text", arrow.string()),
            ("payload", arrow.binary()),
        ]
    )


def _arrow() -> Any:
    return _pyarrow("pyarrow")


def _pyarrow(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise InvalidRequest("format", "parquet", "install pyarrow for it: pip install 'rhizome[parquet]'") from error
