"""`rhizome events stats`: each worker's stream in numbers, of a recording or live."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from deploy.events.following import Following, following, ticks, wall_clock_ns
from deploy.events.progress import duration_text, progress_bar, size_text, status_line
from deploy.events.show import Output, table
from deploy.events.targets import Targets, open_targets
from kv_events.inspect.observer import Observer, StreamReport
from kv_events.inspect.recording import RecordingReader
from kv_events.inspect.words import counted, printable

HEADS = (
    "worker",
    "blocks",
    "stored/s",
    "removed/s",
    "churn/min",
    "lifetime",
    "reuse",
    "batches/s",
    "bytes/s",
    "lag p50",
    "lag p99",
    "gaps",
    "duplicates",
    "resyncs",
    "state",
)


@dataclass(frozen=True, slots=True)
class StatsOptions:
    """What `stats` was asked for."""

    target: str
    workers: tuple[str, ...] = ()  # none: all
    for_s: float | None = 10.0  # a live target; None: until a signal
    every_s: float | None = None  # between two tables; None: one at the end
    as_json: bool = False


async def run_stats(options: StatsOptions) -> None:
    """Print the numbers. Raises InvalidRequest, Unavailable, WireError."""
    output = Output(as_json=options.as_json)
    async with open_targets(options.target, options.workers) as targets:
        if targets.recording is not None:
            names = {stream.name for stream in targets.streams}
            await asyncio.to_thread(_of_recording, targets.recording, names, output)
        else:
            await _live(targets, options, output)


def _of_recording(path: Path, names: Collection[str], output: Output) -> None:
    with RecordingReader(path) as reader, progress_bar("reading", reader.size_bytes) as advance:
        observer, first_ns, last_ns = Observer(window_s=None), 0, 0
        for record in reader.records(names):
            advance(record.offset)
            observer.play(record)
            first_ns, last_ns = first_ns or record.time_ns, record.time_ns
        complete = reader.complete
    if not complete:
        print(f"rhizome: {path} was cut off: this is what is whole", file=sys.stderr)
    if not output.as_json:
        size, seconds = size_text(path.stat().st_size), duration_text((last_ns - first_ns) / 1e9)
        output.text(f"{path}: {size}, {counted(len(observer.names), 'worker')}, {seconds}; rates are means", "note")
    _print(output, [(report, state_of(report)) for report in observer.reports(last_ns / 1e9)])


async def _live(targets: Targets, options: StatsOptions, output: Output) -> None:
    clock_ns, every_s, shown_s = wall_clock_ns(), options.every_s, 0.0
    observer = Observer(window_s=every_s)

    def now_s() -> float:
        return clock_ns() / 1e9

    async with following(targets, lambda name: observer.consumer(name, now_s)) as followed:
        with status_line() as show:
            async with aclosing(ticks(min(1.0, every_s or 1.0), options.for_s)) as ticking:
                async for elapsed_s in ticking:
                    await followed.refresh()
                    show(f"watching {targets.target}: {duration_text(round(elapsed_s))} · Ctrl-C ends")
                    if every_s is not None and elapsed_s - shown_s >= every_s * 0.99:
                        _print(output, _with_states(observer, followed, now_s()), time.strftime("%H:%M:%S"))
                        shown_s = elapsed_s
        for name in targets.problems:  # their streams cannot be opened: a row without numbers
            observer.add(name)
        if every_s is None and (followed.reached or targets.router is not None):
            _print(output, _with_states(observer, followed, now_s()))
        followed.check_reached()
        problems = followed.problems
    for problem in problems:
        print(f"rhizome: {printable(problem)}", file=sys.stderr)


def _with_states(observer: Observer, followed: Following, now_s: float) -> list[tuple[StreamReport, str]]:
    return [(report, state_of(report, followed.problem_of(report.name))) for report in observer.reports(now_s)]


def _print(output: Output, reports: Sequence[tuple[StreamReport, str]], heading: str = "") -> None:
    if output.as_json:
        for report, state in reports:
            output.json(report.as_json() | {"state": state})
    elif reports:
        if heading:
            output.text(heading, "note")
        for line in table(HEADS, [_row(report, state) for report, state in reports]):
            output.line(line)
    output.flush()


def _row(report: StreamReport, state: str) -> list[str]:
    numbers, counts = report.numbers, report.counts
    return [
        printable(report.worker if "://" in report.name and report.worker else report.name),
        f"{numbers.blocks:,}",
        f"{numbers.stored_per_s:,.1f}",
        f"{numbers.removed_per_s:,.1f}",
        _percent(numbers.churn_per_min),
        "-" if numbers.mean_lifetime_s is None else duration_text(numbers.mean_lifetime_s),
        _percent(numbers.reuse),
        f"{numbers.batches_per_s:,.1f}",
        size_text(numbers.bytes_per_s),
        _milliseconds(numbers.lag_p50_s),
        _milliseconds(numbers.lag_p99_s),
        str(counts.gaps),
        str(counts.duplicates),
        str(counts.resyncs),
        state,
    ]


def state_of(report: StreamReport, problem: str = "") -> str:
    """In a word or two; `problem` keeps the stream from being read."""
    if problem:
        return "not reached"
    if report.synced:
        return "in step"
    return "nothing came" if report.epoch == 0 else "behind"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:,.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.3g} ms"
