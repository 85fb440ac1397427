"""Qwen3: query and key heads are RMS-normalised before they are turned."""

from __future__ import annotations

import torch
from torch import Tensor

from worker.models.decoder import Decoder, Layer


class Qwen3(Decoder):
    """Qwen3ForCausalLM (dense)."""

    def _normed_heads(self, layer: Layer, qk: Tensor) -> Tensor:
        assert layer.q_norm is not None
        assert layer.k_norm is not None
        queries, keys = qk[:, : self.config.num_heads], qk[:, self.config.num_heads :]
        return torch.cat([self._normed(queries, layer.q_norm), self._normed(keys, layer.k_norm)], dim=1)
