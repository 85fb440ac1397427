"""Simulated runs for people: a table on standard output."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from deploy.simulate.results import Row


def _seconds(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value * 1e3:,.0f} ms" if value < 1 else f"{value:,.2f} s"


def _share(value: float) -> str:
    return f"{value:.1%}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "policy": lambda row: row.label,
    "TTFT mean": lambda row: _seconds(row.ttft_mean_s),
    "p50": lambda row: _seconds(row.ttft_p50_s),
    "p90": lambda row: _seconds(row.ttft_p90_s),
    "p99": lambda row: _seconds(row.ttft_p99_s),
    "short p99": lambda row: _seconds(row.ttft_short_p99_s),
    "ITL": lambda row: _seconds(row.itl_mean_s),
    "hits": lambda row: _share(row.hit_ratio),
    "saved": lambda row: _share(row.prefill_saved),
    "goodput": lambda row: _share(row.goodput),
    "imbal.": lambda row: f"{row.imbalance:.2f}",
    "preempt.": lambda row: f"{row.preemptions:,}",
    "refused": lambda row: f"{row.refused:,}",
    "error p50": lambda row: _seconds(row.prediction_error_p50_s),
    "p90 ": lambda row: _seconds(row.prediction_error_p90_s),
    "held": lambda row: _share(row.held_share),
}
"""Of the table, by head."""


def show_rows(rows: Sequence[Row]) -> None:
    """A table for each number of workers and speed."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)  # a pipe takes whole rows
    for where in dict.fromkeys((row.workers, row.speed) for row in rows):
        alike = [row for row in rows if (row.workers, row.speed) == where]
        first = alike[0]
        load = "" if first.load is None else f", load {first.load:g}"
        title = f"{first.workers} workers ({first.hardware}), speed {first.speed:.4g}{load}"
        console.print(f"{title}: {first.requests:,} requests, {first.rate_per_s:.3g}/s", markup=False)
        table = Table(box=None, pad_edge=False)
        for head in COLUMNS:
            table.add_column(head.strip(), justify="left" if head == "policy" else "right", no_wrap=True)
        for row in alike:
            table.add_row(*(cell(row) for cell in COLUMNS.values()))
        console.print(table)


def show_saturation(found: dict[tuple[str, int], float], requests_per_s: float) -> None:
    """Of each policy and number of workers. `requests_per_s`: at speed 1."""
    from rich.console import Console
    from rich.table import Table

    table = Table("policy", "workers", "saturated at speed", "requests/s", box=None, pad_edge=False)
    for (policy, workers), speed in found.items():
        table.add_row(policy, f"{workers:,}", f"{speed:.4g}", f"{speed * requests_per_s:.3g}")
    Console(highlight=False).print(table)
