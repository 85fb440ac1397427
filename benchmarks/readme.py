"""README's tables and plots, from the reports beside it: `python -m benchmarks.readme FILE.json ...` writes them anew.

Each report has a section of its own, between two marks that carry its name, and a plot beside the JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.index_plan import ORDERS
from benchmarks.report import goal_text, number

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SCALE = ROOT / "router" / "SCALE.md"
RESULTS = ROOT / "benchmarks" / "results"

Report = dict[str, Any]
Rows = dict[str, dict[str, Any]]

BLOCKS = (32, 128, 512, 4_096)
HOLDERS = (8, 64, 256)
ALONE = (
    *(f"hash {tokens}{form}" for tokens in (8_192, 131_072) for form in ("", " list")),
    *(f"match {quantile} 96 {size}" for size in ("1M", "10M") for quantile in ("p50", "p99")),
    *(f"bytes per entry {size} W64" for size in ("1M", "10M")),
    *(f"drop one of 64 at {size}{what}" for size in ("1M", "10M") for what in ("", " lookup gap")),
    *(f"match p50 512 {kind} H{holders}" for kind in ("spread", "holed") for holders in HOLDERS),
    "longest stored event to 10M W64 E64",
    *("threads 1 reader", "threads 2 readers lookups", "threads 2 readers", "threads 2 readers p99 512"),
    *("view store W64 E16", "view remove W64 E16"),
    *("limit independent random reads", "limit dependent random read", "limit empty call len(tree)"),
    *("limit match of no blocks", "limit match_many 512 full H8"),
    *(f"limit match p50 96 {size}" for size in ("1M", "10M")),
    *(f"limit match p50 {blocks} full H8" for blocks in BLOCKS),
)

DECODED = (
    *(f"{kind} {into}" for kind in ("store", "remove") for into in ("tree", "view", "all")),
    *("foreign store", "foreign remove"),
)
TRANSPORTS = ("memory", "grpc", "zmq", "redis")
STALLED = (0, 1, 3)
FLEET = re.compile(r"(\S+) N(\d+) ")  # a simulated fleet's rows begin so
LOADS = ("0.5", "0.8", "1")
ROUTING = {
    "at 100% of round-robin's saturation, s": [
        f"load 1 {what}" for what in ("mean TTFT vs dynamo", "mean TTFT vs dynamo-p16", "short p99 vs dynamo")
    ],
    "at 80%, s": ["load 0.8 gap to bound host tier, peer fetch", "load 0.8 gap to bound"],
    "beside the best other, s": [
        f"load {load} {what} TTFT vs best other" for load in LOADS for what in ("mean", "p99")
    ],
    "mean TTFT at 100%, beside the same undisturbed, s": [
        "load 1 disturbed",
        *(f"load 1 step times x{factor}{late}" for factor in ("0.5", "2") for late in ("", ", events late and lost")),
    ],
    "requests/s": ["rate carried", "simulated requests"],
}
TRANSFERS: dict[str, Callable[[str], bool]] = {
    "256 MiB in blocks of, GB/s": lambda what: " vs " in what or what.startswith("limit seal"),
    "digests cost, %": lambda what: what.startswith("digests"),
    "one block, us": lambda what: "one block" in what,
}
EVENTS_ALONE = (
    "append",
    *(f"publish redis {state}" for state in ("alive", "stopped", "dead")),
    *(f"recovery {transport}{part}" for transport in ("grpc", "redis") for part in ("", " right")),
)


def index_section(report: Report) -> str:
    """The index's figures: machine, stores and removals, matches, and all else."""
    rows: Rows = {row["what"]: row for row in report["rows"]}
    plot = "![p50 match latency against depth](benchmarks/results/index.png)"
    return "\n\n".join(
        [_measured_on(report), _events(rows), _matches(rows), _alone(rows, ALONE), _verdict(report), plot]
    )


