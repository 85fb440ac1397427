"""Checkpoints that cannot be served are refused before a model is built, by file, tensor and field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from worker.checkpoint import load_model
from worker.config import CheckpointError, ModelConfig, RopeConfig
from worker.tiny_model import make_tiny_model

torch.set_num_threads(1)
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_position_embeddings": 128,
}
NORM = "model.layers.1.input_layernorm.weight"
K_PROJ = "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "tiny", **SIZES)


def rewrite(checkpoint: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = checkpoint / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def drop(checkpoint: Path, *names: str) -> None:
    file = checkpoint / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in load_file(file).items() if name not in names}, file)


def reconfigure(checkpoint: Path, **fields: Any) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def shard(checkpoint: Path) -> dict[str, str]:
    """Split the weights over two files; returns the index's weight map."""
    tensors = load_file(checkpoint / "model.safetensors")
    weight_map = {name: f"part-{n % 2}.safetensors" for n, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({name: tensors[name].clone() for name in tensors if weight_map[name] == file}, checkpoint / file)
    (checkpoint / "model.safetensors").unlink()
    write_index(checkpoint, weight_map)
    return weight_map


def write_index(checkpoint: Path, weight_map: object) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def refusal(checkpoint: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        load_model(checkpoint)
    assert raised.value.code == "FAILED_PRECONDITION"
    return str(raised.value)


def test_missing_tensors_are_named(checkpoint: Path) -> None:
    """All of them, up to a handful."""
    drop(checkpoint, NORM, K_PROJ)
    message = refusal(checkpoint)
    assert "tensors are missing" in message
    assert NORM in message
    assert K_PROJ in message


def test_a_misshapen_tensor_is_named_with_both_shapes_and_its_file(checkpoint: Path) -> None:
    """Transposed is misshapen too."""
    rewrite(checkpoint, lambda tensors: tensors.update({K_PROJ: tensors[K_PROJ].T.contiguous()}))
    assert refusal(checkpoint) == f"{checkpoint / 'model.safetensors'}: {K_PROJ} has shape [32, 16], expected [16, 32]"


def test_shapes_are_checked_before_anything_of_the_configs_size_is_allocated(checkpoint: Path) -> None:
    """A config of petabytes beside small tensors is refused at once."""
    reconfigure(checkpoint, vocab_size=2**24, intermediate_size=2**24, hidden_size=2**24)
    assert "has shape" in refusal(checkpoint)


def test_unexpected_tensors_are_named_unless_harmless(checkpoint: Path) -> None:
    """Old checkpoints hold rope's frequencies; a bias that the config does not know would change results."""
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    rewrite(checkpoint, lambda tensors: tensors.update(frequencies))
    load_model(checkpoint)
    bias = "model.layers.0.self_attn.q_proj.bias"
    rewrite(checkpoint, lambda tensors: tensors.update({bias: torch.ones(32)}))
    assert f"tensors that LlamaForCausalLM does not have: {bias}" in refusal(checkpoint)


def test_a_tied_checkpoint_may_hold_the_matrix_twice_or_once(checkpoint: Path) -> None:
    """lm_head is left aside where embeddings are tied, and missed where they are not."""
    reconfigure(checkpoint, tie_word_embeddings=True)
    hidden = torch.randn(4, 32)
    tied = load_model(checkpoint)
    torch.testing.assert_close(tied.logits(hidden), hidden @ tied.embedding.T)
    drop(checkpoint, "lm_head.weight")
    load_model(checkpoint)
    reconfigure(checkpoint, tie_word_embeddings=False)
    assert "tensors are missing: lm_head.weight" in refusal(checkpoint)


def test_types_other_than_floats_are_refused_and_half_precision_is_widened(checkpoint: Path) -> None:
    """Quantised tensors need a scheme that is not here; bfloat16 loads as float32."""
    rewrite(checkpoint, lambda tensors: tensors.update({K_PROJ: tensors[K_PROJ].bfloat16()}))
    assert load_model(checkpoint).dtype == torch.float32
    rewrite(checkpoint, lambda tensors: tensors.update({K_PROJ: tensors[K_PROJ].to(torch.int8)}))
    assert f"{K_PROJ} is I8; supported: F32, F16, BF16" in refusal(checkpoint)


@pytest.mark.parametrize("kept", [0, 4, 100, 5000])
def test_a_truncated_file_is_refused_by_name(checkpoint: Path, kept: int) -> None:
    """Cut in the length, in the header or in the data."""
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert refusal(checkpoint).startswith(f"{file}: not a whole safetensors file")


def test_missing_weights_are_refused(checkpoint: Path) -> None:
    """Neither a single file nor an index."""
    (checkpoint / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(checkpoint)


def test_broken_shards_are_refused_by_name(checkpoint: Path) -> None:
    """A shard that is missing, one without its tensor, a tensor twice, names that leave the directory, no JSON."""
    weight_map = shard(checkpoint)
    load_model(checkpoint)
    other = {"part-0.safetensors": "part-1.safetensors", "part-1.safetensors": "part-0.safetensors"}
    write_index(checkpoint, weight_map | {NORM: other[weight_map[NORM]]})
    assert f"{NORM} is not in it" in refusal(checkpoint)
    write_index(checkpoint, weight_map | {NORM: "../part-0.safetensors"})
    assert f"{NORM} is in '../part-0.safetensors'" in refusal(checkpoint)
    for bad in ({}, [], {NORM: 3}):
        write_index(checkpoint, bad)
        assert "model.safetensors.index.json" in refusal(checkpoint)
    write_index(checkpoint, weight_map)
    twice = checkpoint / other[weight_map[NORM]]
    save_file(load_file(twice) | {NORM: torch.ones(32)}, twice)
    assert f"{NORM} is in part-0.safetensors too" in refusal(checkpoint)
    (checkpoint / "part-1.safetensors").unlink()
    assert refusal(checkpoint) == f"{checkpoint / 'part-1.safetensors'}: missing"
    (checkpoint / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json: not JSON" in refusal(checkpoint)


@pytest.mark.parametrize("content", ["", "{", "[1]", '"x"', "\xff", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(checkpoint: Path, content: str) -> None:
    """Including one that is nested without end."""
    (checkpoint / "config.json").write_bytes(content.encode("latin-1"))
    assert refusal(checkpoint).startswith(f"{checkpoint / 'config.json'}: ")


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    """So is a directory that does not exist."""
    assert "config.json: cannot be read" in refusal(tmp_path)
    assert "config.json: cannot be read" in refusal(tmp_path / "nowhere")


LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
QWEN = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, r"architectures is \['MambaForCausalLM'\]; supported: one of Llama"),
        ({"architectures": []}, "architectures is"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is"),
        ({"vocab_size": None}, "vocab_size is None; supported: an integer from 1"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": 2**40}, "hidden_size is"),
        ({"hidden_size": 60}, "hidden_size is 60; supported: a multiple of num_attention_heads"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": 2000}, "num_hidden_layers is 2000; supported: an integer from 1 to 1024"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; supported: a divisor"),
        ({"head_dim": 7}, "head_dim is 7; supported: even"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: silu"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes'; supported: true or false"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"sliding_window": 128}, "sliding_window is 128"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
        ({"layer_types": 3}, "layer_types is 3"),
        ({"eos_token_id": 100}, "eos_token_id is 100; supported: token ids below vocab_size, 100"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id is"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type is 'dynamic'; supported: default,"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.rope_type is 'yarn'"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3'; supported: a JSON object"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor is missing"),
        ({"rope_parameters": {"rope_type": ["x"]}}, "rope_parameters.rope_type is"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}},
            "rope_scaling.high_freq_factor is 1; supported: above low_freq_factor",
        ),
    ],
)
def test_fields_that_are_senseless_or_not_supported_are_refused(fields: dict[str, Any], message: str) -> None:
    """The message names file, field, value and what is supported."""
    with pytest.raises(CheckpointError, match=r"^config\.json: " + message):
        ModelConfig.parse(LLAMA | fields, {})


@pytest.mark.parametrize(
    "name",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
     "max_position_embeddings", "architectures"],
)  # fmt: skip
def test_fields_without_a_safe_default_must_be_there(name: str) -> None:
    """No guess is made about the shape of a model."""
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        ModelConfig.parse({key: value for key, value in LLAMA.items() if key != name}, {})


def test_both_shapes_of_rope_settings_are_read() -> None:
    """transformers 5 keeps them in rope_parameters, before it rope_theta stood beside rope_scaling."""
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    }
    expected = RopeConfig(500_000.0, "llama3", 8.0, 1.0, 4.0, 64)
    old = ModelConfig.parse(LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling}, {})
    new = ModelConfig.parse(LLAMA | {"rope_parameters": scaling | {"rope_theta": 5e5}}, {})
    assert old.rope == new.rope == expected
    assert ModelConfig.parse(LLAMA | {"rope_scaling": None}, {}).rope == RopeConfig(10_000.0)
    linear = ModelConfig.parse(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}}, {})
    assert linear.rope == RopeConfig(10_000.0, "linear", 2.0)


def test_end_tokens_come_from_both_files_as_number_or_list() -> None:
    """What either names ends an answer."""
    config = ModelConfig.parse(LLAMA | {"eos_token_id": 2, "bos_token_id": 1}, {"eos_token_id": [3, 4]})
    assert config.eos_token_ids == {2, 3, 4}
    assert config.bos_token_id == 1
    assert ModelConfig.parse(LLAMA, {}).eos_token_ids == frozenset()


def test_a_window_that_qwen_does_not_use_is_accepted() -> None:
    """Its configs carry one that is switched off."""
    config = ModelConfig.parse(QWEN | {"sliding_window": 4096, "use_sliding_window": False}, {})
    assert config.qk_norm
    assert config.head_dim == 16
    with pytest.raises(CheckpointError, match="sliding_window is 4096"):
        ModelConfig.parse(QWEN | {"sliding_window": 4096, "use_sliding_window": True}, {})
