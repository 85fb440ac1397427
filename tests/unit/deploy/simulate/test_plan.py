"""What is asked of `rhizome simulate`: read as meant, or refused with field, value and limit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from deploy.simulate.cli import simulate
from deploy.simulate.fleet import BOUND, Network
from deploy.simulate.plan import (
    DEFAULT_POLICIES,
    SIMULATED_POLICIES,
    Asked,
    checked_jobs,
    plan_of,
    setting_of,
)
from deploy.simulate.results import Case, Slo
from deploy.simulate.split_fleet import Split
from deploy.traces.trace import Trace, TraceRequest
from rhizome.errors import InvalidRequest
from worker.step_time import HARDWARE

TRACE = Trace("one", 512, (TraceRequest(0.0, 100, 1, (1,)),))


def test_every_combination_is_a_case_by_workers_speed_and_policy() -> None:
    """In this order, whatever runs first."""
    cases = plan_of(Asked("8, 16", "dynamo,bound", speed="1,2.5")).cases({})
    assert [(case.workers, case.speed, case.policy) for case in cases] == [
        (workers, speed, policy) for workers in (8, 16) for speed in (1.0, 2.5) for policy in ("dynamo", BOUND)
    ]


def test_without_a_speed_the_trace_keeps_its_own() -> None:
    """Speed 1."""
    assert plan_of(Asked("1", "random")).cases({}) == [Case("random", 1, 1.0)]


def test_loads_are_shares_of_round_robins_saturation_with_as_many_workers() -> None:
    """What has to be known first, and the speeds that follow."""
    plan = plan_of(Asked("8,16", "dynamo", load="0.5,1"))
    assert plan.saturations == [("round-robin", 8), ("round-robin", 16)]
    cases = plan.cases({("round-robin", 8): 1.5, ("round-robin", 16): 3.0})
    assert [(c.workers, c.speed, c.load) for c in cases] == [(8, 0.75, 0.5), (8, 1.5, 1), (16, 1.5, 0.5), (16, 3.0, 1)]


def test_a_search_for_saturation_runs_nothing_else() -> None:
    """Of each policy and number of workers."""
    plan = plan_of(Asked("4,8", "dynamo", find_saturation="sticky,bound"))
    assert plan.saturations == [("sticky", 4), (BOUND, 4), ("sticky", 8), (BOUND, 8)]
    assert plan.cases(dict.fromkeys(plan.saturations, 1.0)) == []


def test_a_split_runs_beside_as_many_equal_workers() -> None:
    """Where there are as many; not under the bound, which has but one cache. Its workers can pull, so all can."""
    plan = plan_of(Asked("3,8", "dynamo,bound", roles="prefill=1, both=1,decode=6"))
    assert plan.split == Split(1, 6, 1)
    assert str(plan.split) == "prefill=1,decode=6,both=1"
    assert [(case.workers, case.policy, case.split) for case in plan.cases({})] == [
        (3, "dynamo", None),
        (3, BOUND, None),
        (8, "dynamo", None),
        (8, "dynamo", plan.split),
        (8, BOUND, None),
    ]


def test_all_are_all() -> None:
    """The issue's thirteen names; the command's default is among them and is what the plan says."""
    assert plan_of(Asked("1", "all")).policies == SIMULATED_POLICIES
    named = "random, round-robin, least-loaded, power-of-two, sticky, prefix-hash, sglang, dynamo, dynamo-p16, llm-d, "
    assert set((named + "lmetric, predicted-ttft, bound").split(", ")) == set(SIMULATED_POLICIES)
    assert simulate.__defaults__ is not None
    assert ",".join(DEFAULT_POLICIES) in simulate.__defaults__


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Asked("0", "dynamo"), "--workers is 0: 1 to 4096"),
        (Asked("4097", "dynamo"), "--workers is 4097: 1 to 4096"),
        (Asked("9" * 5000, "dynamo"), "--workers is 9+: 1 to 4096"),
        (Asked("²", "dynamo"), "--workers is '²': a whole number from 1 to 4096"),
        (Asked("1.5", "dynamo"), "--workers is '1.5': a whole number"),
        (Asked("4,", "dynamo"), "--workers is '4,': values with commas"),
        (Asked("4,8,4", "dynamo"), "--workers is '4,8,4': each value once"),
        (Asked("4", "dynamit"), "--policy is 'dynamit': one of random, .*, bound, or all"),
        (Asked("4", "dynamo,dynamo"), "--policy .* each value once"),
        (Asked("4", ""), "--policy is '': values with commas"),
        (Asked("4", "dynamo", speed="0"), "--speed is '0': a number from 0.001 to 1e\\+06"),
        (Asked("4", "dynamo", speed="nan"), "--speed is 'nan'"),
        (Asked("4", "dynamo", speed="1,inf"), "--speed is 'inf'"),
        (Asked("4", "dynamo", speed=""), "--speed is ''"),
        (Asked("4", "dynamo", speed="1,1.0"), "--speed is '1.0,1.0': each value once"),
        (Asked("4", "dynamo", load="-1"), "--load is '-1': a number from 0.01 to 100"),
        (Asked("4", "dynamo", find_saturation="x"), "--find-saturation is 'x': one of"),
        (Asked("4", "dynamo", roles="decode=4"), "--roles is 'decode=4': workers that prefill, and others that decode"),
        (Asked("4", "dynamo", roles="prefill=4"), "--roles is 'prefill=4': workers that prefill, and others"),
        (Asked("4", "dynamo", roles="prefill=4,both=0"), "--roles .* workers that prefill, and others"),
        (Asked("4", "dynamo", roles="prefill=1,decode=2"), "--roles .* as many as --workers: 4"),
        (Asked("4", "dynamo", roles="prefill=1,x=3"), "--roles .* ROLE=N, with each role once: prefill, decode, both"),
        (Asked("4", "dynamo", roles="prefill=1,prefill=3"), "--roles .* each role once"),
        (Asked("4", "dynamo", roles="prefill=-1,decode=3"), "--roles prefill is '-1': a whole number"),
        (Asked("4", "dynamo", find_saturation="sticky", roles="prefill=1,decode=3"), "not with --find-saturation"),
        (Asked("4", "dynamo", speed="1", load="1"), "--speed, --load is '1, 1': one of them at a time"),
    ],
)
def test_bad_lists_are_refused(asked: Asked, message: str) -> None:
    """Field, value and limit in one line."""
    with pytest.raises(InvalidRequest, match=message) as refused:
        plan_of(asked)
    assert "\n" not in str(refused.value)


def made(**given: Any) -> object:
    """A setting, or the error."""
    settings: dict[str, Any] = {
        "trace": TRACE,
        "hardware": HARDWARE["70b-4xh100"],
        "network": Network(),
        "routers": 1,
        "host_tier": False,
        "seed": 0,
        "slo": Slo(),
    }
    return setting_of(**(settings | given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"routers": 0}, "--routers is 0: 1 to 256"),
        ({"seed": -1}, "--seed is -1: at least 0"),
        ({"network": Network(event_delay_s=-0.1)}, "--event-delay is -0.1: 0 to 3600"),
        ({"network": Network(event_delay_s=float("nan"))}, "--event-delay is nan"),
        ({"network": Network(event_loss=1.01)}, "--event-loss is 1.01: 0 to 1"),
        ({"network": Network(report_interval_s=0.0)}, "--report-interval is 0.0: 0.001 to 3600"),
        ({"slo": Slo(ttft_s=-1.0)}, "--slo-ttft is -1.0"),
        ({"slo": Slo(itl_s=float("inf"))}, "--slo-itl is inf"),
        ({"objective": "itl"}, "--objective is 'itl': one of ttft, slo"),
        ({"objective": "slo", "slo": Slo(ttft_s=0.0)}, "slo_ttft is 0.0: above 0"),
        (
            {"hardware": replace(HARDWARE["70b-4xh100"], kv_tokens=511)},
            "hardware 70b-4xh100: kv_tokens is 511: at least the 512 tokens",
        ),
        (
            {"hardware": replace(HARDWARE["70b-4xh100"], host_kv_tokens=0), "host_tier": True},
            "host_kv_tokens is 0: at least the 512 tokens",
        ),
        (
            {"hardware": replace(HARDWARE["70b-4xh100"], fetch_token_s=0.0), "peer_fetch": True},
            "fetch_token_s is 0.0: above 0, to fetch",
        ),
    ],
)
def test_bad_settings_are_refused(given: dict[str, Any], message: str) -> None:
    """Before a fleet is made; without the bad value all is well."""
    assert made()
    with pytest.raises(InvalidRequest, match=message):
        made(**given)


def test_there_are_as_many_jobs_as_cpus_unless_given() -> None:
    """At least one."""
    assert checked_jobs(None) >= 1
    assert checked_jobs(3) == 3
    with pytest.raises(InvalidRequest, match="--jobs is 0: 1 to 256"):
        checked_jobs(0)
