"""The rules of other routers, as their sources and papers give them, on our index and load picture."""

from __future__ import annotations

import numpy as np

from radix import make_tree
from radix.keys import Hashes
from router.candidates import Candidates
from router.policies.base import Policy, Prompt
from router.table import Floats

SGLANG_MATCH_SHARE = (
    0.3  # the Python launcher's defaults: cache_threshold, balance_abs_threshold, balance_rel_threshold
)
SGLANG_IMBALANCE = 64
SGLANG_IMBALANCE_FACTOR = 1.5
SGLANG_TREE_BLOCKS = 2**22  # of the approximate tree, over all workers


class SglangCacheAware(Policy):
    """sglang-router's cache_aware: a tree of its own decisions, no events. While loads are balanced the best match, if
    it is good enough, else the least loaded."""

    name = "sglang"

    def __init__(self) -> None:
        self._tree = make_tree(SGLANG_TREE_BLOCKS, SGLANG_TREE_BLOCKS)

    def scores(self, prompt: Prompt, candidates: Candidates) -> Floats:
        """See Policy."""
        load = candidates.in_flight
        most, least = load.max(), load.min()
        if most - least > SGLANG_IMBALANCE and most > SGLANG_IMBALANCE_FACTOR * least:
            return load
        depths = self._depths(prompt.hashes, candidates)
        share = depths.max() * candidates.block_size / candidates.prompt_tokens if len(depths) else 0.0
        return -depths if share > SGLANG_MATCH_SHARE else load

    def placed(self, prompt: Prompt, candidates: Candidates, row: int) -> None:
        """See Policy."""
        slot = int(candidates.slots[row])
        if self._tree.room(slot) < len(prompt.hashes):
            self._tree.clear(slot)
        self._tree.store(slot, prompt.hashes)

    def forget(self, slot: int) -> None:
        """See Policy."""
        self._tree.clear(slot)

    def _depths(self, hashes: Hashes, candidates: Candidates) -> Floats:
        depths = np.zeros(int(candidates.slots.max()) + 1)
        found = self._tree.match(hashes)
        known = found.workers < len(depths)
        depths[found.workers[known]] = found.depths[known]
        return depths[candidates.slots]


class Dynamo(Policy):
    """Dynamo's KV router with its defaults: prefill blocks to compute there, queued ones included, and decode blocks
    after the placement, each of weight 1; temperature 0."""

    name = "dynamo"
    prefill_weight = 1.0

    def scores(self, prompt: Prompt, candidates: Candidates) -> Floats:
        """See Policy."""
        block = candidates.block_size
        prefill = (candidates.queued_tokens + candidates.prefill_tokens) / block
        new_blocks = candidates.prompt_blocks - candidates.cached_tokens / block
        return self.prefill_weight * prefill + candidates.used_blocks + new_blocks


class DynamoP16(Dynamo):
    """The same with the prefill term sixteenfold: its best setting in the study that we go by."""

    name = "dynamo-p16"
    prefill_weight = 16.0


class LlmD(Policy):
    """llm-d's weighted scorers with their default weights: prefix 2, KV use 1, queue 1."""

    name = "llm-d"

    def scores(self, prompt: Prompt, candidates: Candidates) -> Floats:
        """See Policy."""
        overlap = candidates.cached_tokens / candidates.prompt_tokens
        use = candidates.used_blocks / candidates.blocks_total
        queue = candidates.in_flight - candidates.decoding
        span = queue.max() - queue.min()
        rank = (queue.max() - queue) / span if span > 0 else np.ones(len(candidates))
        return -(2 * overlap + (1 - use) + rank)


class LMetric(Policy):
    """LMetric (arXiv 2603.15202): new prefill tokens, queued ones included, times the batch."""

    name = "lmetric"

    def scores(self, prompt: Prompt, candidates: Candidates) -> Floats:
        """See Policy."""
        return (candidates.queued_tokens + candidates.prefill_tokens) * (candidates.decoding + 1)
