"""`rhizome events top`: the full-screen view. What it shows comes from a model (top_model), picture by picture."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Collection
from contextlib import suppress
from typing import ClassVar, Protocol

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.css.query import NoMatches
from textual.screen import Screen
from textual.widgets import DataTable, Footer, Static

from deploy.events.show import STYLES
from deploy.events.top_model import Picture, PrefixRow, WorkerRow, watching
from deploy.events.top_tables import (
    BY_AMOUNT,
    BY_BLOCKS,
    HOT_COLUMNS,
    LARGE_COLUMNS,
    STREAM_COLUMNS,
    WORKER_COLUMNS,
    LiveTable,
    holders_of,
    share_text,
)
from kv_events.inspect.tree_cut import TreeCut
from kv_events.inspect.tree_text import Segment, text_lines
from kv_events.inspect.words import KeyRange, counted, key_text, printable
from rhizome.errors import InvalidRequest

SUBTREE_NODES = 200
ALL_NAMES = 1024


class Model(Protocol):
    """What top_model.TopModel offers."""

    async def look(self) -> Picture:
        """Everything as of now."""
        ...

    async def cut(self, below: KeyRange | None, worker: str | None, max_nodes: int) -> TreeCut:
        """A part of the tree."""
        ...


async def run_top(target: str, workers: Collection[str], interval_s: float) -> None:
    """Show it until the user quits. Raises InvalidRequest, Unavailable."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):  # textual reads the one and draws on the other
        raise InvalidRequest("terminal", "none", "top needs one; `stats` and `tail --rates` do without")
    async with watching(target, workers) as model:
        logging.disable()  # a line in the middle of the screen helps nobody: what is wrong is in the state column
        try:
            await TopApp(model, interval_s).run_async()
        finally:
            logging.disable(logging.NOTSET)


