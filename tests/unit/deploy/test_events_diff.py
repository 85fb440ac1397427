"""A router's tree against what its workers say of themselves."""

from __future__ import annotations

import asyncio

import pytest

from deploy.events import diff
from deploy.events.diff import DiffOptions
from deploy.events.targets import Targets
from kv_events.bus.memory import published
from kv_events.events import BlockStored
from kv_events.inspect.diff import StateDiff
from kv_events.log import EventLog
from radix import make_tree
from rhizome.v1 import router_pb2
from router.whole_tree import WholeTree
from tests.support.recordings import blocks


class FakeRouter:
    """A router whose tree is what a test makes it, `lag` looks behind."""

    def __init__(self, workers: list[str]) -> None:
        self.known = make_tree()
        self.names = workers
        self.looks = 0

    async def workers(self) -> list[router_pb2.WorkerEntry]:
        return [router_pb2.WorkerEntry(worker_id=name, events_url=f"memory://{name}") for name in self.names]

    async def tree(self, hottest: int) -> WholeTree:
        self.looks += 1
        self.on_look(self.looks)
        return WholeTree(self.known, self.names, [], 16)

    def on_look(self, look: int) -> None:
        """What happens meanwhile."""


def append(log: EventLog, *hashes: int) -> None:
    log.append([BlockStored(blocks(*hashes), 0, 16)], 0.0)


def settled(router: FakeRouter, *logs: EventLog) -> dict[str, StateDiff]:
    async def test() -> dict[str, StateDiff]:
        targets = Targets("router", router=router)  # type: ignore[arg-type]
        try:
            diffs, unread = await diff._settled(targets, DiffOptions("router"))
            assert not unread
            return diffs
        finally:
            await targets.close()

    async def with_logs(rest: tuple[EventLog, ...]) -> dict[str, StateDiff]:
        if not rest:
            return await test()
        with published(rest[0], rest[0].worker):
            return await with_logs(rest[1:])

    return asyncio.run(asyncio.wait_for(with_logs(logs), 30))


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diff, "SETTLE_S", 0.6)
    monkeypatch.setattr(diff, "LOOK_S", 0.05)


def test_a_view_that_is_not_right_shows() -> None:
    """Which blocks, of which worker; the other is equal."""
    wrong, right = EventLog("w0", 1, 16), EventLog("w1", 1, 16)
    append(wrong, 1, 2, 3)
    append(right, 1)
    router = FakeRouter(["w0", "w1"])
    router.known.store(0, blocks(2, 3, 9))
    router.known.store(1, blocks(1))
    diffs = settled(router, wrong, right)
    assert (diffs["w1"].equal, diffs["w1"].blocks_a) == (True, 1)
    found = diffs["w0"]
    assert (found.equal, found.missing_blocks, found.extra_blocks) == (False, [1], [9])


def test_a_view_that_is_late_has_the_time_to_catch_up() -> None:
    """What is on its way is no difference."""
    log = EventLog("w0", 1, 16)
    append(log, 1, 2)
    router = FakeRouter(["w0"])

    def on_look(look: int) -> None:
        if look == 3:
            router.known.store(0, blocks(1, 2))

    router.on_look = on_look  # type: ignore[method-assign]
    assert settled(router, log)["w0"].equal
    assert router.looks == 3


def test_a_worker_that_never_rests_is_compared_with_what_it_was() -> None:
    """The router's view is always one batch behind."""
    log = EventLog("w0", 1, 16)
    append(log, 1)
    router = FakeRouter(["w0"])

    def on_look(look: int) -> None:
        router.known.store(0, blocks(look))
        append(log, look + 1)

    router.on_look = on_look  # type: ignore[method-assign]
    assert settled(router, log)["w0"].equal


def test_a_view_that_stands_still_while_its_worker_works_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it shows was right once."""
    monkeypatch.setattr(diff, "BEHIND_S", 0.0)
    log = EventLog("w0", 1, 16)
    append(log, 1)
    router = FakeRouter(["w0"])

    def on_look(look: int) -> None:
        if look == 1:
            append(log, 2)
        else:
            router.known.store(0, blocks(1))

    router.on_look = on_look  # type: ignore[method-assign]
    found = settled(router, log)["w0"]
    assert (found.equal, found.missing_blocks) == (False, [2])


def test_a_worker_that_the_router_has_forgotten_shows() -> None:
    """All its blocks are missing."""
    log = EventLog("w0", 1, 16)
    append(log, 1, 2)
    found = settled(FakeRouter(["w0"]), log)["w0"]
    assert (found.equal, found.missing, found.blocks_b) == (False, 2, 0)
