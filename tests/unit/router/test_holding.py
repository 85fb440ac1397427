"""Late binding: requests that wait in the router until their best worker is nearly free."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kv_events.events import BlockStored
from kv_events.log import EventLog
from rhizome.errors import Duplicate, NotServed, Overloaded, Unavailable
from router import holding, load
from router.core import Router, RouteRequest
from router.decision import Decision
from router.fleet import ModelCard, WorkerInfo
from router.holding import AGE_WEIGHT, HOLD_S, MAX_CONSIDERED, STALL_S

CARD = ModelCard("m", max_model_len=100_000, vocab_size=100, block_size=16, tokenizer_sha256="abc")
LONG = 20_000  # tokens: seconds of work


def ask(name: str, tokens: int = 100, first_block: int = 1, **fields: object) -> RouteRequest:
    """Prompts of different first blocks share nothing."""
    hashes = np.arange(first_block * 10_000, first_block * 10_000 + tokens // 16, dtype=np.uint64)
    return RouteRequest(name, "m", tokens, hashes, **fields)  # type: ignore[arg-type]


def fleet(*names: str, **changes: object) -> Router:
    router = Router(validate=True)
    for name in names or ("w0",):
        worker = WorkerInfo(name, 1, f"{name}:1", CARD, 20_000, 32, 32, 512)
        router.register(replace(worker, **changes), 0.0)  # type: ignore[arg-type]
        router.set_ready(name, 1)
    return router


def busy(*names: str, **changes: object) -> Router:
    """Each worker computes a long prompt, called as the worker is."""
    router = fleet(*names, **changes)
    for number, name in enumerate(names or ("w0",)):
        assert router.route(ask(f"own-{name}", LONG, 200 + number), 0.0).worker_id == name
    return router


def free(router: Router, worker_id: str, now: float) -> None:
    """Its long prompt has its first token."""
    for request_id in list(router.load.of(worker_id).queue):
        router.first_token(request_id, now)


def gone(router: Router, now: float) -> dict[str, str]:
    """Who goes where, or what it is told, in order."""
    told = router.dispatch(now)
    assert len({name for name, _ in told}) == len(told)
    return {name: found.worker_id if isinstance(found, Decision) else type(found).__name__ for name, found in told}


def test_who_finds_its_worker_nearly_free_goes_at_once() -> None:
    """Nothing is held then; explain does not change that."""
    router = fleet()
    decision = router.submit(ask("a"), 0.0)
    assert decision is not None
    assert (decision.worker_id, decision.held_s, router.held) == ("w0", 0.0, 0)


@pytest.mark.parametrize(("tokens", "heard"), [(LONG, True), (4000, False)])
def test_who_finds_its_worker_busy_waits_until_it_is_nearly_free(tokens: int, heard: bool) -> None:
    """When its first token is heard of, or as predicted. The decision says how long."""
    router = fleet()
    router.route(ask("long", tokens, 200), 0.0)
    assert router.submit(ask("a"), 0.0) is None
    assert (router.held, "a" in router.load, gone(router, 0.0)) == (1, False, {})
    now = 0.2 if heard else router.explain(ask("b"), 0.0).candidates[0].queue_s
    if heard:
        free(router, "w0", now)
    ((_, decision),) = router.dispatch(now)
    assert isinstance(decision, Decision)
    assert decision.held_s == pytest.approx(now)
    assert (router.held, "a" in router.load, gone(router, now)) == (0, True, {})


def test_a_prompt_that_takes_longer_than_predicted_is_waited_for() -> None:
    """A tenth of it is taken to be left until its first token: with a long one that is more than HOLD_S."""
    router = busy()
    router.submit(ask("a"), 0.0)
    head_s = router.explain(ask("b"), 0.0).candidates[0].queue_s
    assert 0.1 * head_s > HOLD_S
    assert gone(router, STALL_S) == {}
    free(router, "w0", STALL_S)
    assert gone(router, STALL_S) == {"a": "w0"}


def test_nobody_waits_for_ever_behind_the_work_of_others() -> None:
    """Where none has gone for STALL_S one goes, then the next after that."""
    router = busy()
    for name in "ab":
        assert router.submit(ask(name), 0.0) is None
    assert gone(router, STALL_S) == {}
    first = gone(router, STALL_S + 0.1)
    assert len(first) == 1
    assert gone(router, STALL_S + 0.2) == {}
    assert {**first, **gone(router, 2 * STALL_S + 0.3)} == {"a": "w0", "b": "w0"}


def test_the_least_work_goes_first() -> None:
    """Also when it came last. Then each counts: one goes at a time while they are long."""
    router = busy()
    for number, tokens in enumerate((9000, 5000, 7000)):
        assert router.submit(ask(f"{tokens}", tokens, number), 0.1 * number) is None
    for expected in ("5000", "7000", "9000"):
        free(router, "w0", 1.0)
        assert gone(router, 1.0) == {expected: "w0"}


def test_cached_work_is_no_work() -> None:
    """A long prompt that is held there goes before a shorter one that is not."""
    router = busy()
    long = ask("cached", 9000, 1)
    log = EventLog("w0", 1, 16)
    router.view("w0").offer(log.append([BlockStored(long.hashes, 0, 16)], 0.0))
    router.submit(ask("new", 4000, 2), 0.0)
    router.submit(long, 0.0)
    free(router, "w0", 0.1)
    assert next(iter(gone(router, 0.1))) == "cached"


def test_age_makes_up_for_length() -> None:
    """A second of waiting for AGE_WEIGHT seconds of work: no stream of short ones holds a long one back for ever."""
    for waited_longer, first in ((0.9, "short"), (1.1, "long")):
        router = busy()
        assert router.submit(ask("long", 6000, 1), 0.0) is None
        work = {name: router.explain(ask(name, tokens), 0.0).candidates[0].prefill_s for name, tokens in
                (("long", 6000), ("short", 3000))}  # fmt: skip
        later = waited_longer * (work["long"] - work["short"]) / AGE_WEIGHT
        assert router.submit(ask("short", 3000, 2), later) is None
        free(router, "w0", later)
        assert next(iter(gone(router, later))) == first


def test_priority_comes_before_work() -> None:
    """A lower number is more urgent, however much it asks."""
    router = busy()
    router.submit(ask("short", 3000, 1), 0.0)
    router.submit(ask("urgent", 9000, 2, priority=-1), 0.0)
    free(router, "w0", 0.1)
    assert next(iter(gone(router, 0.1))) == "urgent"


def test_short_ones_go_together() -> None:
    """As many as keep the worker busy for HOLD_S, and no more than one beyond that."""
    router = busy()
    for number in range(20):
        router.submit(ask(f"s{number}", 100, number), 0.0)
    free(router, "w0", 0.1)
    each_s = router.explain(ask("x", 100, 99), 0.1).candidates[0].prefill_s
    sent = len(gone(router, 0.1))
    assert 1 < sent < 20
    assert (sent - 2) * each_s <= HOLD_S


def test_each_goes_where_it_is_best() -> None:
    """Two workers become free: two requests go, one to each, though the first alone would have gone to either."""
    router = busy("w0", "w1")
    for number in range(4):
        assert router.submit(ask(f"a{number}", 6000, number), 0.0) is None
    free(router, "w0", 0.1)
    free(router, "w1", 0.1)
    assert sorted(gone(router, 0.1).values()) == ["w0", "w1"]


def test_more_than_are_held_go_to_workers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router's memory is bounded, and nobody is refused for it."""
    monkeypatch.setattr(holding, "MAX_HELD", 2)
    router = busy()
    assert [router.submit(ask(f"a{number}", 3000, number), 0.0) is None for number in range(4)] == [
        True,
        True,
        False,
        False,
    ]
    assert router.held == 2


