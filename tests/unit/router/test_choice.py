"""The choice among scored candidates where other routers choose, too, and where a prefix could be fetched."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kv_events.events import BlockStored, EventBatch
from kv_events.log import EventLog
from router.choice import choose_apart, choose_reference
from router.core import Router, RouteRequest
from router.decision import Decision
from router.fleet import ModelCard, WorkerInfo, WorkerReport
from tests.support.candidates import PlainQuestion, plain_questions

OFFER = "tcp://h:1"
CARD = ModelCard("model", 100_000, 1000, 16, "")


def router_with(
    workers: int, *, fetch_token_s: float = 0.0, seed: int = 1, transfer_offers: tuple[str, ...] = (OFFER,)
) -> Router:
    router = Router(validate=True, seed=seed)
    for number in range(workers):
        name = f"worker-{number}"
        info = WorkerInfo(name, 1, f"{name}:1", CARD, 10_000, 64, 64, 8192, fetch_token_s=fetch_token_s)
        info = replace(info, transfer_offers=transfer_offers)
        router.register(info, 0.0)
        router.set_ready(name, 1)
    return router


def request(number: int, blocks: int = 64) -> RouteRequest:
    return RouteRequest(f"r{number}", "model", blocks * 16 + 1, np.arange(1, blocks + 1, dtype=np.uint64))


def placed(router: Router, asked: RouteRequest) -> Decision:
    decision = router.submit(asked, 1.0)
    assert decision is not None
    return decision


@given(question=plain_questions(), share=st.floats(0.06, 1), seed=st.integers(0, 3))
def test_beside_others_the_chosen_one_is_nearly_the_best(question: PlainQuestion, share: float, seed: int) -> None:
    """Worse by at most a prefill's share, with room, and the same for the same seed."""
    rows = question.candidates()
    scores = rows.ttft_s
    best = choose_reference(rows, scores, lambda least: least)
    found = choose_apart(rows, scores, lambda least: least, share, Random(seed))
    again = choose_apart(rows, scores, lambda least: least, share, Random(seed))
    assert (best is None) == (found is None)
    if found is not None and best is not None and again is not None:
        assert found[1] == again[1]
        assert rows.in_flight[found[1]] < rows.max_in_flight[found[1]]
        assert scores[found[1]] <= scores[best[1]] + share * rows.prefill_s.min() + 1e-12


def test_routers_that_know_the_same_do_not_all_choose_alike() -> None:
    """Three idle workers, busy with others' requests by their reports: each of many routers takes one, not all the same
    one. Alone a router would take the first."""
    chosen = set()
    for seed in range(20):
        router = router_with(3, seed=seed)
        for number in range(3):
            router.heartbeat(f"worker-{number}", 1, WorkerReport(running=2, blocks_total=10_000), 0.5)
        decision = placed(router, request(0))
        chosen.add(decision.worker_id)
        assert "other routers know the same" in decision.reason
    assert len(chosen) > 1
    assert {placed(router_with(3, seed=seed), request(0)).worker_id for seed in range(20)} == {"worker-0"}


def stored(worker_id: str, asked: RouteRequest) -> EventBatch:
    """That worker holds the whole prompt."""
    log = EventLog(worker_id, 1, 16)
    log.append([BlockStored(asked.hashes, 0, 16)], 0.0)
    batch: EventBatch = log.read(0, 1)[0].batch
    return batch


def test_what_another_worker_holds_is_fetched_where_that_is_quicker() -> None:
    """The one that holds it is busy: another takes the request and is told where to fetch."""
    router = router_with(2, fetch_token_s=1e-7)
    asked = request(1, blocks=640)
    batch = stored("worker-0", asked)
    router.view("worker-0").offer(batch)
    router.heartbeat("worker-0", 1, WorkerReport(running=60, waiting=3, prefill_tokens_outstanding=60_000), 0.5)
    decision = router.explain(asked, 1.0)
    assert (decision.worker_id, decision.fetch_from) == ("worker-1", "worker-0")
    assert decision.fetched_tokens == decision.cached_tokens == 640 * 16
    assert "10240 of them at worker-0" in decision.reason
    for alone in (router_with(2), router_with(2, fetch_token_s=1e-7, transfer_offers=())):  # nobody pulls, or lends
        alone.view("worker-0").offer(batch)
        decision = alone.explain(asked, 1.0)
        assert (decision.worker_id, decision.fetch_from, decision.fetched_tokens) == ("worker-0", "", 0)


def test_what_a_draining_worker_holds_is_fetched_while_it_is_there() -> None:
    """It takes no request, and gives what it holds to who does: unless it cannot, or cannot be reached."""
    asked = request(1, blocks=640)
    for offers, reached, source in [((OFFER,), True, "worker-0"), ((), True, ""), ((OFFER,), False, "")]:
        router = router_with(3, fetch_token_s=1e-7, transfer_offers=offers)
        router.view("worker-0").offer(stored("worker-0", asked))
        router.set_draining("worker-0", True)
        if not reached:
            router.set_unreachable("worker-0", 1)
        decision = router.explain(asked, 1.0)
        assert decision.worker_id in ("worker-1", "worker-2")
        assert (decision.fetch_from, decision.fetched_tokens) == (source, 640 * 16 if source else 0)
        assert len(decision.candidates) == 2, "it is no candidate"
        router.set_draining("worker-0", False)
        if reached:
            assert router.explain(asked, 1.0).worker_id == "worker-0"
