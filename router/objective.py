"""What to keep besides a short time to the first token: limits (SLO) on it, and on the time from token to token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rhizome.errors import InvalidRequest
from router.candidates import Candidates
from router.table import Column, Floats

MISS_S = 5.0
"""What a request that misses the objective costs, in seconds of others' waiting."""
ANSWER_TOKENS = 100
"""Short answers are lost first by a prefill beside them: so many tokens bear so many times what a token may be late."""
LATE_S = 2.0
"""Who cannot keep the objective any more goes after others as if it had so much more work, and ages as they do."""
MAX_SLO_S = 3600.0


@dataclass(frozen=True, slots=True)
class Objective:
    """Most seconds to the first token, and from token to token in an answer's mean; None: no such limit."""

    ttft_s: float | None = None
    itl_s: float | None = None

    def __post_init__(self) -> None:
        """Raises InvalidRequest."""
        for name, value in (("slo_ttft", self.ttft_s), ("slo_itl", self.itl_s)):
            if value is not None and not 0 < value <= MAX_SLO_S:
                raise InvalidRequest(name, value, f"above 0, at most {MAX_SLO_S:g} s")

    def __bool__(self) -> bool:
        return self.ttft_s is not None or self.itl_s is not None

    def cost_s(self, rows: Candidates, sequences: int, waited_s: float) -> Floats:
        """Shape (workers,): the requests that miss the objective by a placement, as expected, in seconds of waiting.

        The request itself misses it where its first token comes too late, or where a decode step with it takes too
        long. Those that decode there stand still during its prefill: each misses it in proportion to how much of what a
        short answer bears that is.
        """
        missed: Floats = np.zeros(len(rows))
        if self.ttft_s is not None:
            missed += rows.ttft_s > self.ttft_s - waited_s
        if self.itl_s is not None:
            table = rows.rows
            step_s = table[Column.DECODE_STEP_S] + table[Column.SEQUENCE_S] * (table[Column.DECODING] + sequences)
            step_s += table[Column.CONTEXT_S] * (table[Column.CONTEXT] + sequences * rows.prompt_tokens)
            borne_s = ANSWER_TOKENS * np.maximum(self.itl_s - step_s, 0.0)
            missed = np.maximum(missed, step_s > self.itl_s)
            missed += table[Column.DECODING] * np.minimum(rows.prefill_s / np.maximum(borne_s, rows.prefill_s), 1.0)
        return MISS_S * missed

    def is_late(self, waited_s: float, work_s: float) -> bool:
        """Whether a request that has so much work before it cannot keep the objective any more."""
        return self.ttft_s is not None and waited_s + work_s > self.ttft_s
