"""A fleet in virtual time: repeatable, honest about time and memory, with views that are right."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from heapq import heappop

import pytest

from deploy.simulate.fleet import BOUND, Fleet, Network
from deploy.simulate.plan import SIMULATED_POLICIES
from deploy.traces.synthesize import synthesize
from deploy.traces.trace import Trace, TraceRequest
from deploy.traces.workload import AGENT, CHAT
from worker.step_time import HARDWARE, Hardware

HARDWARE_70B = HARDWARE["70b-4xh100"]
SHORT_OF_MEMORY = replace(HARDWARE_70B, kv_tokens=500 * 64, host_kv_tokens=500 * 64)
LOSSY = Network(event_delay_s=0.5, event_loss=0.2)


@pytest.fixture(scope="module")
def chat() -> Trace:
    """Sessions with shared system prompts, fast enough for short queues."""
    return synthesize(CHAT, 200, 1).scaled(5)


def run(trace: Trace, hardware: Hardware = HARDWARE_70B, **given: object) -> Fleet:
    """A finished fleet, by default of three workers under the default policy; pools are checked on the way."""
    settings = {"workers": 3, "policy": "predicted-ttft"} | given
    fleet = Fleet(trace, hardware, **settings)  # type: ignore[arg-type]

    def check(_: int) -> None:
        for worker in fleet.workers:
            worker.scheduler.check()

    fleet.run(check)
    check(0)
    return fleet


def settle(fleet: Fleet, seconds: float) -> None:
    """Let what is on its way when the last request ends arrive."""
    until = fleet.now + seconds
    while fleet._events and fleet._events[0][0] <= until:
        fleet.now, _, act = heappop(fleet._events)
        act()


def assert_all_ended(fleet: Fleet) -> None:
    """Each request was refused, or answered in an order that makes sense; no worker has anything left."""
    network = fleet._network
    for outcome in fleet.outcomes:
        if outcome.refused:
            assert math.isnan(outcome.first_token_at)
            assert math.isnan(outcome.finished_at)
        else:
            assert outcome.arrived_at <= outcome.routed_at
            assert outcome.routed_at + 2 * network.delay_s <= outcome.first_token_at <= outcome.finished_at
            assert outcome.finished_at <= fleet.now + network.delay_s
            assert 0 <= outcome.worker < len(fleet.workers)
    for worker in fleet.workers:
        status = worker.status()
        assert (status.running, status.waiting, status.blocks_in_use) == (0, 0, 0)
    answered = [outcome for outcome in fleet.outcomes if not outcome.refused]
    # Counted once each, whatever was preempted.
    assert sum(worker.scheduler.prompt_tokens for worker in fleet.workers) == sum(o.prompt_tokens for o in answered)


@pytest.mark.parametrize("policy", SIMULATED_POLICIES)
def test_every_policy_ends_every_request(chat: Trace, policy: str) -> None:
    """Each request ends exactly once, whoever routes, with every router invariant checked."""
    fleet = run(chat.head(120), policy=policy, validate=True)
    assert_all_ended(fleet)
    assert not any(outcome.refused for outcome in fleet.outcomes)
    assert {outcome.worker for outcome in fleet.outcomes} == {0, 1, 2}


@pytest.mark.parametrize("policy", ["predicted-ttft", "power-of-two", "random", "dynamo"])
def test_the_same_seed_gives_the_same_outcomes(chat: Trace, policy: str) -> None:
    """To the bit, with events that come late or not at all and several routers."""
    given = {"policy": policy, "network": LOSSY, "routers": 2, "seed": 5}
    assert repr(run(chat, **given).outcomes) == repr(run(chat, **given).outcomes)


def test_another_seed_loses_other_events(chat: Trace) -> None:
    """The seed reaches what is random: otherwise equal runs differ."""
    one, other = (run(chat, network=LOSSY, seed=seed) for seed in (1, 2))
    assert repr(one.outcomes) != repr(other.outcomes)


@pytest.mark.parametrize("policy", ["predicted-ttft", "round-robin", BOUND])
@pytest.mark.parametrize("host_tier", [False, True])
def test_no_token_comes_before_its_work_is_done(chat: Trace, policy: str, host_tier: bool) -> None:
    """A first token takes the network there and back and the prefill of what no other request shares; each further
    token takes a step."""
    fleet = run(chat, policy=policy, host_tier=host_tier)
    uses = Counter(block for request in chat.requests for block in request.block_ids)
    steps = HARDWARE_70B.steps
    for request, outcome in zip(chat.requests, fleet.outcomes, strict=True):
        full = request.block_ids[: request.input_tokens // chat.block_size]
        shared = next((depth for depth, block in enumerate(full) if uses[block] == 1), len(full))
        start = min(shared * chat.block_size, request.input_tokens - 1)
        new = request.input_tokens - start
        least = steps.token_s * new + steps.attention_s * new * (start + new / 2) if new > 1 else 0.0
        least += min(steps.prefill_step_s, steps.decode_step_s) + 2 * fleet._network.delay_s
        assert outcome.first_token_at - outcome.arrived_at >= least - 1e-9
        answer_s = outcome.finished_at - outcome.first_token_at
        assert answer_s >= (request.output_tokens - 1) * steps.decode_step_s - 1e-9


@pytest.mark.parametrize("network", [Network(), Network(event_delay_s=0.5), LOSSY], ids=["near", "late", "lossy"])
@pytest.mark.parametrize(("host_tier", "peer_fetch"), [(False, False), (True, False), (True, True)])
def test_views_tell_the_workers_caches(chat: Trace, network: Network, host_tier: bool, peer_fetch: bool) -> None:
    """At the end every router's view is what the worker's log says, the last batches included, which no other follows;
    all of that with evictions."""
    fleet = run(chat.head(140), SHORT_OF_MEMORY, network=network, routers=2, host_tier=host_tier, peer_fetch=peer_fetch)
    settle(fleet, 5 * network.event_delay_s + 3 * network.report_interval_s)
    for worker in fleet.workers:
        assert worker.log.next_seq > 30
        for replica in fleet._replicas:
            view = replica.router.view(worker.log.worker)
            assert view.synced
            assert view.position() == (1, worker.log.next_seq)
            assert view.digest == worker.log.digest
            assert (view.counts.gaps > 0) == (network.event_loss > 0)
            assert view.counts.mismatches == 0


@pytest.mark.parametrize("policy", ["round-robin", "predicted-ttft"])
def test_what_others_hold_is_fetched_instead_of_computed(chat: Trace, policy: str) -> None:
    """Whatever the policy: it costs time on the link, no computing, and nobody fetches what nobody holds."""
    without, with_it = run(chat, policy=policy), run(chat, policy=policy, peer_fetch=True)
    assert_all_ended(with_it)
    fetched = sum(outcome.fetched_tokens for outcome in with_it.outcomes)
    assert fetched > 0
    assert not any(outcome.fetched_tokens for outcome in without.outcomes)
    cached = [sum(worker.scheduler.cached_prompt_tokens for worker in fleet.workers) for fleet in (without, with_it)]
    assert cached[1] > cached[0]
    for outcome in with_it.outcomes:
        assert outcome.fetched_tokens <= outcome.cached_tokens < outcome.prompt_tokens
    assert repr(run(chat, policy=policy, peer_fetch=True).outcomes) == repr(with_it.outcomes)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_routers_begin_with_a_prior_that_may_be_wrong(chat: Trace, factor: float) -> None:
    """The first request is predicted by it, later ones by what was learned since."""
    right, wrong = run(chat, prior_error=1.0), run(chat, prior_error=factor)
    assert wrong.outcomes[0].predicted_ttft_s == pytest.approx(factor * right.outcomes[0].predicted_ttft_s)
    predicted, true = (fleet._replicas[0].router.timing.of("worker-0").costs for fleet in (wrong, right))
    assert predicted.prefill_s(4000, 8192) == pytest.approx(true.prefill_s(4000, 8192), rel=0.2)


def test_where_memory_is_short_some_are_preempted_and_all_end() -> None:
    """Prompts that just fit and long answers: preemptions happen, pools stay whole, nobody is lost."""
    requests = tuple(TraceRequest(0.05 * n, 600, 500, tuple(range(20 * n, 20 * n + 10))) for n in range(60))
    fleet = run(Trace("full", 64, requests), replace(HARDWARE_70B, kv_tokens=100 * 64), workers=2)
    assert sum(worker.scheduler.preemptions for worker in fleet.workers) > 0
    assert_all_ended(fleet)


def test_what_cannot_be_served_is_refused() -> None:
    """A request that no worker has memory for, and those that come when all queues are full; the others are served."""
    requests = [TraceRequest(0.0, 640, 10, tuple(range(20 * n, 20 * n + 10))) for n in range(30)]
    requests.append(TraceRequest(1.0, 64 * 200, 10, tuple(range(1000, 1200))))
    hardware = replace(HARDWARE_70B, kv_tokens=100 * 64, max_running=4)
    fleet = run(Trace("much", 64, tuple(requests)), hardware, policy="round-robin", workers=1, max_waiting=8)
    assert_all_ended(fleet)
    assert fleet.outcomes[-1].refused
    assert 8 <= sum(not outcome.refused for outcome in fleet.outcomes) < 30


@pytest.mark.parametrize("routers", [2, 5])
def test_several_routers_share_the_work(chat: Trace, routers: int) -> None:
    """Requests go to the routers in turn; all end, and every worker gets some."""
    fleet = run(chat, routers=routers)
    assert_all_ended(fleet)
    assert len(fleet._replicas) == routers
    assert min(Counter(outcome.worker for outcome in fleet.outcomes).values()) > len(chat) / 10
    settle(fleet, 1.0)
    assert not any(replica.router.held for replica in fleet._replicas)


def test_what_memory_forgets_the_bound_and_the_host_tier_know() -> None:
    """Where sessions outgrow the memory, an idle fleet hits more with host memory behind it, and the most with one
    shared cache without end."""
    trace = synthesize(AGENT, 120, 2).scaled(0.02)
    hardware = replace(HARDWARE_70B, kv_tokens=300 * 512, host_kv_tokens=300 * 512)
    device, host, bound = (
        sum(worker.scheduler.cached_prompt_tokens for worker in run(trace, hardware, workers=2, **given).workers)
        for given in ({}, {"host_tier": True}, {"policy": BOUND})
    )
    assert device < host < bound
