"""What a benchmark writes: rows in one schema, as JSON and as a table.

A row: `what` was measured, in `unit`; `ours` and `peer` (None where there is none) with the spread between quartiles;
`ratio`, how many times better we are than the peer or, where there is no peer, than the limit; `goal` and `goal_is`,
what it is compared with: "times the peer" the ratio, "at most" or "at least" our own figure; `met`; `note`.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

TIMES, AT_MOST, AT_LEAST = "times the peer", "at most", "at least"


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured value: the median of its repeats, and the distance between their quartiles."""

    median: float
    iqr: float | None = None  # of one measurement there is none


def figure(samples: Iterable[float]) -> Figure:
    """The figure of one or more repeats."""
    values = np.fromiter(samples, dtype=np.float64)
    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    return Figure(median, high - low if len(values) > 1 else None)


@dataclass(frozen=True, slots=True)
class Row:
    """See the module."""

    what: str
    unit: str
    ours: float
    peer: float | None
    peer_name: str | None
    ratio: float | None
    goal: float | None
    goal_is: str | None
    met: bool | None
    note: str
    ours_iqr: float | None
    peer_iqr: float | None


def row(
    what: str,
    unit: str,
    ours: Figure,
    peer: Figure | None = None,
    *,
    peer_name: str = "",
    goal: float | None = None,
    goal_is: str = TIMES,
    limit: float | None = None,
    note: str = "",
) -> Row:
    """A row with ratio and verdict worked out. More is better of rates ("/s") and factors ("x"), less of the rest.

    `limit`: what the ratio compares with where there is neither a peer nor a goal of our own figure's.
    """
    against = peer.median if peer else goal if goal_is != TIMES else limit
    ratio = None
    if against is not None and ours.median and against:
        ratio = ours.median / against if unit.endswith("/s") or unit == "x" else against / ours.median
    met = None
    if goal is not None and goal_is == TIMES:
        met = None if ratio is None else ratio >= goal
    elif goal is not None:
        met = ours.median <= goal if goal_is == AT_MOST else ours.median >= goal
    return Row(
        what,
        unit,
        _short(ours.median),
        None if peer is None else _short(peer.median),
        peer_name if peer else None,
        None if ratio is None else _short(ratio),
        goal,
        None if goal is None else goal_is,
        met,
        note,
        None if ours.iqr is None else _short(ours.iqr),
        None if peer is None or peer.iqr is None else _short(peer.iqr),
    )


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0] or platform.processor()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "caches": _caches(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def _caches() -> str:
    def read(index: Path, name: str) -> str:
        return (index / name).read_text().strip()

    indexes = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    data = [index for index in indexes if read(index, "type") != "Instruction"]
    return ", ".join(f"L{read(index, 'level')} {read(index, 'size')}" for index in data)


def write_json(path: Path, name: str, facts: dict[str, Any], rows: Sequence[Row]) -> None:
    """The report as JSON, one row a line."""
    lines = ",\n  ".join(json.dumps(asdict(each)) for each in rows)
    head = json.dumps({"name": name, "machine": facts})[:-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head}, "rows": [\n  {lines}\n]}}\n')


def number(value: float | None) -> str:
    """A figure for people: three digits that count."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def goal_text(row: dict[str, Any]) -> str:
    """A row's goal for people; "" without one."""
    if row["goal"] is None:
        return ""
    shown = {TIMES: f"{row['goal']:g}x", AT_MOST: f"at most {row['goal']:g}", AT_LEAST: f"at least {row['goal']:g}"}
    return shown[row["goal_is"]]


def print_table(title: str, rows: Sequence[Row]) -> None:
    """All rows on standard output."""
    table = Table(title=title, title_justify="left")
    table.add_column("what", overflow="fold")
    for column in ("ours", "iqr", "peer", "iqr", "ratio", "goal"):
        table.add_column(column, justify="right")
    for column in ("unit", "met", "note"):
        table.add_column(column, overflow="fold")
    for each in rows:
        values = asdict(each)
        met = {None: "", True: "yes", False: "[bold]no[/bold]"}[each.met]
        figures = (each.ours, each.ours_iqr, each.peer, each.peer_iqr, each.ratio)
        table.add_row(each.what, *map(number, figures), goal_text(values), each.unit, met, each.note)
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)