class Detail(Screen[None]):
    """One prefix and what is below it, or all that one worker holds."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,b", "app.pop_screen", "Back"),
        Binding("p,space", "app.pause", "Pause"),
        Binding("q", "app.quit", "Quit"),
    ]

    def __init__(self, model: Model, heading: str, below: KeyRange | None, worker: str | None) -> None:
        super().__init__()
        self._model = model
        self._heading = heading
        self._below = below
        self._worker = worker

    def compose(self) -> ComposeResult:
        """A heading over lines that can be scrolled."""
        yield Static(self._heading, id="heading", markup=False)
        with VerticalScroll():
            yield Static("reading …", id="lines", markup=False)
        yield Footer()

    async def on_mount(self) -> None:
        """What there is now."""
        await self.update()

    async def update(self) -> None:
        """What there is now. A block that is gone is said to be."""
        try:
            cut = await self._model.cut(self._below, self._worker, SUBTREE_NODES)
            lines = [*text_lines(cut)][1:]  # the first one is of the whole tree
            parts = [(part.text, STYLES[part.role]) for line in lines for part in (*line, Segment("\n", ""))]
        except InvalidRequest as error:
            parts = [(f"not there any more ({error.limit})", STYLES["bad"])]
        for lines_shown in self.query("#lines").results(Static):  # none before it is composed
            lines_shown.update(Text.assemble(*parts))


class TopApp(App[None]):
    """Two tables, live."""

    TITLE = "rhizome events top"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #totals, #heading { height: auto; padding: 0 1; background: $primary-background; text-style: bold; }
    #problem { height: auto; padding: 0 1; color: $error; display: none; }
    .caption { padding: 0 1; color: $text-muted; }
    #workers { height: 1fr; }
    #prefixes { height: 1fr; }
    #lines { padding: 0 1; width: auto; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("s", "sort", "Sort"),
        Binding("r", "reverse", "Reverse"),
        Binding("p,space", "pause", "Pause"),
        Binding("tab", "app.focus_next", "Other table"),
        Binding("q", "quit", "Quit"),
    ]

    def __init__(self, model: Model, interval_s: float = 1.0) -> None:
        super().__init__()
        self._model = model
        self._interval_s = interval_s
        self._picture: Picture | None = None
        self.paused = False

    def compose(self) -> ComposeResult:
        """Totals, workers, prefixes, keys."""
        yield Static("", id="totals", markup=False)
        yield Static("", id="problem", markup=False)
        yield LiveTable[WorkerRow](WORKER_COLUMNS, BY_BLOCKS, lambda row: row.name, id="workers")
        yield Static("", id="caption", classes="caption", markup=False)
        yield LiveTable[PrefixRow](HOT_COLUMNS, BY_AMOUNT, lambda row: key_text(row.block_hash), id="prefixes")
        yield Footer()

    def on_mount(self) -> None:
        """Begin to look."""
        self.query_one("#prefixes").focus()
        self.run_worker(self._watch())

    async def _watch(self) -> None:
        with suppress(NoMatches):  # the widgets are gone: the app is about to end
            while True:
                picture = await self._model.look()
                if not self.paused:
                    await self._show(picture)
                await asyncio.sleep(self._interval_s)

    async def _show(self, picture: Picture) -> None:
        self._picture = picture
        base = self.screen_stack[0]
        workers = base.query_one("#workers", LiveTable)
        workers.set_columns(WORKER_COLUMNS if picture.by_hits else STREAM_COLUMNS, BY_BLOCKS)
        workers.show(picture.workers)
        prefixes = base.query_one("#prefixes", LiveTable)
        prefixes.set_columns(HOT_COLUMNS if picture.by_hits else LARGE_COLUMNS, BY_AMOUNT)
        prefixes.show(picture.prefixes)
        what = "hottest prefixes, of the last 4,096 requests" if picture.by_hits else "largest prefixes"
        base.query_one("#caption", Static).update(what)
        problem = base.query_one("#problem", Static)
        problem.update(printable(picture.problem))
        problem.display = bool(picture.problem)
        self._show_totals()
        if isinstance(self.screen, Detail):
            await self.screen.update()

    def _show_totals(self) -> None:
        if self._picture is None:
            return
        totals = self._picture.totals
        parts = [printable(self._picture.target), counted(totals.workers, "worker"), counted(totals.blocks, "block")]
        parts.append(f"{totals.stored_per_s:,.1f} stored/s, {totals.removed_per_s:,.1f} removed/s")
        if totals.in_flight is not None:
            parts += [f"hit share {share_text(totals.hit_share)}", f"{totals.in_flight:,} in flight"]
        if self.paused:
            parts.append("PAUSED")
        self.screen_stack[0].query_one("#totals", Static).update("  ·  ".join(parts))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:  # noqa: ARG002 - textual calls it
        """Tables can be sorted where there are any."""
        return action not in ("sort", "reverse") or len(self.screen_stack) == 1

    def action_sort(self) -> None:
        """The table that has the cursor, by its next column."""
        if isinstance(self.focused, LiveTable):
            self.focused.next_column()

    def action_reverse(self) -> None:
        """The table that has the cursor, the other way round."""
        if isinstance(self.focused, LiveTable):
            self.focused.reverse()

    def action_pause(self) -> None:
        """Stop showing what is new, or go on."""
        self.paused = not self.paused
        self._show_totals()

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Look into the prefix, or the worker, that the cursor is on."""
        table, key = event.data_table, event.row_key.value
        row = table.row_of(key) if isinstance(table, LiveTable) and key else None
        if isinstance(row, PrefixRow):
            at = row.block_hash
            hits = f", {counted(row.hits, 'hit')}" if row.hits else ""
            held = f"held by {holders_of(row, ALL_NAMES) or 'nobody'}"
            heading = f"{counted(row.depth, 'block')} up to {key_text(at)}{hits}, {held}"
            self.push_screen(Detail(self._model, heading, KeyRange(at, at), None))
        elif isinstance(row, WorkerRow):
            heading = f"{printable(row.name)}: {counted(row.blocks, 'block')}, {printable(row.state)}"
            self.push_screen(Detail(self._model, heading, None, row.name))
