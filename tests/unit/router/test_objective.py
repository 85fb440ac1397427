"""What an objective costs, and what the router does for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kv_events.events import BlockStored
from kv_events.log import EventLog
from rhizome.errors import InvalidRequest
from router.candidates import Candidates
from router.core import Router
from router.fleet import ModelCard, WorkerInfo
from router.objective import ANSWER_TOKENS, MISS_S, Objective
from router.request import RouteRequest
from router.table import Column, WorkerTable

CARD = ModelCard("m", max_model_len=100_000, vocab_size=100, block_size=16, tokenizer_sha256="abc")
WORKER = WorkerInfo("", 1, "w:1", CARD, 20_000, 64, 64, 8192)


def candidates(prompt_tokens: int, *workers: dict[Column, float]) -> Candidates:
    """Workers of 0.1 ms a token and 20 ms a decode step, which has 1 ms more for each sequence."""
    table = WorkerTable()
    usual = {
        Column.BLOCKS_TOTAL: 20_000,
        Column.MAX_SEQUENCES: 128,
        Column.BUDGET: 8192,
        Column.TOKEN_S: 1e-4,
        Column.DECODE_STEP_S: 0.02,
        Column.SEQUENCE_S: 0.001,
    }
    for slot, changes in enumerate(workers):
        table.add(slot)
        for column, value in (usual | changes).items():
            table.set(slot, column, (value,))
    slots = np.arange(len(workers))
    return Candidates(slots, table.values, prompt_tokens, 16, np.zeros((2, table.values.shape[1])), 0.0)


def ask(name: str, tokens: int, first_block: int = 1) -> RouteRequest:
    hashes = np.arange(first_block * 10_000, first_block * 10_000 + tokens // 16, dtype=np.uint64)
    return RouteRequest(name, "m", tokens, hashes)


def test_without_limits_nothing_costs() -> None:
    """The objective is the least TTFT then."""
    assert not Objective()
    assert Objective().cost_s(candidates(1000, {}, {Column.DECODING: 9}), 1, 99.0).tolist() == [0.0, 0.0]


def test_a_first_token_that_comes_too_late_costs_a_miss() -> None:
    """By what the request has waited and is predicted to wait."""
    rows = candidates(10_000, {}, {Column.QUEUED: 1, Column.QUEUED_TOKENS: 1000, Column.QUEUED_S: 3.0})
    objective = Objective(ttft_s=2.0)
    assert [objective.cost_s(rows, 1, waited).tolist() for waited in (0.0, 1.1)] == [[0.0, MISS_S], [MISS_S, MISS_S]]


def test_those_who_decode_beside_a_prefill_cost_by_what_a_short_answer_bears() -> None:
    """In proportion to the prefill and to their number, one each at most."""
    objective = Objective(itl_s=0.1)
    decoding = {Column.DECODING: 9}
    step_s = 0.02 + 0.001 * 10
    short = objective.cost_s(candidates(1000, {}, decoding), 1, 0.0)
    assert short.tolist() == pytest.approx([0.0, MISS_S * 9 * candidates(1000, decoding).prefill_s[0] / (
        ANSWER_TOKENS * (0.1 - step_s))])  # fmt: skip
    assert objective.cost_s(candidates(90_000, decoding), 1, 0.0).tolist() == [MISS_S * 9]


def test_a_step_that_is_too_long_is_a_miss_for_everybody() -> None:
    """The request's own sequences counted; a request misses its objective once."""
    rows = candidates(100, {Column.DECODING: 70})
    assert Objective(itl_s=0.1).cost_s(rows, 1, 0.0)[0] < MISS_S * 10
    assert Objective(itl_s=0.1).cost_s(rows, 16, 0.0)[0] == MISS_S * 71
    assert Objective(0.001, 0.1).cost_s(rows, 16, 0.0)[0] == MISS_S * 71


@pytest.mark.parametrize("values", [(0.0, None), (None, -1.0), (float("nan"), None), (None, 3601.0)])
def test_limits_that_are_none_are_refused(values: tuple[float | None, float | None]) -> None:
    """By name."""
    with pytest.raises(InvalidRequest, match=r"slo_(ttft|itl) is .*: above 0, at most 3600 s"):
        Objective(*values)


@pytest.mark.parametrize(("objective", "chosen"), [(None, "holder"), (Objective(itl_s=0.1), "idle")])
def test_answers_under_way_are_kept_from_a_long_prefill(objective: Objective | None, chosen: str) -> None:
    """The worker that holds some of the prompt would answer sooner; ten others decode there."""
    router = Router(objective=objective, validate=True)
    for name in ("holder", "idle"):
        router.register(replace(WORKER, worker_id=name), 0.0)
        router.set_ready(name, 1)
    router.set_draining("idle", True)
    for number in range(10):
        router.route(ask(f"r{number}", 100, 100 + number), 0.0)
        router.first_token(f"r{number}", 0.0)
    router.set_draining("idle", False)
    long = ask("long", 10_000)
    log = EventLog("holder", 1, 16)
    router.view("holder").offer(log.append([BlockStored(long.hashes[:300], 0, 16)], 0.0))
    decision = router.route(long, 0.0)
    assert decision.worker_id == chosen
