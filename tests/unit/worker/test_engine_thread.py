"""The engine's thread: what happens when callers vanish, steps fail, or the thread itself does."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from rhizome.errors import RhizomeError
from tests.unit.worker.test_engine import idle_and_nothing_lost, make_engine, request
from worker.engine import Output
from worker.engine_thread import EngineThread


class Heard:
    """A listener that remembers, and can be waited for."""

    def __init__(self) -> None:
        self.items: list[Output | RhizomeError] = []
        self.over = threading.Event()

    def __call__(self, item: Output | RhizomeError) -> None:
        self.items.append(item)
        if isinstance(item, RhizomeError) or item.request_finished:
            self.over.set()

    def wait(self) -> Output | RhizomeError:
        assert self.over.wait(30), "nothing was heard"
        return self.items[-1]


@pytest.fixture
def thread() -> Iterator[EngineThread]:
    running = EngineThread(make_engine())
    running.start()
    yield running
    if not running.ended.done():
        running.stop()
    assert running.ended.done()


def test_an_answer_is_heard_to_its_end(thread: EngineThread) -> None:
    """Every token, then the last one says that it is the last."""
    heard = Heard()
    thread.submit(request("r", [1, 2, 3]), heard)
    last = heard.wait()
    assert isinstance(last, Output)
    assert len(heard.items) == 6


def test_a_command_whose_caller_has_gone_is_dropped(thread: EngineThread) -> None:
    """A cancelled call runs nothing and harms nobody: the thread goes on."""
    entered, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        go_on.wait(30)

    thread.call(hold)
    assert entered.wait(30)
    ran: list[int] = []
    waiting = thread.call(lambda: ran.append(1))
    assert waiting.cancel()
    go_on.set()
    assert thread.call(lambda: "alive").result(30) == "alive"
    assert ran == []


def test_a_commands_error_is_its_callers(thread: EngineThread) -> None:
    """It comes back through the future; the thread goes on."""
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda: 1 // 0).result(30)
    assert thread.call(lambda: 1).result(30) == 1


def test_a_failing_step_ends_every_request_in_flight_and_the_engine_serves_on(thread: EngineThread) -> None:
    """Even those whose last token that step had just made; what was cached is not trusted."""
    engine = thread.engine
    commit = engine._commit
    broken = threading.Event()

    def fail_late(*arguments: object) -> list[Output]:
        outputs = commit(*arguments)  # type: ignore[arg-type]
        if broken.is_set() and any(output.request_finished for output in outputs):
            broken.clear()
            raise RuntimeError("late")
        return outputs

    engine._commit = fail_late  # type: ignore[method-assign]
    broken.set()
    first, second = Heard(), Heard()
    thread.submit(request("a", [1, 2, 3]), first)
    thread.submit(request("b", [4] * 20), second)
    for heard in (first, second):
        error = heard.wait()
        assert isinstance(error, RhizomeError)
        assert "late" in str(error)
    thread.call(lambda: idle_and_nothing_lost(engine)).result(30)
    again = Heard()
    thread.submit(request("a", [1, 2, 3]), again)
    assert isinstance(again.wait(), Output)


def test_a_defect_outside_a_step_tells_everybody_and_ends_the_thread(thread: EngineThread) -> None:
    """A dead engine behind a live server would be worse: whoever runs it learns of it and can start anew."""

    def raising(item: Output | RhizomeError) -> None:
        if isinstance(item, Output):
            raise ValueError("a listener's defect")

    other = Heard()
    held, go_on = threading.Event(), threading.Event()
    thread.call(lambda: (held.set(), go_on.wait(30)))
    assert held.wait(30)
    thread.submit(request("other", [9] * 20), other)  # still in its prefill when the first token of the next comes
    thread.submit(request("bad", [1]), raising)
    go_on.set()
    error = other.wait()
    assert isinstance(error, RhizomeError)
    with pytest.raises(ValueError, match="a listener's defect"):
        thread.ended.result(30)


def test_stopping_tells_those_in_flight(thread: EngineThread) -> None:
    """UNAVAILABLE, so that a router can go elsewhere."""
    heard = Heard()
    held, go_on = threading.Event(), threading.Event()
    thread.call(lambda: (held.set(), go_on.wait(30)))
    assert held.wait(30)
    thread.submit(request("r", [1]), heard)
    stopper = threading.Thread(target=thread.stop)
    stopper.start()
    go_on.set()
    stopper.join(30)
    last = heard.wait()
    assert isinstance(last, Output) or last.code == "UNAVAILABLE"
    assert thread.ended.result(30) is None
