"""`rhizome events top`: what is on the screen, and what the keys do; driven without a terminal."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from textual.pilot import Pilot
from textual.widgets import Footer, Static

from deploy.events.top import Detail, TopApp, run_top
from deploy.events.top_model import Picture, PrefixRow, Totals, WorkerRow
from deploy.events.top_tables import LiveTable
from kv_events.inspect.tree_cut import TreeCut, cut_tree
from kv_events.inspect.words import KeyRange
from radix import make_tree
from rhizome.errors import InvalidRequest

WORKERS = (
    WorkerRow("worker-0", 1200, 3.5, 4.0, 0.5, 0.83, 0.012, 0, 3, "in step"),
    WorkerRow("worker-1", 900, -2.0, 0.0, 2.0, None, None, 2, 0, "UNAVAILABLE: \x1b[31mgone"),
    WorkerRow("seen", 50, 0.0, 0.0, 0.0, None, 0.5, 0, None, "observed"),
)
PREFIXES = (
    PrefixRow(0xA, 2, 40, 0, ("worker-0", "worker-1")),
    PrefixRow(0xB, 3, 9, 0, ("worker-0",)),
    PrefixRow(0xC, 30, 1, 0, tuple(f"w{number}" for number in range(9))),
)
PICTURE = Picture("router://here", WORKERS, PREFIXES, Totals(3, 2150, 4.0, 2.5, 0.8, 3), by_hits=True)


class Still:
    """A model that stands still, until a test changes its picture."""

    def __init__(self, picture: Picture = PICTURE) -> None:
        self.picture = picture
        self.looks = 0
        self.tree = make_tree()
        self.tree.store(0, np.array([0x9, 0xA, 0xB], dtype=np.uint64))
        self.tree.store(1, np.array([0x9, 0xA], dtype=np.uint64))
        self.asked: list[tuple[KeyRange | None, str | None]] = []

    async def look(self) -> Picture:
        self.looks += 1
        return self.picture

    async def cut(self, below: KeyRange | None, worker: str | None, max_nodes: int) -> TreeCut:
        self.asked.append((below, worker))
        number = None if worker is None else ["worker-0", "worker-1"].index(worker)
        return cut_tree(self.tree.dump(), ["worker-0", "worker-1"], below=below, worker=number, max_nodes=max_nodes)


class Screen:
    """The app as a test sees it."""

    def __init__(self, app: TopApp, pilot: Pilot[Any], model: Still) -> None:
        self.app = app
        self.pilot = pilot
        self.model = model

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.pilot.pause()

    def table(self, name: str) -> list[list[str]]:
        table = self.app.screen_stack[0].query_one(f"#{name}", LiveTable)
        return [[cell.plain for cell in table.get_row_at(row)] for row in range(table.row_count)]

    def headings(self, name: str) -> list[str]:
        table = self.app.screen_stack[0].query_one(f"#{name}", LiveTable)
        return [str(column.label) for column in table.ordered_columns]

    def first_column(self, name: str) -> list[str]:
        return [row[0] for row in self.table(name)]

    def text(self, name: str) -> str:
        return str(self.app.screen.query_one(f"#{name}", Static).content)

    async def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            await self.pilot.pause(0.01)

    async def looked_again(self) -> None:
        looks = self.model.looks
        await self.until(lambda: self.model.looks > looks + 1)
        await self.pilot.pause()


def with_screen(test: Callable[[Screen], Awaitable[None]], picture: Picture = PICTURE) -> None:
    async def main() -> None:
        model = Still(picture)
        app = TopApp(model, interval_s=0.1)  # at rest between: a press waits for that
        async with asyncio.timeout(60), app.run_test(size=(140, 40)) as pilot:
            screen = Screen(app, pilot, model)
            await screen.looked_again()
            await test(screen)

    asyncio.run(main())


def test_workers_prefixes_and_totals_are_on_the_screen() -> None:
    """Every column; what is not known is a dash; control characters do not get through; the footer has the keys."""

    async def test(screen: Screen) -> None:
        assert screen.table("workers") == [
            ["worker-0", "1,200", "+3.5", "4.0", "0.5", "83%", "3", "12 ms", "0", "in step"],
            ["worker-1", "900", "-2.0", "0", "2.0", "–", "0", "–", "2", "UNAVAILABLE: ?[31mgone"],
            ["seen", "50", "0", "0", "0", "–", "–", "500 ms", "0", "observed"],
        ]
        assert screen.table("prefixes") == [
            ["000000000000000a", "2", "40", "2", "worker-0, worker-1"],
            ["000000000000000b", "3", "9", "1", "worker-0"],
            ["000000000000000c", "30", "1", "9", "w0, w1, w2, w3 and 5 more"],
        ]
        totals = screen.text("totals")
        for part in ("router://here", "3 workers", "2,150 blocks", "4.0 stored/s", "hit share 80%", "3 in flight"):
            assert part in totals
        shown = {binding.binding.description for binding in screen.app.screen.active_bindings.values()}
        assert shown >= {"Look into", "Sort", "Reverse", "Pause", "Quit"}
        assert screen.app.screen.query_one(Footer).display

    with_screen(test)


def test_s_sorts_by_the_next_column_and_r_the_other_way_round() -> None:
    """Of the table that has the cursor; an arrow says which column, and how."""

    async def test(screen: Screen) -> None:
        assert screen.headings("prefixes")[2] == "hits ▼"
        await screen.press("s")
        assert screen.headings("prefixes")[3] == "holders ▼"
        assert screen.first_column("prefixes")[0] == "000000000000000c"
        await screen.press("r")
        assert screen.headings("prefixes")[3] == "holders ▲"
        assert screen.first_column("prefixes")[0] == "000000000000000b"
        await screen.press("tab", *"s" * 9)
        assert screen.headings("workers")[0] == "worker ▲"
        assert screen.first_column("workers") == ["seen", "worker-0", "worker-1"]
        await screen.press("r")
        assert screen.first_column("workers") == ["worker-1", "worker-0", "seen"]
        await screen.press(*"s" * 5)
        assert screen.headings("workers")[5] == "hit share ▼"
        assert screen.first_column("workers")[0] == "worker-0"

    with_screen(test)


def test_the_cursor_stays_on_its_row() -> None:
    """Wherever the row goes while numbers change."""

    async def test(screen: Screen) -> None:
        await screen.press("down")
        table = screen.app.query_one("#prefixes", LiveTable)
        assert table.cursor_row == 1
        hotter = replace(PREFIXES[1], hits=99)
        screen.model.picture = replace(PICTURE, prefixes=(PREFIXES[0], hotter, PREFIXES[2]))
        await screen.looked_again()
        assert screen.first_column("prefixes")[0] == "000000000000000b"
        assert table.cursor_row == 0

    with_screen(test)


@pytest.mark.parametrize("key", ["p", "space"])
def test_a_pause_keeps_what_is_shown(key: str) -> None:
    """Until the key is pressed again; the title says so."""

    async def test(screen: Screen) -> None:
        await screen.press(key)
        assert "PAUSED" in screen.text("totals")
        screen.model.picture = replace(PICTURE, workers=WORKERS[:1], problem="UNAVAILABLE: no router")
        await screen.looked_again()
        assert len(screen.table("workers")) == 3
        await screen.press(key)
        await screen.looked_again()
        assert len(screen.table("workers")) == 1
        assert "PAUSED" not in screen.text("totals")
        assert screen.text("problem") == "UNAVAILABLE: no router"
        assert screen.app.screen.query_one("#problem").display

    with_screen(test)


@pytest.mark.parametrize("back", ["escape", "b"])
def test_enter_looks_into_a_prefix(back: str) -> None:
    """Its holders, and what is below it, live; the tables are there again afterwards."""

    async def test(screen: Screen) -> None:
        await screen.press("enter")
        assert isinstance(screen.app.screen, Detail)
        assert screen.text("heading") == "2 blocks up to 000000000000000a, 40 hits, held by worker-0, worker-1"
        await screen.until(lambda: "└─" in screen.text("lines"))
        assert screen.text("lines").splitlines() == [
            "1 block 000000000000000a  worker-0, worker-1",
            "└─ 1 block 000000000000000b  worker-0",
        ]
        assert screen.model.asked[0] == (KeyRange(0xA, 0xA), None)
        screen.model.tree.clear(0)
        screen.model.tree.clear(1)
        await screen.until(lambda: "not there any more" in screen.text("lines"))
        await screen.press("s", back)
        assert not isinstance(screen.app.screen, Detail)

    with_screen(test)


def test_enter_looks_into_a_worker() -> None:
    """All that it holds; also while the view is paused."""

    async def test(screen: Screen) -> None:
        await screen.press("p", "tab", "enter")
        assert screen.text("heading") == "worker-0: 1,200 blocks, in step"
        await screen.until(lambda: "├" in screen.text("lines") or "└" in screen.text("lines"))
        assert screen.model.asked == [(None, "worker-0")]

    with_screen(test)


def test_without_a_router_large_prefixes_stand_for_hot_ones() -> None:
    """Nothing is known of matches: the table says what it shows, and is sorted by that."""
    rows = (PrefixRow(0xA, 2, 0, 700, ("w",)), PrefixRow(0xB, 3, 0, 800, ("w",)))
    totals = Totals(1, 50, 0.0, 0.0, None, None)
    plain = replace(PICTURE, workers=WORKERS[2:], prefixes=rows, totals=totals, by_hits=False)

    async def test(screen: Screen) -> None:
        assert screen.headings("prefixes")[2] == "below ▼"
        assert [row[2] for row in screen.table("prefixes")] == ["800", "700"]
        assert screen.text("caption") == "largest prefixes"
        assert "hit share" not in screen.text("totals")
        assert [heading.split()[0] for heading in screen.headings("workers")] == [
            *("worker", "blocks", "growth/s", "stored/s", "removed/s", "lag", "gaps", "state")
        ]

    with_screen(test, plain)


def test_q_quits() -> None:
    """From the tables and from within a prefix."""

    async def test(screen: Screen) -> None:
        await screen.press("enter", "q")
        assert not screen.app.is_running

    with_screen(test)


def test_without_a_terminal_it_says_so() -> None:
    """In a pipe there is nothing to draw on: one line, and what to take instead."""
    with pytest.raises(InvalidRequest, match="top needs one"):
        asyncio.run(run_top("router://127.0.0.1:1", (), 1.0))
