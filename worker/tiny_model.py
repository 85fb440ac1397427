"""A small randomly initialised Llama checkpoint with a byte-level tokenizer and a chat template, made locally.

It knows nothing, but it is whole: Rhizome and transformers load it alike, it answers in printable characters that
vary with the prompt, and its prefill costs enough for a cache hit to be seen.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from worker.byte_tokenizer import BOS, END, EOS, VOCAB_SIZE, byte_tokenizer_files
from worker.config import LLAMA, ModelConfig
from worker.models.decoder import tensor_shapes


def make_tiny_model(
    out_dir: str | Path,
    seed: int = 0,
    *,
    hidden_size: int = 256,
    intermediate_size: int = 512,
    num_layers: int = 4,
    num_heads: int = 8,
    num_kv_heads: int = 2,
    max_position_embeddings: int = 8192,
) -> Path:
    """Write config, weights (float32), tokenizer and chat template into `out_dir`; same seed, same files.

    Raises CheckpointError for sizes that make no model.
    """
    config = {
        "architectures": [LLAMA],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "max_position_embeddings": max_position_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": [EOS, END],
        "torch_dtype": "float32",
    }
    generation = {"bos_token_id": BOS, "eos_token_id": [EOS, END]}
    checked = ModelConfig.parse(config, generation)
    directory = Path(out_dir)
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", generation)
    save_file(_weights(checked, seed), directory / "model.safetensors", metadata={"format": "pt"})
    for name, data in byte_tokenizer_files(max_position_embeddings).items():
        (directory / name).write_bytes(data)
    return directory


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Normal weights that keep activations near unit size, with attention sharp enough to make answers vary."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in tensor_shapes(config).items():
        if len(shape) == 1:
            weights[name] = torch.ones(shape)
            continue
        gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
        fan_in = 1 if "embed_tokens" in name else shape[1]
        weights[name] = torch.randn(shape, generator=generator) * (gain / fan_in**0.5)
    weights["lm_head.weight"] *= 8 * _readable().unsqueeze(1)
    return weights


def _readable() -> Tensor:
    """How strongly each token competes: answers are printable ASCII, mostly letters, and end now and then."""
    strength = torch.full((VOCAB_SIZE,), 0.01)
    for byte in range(0x20, 0x7F):
        strength[byte] = 1.0 if chr(byte).isalpha() or byte == 0x20 else 0.7
    strength[ord("\n")] = strength[END] = 0.7
    return strength
