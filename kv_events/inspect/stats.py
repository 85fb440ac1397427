"""StreamStats: what one worker's event stream tells of its cache, in numbers. No I/O, no clock.

A block counts once, in however many tiers it is held. All times are of receipt, in seconds of any clock that does not
step back; the batches' own times are looked at for the lag alone.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from kv_events.columns import changes_of
from kv_events.events import BlockStored, EventBatch
from kv_events.wire import DecodedEvents
from radix.tree import DEFAULT_MAX_BLOCKS_PER_WORKER, REMOVE, STORE, Changes, Tier

RATE_WINDOW_S = 10.0
_WINDOW_STEPS = 20
_EVENT_BYTES = np.array([116, 45, 25])  # of a STORE, a REMOVE, a CLEAR without hashes and tokens

LAG_BATCHES = 1024
"""Batches whose lag is remembered: enough for a p99."""

FORMER_BLOCKS = 2**16
"""Removed blocks that are remembered, to know them when they come back: about 6 MB a worker."""


@dataclass(frozen=True, slots=True)
class StreamNumbers:
    """What a stream told so far. Rates are over the window, all else since the stream was first seen."""

    seconds: float  # since the first snapshot or batch
    batches: int  # that came, duplicates and late ones included
    size_bytes: int  # of them, as kv_events.wire writes them; about, where it was not told
    blocks: int  # held, in any tier
    tier_blocks: tuple[int, int, int]  # held on the device, in host memory, on disk
    stored: int  # blocks that became held: were in no tier, and are in one now
    removed: (
        int  # blocks that were held and are no longer: removed from their last tier, cleared, or the worker's restart
    )
    repeats: int  # blocks told as stored where they were held already
    returns: int  # of `stored`: blocks that had been held before and were among the last FORMER_BLOCKS removed
    batches_per_s: float
    bytes_per_s: float
    stored_per_s: float
    removed_per_s: float
    churn_per_min: float | None  # share of the cache that goes in a minute: 60 x removed_per_s / blocks; None: empty
    mean_lifetime_s: float | None  # from store to removal, of the blocks whose store and removal both were seen
    reuse: float | None  # (repeats + returns) / (stored + repeats): of all blocks told as stored, those known already
    lag_p50_s: float | None  # receipt less the batch's own time, of the last LAG_BATCHES batches: with the offset of
    lag_p99_s: float | None  # the two machines' clocks in it; needs received_s to be wall time

    def as_json(self) -> dict[str, Any]:
        """Plain values by field."""
        return asdict(self)


class StreamStats:
    """Adds up one worker's stream. kv_events.inspect.observer feeds it, in the order in which batches apply.

    Holds at most `max_blocks` blocks of about 200 bytes, like the tree, and forgets what a snapshot shows to be gone.
    What only a snapshot tells (blocks that came or went while batches were missed) is neither stored nor removed, and
    has no lifetime: nobody saw when it happened.
    """

    def __init__(self, window_s: float | None = RATE_WINDOW_S, max_blocks: int = DEFAULT_MAX_BLOCKS_PER_WORKER) -> None:
        """Rates are over the last `window_s` seconds, in steps of a 20th; None: over all that was seen."""
        self._masks: dict[int, int] = {}  # block -> bit mask of tiers
        self._since: dict[int, float] = {}  # block -> when its store was seen
        self._former: OrderedDict[int, None] = OrderedDict()  # removed blocks, the latest last
        self._tier_blocks = [0 for _ in Tier]
        self._max_blocks = max_blocks
        self._rates = _SlidingSums(window_s, columns=4)
        self._lags: deque[float] = deque(maxlen=LAG_BATCHES)
        self._first_s: float | None = None
        self._last_s = -math.inf
        self._batches = self._bytes = self._stored = self._removed = self._repeats = self._returns = 0
        self._lifetimes = 0
        self._lifetime_sum_s = 0.0

    def received(self, batch: EventBatch, received_s: float, size_bytes: int | None = None) -> None:
        """A batch came, whatever becomes of it."""
        now_s = self._at(received_s)
        size_bytes = size_about(batch) if size_bytes is None else size_bytes
        self._batches += 1
        self._bytes += size_bytes
        self._lags.append(received_s - batch.ts)
        self._rates.add(now_s, (1, size_bytes, 0, 0))

    def applied(self, changes: Changes, now_s: float) -> None:
        """A batch's changes took effect."""
        now_s = self._at(now_s)
        stored, removed = self._stored, self._removed
        hashes = changes.hashes.tolist()
        parts = pairwise([0, *changes.ends.tolist()])
        for kind, tier, (start, end) in zip(changes.kinds.tolist(), changes.tiers.tolist(), parts, strict=True):
            if kind == STORE:
                self._store(hashes[start:end], tier, now_s)
            elif kind == REMOVE:
                self._remove(hashes[start:end], tier, now_s)
            else:
                self._clear(now_s)
        self._rates.add(now_s, (0, 0, self._stored - stored, self._removed - removed))

    def caught_up(self, changes: Changes, now_s: float) -> None:
        """Changes that took effect before anybody watched: part of what was held then, as in a snapshot."""
        counts = self._stored, self._removed, self._repeats, self._returns, self._lifetimes, self._lifetime_sum_s
        rates, self._rates = self._rates, _SlidingSums(None, columns=4)
        self.applied(changes, now_s)
        self._stored, self._removed, self._repeats, self._returns, self._lifetimes, self._lifetime_sum_s = counts
        self._rates = rates
        for block in changes.hashes.tolist():
            self._since.pop(block, None)

    def cleared(self, now_s: float) -> None:
        """The worker started anew, with nothing: all blocks count as removed."""
        now_s = self._at(now_s)
        removed = self._removed
        self._clear(now_s)
        self._rates.add(now_s, (0, 0, 0, self._removed - removed))

    def replaced(self, changes: Changes, now_s: float) -> None:
        """A snapshot, as changes to an empty worker, tells what is held. Blocks that it knows keep their age."""
        self._at(now_s)
        since = self._since
        self._masks, self._since, self._tier_blocks = {}, {}, [0 for _ in Tier]
        hashes = changes.hashes.tolist()
        parts = pairwise([0, *changes.ends.tolist()])
        for tier, (start, end) in zip(changes.tiers.tolist(), parts, strict=True):
            for block in hashes[start:end]:
                self._hold(block, tier, self._masks.get(block, 0))
        self._since = {block: at for block, at in since.items() if block in self._masks}
        self._former = OrderedDict.fromkeys(block for block in self._former if block not in self._masks)

    def numbers(self, now_s: float) -> StreamNumbers:
        """As of now."""
        now_s = max(now_s, self._last_s)
        batches, size_bytes, stored, removed = self._rates.per_second(now_s)
        told = self._stored + self._repeats
        lags = sorted(self._lags)
        return StreamNumbers(
            seconds=0.0 if self._first_s is None else now_s - self._first_s,
            batches=self._batches,
            size_bytes=self._bytes,
            blocks=len(self._masks),
            tier_blocks=(self._tier_blocks[0], self._tier_blocks[1], self._tier_blocks[2]),
            stored=self._stored,
            removed=self._removed,
            repeats=self._repeats,
            returns=self._returns,
            batches_per_s=batches,
            bytes_per_s=size_bytes,
            stored_per_s=stored,
            removed_per_s=removed,
            churn_per_min=60 * removed / len(self._masks) if self._masks else None,
            mean_lifetime_s=self._lifetime_sum_s / self._lifetimes if self._lifetimes else None,
            reuse=(self._repeats + self._returns) / told if told else None,
            lag_p50_s=_quantile(lags, 0.50),
            lag_p99_s=_quantile(lags, 0.99),
        )

    def _at(self, now_s: float) -> float:
        """Now, which never goes back."""
        self._last_s = max(self._last_s, now_s)
        if self._first_s is None:
            self._first_s = self._last_s
            self._rates.start(self._last_s)
        return self._last_s

    def _store(self, blocks: list[int], tier: int, now_s: float) -> None:
        for block in blocks:
            mask = self._masks.get(block, 0)
            if mask >> tier & 1:
                self._repeats += 1
            elif self._hold(block, tier, mask) and not mask:
                self._since[block] = now_s
                self._stored += 1
                if block in self._former:
                    del self._former[block]
                    self._returns += 1

    def _hold(self, block: int, tier: int, mask: int) -> bool:
        if mask >> tier & 1 or (not mask and len(self._masks) >= self._max_blocks):
            return False
        self._masks[block] = mask | 1 << tier
        self._tier_blocks[tier] += 1
        return True

    def _remove(self, blocks: list[int], tier: int, now_s: float) -> None:
        for block in blocks:
            mask = self._masks.get(block, 0)
            if mask >> tier & 1:
                self._tier_blocks[tier] -= 1
                if rest := mask & ~(1 << tier):
                    self._masks[block] = rest
                else:
                    del self._masks[block]
                    self._gone(block, now_s)
        self._trim()

    def _clear(self, now_s: float) -> None:
        for block in self._masks:
            self._gone(block, now_s)
        self._masks, self._tier_blocks = {}, [0 for _ in Tier]
        self._trim()

    def _gone(self, block: int, now_s: float) -> None:
        self._removed += 1
        self._former[block] = None
        if (since_s := self._since.pop(block, None)) is not None:
            self._lifetimes += 1
            self._lifetime_sum_s += now_s - since_s

    def _trim(self) -> None:
        while len(self._former) > FORMER_BLOCKS:
            self._former.popitem(last=False)


