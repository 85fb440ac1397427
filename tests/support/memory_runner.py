"""A model runner whose KV cache holds the tokens themselves.

It reads each context back through the block table, after all writes of the step, and derives the next token from all
of it. So a wrong block table, a missed copy, a block freed too early or reused with stale content changes the output.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np

from worker.plan import SampledToken, SamplingParams, StepPlan

VOCAB = 40
EOS = 0


def next_token(context: Iterable[int], params: SamplingParams, choice: int, banned: frozenset[int]) -> int:
    """The model: a hash of the whole context; greedy choices agree, others differ by choice and seed."""
    data = np.array([*context, choice if params.temperature else 0, params.seed % 2**31], np.int64).tobytes()
    token = zlib.crc32(data) % VOCAB
    while token in banned:
        token = (token + 1) % VOCAB
    return token


def reference_answer(prompt: list[int], params: SamplingParams, choice: int, longest: int) -> list[int]:
    """What the model says to a prompt when nothing is batched, cached, chunked or preempted."""
    ends = params.stop_token_ids | (frozenset() if params.ignore_eos else {EOS})
    output: list[int] = []
    while len(output) < min(params.max_tokens, longest - len(prompt)):
        banned = params.stop_token_ids | {EOS} if len(output) < params.min_tokens else frozenset()
        output.append(next_token([*prompt, *output], params, choice, banned))
        if output[-1] in ends and len(output) > params.min_tokens:
            break
    return output


class MemoryRunner:
    """See the module's docstring."""

    def __init__(self, num_blocks: int, block_size: int, host_blocks: int = 0) -> None:
        self.memory = np.full((num_blocks, block_size), -1, np.int64)
        self.host = np.full((host_blocks, block_size), -1, np.int64)
        self.block_size = block_size
        self.steps = 0

    def run(self, plan: StepPlan) -> list[list[SampledToken]]:
        self.steps += 1
        for block, slot in plan.saves:
            self.host[slot] = self.memory[block]
        for source, target in plan.copies:
            self.memory[target] = self.memory[source]
        for slot, block in plan.loads:
            self.memory[block] = self.host[slot]
        for chunk in plan.chunks:
            for position, token in enumerate(chunk.token_ids, chunk.start):
                self.memory[chunk.block_ids[position // self.block_size], position % self.block_size] = token
        results = []
        for chunk in plan.chunks:
            end = chunk.start + len(chunk.token_ids)
            context = self.memory[list(chunk.block_ids)].reshape(-1)[:end].tolist()
            results.append([SampledToken(next_token(context, s.params, s.choice, s.banned)) for s in chunk.samples])
        return results


class LetterDecoder:
    """Tokens to letters, one each."""

    def push(self, token_ids: Iterable[int]) -> str:
        return "".join(chr(97 + token % 26) for token in token_ids)

    def finish(self) -> str:
        return ""
