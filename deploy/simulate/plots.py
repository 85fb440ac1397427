"""Plots of simulated runs. Needs matplotlib, which is imported when they are drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from deploy.simulate.results import Row
from deploy.simulate.sweep import Run
from router.policies import DEFAULT_POLICY

MAX_NAMED_WORKERS = 10  # in a legend


def can_draw() -> bool:
    """Whether matplotlib is there."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    return True


def draw_plots(runs: Sequence[Run], folder: Path) -> list[Path]:
    """As PNGs in a folder: latency against load where there are several speeds, and for each number of workers and
    speed how times to first token are distributed, and what the default policy's workers did (the first policy's,
    where that is not among them)."""
    from matplotlib import pyplot

    paths = []
    for name, figure in _figures(pyplot, runs):
        path = folder / f"{name}.png"
        figure.tight_layout()
        figure.savefig(path, dpi=120, metadata={"Software": None})
        pyplot.close(figure)
        paths.append(path)
    return paths


def _figures(pyplot: Any, runs: Sequence[Run]) -> Iterator[tuple[str, Any]]:
    ordered = sorted(runs, key=lambda run: (run.row.workers, run.row.speed))  # stable: policies as they were given
    for workers, of_size in groupby(ordered, lambda run: run.row.workers):
        rows = [run.row for run in of_size]
        if len({row.speed for row in rows}) > 1:
            yield f"latency-{workers}", _latency(pyplot, rows)
    for (workers, speed), group in groupby(ordered, lambda run: (run.row.workers, run.row.speed)):
        alike = list(group)
        where = f"{workers}-x{speed:g}"
        yield f"ttft-{where}", _distributions(pyplot, alike)
        shown = next((run for run in alike if run.row.policy == DEFAULT_POLICY), alike[0])
        if len(shown.timeline.times_s) > 1:
            yield f"workers-{where}", _workers(pyplot, shown)


def _latency(pyplot: Any, rows: Sequence[Row]) -> Any:
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.4))
    for axis, field, what in (
        (axes[0], "ttft_mean_s", "mean"),
        (axes[1], "ttft_short_p99_s", "p99 of short work"),
    ):
        for label in dict.fromkeys(row.label for row in rows):
            points = [(row.rate_per_s, getattr(row, field)) for row in rows if row.label == label]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        title = f"{rows[0].workers} workers: time to first token, {what}"
        axis.set(title=title, xlabel="requests a second", ylabel="seconds", yscale="log")
        axis.grid(visible=True, alpha=0.3)
    axes[0].legend(fontsize=8)
    return figure


def _distributions(pyplot: Any, runs: Sequence[Run]) -> Any:
    figure, axis = pyplot.subplots(figsize=(7, 4.4))
    for run in runs:
        ordered = np.sort(run.ttft_s)
        axis.plot(ordered, np.arange(1, len(ordered) + 1) / max(1, len(ordered)), label=run.row.label)
    row = runs[0].row
    axis.set(title=_title(row), xscale="log", xlabel="time to first token, s", ylabel="share of requests")
    axis.grid(visible=True, alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def _workers(pyplot: Any, run: Run) -> Any:
    figure, axes = pyplot.subplots(3, 1, figsize=(9, 8), sharex=True)
    timeline = run.timeline
    panels = (
        ("waiting, requests", np.array(timeline.waiting)),
        ("running, requests", np.array(timeline.running)),
        ("hit ratio, recent", timeline.hit_shares()),
    )
    for axis, (label, values) in zip(axes, panels, strict=True):
        for worker in range(values.shape[1]):
            axis.plot(timeline.times_s, values[:, worker], linewidth=0.8, label=f"worker-{worker}")
        axis.set(ylabel=label)
        axis.set_ylim(bottom=0)
        axis.grid(visible=True, alpha=0.3)
    axes[0].plot(timeline.times_s, timeline.held, linestyle="--", linewidth=1, color="black", label="held in routers")
    axes[0].set_title(f"{run.row.label}, {_title(run.row)}")
    axes[2].set_xlabel("virtual seconds")
    if run.row.workers <= MAX_NAMED_WORKERS:
        axes[0].legend(fontsize=7, ncols=2)
    return figure


def _title(row: Row) -> str:
    return f"{row.workers} workers ({row.hardware}), speed {row.speed:g}: {row.rate_per_s:.3g} requests/s"
