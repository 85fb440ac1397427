"""A prefix that many share: copied to more workers when its holder is the bottleneck, and only then."""

from __future__ import annotations

import numpy as np
import pytest

from deploy.simulate.fleet import Fleet
from deploy.traces.trace import Trace, TraceRequest
from worker.step_time import HARDWARE

BLOCK_SIZE = 512
PREFIX = tuple(range(16))  # 8k tokens, of which a prefill takes 0.65 s
TAIL_TOKENS = 500  # 42 ms: one worker takes some 23 requests a second
WORKERS = 4


def shared(requests: int, rate_per_s: float) -> Trace:
    """So many requests at even distances, with the same 8k tokens before a tail of their own; one session's,
    for policies that go by sessions."""
    tokens = len(PREFIX) * BLOCK_SIZE + TAIL_TOKENS
    made = (TraceRequest(number / rate_per_s, tokens, 20, PREFIX, "all") for number in range(requests))
    return Trace("shared", BLOCK_SIZE, tuple(made))


def played(trace: Trace, policy: str, routers: int = 1) -> tuple[np.ndarray, int]:
    """Times to the first token, and how many workers served."""
    fleet = Fleet(trace, HARDWARE["70b-4xh100"], workers=WORKERS, policy=policy, routers=routers)
    fleet.run()
    assert not any(outcome.refused for outcome in fleet.outcomes)
    ttft = np.array([outcome.first_token_at - outcome.arrived_at for outcome in fleet.outcomes])
    return ttft, len({outcome.worker for outcome in fleet.outcomes})


def test_a_hot_prefix_comes_to_be_held_by_as_many_workers_as_it_takes() -> None:
    """Beyond one worker's capacity it is copied, and TTFT stays bounded, where stickiness saturates the holder."""
    trace = shared(600, rate_per_s=40.0)
    ttft, workers = played(trace, "predicted-ttft")
    sticky, one = played(trace, "sticky")
    assert (workers, one) == (WORKERS, 1)
    assert ttft.mean() < 0.3
    assert np.percentile(ttft, 99) < 1.0  # the first on each worker compute the prefix
    assert sticky.mean() > 10 * ttft.mean()


def test_a_prefix_that_one_worker_can_serve_stays_there() -> None:
    """At a load that leaves its holder idle most of the time it is computed once."""
    ttft, workers = played(shared(30, rate_per_s=1.0), "predicted-ttft")
    assert workers == 1
    assert np.percentile(ttft[1:], 99) < 0.1


@pytest.mark.parametrize("routers", [2, 4])
def test_several_routers_share_the_work_of_a_hot_prefix(routers: int) -> None:
    """They hear of each other's requests from the workers' reports only, and still nothing saturates."""
    ttft, workers = played(shared(600, rate_per_s=40.0), "predicted-ttft", routers)
    assert workers == WORKERS
    assert ttft.mean() < 1.0
