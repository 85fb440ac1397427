"""Prefill apart from decode in virtual time: who begins, who goes on, what travels, and that nothing stays held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from deploy.simulate.split_fleet import Split, SplitFleet
from deploy.traces.synthesize import synthesize
from deploy.traces.trace import Trace, TraceRequest
from deploy.traces.workload import CHAT
from tests.unit.deploy.simulate.test_fleet import HARDWARE_70B, LOSSY, assert_all_ended, settle
from tests.unit.deploy.simulate.test_fleet import run as run_together
from worker.step_time import Hardware

PREFILL, DECODE = 0, (1, 2)


@pytest.fixture(scope="module")
def chat() -> Trace:
    return synthesize(CHAT, 90, 1).scaled(5)


def run(trace: Trace, hardware: Hardware = HARDWARE_70B, split: Split | None = None, **given: object) -> SplitFleet:
    """A finished fleet, by default of one worker that prefills and two that decode; pools are checked on the way."""
    settings = {"policy": "predicted-ttft", "validate": True} | given
    fleet = SplitFleet(trace, hardware, split or Split(1, 2), **settings)

    def check(_: int) -> None:
        for worker in fleet.workers:
            worker.scheduler.check()

    fleet.run(check)
    check(0)
    return fleet


def prompts(count: int, tokens: int, output_tokens: int, every_s: float = 0.5) -> Trace:
    """Requests that have nothing in common."""
    blocks = tokens // 64
    made = [
        TraceRequest(every_s * n, tokens, output_tokens, tuple(range(blocks * n, blocks * (n + 1))))
        for n in range(count)
    ]
    return Trace("apart", 64, tuple(made))


@pytest.mark.parametrize("policy", ["predicted-ttft", "round-robin", "dynamo"])
@pytest.mark.parametrize("routers", [1, 2])
def test_every_request_ends_once(chat: Trace, policy: str, routers: int) -> None:
    """Whoever routes, with events that are late and lost; prompts are counted once; nothing stays lent."""
    fleet = run(chat, policy=policy, routers=routers, network=LOSSY, seed=3)
    assert_all_ended(fleet)
    assert not any(outcome.refused for outcome in fleet.outcomes)
    begun = [outcome for outcome in fleet.outcomes if outcome.begun_by >= 0]
    assert len(begun) > len(chat) / 4
    assert {outcome.begun_by for outcome in begun} == {PREFILL}
    assert {outcome.worker for outcome in begun} == set(DECODE)
    assert repr(run(chat, policy=policy, routers=routers, network=LOSSY, seed=3).outcomes) == repr(fleet.outcomes)


def test_the_prefill_worker_decodes_nothing_and_the_others_compute_what_fills_no_block() -> None:
    """Long prompts with nothing in common: all full blocks travel, once, at the pace of the hardware's network."""
    trace = prompts(20, 64 * 40 + 30, 50)
    fleet = run(trace)
    first = fleet.workers[PREFILL].status()
    assert first.times.decode_steps == 0
    assert first.prompt_tokens == sum(request.input_tokens for request in trace.requests)
    assert sum(fleet.workers[number].status().times.prefill_tokens for number in DECODE) == 20 * 31
    assert all(outcome.fetched_tokens == 64 * 40 for outcome in fleet.outcomes)
    pull_s = 64 * 40 * HARDWARE_70B.fetch_token_s
    for outcome in fleet.outcomes:
        least = pull_s + 49 * HARDWARE_70B.steps.decode_step_s
        assert outcome.finished_at - outcome.first_token_at >= least
    settle(fleet, 3.0)
    for number in DECODE:
        assert fleet._replicas[0].router.view(f"worker-{number}").digest == fleet.workers[number].log.digest


def test_what_a_decode_worker_has_does_not_travel_again() -> None:
    """A second turn goes on with the blocks of the first: only new ones are pulled."""
    blocks = tuple(range(80))
    turns = (TraceRequest(0.0, 64 * 40, 5, blocks[:40]), TraceRequest(10.0, 64 * 80, 5, blocks))
    fleet = run(Trace("turns", 64, turns), split=Split(1, 1))
    assert [outcome.begun_by for outcome in fleet.outcomes] == [PREFILL, PREFILL]
    assert [outcome.fetched_tokens for outcome in fleet.outcomes] == [64 * 40, 64 * 40]


def test_a_single_token_and_a_short_prompt_are_answered_by_one_worker() -> None:
    """The first where it begins, the second where it would go on."""
    requests = (TraceRequest(0.0, 64 * 40, 1, tuple(range(40))), TraceRequest(5.0, 64, 20, (99,)))
    fleet = run(Trace("alone", 64, requests))
    assert_all_ended(fleet)
    assert [outcome.begun_by for outcome in fleet.outcomes] == [-1, -1]
    assert fleet.outcomes[0].worker == PREFILL
    assert fleet.outcomes[1].worker in DECODE


def assert_steady(itls: Sequence[float]) -> None:
    assert max(itls) < 2 * HARDWARE_70B.steps.decode_step_s


def test_prompts_of_others_do_not_hold_answers_up() -> None:
    """The reason for it all: tokens come at the pace of decoding, which a fleet of equal workers does not keep."""
    trace = prompts(40, 64 * 100, 100, every_s=0.4)
    apart, together = run(trace, split=Split(2, 1)), run_together(trace, policy="predicted-ttft")
    itls = [
        [(outcome.finished_at - outcome.first_token_at) / 99 for outcome in fleet.outcomes]
        for fleet in (apart, together)
    ]
    assert sum(itls[0]) < 0.8 * sum(itls[1])
    assert_steady(itls[0])


def test_decode_workers_without_room_refuse_and_nothing_stays_held() -> None:
    """Begun requests that nobody can go on with end with an error; the others are answered, with memory short on both
    sides."""
    hardware = replace(HARDWARE_70B, kv_tokens=64 * 100, max_running=4)
    fleet = run(prompts(60, 64 * 30, 400, every_s=0.15), hardware, split=Split(1, 1), max_waiting=2)
    refused = [outcome for outcome in fleet.outcomes if outcome.refused]
    assert 0 < len(refused) < 60
    assert any(outcome.begun_by >= 0 for outcome in refused)
    for worker in fleet.workers:
        status = worker.status()
        assert (status.running, status.waiting, status.blocks_in_use) == (0, 0, 0)
    assert not fleet._replicas[0].router.held