def events_section(report: Report) -> str:
    """The events' figures: payloads into a tree, transports, what publishing costs, recovery."""
    rows: Rows = {row["what"]: row for row in report["rows"]}
    stalled = [f"{count} stalled" for count in STALLED]
    parts = [
        _measured_on(report),
        _grid(
            "batches of 16 blocks, from bytes into a tree",
            ("batches/s", "M blocks/s"),
            [(what, [f"decode {what}", f"decode {what} blocks"]) for what in DECODED],
            rows,
        ),
        _notes([f"decode {what}" for what in DECODED if "store" in what], rows),
        _grid(
            "append to tree",
            ("batches/s", "M blocks/s", "lag p50, us", "lag p99, us"),
            [(each, [f"bus {each}{part}" for part in ("", " blocks", " lag p50", " lag p99")]) for each in TRANSPORTS],
            rows,
        ),
        _notes([f"bus {each}" for each in TRANSPORTS], rows) + "\n- lag: at a tenth of the transport's rate",
        _grid(
            "an append in a step of 10 ms, us (goal: at most 100)",
            stalled,
            [(each, [f"publish {each} {count}" for count in stalled]) for each in TRANSPORTS],
            rows,
        ),
        _alone(rows, EVENTS_ALONE),
    ]
    if not report["machine"]["redis"]:
        parts.append("Rows of Redis are missing: there was no redis-server.")
    return "\n\n".join([*parts, _verdict(report)])


def routing_section(report: Report) -> str:
    """What routing comes to, trace by trace, and what a decision costs."""
    rows: Rows = {row["what"]: row for row in report["rows"]}
    fleets = list(dict.fromkeys(found.group(1, 2) for what in rows if (found := FLEET.match(what))))
    decisions = [what for what in rows if not FLEET.match(what)]
    parts = [_measured_on(report), *([_alone(rows, decisions)] if decisions else [])]
    for title, lines in ROUTING.items():
        columns = [f"{trace}, N = {workers}" for trace, workers in fleets]
        grid = [(line, [f"{trace} N{workers} {line}" for trace, workers in fleets]) for line in lines]
        if any(name in rows for _, names in grid for name in names):
            parts.append(_grid(title, columns, grid, rows))
    return "\n\n".join([*parts, _verdict(report)])


def transfer_section(report: Report) -> str:
    """Ways for blocks, by the size of a block."""
    rows: Rows = {row["what"]: row for row in report["rows"]}
    sizes = list(dict.fromkeys(what.rpartition(" ")[2] for what in rows))
    of = {title: [what.rpartition(" ")[0] for what in rows if fits(what)] for title, fits in TRANSFERS.items()}
    parts = [
        _grid(title, sizes, [(name, [f"{name} {size}" for size in sizes]) for name in dict.fromkeys(names)], rows)
        for title, names in of.items()
    ]
    return "\n\n".join([_measured_on(report), *parts, _verdict(report)])


def whole_section(report: Report) -> str:
    """All rows, as they are."""
    rows: Rows = {row["what"]: row for row in report["rows"]}
    return "\n\n".join([_measured_on(report), _alone(rows, rows), _verdict(report)])


SECTIONS: dict[str, Callable[[Report], str]] = {
    "index": index_section,
    "events": events_section,
    "routing": routing_section,
    "routing_scale": whole_section,
    "transfer": transfer_section,
    "disagg": whole_section,
    "fleet_ray": whole_section,
}


def page_of(report: Report) -> Path:
    """Where a report's section is."""
    return SCALE if report["name"] == "routing_scale" else README


def with_section(readme: str, report: Report) -> str:
    """A page with the report's section replaced. Raises ValueError where its marks are not."""
    name = report["name"]
    start, end = f"<!-- {name} speed -->\n", f"<!-- end of {name} speed -->\n"
    before, found, rest = readme.partition(start)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"{page_of(report).name} has no {start.strip()} … {end.strip()}")
    return f"{before}{start}\n{SECTIONS[name](report)}\n\n{end}{after}"


