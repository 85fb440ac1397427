"""Rotary position embeddings (Su et al., arXiv:2104.09864), half-split as in Hugging Face's Llama."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from worker.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """float32 [head_dim / 2]; scaled as transformers does for `linear` and `llama3`."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    return frequencies


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / frequencies
    old_context = rope.original_max_position_embeddings
    slowed = frequencies / rope.factor
    keep = (old_context / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - keep) * slowed + keep * frequencies
    long_wave = wavelengths > old_context / rope.low_freq_factor
    short_wave = wavelengths < old_context / rope.high_freq_factor
    return torch.where(long_wave, slowed, torch.where(short_wave, frequencies, blended))


def rotation(positions: Tensor, inverse: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine for positions [rows], each [rows, 1, head_dim / 2]: once a step, for all layers and heads."""
    angles = (positions.to(torch.float32).unsqueeze(1) * inverse).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn [rows, heads, head_dim] by its rows' positions; a new tensor."""
    half = heads.shape[-1] // 2
    first, second = heads[..., :half], heads[..., half:]
    turned = torch.empty_like(heads, memory_format=torch.contiguous_format)
    torch.mul(first, cos, out=turned[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned[..., half:]).addcmul_(first, sin)
    return turned
