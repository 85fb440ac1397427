"""A trace's statistics for people: tables on standard output."""

from __future__ import annotations

from collections.abc import Iterable

from deploy.events.progress import duration_text
from deploy.traces.stats import Spread, TraceStats


def show_stats(stats: TraceStats) -> None:
    """Everything, in tables that fit a terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"{stats.name}: {stats.requests:,} requests", markup=False)

    facts = Table(box=None, show_header=False, pad_edge=False)
    for name, value in _facts(stats):
        facts.add_row(name, value)
    console.print(facts)

    spreads = Table(box=None, pad_edge=False)
    for head in ("", "mean", "p50", "p90", "p99", "max"):
        spreads.add_column(head, justify="right" if head else "left", no_wrap=True)
    for name, spread, digits in _spreads(stats):
        values = (spread.mean, spread.p50, spread.p90, spread.p99, spread.max)
        spreads.add_row(name, *(f"{value:,.{digits}f}" for value in values))
    console.print(spreads)

    caches = Table("cache, tokens", "LRU hit ratio", box=None, pad_edge=False)
    for tokens, ratio in stats.lru_hit_ratio.items():
        caches.add_row(f"{tokens:,}", f"{ratio:.3f}")
    caches.add_row("infinite", f"{stats.hit_ratio_blocks:.3f}")
    console.print(caches)

    if stats.hottest:
        hottest = Table(
            "hottest prefixes", "from token", "tokens", "requests", "saves, tokens", box=None, pad_edge=False
        )
        for run in stats.hottest:
            numbers = (run.start_token, run.tokens, run.requests, run.saved_tokens)
            hottest.add_row(f"…{run.last_block_id}", *(f"{number:,}" for number in numbers))
        console.print(hottest)


def _facts(stats: TraceStats) -> Iterable[tuple[str, str]]:
    yield "duration", f"{duration_text(stats.duration_s)}, {stats.requests_per_s:.2f} requests/s"
    yield "blocks", f"{stats.blocks:,} of {stats.block_size} tokens"
    yield (
        "infinite cache",
        f"hits {stats.hit_ratio_blocks:.3f} of blocks, {stats.hit_ratio_tokens:.3f} of tokens, "
        f"in {stats.requests_with_reuse:.1%} of requests",
    )
    yield "working set", f"{stats.working_set_tokens:,} tokens"
    yield "sessions", f"{stats.sessions:,}"


def _spreads(stats: TraceStats) -> Iterable[tuple[str, Spread, int]]:
    yield "input, tokens", stats.input_tokens, 0
    yield "output, tokens", stats.output_tokens, 0
    yield "turns of a session", stats.session_turns, 1
    yield "think time, s", stats.think_s, 1
    yield "reused after, s", stats.reuse_s, 1
    yield "reused after, requests", stats.reuse_requests, 0
    for window_s, tokens in stats.window_tokens.items():
        yield f"working set of {window_s // 60} min", tokens, 0
