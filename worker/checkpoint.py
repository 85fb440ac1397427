"""Weights from safetensors files, every tensor's presence, type and shape checked before a model is built."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from worker.config import CheckpointError, ModelConfig, read_json
from worker.models import MODELS
from worker.models.decoder import Decoder, tensor_shapes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = ("F32", "F16", "BF16")
SHOWN = 5  # names in an error message


@dataclass(frozen=True, slots=True)
class _Entry:
    file: Path
    shape: tuple[int, ...]
    dtype: str


def load_model(
    directory: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Decoder:
    """The model of a checkpoint directory. Raises CheckpointError naming file and tensor."""
    config = ModelConfig.load(directory)
    with ExitStack() as stack:
        handles = {path: _open(path, stack) for path in _weight_files(Path(directory))}
        entries = _entries(handles)
        _check_against_index(Path(directory), entries)
        _check(entries, config, Path(directory))

        def load(name: str) -> Tensor:
            tensor: Tensor = handles[entries[name].file].get_tensor(name)
            return tensor.to(device=device, dtype=dtype, copy=True)  # out of the file's memory map, aligned

        return MODELS[config.architecture](config, load)


def _weight_files(directory: Path) -> list[Path]:
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        raise CheckpointError(directory, f"neither {SINGLE} nor {INDEX} is there")
    return [directory / name for name in sorted(set(_weight_map(index).values()))]


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(index, "weight_map is missing or empty")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(index, f"{tensor} is in {name!r}; a .safetensors file beside the index is expected")
    return weight_map


def _open(path: Path, stack: ExitStack) -> Any:
    if not path.is_file():
        raise CheckpointError(path, "missing")
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(path, f"not a whole safetensors file ({error})") from error


def _entries(handles: Mapping[Path, Any]) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for path, handle in handles.items():
        for name in handle.keys():  # noqa: SIM118 - not a mapping
            if name in entries:
                raise CheckpointError(path, f"{name} is in {entries[name].file.name} too")
            tensor = handle.get_slice(name)
            entries[name] = _Entry(path, tuple(tensor.get_shape()), str(tensor.get_dtype()))
    return entries


def _check_against_index(directory: Path, entries: Mapping[str, _Entry]) -> None:
    """A sharded checkpoint's files must hold what the index says they do."""
    if (directory / SINGLE).is_file():
        return
    for name, file in _weight_map(directory / INDEX).items():
        if name not in entries or entries[name].file.name != file:
            raise CheckpointError(directory / file, f"{name} is not in it, though {INDEX} says so")


def _check(entries: Mapping[str, _Entry], config: ModelConfig, directory: Path) -> None:
    expected = tensor_shapes(config)
    missing = [name for name in expected if name not in entries]
    if missing:
        raise CheckpointError(directory, f"tensors are missing: {_listed(missing)}")
    for name, shape in expected.items():
        entry = entries[name]
        if entry.shape != shape:
            raise CheckpointError(entry.file, f"{name} has shape {list(entry.shape)}, expected {list(shape)}")
        if entry.dtype not in DTYPES:
            raise CheckpointError(entry.file, f"{name} is {entry.dtype}; supported: {', '.join(DTYPES)}")
    unexpected = [name for name in entries if name not in expected and not _harmless(name, config)]
    if unexpected:
        raise CheckpointError(directory, f"tensors that {config.architecture} does not have: {_listed(unexpected)}")


def _harmless(name: str, config: ModelConfig) -> bool:
    """Old checkpoints save rope's frequencies; tied ones may save the shared matrix twice."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
