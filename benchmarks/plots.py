"""Plots of the reports. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.readme import BLOCKS

HOLDERS = ((8, "-"), (256, "--"))


def match_plot(report: dict[str, Any], path: Path) -> None:
    """p50 of a full match against depth, ours and the peer's, both axes logarithmic."""
    rows = {row["what"]: row for row in report["rows"]}
    peer = next((row["peer_name"] for row in report["rows"] if row["peer_name"]), "peer")
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for side, label, color in (("ours", "ours", "tab:blue"), ("peer", peer, "tab:orange")):
        for holders, style in HOLDERS:
            points = [(blocks, rows.get(f"match p50 {blocks} full H{holders}", {}).get(side)) for blocks in BLOCKS]
            measured = [(blocks, value) for blocks, value in points if value is not None]
            if measured:
                name = f"{label}, {holders} holders"
                axes.plot(*zip(*measured, strict=True), style, color=color, marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="blocks of the prompt, all held", ylabel="p50 of a match, us")
    axes.set_xticks(BLOCKS, [str(blocks) for blocks in BLOCKS])
    axes.minorticks_off()
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


PLOTS: dict[str, Callable[[dict[str, Any], Path], None]] = {"index": match_plot}
