"""Dispatcher: whoever awaits a place gets it, is told why not, or goes away, and nothing stays behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest

from rhizome.errors import Duplicate, RhizomeError, Unavailable
from router import dispatcher as dispatcher_module
from router.core import Router, RouteRequest
from router.decision import Decision
from router.dispatcher import Dispatcher
from router.fleet import ModelCard, WorkerInfo

CARD = ModelCard("m", max_model_len=100_000, vocab_size=100, block_size=16, tokenizer_sha256="abc")


def ask(name: str, tokens: int = 100) -> RouteRequest:
    return RouteRequest(name, "m", tokens, np.array([int.from_bytes(name.encode()[:8], "big")], np.uint64))


class Stage:
    """A router with one worker and a clock that stands still, and the dispatcher before it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.router = Router(lease_s=1e9, validate=True)
        self.router.register(WorkerInfo("w", 1, "w:1", CARD, 100_000, 1000, 1000, 512), 0.0)
        self.router.set_ready("w", 1)
        self.dispatcher = Dispatcher(self.router)

    def busy(self) -> None:
        """The worker computes a long prompt."""
        self.router.route(ask("long", 20_000), self.now)

    def free(self) -> None:
        """It is done with whatever it had to prefill."""
        for name in list(self.router.load.of("w").queue):
            self.router.first_token(name, self.now)

    async def held(self, *names: str) -> list[asyncio.Task[Decision]]:
        """Tasks that wait for a place, of requests that are held."""
        tasks = [asyncio.create_task(self.dispatcher.place(ask(name))) for name in names]
        async with asyncio.timeout(10):
            while self.router.held < len(names):
                await asyncio.sleep(0)
        return tasks

    async def nothing_left(self) -> None:
        """But the long prompt; the timer runs out."""
        assert self.router.held == 0
        assert not self.dispatcher._waiting
        assert len(self.router.load) == ("long" in self.router.load)
        async with asyncio.timeout(10):
            while self.dispatcher._timer is not None:
                await asyncio.sleep(0.01)


def on_stage(monkeypatch: pytest.MonkeyPatch, play: Callable[[Stage], Awaitable[None]]) -> None:
    async def main() -> None:
        stage = Stage()
        monkeypatch.setattr(dispatcher_module, "time", SimpleNamespace(monotonic=lambda: stage.now))
        stage.busy()
        async with asyncio.timeout(30):
            await play(stage)
            await stage.nothing_left()

    asyncio.run(main())


def test_it_waits_for_its_turn_and_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as something changed; the decision says how long it was held."""

    async def play(stage: Stage) -> None:
        (task,) = await stage.held("a")
        stage.now = 2.0
        stage.free()
        assert not task.done()
        stage.dispatcher.changed()
        decision = await task
        assert (decision.request_id, decision.worker_id, decision.held_s) == ("a", "w", 2.0)
        assert "a" in stage.router.load
        stage.router.finish("a", stage.now)

    on_stage(monkeypatch, play)


def test_who_need_not_wait_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place is there before the loop turns."""

    async def play(stage: Stage) -> None:
        stage.free()
        with pytest.raises(StopIteration) as stop:
            stage.dispatcher.place(ask("a")).send(None)
        assert stop.value.value.worker_id == "w"
        assert stage.dispatcher._timer is None
        stage.router.finish("a", stage.now)

    on_stage(monkeypatch, play)


def test_time_alone_lets_it_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody calls changed: it is looked at again and again while it is held."""

    async def play(stage: Stage) -> None:
        stage.free()
        stage.router.route(ask("middling", 4000), stage.now)
        (task,) = await stage.held("a")
        stage.now = 60.0
        assert (await task).held_s == 60.0
        for name in ("a", "middling"):
            stage.router.finish(name, stage.now)

    on_stage(monkeypatch, play)


def test_a_client_that_goes_away_is_held_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others keep their turn."""

    async def play(stage: Stage) -> None:
        first, second = await stage.held("a", "b")
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert stage.router.held == 1
        stage.free()
        stage.dispatcher.changed()
        assert (await second).request_id == "b"
        assert "a" not in stage.router.load
        stage.router.finish("b", stage.now)

    on_stage(monkeypatch, play)


@pytest.mark.parametrize("decided_first", [True, False])
def test_a_turn_that_comes_as_the_client_goes_is_given_back(
    decided_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one turn of the loop, whichever was first: no reservation stays, and its id is free."""

    async def play(stage: Stage) -> None:
        (task,) = await stage.held("a")
        stage.free()
        if decided_first:
            stage.dispatcher.changed()
            assert "a" in stage.router.load
            task.cancel()
        else:
            task.cancel()
            stage.dispatcher.changed()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert "a" not in stage.router.load
        assert (await stage.dispatcher.place(ask("a"))).worker_id == "w"
        stage.router.finish("a", stage.now)

    on_stage(monkeypatch, play)


def test_a_deadline_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Like a client that goes away."""

    async def play(stage: Stage) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await stage.dispatcher.place(ask("a"))

    on_stage(monkeypatch, play)


def test_errors_reach_those_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last worker leaves: each is told why; one that was cancelled in the same turn does not disturb the others."""

    async def play(stage: Stage) -> None:
        tasks = await stage.held("a", "b", "c")
        stage.router.deregister("w", 1)
        tasks[1].cancel()
        stage.dispatcher.changed()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(each) for each in found] == [Unavailable, asyncio.CancelledError, Unavailable]
        stage.router.finish("long", stage.now)
        assert len(stage.router.load) == 0

    on_stage(monkeypatch, play)


def test_an_id_that_is_held_is_refused_and_the_first_keeps_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second's end does not give the first one up."""

    async def play(stage: Stage) -> None:
        (task,) = await stage.held("a")
        with pytest.raises(Duplicate):
            await stage.dispatcher.place(ask("a"))
        assert stage.router.held == 1
        stage.free()
        stage.dispatcher.changed()
        assert (await task).request_id == "a"
        with pytest.raises(Duplicate):
            await stage.dispatcher.place(ask("a"))
        assert "a" in stage.router.load
        stage.router.finish("a", stage.now)

    on_stage(monkeypatch, play)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_clients_do_nothing_is_left(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many come, wait, are served, go away; everyone has an answer or has gone."""

    async def play(stage: Stage) -> None:
        random = Random(seed)
        ended: list[str] = []

        async def client(name: str) -> None:
            try:
                decision = await stage.dispatcher.place(ask(name, random.choice((50, 500, 5000))))
            except RhizomeError:
                ended.append(name)
                return
            try:
                assert decision.request_id == name
                for _ in range(random.randint(0, 5)):
                    await asyncio.sleep(0)
                stage.router.first_token(name, stage.now)
                stage.dispatcher.changed()
                await asyncio.sleep(0)
                ended.append(name)
            finally:
                stage.router.finish(name, stage.now)
                stage.dispatcher.changed()

        tasks: list[asyncio.Task[None]] = []
        for number in range(150):
            tasks.append(asyncio.create_task(client(f"r{number}")))
            if random.random() < 0.3:
                random.choice(tasks).cancel()
            if random.random() < 0.3:
                await asyncio.sleep(0)
            if number == 75:
                stage.free()
            stage.now += 0.01
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(each is None or isinstance(each, asyncio.CancelledError) for each in found)
        assert len(ended) + sum(isinstance(each, asyncio.CancelledError) for each in found) >= 150

    on_stage(monkeypatch, play)
