"""Plots of a trace. Needs matplotlib, which is imported when they are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploy.traces.reuse import WINDOWS_S, measure_reuse, working_sets
from deploy.traces.stats import TraceStats
from deploy.traces.trace import Trace
from rhizome.errors import InvalidRequest


def draw_plots(trace: Trace, stats: TraceStats, folder: Path) -> list[Path]:
    """Lengths, arrivals, reuse distances, working set and hit ratio by cache size, as PNGs in a folder.

    Raises InvalidRequest where matplotlib is missing or the folder cannot be written.
    """
    pyplot = _pyplot()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [
            _saved(pyplot, draw(pyplot, trace, stats), folder / f"{name}.png")
            for name, draw in (
                ("lengths", _lengths),
                ("arrivals", _arrivals),
                ("reuse", _reuse),
                ("working_set", _working_set),
                ("hit_ratio", _hit_ratio),
            )
        ]
    except OSError as error:
        raise InvalidRequest("--plots", str(folder), f"a folder that can be written ({error})") from None


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise InvalidRequest("--plots", "PNG", "install matplotlib for it: pip install 'rhizome[plots]'") from error
    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _saved(pyplot: Any, figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return path


def _axes(pyplot: Any, title: str, **settings: Any) -> tuple[Any, Any]:
    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    axes.set(title=title, **settings)
    axes.grid(visible=True, alpha=0.3)
    return figure, axes


def _cumulative(axes: Any, values: Sequence[float], label: str) -> None:
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    axes.plot(ordered, np.arange(1, len(ordered) + 1) / max(1, len(ordered)), label=label)


def _lengths(pyplot: Any, trace: Trace, stats: TraceStats) -> Any:
    figure, axes = _axes(pyplot, f"{stats.name}: lengths", xscale="log", xlabel="tokens", ylabel="share of requests")
    _cumulative(axes, [request.input_tokens for request in trace.requests], "input")
    _cumulative(axes, [request.output_tokens for request in trace.requests], "output")
    axes.legend()
    return figure


def _arrivals(pyplot: Any, trace: Trace, stats: TraceStats) -> Any:
    figure, axes = _axes(pyplot, f"{stats.name}: arrivals", xlabel="minutes", ylabel="requests a minute")
    minutes = np.asarray([request.arrival_s for request in trace.requests]) / 60
    counts = np.bincount(minutes.astype(np.int64))
    axes.step(np.arange(len(counts)), counts, where="post")
    axes.set_ylim(bottom=0)
    return figure


def _reuse(pyplot: Any, trace: Trace, stats: TraceStats) -> Any:
    title = f"{stats.name}: time between two uses of a block"
    figure, axes = _axes(pyplot, title, xscale="symlog", xlabel="seconds", ylabel="share of uses")
    _cumulative(axes, measure_reuse(trace).seconds_between, "")
    return figure


def _working_set(pyplot: Any, trace: Trace, stats: TraceStats) -> Any:
    figure, axes = _axes(pyplot, f"{stats.name}: working set", xlabel="minutes", ylabel="million tokens in a window")
    for window_s in WINDOWS_S:
        sizes = np.asarray(working_sets(trace, window_s)) * trace.block_size / 1e6
        axes.step(np.arange(len(sizes)) * window_s / 60, sizes, where="post", label=f"{window_s // 60} min")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _hit_ratio(pyplot: Any, _: Trace, stats: TraceStats) -> Any:
    title = f"{stats.name}: one cache, least recently used leaves first"
    figure, axes = _axes(pyplot, title, xscale="log", xlabel="tokens of the cache", ylabel="hit ratio of blocks")
    axes.plot(list(stats.lru_hit_ratio), list(stats.lru_hit_ratio.values()), marker="o", label="LRU")
    axes.axhline(stats.hit_ratio_blocks, linestyle="--", color="gray", label="infinite")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure
