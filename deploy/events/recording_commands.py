"""The commands of `rhizome events` that are about recordings: record, replay, stats, verify, diff, convert."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.events.completion import complete_target, complete_worker
from rhizome.errors import InvalidRequest

DEFAULT_TARGET = "router://127.0.0.1:7700"

Target = Annotated[
    str, typer.Argument(help="router://HOST:PORT, a bus URL or a recording", autocompletion=complete_target)
]
LiveTarget = Annotated[str, typer.Argument(help="router://HOST:PORT or a bus URL", autocompletion=complete_target)]
Recording = Annotated[Path, typer.Argument(help="a recording")]
Workers = Annotated[
    list[str] | None,
    typer.Option("--worker", help="only this one; may be repeated", autocompletion=complete_worker),
]
ForSeconds = Annotated[float | None, typer.Option("--for", min=0.1, metavar="SECONDS", help="how long to watch")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object a line")]
Force = Annotated[bool, typer.Option("--force", help="replace a file that is there")]


def record(
    file: Annotated[Path, typer.Argument(help="the recording to write")],
    target: LiveTarget = DEFAULT_TARGET,
    workers: Workers = None,
    for_s: Annotated[
        float | None, typer.Option("--for", min=0.1, metavar="SECONDS", help="end after so long; else with Ctrl-C")
    ] = None,
    batches: Annotated[int | None, typer.Option(min=1, metavar="N", help="end after so many batches")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write what comes into a file, until Ctrl-C: everything, as it comes, after a snapshot of each worker.

    Ends with 1 where nothing could be read.
    """
    from deploy.events.record import RecordOptions, run_record

    with _damage():
        asyncio.run(run_record(RecordOptions(file, target, tuple(workers or ()), for_s, batches, force, as_json)))


def replay(
    file: Recording,
    into: Annotated[
        str, typer.Option(help="tree, or a bus URL to publish at; {worker} in it stands for each worker's name")
    ] = "tree",
    speed: Annotated[
        str | None, typer.Option(metavar="X", help="times real time, or max [default: 1 onto a bus, max into a tree]")
    ] = None,
    workers: Workers = None,
    hold: Annotated[bool, typer.Option("--hold", help="stay published when all is replayed, until Ctrl-C")] = False,
    insecure: Annotated[bool, typer.Option("--insecure", help="publish off-host in the clear")] = False,
    as_json: Json = False,
) -> None:
    """Play a recording, into a tree or onto a bus that routers follow, with the numbers and digests that it had.

    Ends with 1 where a digest does not come out as it was recorded.
    """
    from deploy.events.replay import ReplayOptions, run_replay

    options = ReplayOptions(file, into, _speed(speed), tuple(workers or ()), hold, insecure, as_json)
    with _damage():
        _end(asyncio.run(run_replay(options)))


def stats(
    target: Target = DEFAULT_TARGET,
    workers: Workers = None,
    for_s: ForSeconds = None,
    every_s: Annotated[
        float | None,
        typer.Option("--every", min=0.1, metavar="SECONDS", help="a table each time, until --for or Ctrl-C"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Count what streams tell: blocks, stores and removals a second, churn, lifetimes, reuse, gaps, duplicates, lag.

    churn is the share of the cache that goes in a minute.
    lifetime is from a block's store to its removal, mean.
    reuse is the share of blocks told as stored that were held already or before.
    lag is from the worker's clock to this machine's.

    Of a recording rates are means over all of it; of a live target over what was
    watched: 10 s, without --for and --every.
    """
    from deploy.events.stats import StatsOptions, run_stats

    watch_s = 10.0 if for_s is None and every_s is None else for_s
    with _damage():
        asyncio.run(run_stats(StatsOptions(target, tuple(workers or ()), watch_s, every_s, as_json)))


def verify(
    target: Target = DEFAULT_TARGET,
    workers: Workers = None,
    for_s: ForSeconds = 10.0,
    as_json: Json = False,
) -> None:
    """Check every sequence number and recompute the digest after every batch, of a recording or of live streams.

    Ends with 1 where something is wrong: a digest that differs, lost batches, a damaged file or one that was cut off.
    Duplicates, late batches and restarts are no harm.
    """
    from deploy.events.verify import VerifyOptions, run_verify

    _end(asyncio.run(run_verify(VerifyOptions(target, tuple(workers or ()), for_s, as_json))))


def diff(
    a: Annotated[
        str, typer.Argument(help="a recording, router://HOST:PORT or a bus URL", autocompletion=complete_target)
    ],
    b: Annotated[
        str | None,
        typer.Argument(help="another one; without it, a router's own workers", autocompletion=complete_target),
    ] = None,
    workers: Workers = None,
    limit: Annotated[int, typer.Option(min=0, max=100_000, help="how many blocks of each kind to list")] = 20,
    as_json: Json = False,
) -> None:
    """Compare two recordings batch by batch, or who holds what by two accounts: router and workers, now and then.

    Ends with 1 where they differ.
    """
    from deploy.events.diff import DiffOptions, run_diff

    with _damage():
        _end(asyncio.run(run_diff(DiffOptions(a, b, tuple(workers or ()), limit, as_json))))


def convert(
    source: Annotated[str, typer.Argument(help="a recording, .jsonl, .parquet, or - for JSON lines on standard input")],
    destination: Annotated[str, typer.Argument(help="the same; - is standard output")],
    force: Force = False,
) -> None:
    """Turn a recording into JSON lines or Parquet, or either into a recording; nothing is lost.

    A recording that becomes another one is copied: one that was cut off gets its index.
    """
    from deploy.events.convert import ConvertOptions, run_convert

    with _damage():
        run_convert(ConvertOptions(source, destination, force))


_COMMANDS: dict[Callable[..., Any], tuple[str, ...]] = {
    record: (
        "record session.rhz",
        "record session.rhz zmq://127.0.0.1:5557 --for 60",
        "record session.rhz --worker worker-0 --batches 1000 --json",
    ),
    replay: (
        "replay session.rhz",
        "replay session.rhz --into grpc://127.0.0.1:0 --speed 2 --hold",
        "replay session.rhz --into 'redis://127.0.0.1/replay:{worker}' --speed max",
    ),
    stats: ("stats", "stats session.rhz --json | jq '{name, blocks, reuse}'", "stats zmq://127.0.0.1:5557 --every 2"),
    verify: ("verify session.rhz", "verify router://127.0.0.1:7700 --for 60", "verify session.rhz --json | tail -1"),
    diff: (
        "diff monday.rhz tuesday.rhz",
        "diff router://127.0.0.1:7700",
        "diff session.rhz redis://127.0.0.1/kv:worker-0",
    ),
    convert: (
        "convert session.rhz session.parquet",
        "convert session.rhz - | jq -c 'select(.events) | [.worker, .seq]'",
        "convert edited.jsonl session.rhz",
    ),
}


def add_to(app: typer.Typer, examples: Callable[..., str]) -> None:
    """Add the commands to `rhizome events`."""
    for command, lines in _COMMANDS.items():
        app.command(epilog=examples(*lines))(command)


@contextmanager
def _damage() -> Iterator[None]:
    """What cannot be read any further is one line, and ends with 1."""
    from kv_events.wire import WireError

    try:
        yield
    except WireError as error:
        print(f"rhizome: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def _speed(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return math.inf if text == "max" else float(text)
    except ValueError:
        raise InvalidRequest("speed", text, "a number above 0, or max") from None


def _end(right: bool) -> None:
    if not right:
        raise typer.Exit(1)
