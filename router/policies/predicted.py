"""predicted-ttft, the default: the worker that will answer soonest, and that is slowed down the least by it."""

from __future__ import annotations

import numpy as np

from router.candidates import Candidates
from router.policies.base import Policy, Prompt
from router.table import Floats

OWN_WEIGHT = 0.25
JOIN_WEIGHT = 1.0
TIE_S = 0.001
TIE_SHARE = 0.02


class PredictedTtft(Policy):
    """The least predicted time to the first token, the own prefill counted again for those that will wait behind it."""

    name = "predicted-ttft"
    holds = True
    unit = " s"

    def scores(self, prompt: Prompt, candidates: Candidates) -> Floats:
        """See Policy."""
        others_s = candidates.waiting * np.minimum(candidates.prefill_s, candidates.budget * candidates.token_s)
        return candidates.ttft_s + OWN_WEIGHT * candidates.prefill_s + JOIN_WEIGHT * others_s

    def tie(self, least: float) -> float:
        """See Policy: broken by index, ties overload the first worker."""
        return least + max(TIE_S, TIE_SHARE * least)