def _measured_on(report: Report) -> str:
    machine = report["machine"]
    peers = sorted({row["peer_name"] for row in report["rows"] if row["peer_name"]})
    kind = "a `--quick` run: few repeats" if machine["quick"] else "the full run"
    return (
        f"Measured in {kind}, on {machine['cores']} cores of {machine['cpu']} ({machine['caches']}), Python "
        f"{machine['python']}, {machine['index']} core. Cells are ours / the peer's = times better, medians. "
        f"The peer: {' and '.join(peers) or 'not installed'}."
    )


def _events(rows: Rows) -> str:
    columns = ("1M W8", "1M W64", "1M W256", "10M W64")
    kinds = [("store", ""), *(("remove", f" {order}") for order in ORDERS)]
    lines = [
        (f"{kind}{order}, events of {blocks}", [f"{kind} {column} E{blocks}{order}" for column in columns])
        for kind, order in kinds
        for blocks in (1, 16, 64)
    ]
    orders = "; ".join(f"{order}: {what}" for order, what in ORDERS.items())
    return f"{_grid('M blocks/s', columns, lines, rows)}\n\nRemovals, {orders}."


def _matches(rows: Rows) -> str:
    kinds = [(kind, quantile) for kind in ("full", "half", "none") for quantile in ("p50", "p99")]
    lines = [
        (f"{blocks} blocks, {holders} holders", [f"match {q} {blocks} {kind} H{holders}" for kind, q in kinds])
        for blocks in BLOCKS
        for holders in HOLDERS
    ]
    return _grid("match, us", [f"{kind} {quantile}" for kind, quantile in kinds], lines, rows)


def _grid(corner: str, columns: Sequence[str], lines: Iterable[tuple[str, list[str]]], rows: Rows) -> str:
    """A table of cells; lines and columns of which nothing was measured are left out."""
    kept = [(label, names) for label, names in lines if any(name in rows for name in names)]
    used = [at for at in range(len(columns)) if any(names[at] in rows for _, names in kept)]
    table = [f"| {corner} | {' | '.join(columns[at] for at in used)} |", "| --- " * (len(used) + 1) + "|"]
    table += [f"| {label} | {' | '.join(_cell(rows.get(names[at])) for at in used)} |" for label, names in kept]
    return "\n".join(table)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    cell = number(row["ours"])
    if row["peer"] is not None:
        cell += f" / {number(row['peer'])} = {number(row['ratio'])}x"
    return cell + (f", goal {goal_text(row)} missed" if row["met"] is False else "")


def _notes(names: Iterable[str], rows: Rows) -> str:
    """The notes of rows in a grid."""
    return "\n".join(f"- {name.partition(' ')[2]}: {rows[name]['note']}" for name in names if name in rows)


def _verdict(report: Report) -> str:
    judged = [row["met"] for row in report["rows"] if row["met"] is not None]
    verdict = f"Of {len(judged)} rows with a goal, {sum(judged)} meet it. " if judged else ""
    return f"{verdict}`benchmarks/results/{report['name']}.json` has all rows."


def _alone(rows: Rows, names: Iterable[str]) -> str:
    table = ["| what | unit | ours | peer | ratio | goal | |", "| --- " * 7 + "|"]
    for row in (rows[what] for what in names if what in rows):
        goal = goal_text(row) + {None: "", True: ", met", False: ", missed"}[row["met"]]
        ratio = f"{number(row['ratio'])}x" if row["ratio"] is not None else ""
        figures = f"{number(row['ours'])} | {number(row['peer'])} | {ratio} | {goal}"
        table.append(f"| {row['what']} | {row['unit']} | {figures} | {row['note']} |")
    return "\n".join(table)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser("python -m benchmarks.readme", description="README's tables and plots from JSON.")
    parser.add_argument("files", type=Path, nargs="*", default=sorted(RESULTS.glob("*.json")), metavar="FILE.json")
    for path in parser.parse_args().files:
        report = json.loads(path.read_text())
        page = page_of(report)
        page.write_text(with_section(page.read_text(), report))
        try:
            from benchmarks.plots import PLOTS
        except ImportError:
            print("no plot: pip install matplotlib", file=sys.stderr)
        else:
            if report["name"] in PLOTS:
                PLOTS[report["name"]](report, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
