"""The workers that could serve a request, and what is predicted for it on each: columns over workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from router.table import Column, Floats, Slots

HOST_SHARE = 0.1
"""What a token that comes back from the host tier costs, in those that are computed: 320 KiB of KV over PCIe 5 beside
140 GFLOP, for 70B on 4 H100; a tenth is on the safe side."""
HEAD_LEFT = 0.1  # of the head's time is left at least while its first token has not come


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker as a candidate. Predicted times in seconds; see Candidates."""

    worker_id: str
    cached_tokens: int
    prefill_tokens: int
    queued_prefill_tokens: int
    running: int
    in_flight: int
    max_in_flight: int
    free_blocks: int
    last_routed: int
    queue_s: float
    memory_s: float
    prefill_s: float
    decode_s: float
    score: float
    predicted_ttft_s: float


def queues_s(values: Floats, now: float) -> Floats:
    """Seconds before each worker, given as the table's columns, would begin with a request that comes now."""
    step_s: Floats = values[Column.PREFILL_STEP_S] + values[Column.SEQUENCE_S] * values[Column.DECODING]
    step_s += values[Column.CONTEXT_S] * values[Column.CONTEXT]
    queue_s: Floats = values[Column.QUEUED_S] + step_s * np.ceil(values[Column.QUEUED_TOKENS] / values[Column.BUDGET])
    queue_s -= np.minimum(now - values[Column.HEAD_SINCE], (1 - HEAD_LEFT) * values[Column.HEAD_S])
    return np.maximum(queue_s, 0.0)


class Candidates:
    """One row a worker, shape (workers,) each.

    The queue is what was sent there and has no first token yet, in steps as full as they can be, less what must have
    been computed since its head began. A step with prefill costs what the decoding sequences beside it cost, too. While
    the pool has no room for the prompt, blocks come back as others end: in use over how long requests are in use.
    """

    blocks_total: Floats
    max_in_flight: Floats
    budget: Floats
    queued_tokens: Floats
    in_flight: Floats
    decoding: Floats
    context: Floats
    last_routed: Floats
    prefill_step_s: Floats
    token_s: Floats
    attention_s: Floats
    decode_step_s: Floats
    sequence_s: Floats
    context_s: Floats

    def __init__(
        self,
        slots: Slots,
        values: Floats,
        prompt_tokens: int,
        block_size: int,
        held_blocks: Floats,
        now: float,
    ) -> None:
        """`values` are the table's columns for `slots`; `held_blocks`, shape (2, workers), are leading blocks of the
        prompt held on the device, and in any tier."""
        (
            self.blocks_total,
            self.max_in_flight,
            self.budget,
            queued,
            self.queued_tokens,
            _,
            _,
            head_since,
            self.in_flight,
            self.decoding,
            self.context,
            pending_blocks,
            blocks_in_use,
            self.last_routed,
            residence_s,
            self.prefill_step_s,
            self.token_s,
            self.attention_s,
            self.decode_step_s,
            self.sequence_s,
            self.context_s,
        ) = values
        self.slots = slots
        self.prompt_tokens = prompt_tokens
        self.block_size = block_size
        # The last token is computed in any case, and blocks are reused whole.
        most = (prompt_tokens - 1) // block_size
        device, held = np.minimum(held_blocks, most)
        self.cached_tokens: Floats = held * block_size
        self.prefill_tokens: Floats = prompt_tokens - self.cached_tokens
        self.prompt_blocks = -(-prompt_tokens // block_size)
        self.blocks_in_use: Floats = blocks_in_use + pending_blocks
        self.free_blocks: Floats = np.maximum(self.blocks_total - self.blocks_in_use, 0)

        beside = self.sequence_s * self.decoding + self.context_s * self.context
        step_s = self.prefill_step_s + beside
        self.queue_s: Floats = queues_s(values, now)
        self.prefill_s: Floats = self.prefill_tokens * (
            self.token_s + self.attention_s * (self.cached_tokens + self.prefill_tokens / 2)
        ) + step_s * np.ceil(self.prefill_tokens / self.budget)
        self.prefill_s += (held - device) * block_size * HOST_SHARE * self.token_s
        # Who comes while others wait for their first step shares it, and makes it longer: up to a whole budget's.
        begun = (now - head_since > self.decode_step_s + beside) & (queued > 0)
        self.waiting: Floats = queued - begun
        # An idle prefill queue still means waiting for the end of the decode step under way: half of one.
        self.decode_s: Floats = np.where(
            (self.queued_tokens == 0) & (self.decoding > 0), (self.decode_step_s + beside) / 2, 0.0
        )
        missing = self.prompt_blocks - device - self.free_blocks
        waiting = missing > 0
        if waiting.any():
            release_s = residence_s / np.maximum(self.blocks_in_use, 1)
            self.memory_s: Floats = np.where(waiting, missing * release_s, 0.0)
            self.ttft_s: Floats = np.maximum(self.queue_s, self.memory_s) + self.prefill_s + self.decode_s
        else:
            self.memory_s = np.zeros_like(self.queue_s)
            self.ttft_s = self.queue_s + self.prefill_s + self.decode_s

    def __len__(self) -> int:
        return len(self.slots)

    def tokens_s(self, index: int) -> float:
        """The prefill of one of them without what each step costs by itself."""
        new, cached = self.prefill_tokens[index], self.cached_tokens[index]
        return float(new * (self.token_s[index] + self.attention_s[index] * (cached + new / 2)))

    def row(self, index: int, names: Sequence[str], scores: Floats) -> Candidate:
        """One of them for people; `names` by slot."""
        return Candidate(
            worker_id=names[self.slots[index]],
            cached_tokens=int(self.cached_tokens[index]),
            prefill_tokens=int(self.prefill_tokens[index]),
            queued_prefill_tokens=int(self.queued_tokens[index]),
            running=int(self.decoding[index]),
            in_flight=int(self.in_flight[index]),
            max_in_flight=int(self.max_in_flight[index]),
            free_blocks=int(self.free_blocks[index]),
            last_routed=int(self.last_routed[index]),
            queue_s=float(self.queue_s[index]),
            memory_s=float(self.memory_s[index]),
            prefill_s=float(self.prefill_s[index]),
            decode_s=float(self.decode_s[index]),
            score=float(scores[index]),
            predicted_ttft_s=float(self.ttft_s[index]),
        )
