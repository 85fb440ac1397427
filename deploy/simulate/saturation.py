"""At which speed a trace saturates a fleet: found by bisection. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable

from deploy.simulate.results import Row
from deploy.traces.trace import Trace
from rhizome.errors import InvalidRequest
from worker.step_time import Hardware

SATURATED = 5.0
"""Times the unloaded mean time to first token."""
UNLOADED = 0.05
"""Share of the time that prefills without any cache would keep the workers busy."""
PRECISION = 1.02
"""Between a speed that is carried and one that is not."""
MAX_DOUBLINGS = 20


def find_saturation(measure: Callable[[float], Row], busy_speed: float) -> float:
    """The highest speed at which the mean time to first token is at most SATURATED times the unloaded one, as far as
    PRECISION goes, and no more is refused. `measure` runs the fleet at a speed; `busy_speed` is where prefills without
    cache keep all workers busy.

    Raises InvalidRequest for a trace that never saturates the fleet.
    """
    unloaded = measure(_rounded(UNLOADED * busy_speed))
    limit = SATURATED * unloaded.ttft_mean_s

    def carried(speed: float) -> bool:
        row = measure(speed)
        return row.refused <= unloaded.refused and row.ttft_mean_s <= limit

    low = high = _rounded(busy_speed / 2)
    if carried(low):
        for _ in range(MAX_DOUBLINGS):
            high = _rounded(2 * low)
            if not carried(high):
                break
            low = high
        else:
            limit_text = "more requests or fewer workers: however fast they come, the fleet is not saturated"
            raise InvalidRequest("requests", unloaded.requests, limit_text)
    else:
        unloaded_speed = UNLOADED * busy_speed
        while low > unloaded_speed and not carried(low := _rounded(low / 2)):
            high = low
    while high > PRECISION * low:
        middle = _rounded(math.sqrt(low * high))
        if not low < middle < high:
            break
        if carried(middle):
            low = middle
        else:
            high = middle
    return low


def busy_speed(trace: Trace, hardware: Hardware, workers: int) -> float:
    """Where prefills without any cache would keep all workers busy. Raises InvalidRequest where requests come all at
    once: no speed changes that."""
    if not trace.duration_s:
        raise InvalidRequest("trace", trace.name, "one whose requests do not come all at once")
    steps = hardware.steps
    work_s = sum(
        steps.token_s * request.input_tokens + steps.attention_s * request.input_tokens**2 / 2
        for request in trace.requests
    )
    least = len(trace) * steps.decode_step_s  # hardware may have no cost a token
    return workers * trace.duration_s / max(work_s, least)


def _rounded(speed: float) -> float:
    """To four digits: what is printed is what was run."""
    return float(f"{speed:.4g}")
