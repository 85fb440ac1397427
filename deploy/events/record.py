"""`rhizome events record`: what comes on a target's streams goes into a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.events.following import Following, following, ticks, wall_clock_ns
from deploy.events.progress import duration_text, size_text, status_line
from deploy.events.show import Output
from deploy.events.targets import open_targets
from kv_events.inspect.observer import Observer
from kv_events.inspect.recorder import RecordedStream, Recorder
from kv_events.inspect.recording import RecordingWriter
from kv_events.inspect.words import counted, printable
from rhizome.errors import InvalidRequest, Unavailable

LOOK_S = 0.1
"""How often it is looked whether enough batches have come."""

FLUSH_S = 1.0
"""What a killed recorder loses at most."""


@dataclass(frozen=True, slots=True)
class RecordOptions:
    """What `record` was asked for."""

    file: Path
    target: str
    workers: tuple[str, ...] = ()  # none: all
    for_s: float | None = None  # None: until a signal
    batches: int | None = None
    force: bool = False
    as_json: bool = False


async def run_record(options: RecordOptions) -> None:
    """Record until the time is over, the batches have come, or a signal; then say what is in the file.

    Raises InvalidRequest, and Unavailable where nothing came from anybody; the file is whole in any case.
    """
    async with open_targets(options.target, options.workers) as targets:
        clock_ns, named = wall_clock_ns(), targets.router is not None
        if targets.recording is not None:
            raise InvalidRequest(
                "target", options.target, "a live one; a recording is copied by `rhizome events convert`"
            )
        with _full_disk(options.file), _create(options, clock_ns()) as writer:
            recorder = Recorder(writer, Observer(), clock_ns, options.batches)
            async with following(targets, lambda name: recorder.consumer(name if named else "")) as followed:
                seconds = await _record(recorder, followed, options.for_s)
                problems = followed.problems
                followed.check_reached()
    _tell(options, recorder, seconds, problems)


def _create(options: RecordOptions, created_ns: int) -> RecordingWriter:
    try:
        return RecordingWriter(options.file.open("wb" if options.force else "xb"), created_ns)
    except FileExistsError:
        limit = "a file that does not exist, or with --force one to be replaced"
        raise InvalidRequest("file", str(options.file), limit) from None
    except OSError as error:
        raise InvalidRequest("file", str(options.file), f"a file that can be written ({error.strerror})") from error


@contextmanager
def _full_disk(file: Path) -> Iterator[None]:
    """What the file cannot take is no fault of the program."""
    try:
        yield
    except OSError as error:
        raise Unavailable(f"{file}: {error.strerror}") from error


async def _record(recorder: Recorder, followed: Following, for_s: float | None) -> float:
    flushed_s = elapsed_s = 0.0
    with status_line() as show:
        async with aclosing(ticks(LOOK_S, for_s)) as ticking:
            async for elapsed_s in ticking:
                await followed.refresh()
                for consumer in followed.foreign.values():
                    if isinstance(consumer, RecordedStream):
                        consumer.mark_foreign()
                if elapsed_s - flushed_s >= FLUSH_S:
                    recorder.writer.flush()
                    flushed_s = elapsed_s
                show(_status(recorder, followed, elapsed_s))
                if recorder.full:
                    break
    return elapsed_s


def _status(recorder: Recorder, followed: Following, elapsed_s: float) -> str:
    streams = counted(len(recorder.observer.names), "worker")
    batches, blocks = counted(recorder.batches, "batch", "batches"), counted(len(recorder.observer.tree), "block")
    size = size_text(recorder.writer.size_bytes)
    problems = "".join(f" · {printable(problem)}" for problem in followed.problems[:1])
    return f"recording {duration_text(elapsed_s)}: {streams}, {batches}, {blocks} held, {size}{problems} · Ctrl-C ends"


def _tell(options: RecordOptions, recorder: Recorder, seconds: float, problems: list[str]) -> None:
    output, size_bytes = Output(as_json=options.as_json), options.file.stat().st_size
    workers, records = recorder.observer.names, recorder.writer.records
    for problem in problems:
        print(f"rhizome: {printable(problem)}", file=sys.stderr)
    if output.as_json:
        told = {"file": str(options.file), "seconds": round(seconds, 3), "workers": workers}
        counts = {"batches": recorder.batches, "records": records, "unwritten": recorder.unwritten}
        output.json(told | counts | {"size_bytes": size_bytes})
        return
    batches = counted(recorder.batches, "batch", "batches")
    what = f"{batches} of {counted(len(workers), 'worker')} in {duration_text(seconds)}, {size_text(size_bytes)}"
    output.text(f"{options.file}: {what}")
    if recorder.unwritten:
        output.text(f"{recorder.unwritten} batches were too large: snapshots stand in their place", "bad")
