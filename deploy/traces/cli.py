"""`rhizome trace …`: the commands. What they need is imported when they run: --help stays quick."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

traces_app = typer.Typer(
    help="Traces of requests: look into them, and make more like them.",
    no_args_is_help=True,
    epilog="FILE is JSON lines as Mooncake publishes them (timestamp in ms, input_length, output_length, hash_ids), or "
    "what `rhizome router --record-trace FILE` wrote; gzipped where it ends in .gz. Ends with 2 for bad input.",
)

TraceFile = Annotated[Path, typer.Argument(metavar="FILE", help="a trace")]
BlockSize = Annotated[
    int | None, typer.Option(min=1, help="tokens in a block, where the file does not tell [default: 512]")
]


class Preset(StrEnum):
    """A workload of deploy.traces.workload."""

    CHAT = "chat"
    AGENT = "agent"
    RAG = "rag"
    BATCH = "batch"


def _examples(*commands: str) -> str:
    return "\n\n".join(["Examples:", *(f"  rhizome trace {command}" for command in commands)])


@traces_app.command(
    epilog=_examples("stats conversation_trace.jsonl", "stats recorded.jsonl.gz --json", "stats t.jsonl --plots plots/")
)
def stats(
    file: TraceFile,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object on standard output")] = False,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="draw PNGs there; needs rhizome[plots]")] = None,
    block_size: BlockSize = None,
) -> None:
    """Rate, lengths, reuse, sessions, the working set over time, and what caches of some sizes would hit."""
    import json

    from deploy.traces.show import show_stats
    from deploy.traces.stats import trace_stats
    from deploy.traces.trace import read_trace

    trace = read_trace(file, block_size)
    numbers = trace_stats(trace)
    if as_json:
        typer.echo(json.dumps(numbers.to_json(), allow_nan=False))
    else:
        show_stats(numbers)
    if plots is not None:
        from deploy.traces.plots import draw_plots

        for path in draw_plots(trace, numbers, plots):
            typer.echo(str(path), err=True)


@traces_app.command(
    epilog=_examples(
        "synthesize --workload agent --requests 5000 --out agent.jsonl.gz",
        "synthesize --like conversation_trace.jsonl --requests 20000 --seed 7 --out more.jsonl",
    )
)
def synthesize(
    out: Annotated[Path, typer.Option(help="the trace to write; gzipped where it ends in .gz")],
    like: Annotated[Path | None, typer.Option(metavar="FILE", help="a trace to fit the workload to")] = None,
    workload: Annotated[
        Preset | None,
        typer.Option(
            help="chat: sessions of people; agent: long sessions of tool calls; rag: questions about shared documents; "
            "batch: nothing shared"
        ),
    ] = None,
    requests: Annotated[int, typer.Option(min=1)] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="equal seeds make equal traces")] = 0,
    rate: Annotated[float | None, typer.Option(min=0, help="requests a second [default: the workload's]")] = None,
    block_size: Annotated[int | None, typer.Option(min=1, help="tokens in a block [default: the workload's]")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace a file that is there")] = False,
) -> None:
    """Make a trace: of a preset workload, or of one fitted to another trace."""
    from dataclasses import replace

    from deploy.traces.fit import fit_workload
    from deploy.traces.synthesize import synthesize as make
    from deploy.traces.trace import read_trace, write_trace
    from deploy.traces.workload import PRESETS
    from rhizome.errors import InvalidRequest

    if (like is None) == (workload is None):
        raise InvalidRequest("--like, --workload", f"{like}, {workload}", "exactly one of them is to be given")
    if out.exists() and not force:
        raise InvalidRequest("--out", str(out), "a file that does not exist, or give --force")
    if like is not None:
        if block_size is not None:
            raise InvalidRequest("--block-size", block_size, "goes with --workload; a fitted one has its trace's")
        chosen = fit_workload(read_trace(like))
    else:
        assert workload is not None
        chosen = PRESETS[workload.value]
    given = {"requests_per_s": rate, "block_size": block_size}
    chosen = replace(chosen, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    trace = make(chosen, requests, seed)
    write_trace(trace, out)
    typer.echo(f"{out}: {len(trace):,} requests in {trace.duration_s:,.0f} s, workload {chosen.name}")
