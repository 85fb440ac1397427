"""Attention over the paged cache. One interface; a backend a file.

A backend is made once for a model and its cache. Each step it prepares what all layers share (slots, tiles, masks)
and is then called once for each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Span:
    """Rows of one sequence in a batch: `length` tokens at positions from `start` on.

    `block_ids` is the block table over positions [0, start + length).
    """

    start: int
    length: int
    block_ids: Sequence[int]


class AttentionStep(Protocol):
    """One step's attention, the same for every layer but for the tensors."""

    def __call__(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Write the keys and values of the batch to the cache, then let each query see positions up to its own.

        queries [rows, num_heads, head_dim], keys and values [rows, num_kv_heads, head_dim]; returns
        [rows, num_heads * head_dim]. Rows behind those of the spans are padding: not written, zero in the result.
        """
        ...


class AttentionBackend(Protocol):
    """Attention for one model over one cache."""

    def prepare(self, spans: Sequence[Span]) -> AttentionStep:
        """What all layers share. The rows of `spans` follow each other in the batch."""
        ...


def slot_mapping(spans: Sequence[Span], block_size: int) -> Tensor:
    """The cache slot of each row of a batch, int64 [rows]."""
    slots = np.empty(sum(span.length for span in spans), dtype=np.int64)
    row = 0
    for span in spans:
        if span.length == 1:
            slots[row] = span.block_ids[span.start // block_size] * block_size + span.start % block_size
        else:
            positions = np.arange(span.start, span.start + span.length)
            table = np.asarray(span.block_ids, dtype=np.int64)
            slots[row : row + span.length] = table[positions // block_size] * block_size + positions % block_size
        row += span.length
    return torch.from_numpy(slots)
