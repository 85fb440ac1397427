"""What workers pulled from each other, over which transport: a table, and its figures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from deploy.events.progress import size_text
from deploy.events.show import Output, table
from kv_events.inspect.words import printable
from rhizome.v1.worker_pb2 import PullCounts, WorkerStatus

HEADS = ("worker", "pulled over", "blocks", "size", "pulls", "failed", "short", "had already", "lent")


def pulled(status: WorkerStatus) -> dict[str, Any]:
    """The figures of one worker since its start, for programs."""
    return {
        "pulls": status.pulls,
        "short": status.pulls_short,
        "blocks": status.pulled_blocks,
        "size_bytes": status.pulled_bytes,
        "skipped_blocks": status.pull_skipped_blocks,
        "lent_blocks": status.lent_blocks,
        "token_s": status.fetch_token_s or None,
        "by_transport": [
            {field.name: getattr(counts, field.name) for field in counts.DESCRIPTOR.fields}
            for counts in status.pull_counts
        ],
    }


def show_pulled(output: Output, statuses: Iterable[tuple[str, WorkerStatus]]) -> None:
    """A table of those workers that pulled or lent anything; without any, nothing.

    A row for each transport; what is counted for the worker as a whole stands in its first one.
    """
    rows: list[tuple[str, ...]] = []
    for name, status in statuses:
        if not (status.pulls or status.pull_skipped_blocks or status.lent_blocks):
            continue
        whole = tuple(f"{count:,}" for count in (status.pulls_short, status.pull_skipped_blocks, status.lent_blocks))
        ways = [_way(counts) for counts in status.pull_counts] or [("-",) * 5]
        rows.append((printable(name), *ways[0], *whole))
        rows += [("", *way, "", "", "") for way in ways[1:]]
    if rows:
        output.text("")
        for line in table(HEADS, rows):
            output.line(line)


def _way(counts: PullCounts) -> tuple[str, ...]:
    numbers = (f"{counts.pulls:,}", f"{counts.failed:,}")
    return (printable(counts.transport), f"{counts.blocks:,}", size_text(counts.size_bytes), *numbers)