class _SlidingSums:
    """Sums of some columns over the last seconds, in steps of a 20th of the window; or over all time."""

    def __init__(self, window_s: float | None, columns: int) -> None:
        if window_s is not None and not 0 < window_s < math.inf:
            raise ValueError(f"window_s is {window_s}: a time above 0 is needed, or None")
        self._step_s = 1.0 if window_s is None else window_s / _WINDOW_STEPS
        self._endless = window_s is None
        self._sums = [0] * columns
        self._steps: deque[tuple[int, list[int]]] = deque()  # the last _WINDOW_STEPS, those without anything left out
        self._start_s = 0.0

    def start(self, now_s: float) -> None:
        self._start_s = now_s

    def add(self, now_s: float, amounts: tuple[int, ...]) -> None:
        step = 0 if self._endless else math.floor((now_s - self._start_s) / self._step_s)
        self._forget(step)
        if not self._steps or self._steps[-1][0] != step:
            self._steps.append((step, [0] * len(self._sums)))
        for column, amount in enumerate(amounts):
            self._steps[-1][1][column] += amount
            self._sums[column] += amount

    def per_second(self, now_s: float) -> list[float]:
        """Over the step that runs and the 19 before it, as far as they were seen; a step at least."""
        elapsed_s = now_s - self._start_s
        if self._endless:
            span_s = max(elapsed_s, self._step_s)
        else:
            step = math.floor(elapsed_s / self._step_s)
            self._forget(step)
            span_s = max(elapsed_s - max(0, step - _WINDOW_STEPS + 1) * self._step_s, self._step_s)
        return [total / span_s for total in self._sums]

    def _forget(self, step: int) -> None:
        while self._steps and self._steps[0][0] <= step - _WINDOW_STEPS:
            for column, amount in enumerate(self._steps.popleft()[1]):
                self._sums[column] -= amount


def size_about(batch: EventBatch) -> int:
    """About how many bytes kv_events.wire makes of a batch, without making them."""
    if isinstance(batch.events, DecodedEvents):
        return batch.events.size_bytes
    changes = changes_of(batch.events)
    size = 38 + len(batch.worker) + 9 * len(changes.hashes)  # most hashes take 9 bytes
    size += int(_EVENT_BYTES[changes.kinds].sum())
    for event in batch.events:
        if isinstance(event, BlockStored) and event.token_ids is not None:
            size += 4 * len(event.token_ids)  # up to 5 each
    return size


def _quantile(ascending: list[float], share: float) -> float | None:
    """The smallest value that at least `share` of all do not exceed; None of none."""
    return ascending[math.ceil(share * len(ascending)) - 1] if ascending else None
