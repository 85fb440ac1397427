"""The tables of `top`: which columns they have, how rows are sorted and kept in place while they change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.widgets import DataTable

from deploy.events.top_model import PrefixRow, WorkerRow
from kv_events.inspect.words import key_text, printable

HOLDERS_SHOWN = 4
UNKNOWN = "–"
FINE = ("in step", "observed")

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Column(Generic[Row]):
    """A heading, what of a row is shown below it, and what it is sorted by."""

    heading: str
    cell: Callable[[Row], Text]
    sort_key: Callable[[Row], Any]
    descending: bool = True  # at first


class LiveTable(DataTable[Text], Generic[Row]):
    """Rows that change all the time: the cursor stays on its row, wherever that goes."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "select_cursor", "Look into")]

    def __init__(self, columns: Sequence[Column[Row]], sort_by: int, key: Callable[[Row], str], **options: Any) -> None:
        super().__init__(cursor_type="row", zebra_stripes=True, **options)
        self._columns_shown = columns
        self._sort_by = sort_by
        self._descending = columns[sort_by].descending
        self._key = key
        self._rows_shown: Sequence[Row] = ()

    def on_mount(self) -> None:
        """The headings."""
        self._head()

    def set_columns(self, columns: Sequence[Column[Row]], sort_by: int) -> None:
        """Other columns in place of those that were there."""
        if columns is not self._columns_shown:
            self._columns_shown = columns
            self.clear(columns=True)
            self._head()
            self._sort(sort_by)

    def show(self, rows: Sequence[Row]) -> None:
        """Other rows in place of those that were there."""
        self._rows_shown = rows
        self._draw()

    def next_column(self) -> None:
        """Sort by the one to the right; after the last by the first."""
        self._sort((self._sort_by + 1) % len(self._columns_shown))

    def _head(self) -> None:
        for place in range(len(self._columns_shown)):
            self.add_column(self._label(place), key=str(place))

    def _sort(self, place: int) -> None:
        self._sort_by = place
        self._descending = self._columns_shown[place].descending
        self._draw()

    def reverse(self) -> None:
        """The last row first."""
        self._descending = not self._descending
        self._draw()

    def row_of(self, key: str) -> Row | None:
        """The row of a key, if it is still there."""
        return next((row for row in self._rows_shown if self._key(row) == key), None)

    def _label(self, place: int) -> Text:
        arrow = ("▼" if self._descending else "▲") if place == self._sort_by else " "
        return Text(f"{self._columns_shown[place].heading} {arrow}")

    def _draw(self) -> None:
        at = self.cursor_row
        chosen = self.ordered_rows[at].key.value if 0 <= at < self.row_count else None
        scrolled = self.scroll_y
        sort_key = self._columns_shown[self._sort_by].sort_key
        rows = sorted(self._rows_shown, key=sort_key, reverse=self._descending)
        self.clear()
        for place, column in enumerate(self.ordered_columns):
            column.label = self._label(place)
            column.content_width = column.label.cell_len  # of the rows that were there it may have been more
        for row in rows:
            self.add_row(*(column.cell(row) for column in self._columns_shown), key=self._key(row))
        keys = [self._key(row) for row in rows]
        if chosen in keys:
            self.move_cursor(row=keys.index(chosen), scroll=False)
        self.scroll_to(y=scrolled, animate=False)


def _number(text: str, style: str = "") -> Text:
    return Text(text, style, justify="right")


def _rate(value: float, sign: str = "") -> Text:
    style = "" if not sign else "green" if value > 0 else "yellow" if value < 0 else ""
    return _number("0" if not value else f"{value:{sign},.1f}", style)


def _lag(row: WorkerRow) -> Text:
    return _number(UNKNOWN if row.lag_s is None else f"{row.lag_s * 1000:,.0f} ms")


def share_text(share: float | None) -> str:
    """As a percentage."""
    return UNKNOWN if share is None else f"{share:.0%}"


def _or_least(value: float | None) -> float:
    return -1.0 if value is None else value


WORKER_COLUMNS: tuple[Column[WorkerRow], ...] = (
    Column("worker", lambda row: Text(printable(row.name), "bold"), lambda row: row.name, descending=False),
    Column("blocks", lambda row: _number(f"{row.blocks:,}"), lambda row: row.blocks),
    Column("growth/s", lambda row: _rate(row.growth_per_s, "+"), lambda row: row.growth_per_s),
    Column("stored/s", lambda row: _rate(row.stored_per_s), lambda row: row.stored_per_s),
    Column("removed/s", lambda row: _rate(row.removed_per_s), lambda row: row.removed_per_s),
    Column("hit share", lambda row: _number(share_text(row.hit_share)), lambda row: _or_least(row.hit_share)),
    Column("in flight", lambda row: _count(row.in_flight), lambda row: _or_least(row.in_flight)),
    Column("lag", _lag, lambda row: _or_least(row.lag_s)),
    Column("gaps", lambda row: _number(f"{row.gaps:,}", "red" if row.gaps else ""), lambda row: row.gaps),
    Column("state", lambda row: Text(printable(row.state), "" if row.state in FINE else "red"), lambda row: row.state),
)


def _count(count: int | None) -> Text:
    return _number(UNKNOWN if count is None else f"{count:,}")


def holders_of(row: PrefixRow, shown: int = HOLDERS_SHOWN) -> str:
    """The names of the first ones, and how many there are beside them."""
    names = ", ".join(map(printable, row.holders[:shown]))
    return names + (f" and {len(row.holders) - shown} more" if len(row.holders) > shown else "")


_UP_TO: Column[PrefixRow] = Column(
    "up to block", lambda row: Text(key_text(row.block_hash), "cyan"), lambda row: row.block_hash, descending=False
)
_DEPTH: Column[PrefixRow] = Column("blocks", lambda row: _number(f"{row.depth:,}"), lambda row: row.depth)
_HOLDERS: Column[PrefixRow] = Column(
    "holders", lambda row: _number(f"{len(row.holders):,}"), lambda row: len(row.holders)
)
_HELD_BY: Column[PrefixRow] = Column(
    "held by", lambda row: Text(holders_of(row)), lambda row: holders_of(row), descending=False
)
_HITS: Column[PrefixRow] = Column("hits", lambda row: _number(f"{row.hits:,}"), lambda row: row.hits)
_BELOW: Column[PrefixRow] = Column("below", lambda row: _number(f"{row.below:,}"), lambda row: row.below)

STREAM_COLUMNS = tuple(column for column in WORKER_COLUMNS if column.heading not in ("hit share", "in flight"))
"""What is known without a router."""

HOT_COLUMNS = (_UP_TO, _DEPTH, _HITS, _HOLDERS, _HELD_BY)
LARGE_COLUMNS = (_UP_TO, _DEPTH, _BELOW, _HOLDERS, _HELD_BY)
BY_BLOCKS, BY_AMOUNT = 1, 2
"""The columns that they are sorted by at first: of blocks among the former, of hits or blocks below among these."""
