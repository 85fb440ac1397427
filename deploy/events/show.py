"""What the event tools write: lines in colour for a terminal, plain ones for a pipe, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from kv_events.inspect.tree_text import Segment

if TYPE_CHECKING:
    from rich.console import Console

STYLES = {
    "guide": "dim",
    "blocks": "bold",
    "key": "cyan",
    "holders": "green",
    "hits": "yellow",
    "note": "dim",
    "bad": "bold red",
    "stored": "green",
    "removed": "yellow",
    "cleared": "bold magenta",
    "worker": "bold",
    "": "",
}
"""By a segment's role."""


class Output:
    """Standard output, line by line."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self._console: Console | None = None
        if not as_json and sys.stdout.isatty():
            from rich.console import Console

            self._console = Console(highlight=False, soft_wrap=True)

    @property
    def colours(self) -> bool:
        """Whether this goes to a terminal."""
        return self._console is not None

    def line(self, segments: Iterable[Segment | tuple[str, str]]) -> None:
        """One line of text; control characters have no business in it."""
        if self._console is None:
            print("".join(text for text, _ in segments))
        else:
            from rich.text import Text

            self._console.print(Text.assemble(*((text, STYLES[role]) for text, role in segments)))

    def text(self, text: str, role: str = "") -> None:
        """One line in one style."""
        self.line([(text, role)])

    def json(self, value: Mapping[str, Any]) -> None:
        """One line of JSON."""
        print(json.dumps(value, allow_nan=False))

    def flush(self) -> None:
        """What was written goes out now."""
        sys.stdout.flush()


def clock_text(time_s: float) -> str:
    """Wall time as local hours, minutes, seconds and milliseconds; a number of seconds that is no date as it is."""
    try:
        return datetime.fromtimestamp(time_s).astimezone().strftime("%H:%M:%S.%f")[:-3]
    except (ValueError, OverflowError, OSError):
        return f"{time_s:g} s"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[list[tuple[str, str]]]:
    """Lines of columns: the first one to the left, numbers to the right, the heads above."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    right = [all(row[at][:1].isdecimal() and row[at][-1:].isdecimal() for row in rows) for at in range(len(heads))]
    for number, row in enumerate((heads, *rows)):
        cells = [
            text.rjust(width) if at and to_right else text.ljust(width)
            for at, (text, width, to_right) in enumerate(zip(row, widths, right, strict=True))
        ]
        style = "note" if number == 0 else ""
        yield [(cells[0], style or "worker"), (("  " + "  ".join(cells[1:])).rstrip(), style)]
