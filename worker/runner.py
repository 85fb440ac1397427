"""Runs a step plan on a torch model over its paged cache."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from rhizome.errors import InvalidRequest
from worker.attention import AttentionBackend, Span
from worker.attention.cpu import TiledCpuAttention
from worker.kv_cache.paged import PagedKVCache
from worker.models.decoder import Decoder
from worker.models.linear import ROW_MULTIPLE
from worker.plan import Chunk, SampledToken, SamplingInput, SamplingParams, StepPlan
from worker.sampling import sample
from worker.transfer.memory import BlockMemory


class TorchRunner:
    """A `ModelRunner`: the model, its cache and an attention backend. Not thread-safe; a step at a time."""

    def __init__(
        self,
        model: Decoder,
        num_blocks: int,
        block_size: int,
        host_blocks: int = 0,
        memory: BlockMemory | None = None,
    ) -> None:
        """`memory` for the cache, of the model's dtype, if it is to lie there. Raises InvalidRequest where a host tier
        is asked for."""
        if host_blocks:
            raise InvalidRequest("host_blocks", host_blocks, "0: tensors are not moved between the tiers yet")
        config = model.config
        shape = (config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        self.model = model
        self.cache = PagedKVCache(*shape, dtype=model.dtype, device=model.device, memory=memory)
        self.attention: AttentionBackend = TiledCpuAttention(self.cache, config.num_heads)

    def warm_up(self, num_tokens: int) -> None:
        """A prefill of `num_tokens` and a decode step, so that no request pays for what is set up on first use.

        What it leaves in the cache is not listed anywhere.
        """
        blocks = range(-(-(num_tokens + 1) // self.cache.block_size))
        table = [block % self.cache.num_blocks for block in blocks]
        sample = SamplingInput(SamplingParams(max_tokens=1, temperature=0.0), [0], prompt_len=1)
        self.run(StepPlan((Chunk([0] * num_tokens, 0, table, (sample,)),)))
        self.run(StepPlan((Chunk([0], num_tokens, table, (sample,)),)))

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> list[list[SampledToken]]:
        """For each chunk, one token for each of its samples."""
        for source, destination in plan.copies:
            self.cache.copy_block(source, destination)
        hidden = self.hidden_states(plan)
        inputs = [wanted for chunk in plan.chunks for wanted in chunk.samples]
        if not inputs:
            return [[] for _ in plan.chunks]
        ends = np.cumsum([len(chunk.token_ids) for chunk in plan.chunks]) - 1
        sampled_rows = [row for row, chunk in enumerate(plan.chunks) if chunk.samples]
        logits = self.model.logits(hidden[torch.from_numpy(ends[sampled_rows])])
        tokens = iter(sample(_repeated(logits, plan), inputs))
        return [_take(tokens, len(chunk.samples)) for chunk in plan.chunks]

    def hidden_states(self, plan: StepPlan) -> Tensor:
        """Final hidden states of all tokens of a plan in their order, [tokens, hidden_size]; writes the cache."""
        chunks = plan.chunks
        count = sum(len(chunk.token_ids) for chunk in chunks)
        token_ids = np.zeros(count + -count % ROW_MULTIPLE, dtype=np.int64)
        positions = np.zeros_like(token_ids)
        row = 0
        for chunk in chunks:
            length = len(chunk.token_ids)
            token_ids[row : row + length] = chunk.token_ids
            positions[row : row + length] = range(chunk.start, chunk.start + length)
            row += length
        attend = self.attention.prepare([Span(c.start, len(c.token_ids), c.block_ids) for c in chunks])
        device = self.model.device
        hidden = self.model.forward(
            torch.from_numpy(token_ids).to(device), torch.from_numpy(positions).to(device), attend
        )
        return hidden[:count]


def _repeated(logits: Tensor, plan: StepPlan) -> Tensor:
    """A row of logits for each sample: a chunk's row as often as it has samples."""
    counts = [len(chunk.samples) for chunk in plan.chunks if chunk.samples]
    if all(count == 1 for count in counts):
        return logits
    return logits.repeat_interleave(torch.tensor(counts), dim=0)


def _take(tokens: Iterator[SampledToken], count: int) -> list[SampledToken]:
    return [next(tokens) for _ in range(count)]