def test_only_the_first_in_order_are_looked_at() -> None:
    """However many are held: all go in their time."""
    router = busy()
    for number in range(2 * MAX_CONSIDERED):
        router.submit(ask(f"a{number}", 100 + number, number), 0.0)
    rounds, now = 0, 0.0
    while router.held:
        free(router, "w0", now)
        assert gone(router, now)
        for name in list(router.load.of("w0").reservations):
            router.finish(name, now)
        rounds, now = rounds + 1, now + 0.1
        assert rounds < 300


def test_a_policy_that_holds_nothing_back_is_obeyed() -> None:
    """By a request's own word, while others are held."""
    router = busy()
    router.submit(ask("held"), 0.0)
    decision = router.submit(ask("now", policy="round-robin"), 0.0)
    assert decision is not None
    assert decision.policy == "round-robin"


def test_a_held_request_is_in_flight() -> None:
    """Its id is taken, whatever way another comes, until it is given up."""
    router = busy()
    router.submit(ask("a"), 0.0)
    with pytest.raises(Duplicate):
        router.submit(ask("a"), 0.0)
    with pytest.raises(Duplicate):
        router.submit(ask("a", policy="round-robin"), 0.0)
    with pytest.raises(Duplicate):
        router.route(ask("a"), 0.0)
    with pytest.raises(Duplicate):
        router.submit(ask("own-w0"), 0.0)
    router.finish("a", 0.0)
    assert router.held == 0
    free(router, "w0", 1.0)
    assert gone(router, 1.0) == {}
    assert router.submit(ask("a"), 1.0) is not None


