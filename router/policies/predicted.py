"""predicted-ttft, the default: the worker that will answer soonest, and that others lose the least by."""

from __future__ import annotations

import numpy as np

from radix.backend import native
from router.candidates import Candidates
from router.policies.base import Policy, Prompt
from router.table import Floats

FULL_WEIGHT = 3.0
"""What a placement takes from others is its prefill, again so many times the share of the pool that is in use there:
the fuller a pool, the sooner what it caches is pushed out. Measured on traces short of prefill and short of memory."""
MOST_PUSHED_S = 2.0  # of a prefill: a longer one would wait too long for an emptier pool
EVEN_FULL = 0.5  # of the least full pool's share counts for nothing: where all are full, waiting helps nobody
TIE_S = 0.001
TIE_SHARE = 0.1
MOST_TIE_S = 0.1


class PredictedTtft(Policy):
    """The least predicted time to the first token, with what the others lose by it.

    These are the requests that wait for their first step there: a prefill that joins them makes it longer, up to a
    step's budget. And those to come, whose prefixes it pushes out of the cache. Near ties are as good as each other:
    broken by index, they would overload the first worker.
    """

    name = "predicted-ttft"
    holds = True
    unit = " s"

    def scores(self, prompt: Prompt, candidates: Candidates) -> Floats:
        """See Policy."""
        if native is None:
            return scores_reference(candidates)
        scores: Floats = native.predicted_ttft_scores(candidates.rows, FULL_WEIGHT, EVEN_FULL, MOST_PUSHED_S)
        return scores

    def tie(self, least: float) -> float:
        """See Policy."""
        return least + TIE_S + min(TIE_SHARE * max(least, 0.0), MOST_TIE_S)


def scores_reference(candidates: Candidates) -> Floats:
    """What the native core computes in one pass."""
    joined_s = candidates.waiting * np.minimum(candidates.prefill_s, candidates.budget * candidates.token_s)
    full = candidates.used_blocks / candidates.blocks_total
    pushed_out: Floats = FULL_WEIGHT * (full - EVEN_FULL * full.min())
    return candidates.ttft_s + joined_s + pushed_out * np.minimum(candidates.prefill_s, MOST_PUSHED_S)
