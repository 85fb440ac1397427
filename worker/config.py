"""The shape of a model, read from a checkpoint's config.json and checked before anything is loaded. Torch-free."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rhizome.errors import RhizomeError

LLAMA = "LlamaForCausalLM"
QWEN3 = "Qwen3ForCausalLM"
SUPPORTED = (LLAMA, QWEN3)

MAX_DIMENSION = (
    2**24
)  # of any one size in a config: far above real models, far below what would exhaust memory by itself
MAX_LAYERS = 1024  # the largest published have about 130
MAX_JSON_BYTES = 64 * 2**20


class CheckpointError(RhizomeError):
    """A checkpoint that cannot be served: the message names the file, what was found and what is supported."""

    code = "FAILED_PRECONDITION"

    def __init__(self, file: str | Path, problem: str) -> None:
        super().__init__(f"{file}: {problem}")
        self.file = str(file)


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: `kind` is default, linear or llama3; the other fields as in transformers."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder of the Llama or Qwen3 family. Sizes are in elements, lengths in tokens."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    qk_norm: bool
    eos_token_ids: frozenset[int]
    bos_token_id: int | None

    @classmethod
    def load(cls, directory: str | Path) -> ModelConfig:
        """Read config.json and, where there is one, generation_config.json. Raises CheckpointError."""
        path = Path(directory) / "config.json"
        generation_path = path.with_name("generation_config.json")
        generation = read_json(generation_path) if generation_path.exists() else {}
        return cls.parse(read_json(path), generation, path)

    @classmethod
    def parse(
        cls, config: Mapping[str, Any], generation: Mapping[str, Any], file: str | Path = "config.json"
    ) -> ModelConfig:
        """Check every field that changes a result. Raises CheckpointError for the first that is not supported."""
        fields = _Fields(config, file)
        architecture = _architecture(fields)
        _refuse_unsupported(fields, architecture)
        hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
        kv_heads = fields.size("num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise fields.error("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
        if config.get("head_dim") is None and hidden % heads:
            raise fields.error("hidden_size", f"a multiple of num_attention_heads, {heads}, or a head_dim")
        head_dim = fields.size("head_dim", default=hidden // heads)
        if head_dim % 2:
            raise fields.error("head_dim", "even: rotary embeddings turn pairs")
        vocab = fields.size("vocab_size")
        max_positions = fields.size("max_position_embeddings")
        return cls(
            architecture=architecture,
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=fields.size("intermediate_size"),
            num_layers=fields.size("num_hidden_layers", most=MAX_LAYERS),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=fields.positive("rms_norm_eps"),
            rope=_rope(fields, max_positions),
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            attention_bias=fields.flag("attention_bias"),
            mlp_bias=architecture == LLAMA and fields.flag("mlp_bias"),
            qk_norm=architecture == QWEN3,
            eos_token_ids=fields.token_ids("eos_token_id", vocab)
            | _Fields(generation, "generation_config.json").token_ids("eos_token_id", vocab),
            bos_token_id=min(fields.token_ids("bos_token_id", vocab), default=None),
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint. Raises CheckpointError."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(path, f"larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(path, f"cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(path, f"a JSON object is expected, not {type(value).__name__}")
    return value


class _Fields:
    """Typed access to a JSON object; every refusal names file, field, value and what is supported."""

    def __init__(self, values: Mapping[str, Any], file: str | Path, prefix: str = "") -> None:
        self.values = values
        self.file = file
        self.prefix = prefix

    def error(self, name: str, supported: str) -> CheckpointError:
        found = repr(self.values[name]) if name in self.values else "missing"
        return CheckpointError(self.file, f"{self.prefix}{name} is {found[:100]}; supported: {supported}")

    def size(self, name: str, default: int | None = None, most: int = MAX_DIMENSION) -> int:
        value = self.values.get(name)
        if value is None and default is not None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise self.error(name, f"an integer from 1 to {most}")
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name)
        if value is None and default is not None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.error(name, "a number above 0")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def token_ids(self, name: str, vocab_size: int) -> frozenset[int]:
        value = self.values.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(_is_int(token) and 0 <= token < vocab_size for token in ids):
            raise self.error(name, f"token ids below vocab_size, {vocab_size}")
        return frozenset(ids)

    def section(self, name: str) -> _Fields:
        value = self.values.get(name) or {}
        if not isinstance(value, dict):
            raise self.error(name, "a JSON object")
        return _Fields(value, self.file, f"{self.prefix}{name}.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _architecture(fields: _Fields) -> str:
    names = fields.values.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in SUPPORTED:
        raise fields.error("architectures", "one of " + ", ".join(SUPPORTED))
    return str(names[0])


def _refuse_unsupported(fields: _Fields, architecture: str) -> None:
    """Fields that would change the result and that the decoder does not follow."""
    values = fields.values
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise fields.error("hidden_act", "silu")
    if values.get("quantization_config") is not None:
        raise fields.error("quantization_config", "unquantised weights (float32, float16, bfloat16)")
    kinds = values.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise fields.error("layer_types", "full_attention in every layer")
    # Qwen3 slides only where use_sliding_window says so; elsewhere a window by itself means one.
    slides = fields.flag("use_sliding_window", default=architecture != QWEN3)
    if slides and values.get("sliding_window") is not None:
        raise fields.error("sliding_window", "null, or use_sliding_window false: full attention only")


def _rope(fields: _Fields, max_positions: int) -> RopeConfig:
    """Both shapes: transformers 5 (`rope_parameters`) and before (`rope_theta` beside `rope_scaling`)."""
    scaling = fields.section("rope_parameters" if fields.values.get("rope_parameters") else "rope_scaling")
    kinds = [name for name in ("rope_type", "type") if scaling.values.get(name) is not None]
    kind = scaling.values[kinds[0]] if kinds else "default"
    if kind not in ("default", "linear", "llama3"):
        raise scaling.error(kinds[0], "default, linear, llama3")
    for section in (fields, scaling):
        if section.values.get("partial_rotary_factor", 1.0) != 1.0:
            raise section.error("partial_rotary_factor", "1.0")
    theta = (scaling if "rope_theta" in scaling.values else fields).positive("rope_theta", default=10_000.0)
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind=kind, factor=scaling.positive("factor"))
    rope = RopeConfig(
        theta=theta,
        kind=kind,
        factor=scaling.positive("factor"),
        low_freq_factor=scaling.positive("low_freq_factor"),
        high_freq_factor=scaling.positive("high_freq_factor"),
        original_max_position_embeddings=scaling.size("original_max_position_embeddings", default=max_positions),
    )
    if rope.high_freq_factor <= rope.low_freq_factor:
        raise scaling.error("high_freq_factor", f"above low_freq_factor, {rope.low_freq_factor:g}")
    return rope
