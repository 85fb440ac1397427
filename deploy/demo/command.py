"""`rhizome demo`: plays the conversations stage by stage, and prints what came of it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deploy.demo.figures import Outcome, Row, Summary
from deploy.demo.places import place
from deploy.demo.play import Player
from deploy.demo.stages import Stage, disagg_stages, routing_stages
from router.client import Client
from router.tokenizing import PromptTokenizer
from worker.tiny_model import make_tiny_model
from worker.tokenizer import tokenizer_files

IN_WORDS = {2: "two", 3: "three"}
MIB = 2**20


def run_demo(
    *, workers: int, sessions: int, turns: int, disagg: bool, ray: str | None, insecure: bool, json_output: bool
) -> int:
    """Play all stages and print the outcome; the exit code: 1 when answers differ or a tree is not its worker's.

    Raises InvalidRequest, Unavailable.
    """
    console = Console(stderr=json_output, highlight=False)
    stages = (disagg_stages if disagg else routing_stages)(f"demo-{os.getpid()}", workers, insecure=insecure)
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="rhizome-demo-") as folder:
        model_dir = make_tiny_model(Path(folder) / "tiny")
        tokenizer = PromptTokenizer(tokenizer_files(model_dir))

        def playing(stage: Stage) -> Callable[[str], Coroutine[Any, Any, None]]:
            async def play(address: str) -> None:
                async with Client(address) as client:
                    on_row = _row_printer(console, wide=disagg)
                    player = Player(client, tokenizer, sessions, turns, outcome, on_row)
                    await player.warm_up()
                    for mode in stage.modes:
                        worker = f"{'worker':{_worker_width(disagg)}s}"
                        console.print(f"\n[bold]{mode.name}[/bold]  session turn {worker} prompt cached  TTFT")
                        await player.play(mode)

            return play

        with place(ray, model_dir, lambda text: console.print(f"[dim]{text}[/dim]", soft_wrap=True)) as there:
            for stage in stages:
                there.serve(stage.fleet, playing(stage))
    _print_outcome(console, outcome, disagg=disagg)
    if json_output:
        print(json.dumps(outcome.report(), indent=1))
    return 0 if outcome.good() else 1


def _worker_width(wide: bool) -> int:
    return 21 if wide else 9


def _row_printer(console: Console, *, wide: bool) -> Callable[[Row], None]:
    def print_row(row: Row) -> None:
        worker = " > ".join(row.workers) if wide else row.worker
        console.print(
            f"{'':{len(row.mode)}}  {row.session:7d} {row.turn:4d} {worker:{_worker_width(wide)}s} "
            f"{row.prompt_tokens:6d} {row.cached_tokens:6d} {row.ttft_ms:6.0f} ms",
            soft_wrap=True,
        )

    return print_row


def _print_outcome(console: Console, outcome: Outcome, *, disagg: bool) -> None:
    summaries = outcome.summaries()
    if disagg:
        console.print(_times(summaries))
        console.print(_pulls(outcome))
        console.print("Skipped: blocks that a worker was to take, and had already.", soft_wrap=True)
    else:
        console.print(_reuse(summaries, outcome))
        console.print("Fetched: blocks that one worker had, taken over by another that was to answer.", soft_wrap=True)
        console.print("The maximum: what one cache of unlimited size, shared by all, would hold.", soft_wrap=True)
    runs = len(summaries)
    identical = "yes" if outcome.answers_identical() else "NO"
    console.print(f"Answers identical in the {IN_WORDS.get(runs, runs)} runs: {identical}")
    for mode, checks in outcome.trees.items():
        for worker, check in checks.items():
            held = f"{worker} holds {check.worker_blocks} blocks, the router's tree has {check.router_blocks} of it"
            console.print(f"After {mode}: {held}: {'equal' if check.equal else 'NOT EQUAL'}", soft_wrap=True)


def _table(title: str, words: int, *headings: str) -> Table:
    """The first so many columns hold words, the others figures."""
    table = Table(title=title)
    for at, heading in enumerate(headings):
        table.add_column(heading, justify="left" if at < words else "right")
    return table


def _reuse(summaries: list[Summary], outcome: Outcome) -> Table:
    headings = ("mode", "hit share of prompt tokens", "of the maximum", "fetched", "mean TTFT", "against KV-aware")
    table = _table("Turns 2 and later", 1, *headings)
    best = summaries[0].mean_ttft_ms
    for line in summaries:
        table.add_row(
            line.mode,
            f"{line.hit_share:.3f}",
            f"{line.hit_share_of_maximum:.3f}",
            f"{sum(pulls.blocks for pulls in outcome.pulls[line.mode].values())}",
            f"{line.mean_ttft_ms:.0f} ms",
            f"{line.mean_ttft_ms / best:.2f}x",
        )
    return table


def _times(summaries: list[Summary]) -> Table:
    table = _table("All turns, ms", 1, "mode", "TTFT mean", "TTFT p99", "ITL mean", "ITL p99")
    for line in summaries:
        seen = line.all_turns
        figures = (seen.mean_ttft_ms, seen.p99_ttft_ms, seen.mean_itl_ms, seen.p99_itl_ms)
        table.add_row(line.mode, *(f"{figure:.1f}" for figure in figures))
    return table


def _pulls(outcome: Outcome) -> Table:
    table = _table(
        "What workers took from others", 2, "mode", "worker", "MiB", "blocks", "skipped", "pulls", "short", "by"
    )
    for mode, workers in outcome.pulls.items():
        for worker, pulls in workers.items():
            counts = (pulls.blocks, pulls.skipped_blocks, pulls.pulls, pulls.short)
            size = f"{pulls.size_bytes / MIB:.1f}"
            table.add_row(mode, worker, size, *map(str, counts), pulls.transport or "-")
    return table
