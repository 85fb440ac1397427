"""`rhizome events convert`: recordings to JSON lines or Parquet, and back; nothing is lost."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from deploy.events.files import open_recording
from deploy.events.progress import progress_bar, size_text
from kv_events.inspect.jsonl import MAX_LINE_CHARS, read_lines, record_lines
from kv_events.inspect.recording import Record, RecordingWriter, RecordKind, is_recording
from kv_events.inspect.words import counted
from rhizome.errors import InvalidRequest

STANDARD = "-"
FORMS = {
    ".rhz": "recording",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
"""By a file's ending; `-` is JSON lines."""


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What `convert` was asked for."""

    source: str
    destination: str
    force: bool = False


def run_convert(options: ConvertOptions) -> None:
    """Convert, and say on standard error what was done. Raises InvalidRequest, WireError.

    A destination is only there once it is whole: what is written is called .part until then.
    """
    if options.source != STANDARD and not Path(options.source).is_file():
        limit = "a file that exists, or - for JSON lines on standard input"
        raise InvalidRequest("source", options.source, limit)
    source, destination = _form("source", options.source), _form("destination", options.destination)
    if "recording" not in (source, destination):
        raise InvalidRequest("destination", options.destination, "a recording, where the source is none")
    with _output(options) as path:
        if source == "recording":
            records, complete = _export(Path(options.source), destination, path)
        else:
            records, complete = _import(options.source, source, path), True
    size = "" if options.destination == STANDARD else f", {size_text(Path(options.destination).stat().st_size)}"
    print(f"{options.destination}: {counted(records, 'record')}{size}", file=sys.stderr)
    if not complete:
        print(f"rhizome: {options.source} was cut off: this is what is whole", file=sys.stderr)


def _form(field: str, name: str) -> str:
    """Raises InvalidRequest where the name does not tell, and no recording is there."""
    if name == STANDARD:
        return "jsonl"
    form = FORMS.get(Path(name).suffix.lower())
    with suppress(OSError):
        if form is None and field == "source" and is_recording(Path(name)):
            return "recording"
    if form is None:
        raise InvalidRequest(field, name, f"a name that ends in one of {', '.join(FORMS)}; or -")
    return form


@contextmanager
def _output(options: ConvertOptions) -> Iterator[Path | None]:
    """Where to write; None for standard output."""
    if options.destination == STANDARD:
        yield None
        return
    path = Path(options.destination)
    if path.exists() and not options.force:
        raise InvalidRequest("destination", str(path), "a file that does not exist, or with --force one to be replaced")
    part = path.with_name(path.name + ".part")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        raise InvalidRequest("destination", str(path), f"a file that can be written ({error.strerror})") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _export(source: Path, form: str, path: Path | None) -> tuple[int, bool]:
    """Returns how many records there were, and whether they are all that was recorded."""
    with open_recording("source", source) as reader, progress_bar("converting", reader.size_bytes) as advance:
        count = 0

        def records() -> Iterator[Record]:
            nonlocal count
            for record in reader.records():
                advance(record.offset)
                count += 1
                yield record

        if form == "jsonl":
            with _text(path) as file:
                for line in record_lines(reader.created_ns, records()):
                    print(line, file=file)
        elif path is not None and form == "parquet":
            from kv_events.inspect.parquet import ParquetExporter

            with ParquetExporter(path, reader.created_ns) as exporter:
                for record in records():
                    exporter.add(record)
        elif path is not None:
            with RecordingWriter(path.open("wb"), reader.created_ns) as writer:
                for record in records():
                    _copy(record, writer)
        return count, reader.complete


def _copy(record: Record, writer: RecordingWriter) -> None:
    match record.kind:
        case RecordKind.BATCH:
            batch = record.batch()
            writer.batch_bytes(record.worker, record.payload, batch.epoch, batch.seq, record.time_ns)
        case RecordKind.SNAPSHOT:
            writer.snapshot_bytes(record.worker, record.payload, record.snapshot().epoch, record.time_ns)
        case _:
            writer.mark(record.worker, record.mark(), record.time_ns)


def _import(source: str, form: str, path: Path | None) -> int:
    """Returns how many records there were."""
    assert path is not None, "a recording is not written to standard output"

    def make_writer(created_ns: int) -> RecordingWriter:
        return RecordingWriter(path.open("wb"), created_ns)

    if form == "jsonl":
        with _lines(source) as lines:
            return read_lines(lines, make_writer)
    from kv_events.inspect.parquet import read_parquet, row_count

    with progress_bar("converting", row_count(Path(source))) as advance:
        return read_parquet(Path(source), make_writer, advance)


@contextmanager
def _text(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
    else:
        with path.open("w", encoding="utf-8") as file:
            yield file


@contextmanager
def _lines(source: str) -> Iterator[Iterator[str]]:
    """The lines of a file or of standard input; one that is too long comes in pieces, which are refused."""
    with ExitStack() as stack:
        if source == STANDARD:
            file: TextIO = sys.stdin
        else:  # what is not UTF-8 is refused as part of its line
            file = stack.enter_context(Path(source).open(encoding="utf-8", errors="surrogateescape"))
        yield iter(lambda: file.readline(MAX_LINE_CHARS + 1), "")
