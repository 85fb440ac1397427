"""What caches could reuse of a trace: hits, distances, working sets, hot prefixes. Blocks hit in prefix order only."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass

from deploy.traces.trace import Trace

LRU_SHARES = (1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of the working set
WINDOWS_S = (60, 300, 900)


@dataclass(frozen=True, slots=True)
class Reuse:
    """What one infinite cache, shared by all, would hit.

    hits[i] is the number of request i's leading blocks that came before; distances are those between two uses of a
    block, one for each use but its first.
    """

    hits: list[int]
    requests_between: list[int]
    seconds_between: list[float]
    uses: Counter[int]  # block -> requests that hold it


@dataclass(frozen=True, slots=True)
class HotPrefix:
    """A run of blocks that the same requests share. It begins at block `start` of their prompts, counted from 0."""

    last_block_id: int
    start: int
    blocks: int
    requests: int

    @property
    def saved_blocks(self) -> int:
        """What an infinite cache saves by it."""
        return self.blocks * (self.requests - 1)


def measure_reuse(trace: Trace) -> Reuse:
    """One walk over the trace."""
    last: dict[int, int] = {}
    reuse = Reuse([], [], [], Counter())
    for number, request in enumerate(trace.requests):
        depth = 0
        for block in request.block_ids:
            before = last.get(block)
            if before is None:
                break
            depth += 1
            reuse.requests_between.append(number - before)
            reuse.seconds_between.append(request.arrival_s - trace.requests[before].arrival_s)
        for block in request.block_ids:
            last[block] = number
        reuse.hits.append(depth)
        reuse.uses.update(request.block_ids)
    return reuse


def lru_hit_ratio(trace: Trace, capacity: int) -> float:
    """The share of blocks that hit one cache of so many blocks, the least recently used leaving first.

    A request's last block leaves before its first, as in an engine's prefix cache: what stays can still be matched.
    """
    cache: OrderedDict[int, None] = OrderedDict()
    hits = blocks = 0
    for request in trace.requests:
        for block in request.block_ids:
            if block not in cache:
                break
            hits += 1
        blocks += len(request.block_ids)
        for block in reversed(request.block_ids):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return hits / blocks if blocks else 0.0


def working_sets(trace: Trace, window_s: float) -> list[int]:
    """Distinct blocks used in each window of so many seconds, one after the other; the last may be a shorter one."""
    counts: list[int] = []
    used: set[int] = set()
    for request in trace.requests:
        while request.arrival_s >= (len(counts) + 1) * window_s:
            counts.append(len(used))
            used = set()
        used.update(request.block_ids)
    return [*counts, len(used)]


def hot_prefixes(trace: Trace, uses: Counter[int], count: int) -> list[HotPrefix]:
    """The runs of blocks that save most, best first. A run goes on as long as all its requests go on together."""
    runs: dict[int, HotPrefix] = {}
    for request in trace.requests:
        start = 0
        for place, block in enumerate(request.block_ids):
            shared = uses[block]
            if shared < 2:
                break
            following = request.block_ids[place + 1] if place + 1 < len(request.block_ids) else None
            if following is None or uses[following] != shared:
                if block not in runs:
                    runs[block] = HotPrefix(block, start, place + 1 - start, shared)
                start = place + 1
    return sorted(runs.values(), key=lambda run: (-run.saved_blocks, run.last_block_id))[:count]