def test_full_workers_refuse_at_once() -> None:
    """What cannot be served soon is not held."""
    router = busy(max_running=1, max_waiting=0)
    with pytest.raises(Overloaded):
        router.submit(ask("a"), 0.0)
    assert router.held == 0


def test_a_worker_that_fills_up_keeps_requests_held() -> None:
    """They go when it has room again."""
    router = busy(max_running=1, max_waiting=1)
    for number in range(2):
        assert router.submit(ask(f"a{number}", 100, number), 0.0) is None
    free(router, "w0", 0.1)
    assert list(gone(router, 0.1)) == ["a0"]
    assert gone(router, 0.2) == {}
    router.finish("own-w0", 0.3)
    assert list(gone(router, 0.3)) == ["a1"]


def test_a_full_router_keeps_requests_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """And loses nobody whom it let go before it was full."""
    router = busy()
    for number in range(3):
        router.submit(ask(f"a{number}", 100, number), 0.0)
    monkeypatch.setattr(load, "MAX_IN_FLIGHT", 2)
    free(router, "w0", 0.1)
    assert list(gone(router, 0.1)) == ["a0"]
    assert gone(router, 0.2) == {}
    for done in ("own-w0", "a0"):
        router.finish(done, 0.3)
    assert list(gone(router, 0.3)) == ["a1", "a2"]


def test_a_worker_that_leaves_takes_no_held_request_along() -> None:
    """They go to the others; a newcomer is a candidate at once."""
    router = busy("w0", "w1")
    for number in range(2):
        router.submit(ask(f"a{number}", 100, number), 0.0)
    router.deregister("w0", 1)
    assert router.held == 2
    free(router, "w1", 0.1)
    assert set(gone(router, 0.1).values()) == {"w1"}
    router = busy()
    router.submit(ask("a"), 0.0)
    router.register(WorkerInfo("w9", 1, "w9:1", CARD, 20_000, 32, 32, 512), 0.0)
    router.set_ready("w9", 1)
    assert gone(router, 0.1) == {"a": "w9"}


def test_a_worker_that_is_replaced_by_another_is_not_mistaken_for_it() -> None:
    """One leaves and one comes between two looks: as many as before, and not the same."""
    router = busy("w0", "w1")
    assert router.submit(ask("a"), 0.0) is None
    router.deregister("w0", 1)
    router.register(WorkerInfo("w2", 1, "w2:1", CARD, 20_000, 32, 32, 512), 0.0)
    router.set_ready("w2", 1)
    assert gone(router, 0.1) == {"a": "w2"}


@pytest.mark.parametrize("how", ["leaves", "drains", "is lost", "expires"])
def test_nobody_is_held_for_workers_that_are_no_more(how: str) -> None:
    """Each is told so, once."""
    router = busy()
    for number in range(3):
        router.submit(ask(f"a{number}", 100, number), 0.0)
    if how == "leaves":
        router.deregister("w0", 1)
    elif how == "drains":
        router.set_draining("w0", True)
    elif how == "is lost":
        router.set_unreachable("w0", 1)
    else:
        router.expire(1000.0)
    found = router.dispatch(0.1)
    assert [name for name, _ in found] == ["a0", "a1", "a2"]
    assert all(isinstance(error, (Unavailable, NotServed)) for _, error in found)
    assert (router.held, router.dispatch(0.2)) == (0, [])
    assert all(name not in router.load for name, _ in found)
