"""The speed that saturates a fleet: found for any sensible curve, refused where there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deploy.simulate.fleet import Network
from deploy.simulate.results import Case, Row, Setting
from deploy.simulate.saturation import PRECISION, SATURATED, busy_speed, find_saturation
from deploy.simulate.sweep import replay, saturation
from deploy.traces.synthesize import synthesize
from deploy.traces.trace import Trace, TraceRequest
from deploy.traces.workload import CHAT
from rhizome.errors import InvalidRequest
from worker.step_time import HARDWARE

HARDWARE_70B = HARDWARE["70b-4xh100"]
ONE = Trace("one", 512, (TraceRequest(0.0, 100, 1, (1,)),))
ROW = replay(Setting(ONE, HARDWARE_70B, Network()), Case("round-robin", 1, 1.0)).row


class Curve:
    """Mean TTFT of a queue that is full at `capacity`, and what was asked of it."""

    def __init__(self, capacity: float, refuses_from: float = 1e9) -> None:
        self.capacity, self.refuses_from = capacity, refuses_from
        self.asked: list[float] = []

    def __call__(self, speed: float) -> Row:
        """The row at a speed."""
        self.asked.append(speed)
        left = 1 - speed / self.capacity
        return replace(ROW, ttft_mean_s=1 / left if left > 0 else 1e9, refused=int(speed >= self.refuses_from))


@pytest.mark.parametrize("capacity", [0.07, 0.5, 1.0, 3.0, 40.0])
def test_it_is_found_on_either_side_of_the_first_guess(capacity: float) -> None:
    """Within the precision of the true speed, in few runs; the speed found is one that was run and carried."""
    curve = Curve(capacity)
    found = find_saturation(curve, 1.0)
    unloaded = 1 / (1 - curve.asked[0] / capacity)
    true = capacity * (1 - 1 / (SATURATED * unloaded))
    assert true / PRECISION**1.1 <= found <= true
    assert found in curve.asked
    assert len(curve.asked) < 18


def test_refusals_saturate() -> None:
    """A fleet that turns requests away does not carry them, however soon it answers the others."""
    assert find_saturation(Curve(10.0, refuses_from=2.0), 1.0) < 2.0


def test_a_trace_too_short_to_saturate_is_refused() -> None:
    """However fast they come: said with what to change, not searched for ever."""
    with pytest.raises(InvalidRequest, match="requests is 1: more requests or fewer workers"):
        find_saturation(lambda _: ROW, 1.0)


def test_requests_that_come_all_at_once_have_no_speed() -> None:
    """Said before anything is run."""
    with pytest.raises(InvalidRequest, match="not come all at once"):
        busy_speed(ONE, HARDWARE_70B, 4)


def test_a_simulated_fleet_is_saturated_where_it_says() -> None:
    """Just carried at the speed found, no more at a tenth above it."""
    setting = Setting(synthesize(CHAT, 80, 3), HARDWARE_70B, Network())
    speed = saturation(setting, "round-robin", 1)
    unloaded, at, above = (
        replay(setting, Case("round-robin", 1, tried)).row.ttft_mean_s
        for tried in (0.05 * busy_speed(setting.trace, HARDWARE_70B, 1), speed, 1.1 * speed)
    )
    assert at <= SATURATED * unloaded * 1.01
    assert above > SATURATED * unloaded
