"""The decoder that Llama and its relatives share: pre-norm attention and gated MLP, weights fused for fewer GEMMs.

A family is a subclass that says what differs. Tensors are named as in Hugging Face checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own habit
from torch import Tensor

from worker.attention import AttentionStep
from worker.config import ModelConfig
from worker.models.linear import Linear, pad_rows
from worker.models.rope import inverse_frequencies, rotate, rotation

LoadTensor = Callable[[str], Tensor]
"""Gives a checkpoint's tensor by name, in the model's dtype and on its device."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one decoder layer; qkv and gate_up are stacked by rows."""

    input_norm: Tensor
    qkv: Linear
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


class Decoder:
    """A causal language model of one family, weights loaded."""

    def __init__(self, config: ModelConfig, load: LoadTensor) -> None:
        self.config = config
        self.embedding = load("model.embed_tokens.weight")
        self.layers = [self._load_layer(f"model.layers.{index}.", load) for index in range(config.num_layers)]
        self.norm = load("model.norm.weight")
        self.head = Linear(self.embedding if config.tie_word_embeddings else load("lm_head.weight"))
        self._inverse_frequencies = inverse_frequencies(config.rope, config.head_dim).to(self.embedding.device)

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def forward(self, token_ids: Tensor, positions: Tensor, attend: AttentionStep) -> Tensor:
        """Final hidden states [rows, hidden_size] of tokens [rows] (int64). Rows must be a multiple of 4."""
        x = F.embedding(token_ids, self.embedding)
        cos, sin = rotation(positions, self._inverse_frequencies, x.dtype)
        for index, layer in enumerate(self.layers):
            q, k, v = self._heads(layer, self._normed(x, layer.input_norm), cos, sin)
            x = x + layer.out(attend(index, q, k, v))
            gate, up = layer.gate_up(self._normed(x, layer.mlp_norm)).chunk(2, dim=-1)
            x = x + layer.down(silu(gate).mul_(up))
        return self._normed(x, self.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [rows, vocab_size] of hidden states [rows, hidden_size], any number of rows."""
        return self.head(pad_rows(hidden))[: len(hidden)].float()

    def _heads(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (both turned by position) and values, each [rows, heads, head_dim]."""
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        qkv = layer.qkv(x).view(len(x), heads + 2 * kv_heads, self.config.head_dim)
        qk = rotate(self._normed_heads(layer, qkv[:, : heads + kv_heads]), cos, sin)
        return qk[:, :heads], qk[:, heads:], qkv[:, heads + kv_heads :]

    def _normed_heads(self, layer: Layer, qk: Tensor) -> Tensor:  # noqa: ARG002 - for subclasses
        """Hook: what a family does to query and key heads [rows, num_heads + num_kv_heads, head_dim] before turning."""
        return qk

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.config.rms_norm_eps)

    def _load_layer(self, prefix: str, load: LoadTensor) -> Layer:
        config = self.config

        def linear(module: str, *names: str, bias: bool) -> Linear:
            def fused(kind: str) -> Tensor:
                return torch.cat([load(f"{prefix}{module}.{name}_proj.{kind}") for name in names])

            return Linear(fused("weight"), fused("bias") if bias else None)

        return Layer(
            input_norm=load(f"{prefix}input_layernorm.weight"),
            qkv=linear("self_attn", "q", "k", "v", bias=config.attention_bias),
            out=linear("self_attn", "o", bias=config.attention_bias),
            mlp_norm=load(f"{prefix}post_attention_layernorm.weight"),
            gate_up=linear("mlp", "gate", "up", bias=config.mlp_bias),
            down=linear("mlp", "down", bias=config.mlp_bias),
            q_norm=load(f"{prefix}self_attn.q_norm.weight") if config.qk_norm else None,
            k_norm=load(f"{prefix}self_attn.k_norm.weight") if config.qk_norm else None,
        )


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x). torch's own gives other bits at the ends of a thread's share of the elements; `exp` does not."""
    return x / x.neg().exp_().add_(1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last dimension, in float32 (Zhang and Sennrich, arXiv:1910.07467); half the time of torch's own here."""
    wide = x.float()
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this model must hold, with its shape."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    attention = {"q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q)}
    mlp = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
        for module, projections, bias in (
            ("self_attn", attention, config.attention_bias),
            ("mlp", mlp, config.mlp_bias),
        ):
            for name, (rows, columns) in projections.items():
                shapes[f"{prefix}{module}.{name}_proj.weight"] = (rows, columns)
                if bias:
                    shapes[f"{prefix}{module}.{name}_proj.bias"] = (rows,)
        if config.qk_norm:
            shapes[f"{prefix}self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{prefix}self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes
