"""Statistics of a trace: rate, lengths, reuse, working set, sessions, and what caches of some sizes would hit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from deploy.traces.reuse import LRU_SHARES, WINDOWS_S, hot_prefixes, lru_hit_ratio, measure_reuse, working_sets
from deploy.traces.sessions import sessions_of
from deploy.traces.trace import Trace

HOTTEST = 5


@dataclass(frozen=True, slots=True)
class Spread:
    """Of some values; zeros where there are none."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class HotPrefixStats:
    """A run of blocks that the same requests share."""

    last_block_id: int
    start_token: int
    tokens: int
    requests: int
    saved_tokens: int  # by an infinite cache


@dataclass(frozen=True, slots=True)
class TraceStats:
    """All that `rhizome trace stats` tells; times in seconds, lengths and sizes in tokens."""

    name: str
    block_size: int
    requests: int
    duration_s: float
    requests_per_s: float  # 0 where all come at once
    input_tokens: Spread
    output_tokens: Spread
    blocks: int  # of all prompts
    hit_ratio_blocks: float  # of one infinite cache
    hit_ratio_tokens: float
    requests_with_reuse: float  # share
    reuse_requests: Spread  # requests between two uses of a block
    reuse_s: Spread
    working_set_tokens: int  # distinct blocks
    window_tokens: dict[int, Spread]  # by the window's seconds: the working sets of the trace's windows
    lru_hit_ratio: dict[int, float]  # by the cache's tokens
    sessions: int
    session_turns: Spread
    think_s: Spread  # between the arrivals of a session's requests
    hottest: tuple[HotPrefixStats, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def spread(values: Sequence[float]) -> Spread:
    """Mean, percentiles and maximum."""
    if not len(values):
        return Spread(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    array = np.asarray(values, dtype=np.float64)
    p50, p90, p99 = (float(value) for value in np.percentile(array, (50, 90, 99)))
    return Spread(len(array), float(array.mean()), p50, p90, p99, float(array.max()))


def trace_stats(trace: Trace) -> TraceStats:
    """Every number of a trace with at least one request."""
    reuse, size, requests = measure_reuse(trace), trace.block_size, trace.requests
    blocks, distinct = reuse.uses.total(), len(reuse.uses)
    tokens = sum(request.input_tokens for request in requests)
    hit_tokens = sum(min(hit * size, r.input_tokens) for hit, r in zip(reuse.hits, requests, strict=True))
    sessions = sessions_of(trace)
    hottest = (
        HotPrefixStats(run.last_block_id, run.start * size, run.blocks * size, run.requests, run.saved_blocks * size)
        for run in hot_prefixes(trace, reuse.uses, HOTTEST)
    )
    capacities = sorted({max(1, round(distinct * share)) for share in LRU_SHARES})
    return TraceStats(
        name=trace.name,
        block_size=size,
        requests=len(requests),
        duration_s=trace.duration_s,
        requests_per_s=len(requests) / trace.duration_s if trace.duration_s else 0.0,
        input_tokens=spread([request.input_tokens for request in requests]),
        output_tokens=spread([request.output_tokens for request in requests]),
        blocks=blocks,
        hit_ratio_blocks=sum(reuse.hits) / blocks if blocks else 0.0,
        hit_ratio_tokens=hit_tokens / tokens,
        requests_with_reuse=sum(hit > 0 for hit in reuse.hits) / len(requests),
        reuse_requests=spread(reuse.requests_between),
        reuse_s=spread(reuse.seconds_between),
        working_set_tokens=distinct * size,
        window_tokens={window: spread([n * size for n in working_sets(trace, window)]) for window in WINDOWS_S},
        lru_hit_ratio={capacity * size: lru_hit_ratio(trace, capacity) for capacity in capacities},
        sessions=len(sessions),
        session_turns=spread([len(session) for session in sessions]),
        think_s=spread(think_times(trace, sessions)),
        hottest=tuple(hottest),
    )


def think_times(trace: Trace, sessions: list[list[int]]) -> list[float]:
    """Seconds between the arrivals of each session's requests."""
    at = [request.arrival_s for request in trace.requests]
    return [at[later] - at[earlier] for session in sessions for earlier, later in pairwise(session)]
