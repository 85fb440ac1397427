"""What a worker's engine serves: a checkpoint on torch, or simulated hardware that needs neither torch nor weights."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rhizome.errors import InvalidRequest
from rhizome.tokenizer import tokenizer_sha256

if TYPE_CHECKING:
    from deploy.processes import WorkerSettings
    from worker.plan import ModelRunner
    from worker.scheduler import SchedulerConfig
    from worker.step_time import Hardware
    from worker.transfer.memory import BlockMemory

DEFAULT_HARDWARE = "8b-1xh100"
MAX_TIME_SCALE = 1e6
MAX_SIMULATED_BLOCKS = 2**22  # a block pool of as many takes half a gigabyte

LONGEST = 2**20  # what tokenizer files say, the same on all hardware: the workers of a fleet have to agree in them


@dataclass(frozen=True)
class ServedModel:
    """A model ready to run, with the scheduler's bounds."""

    config: SchedulerConfig
    runner: ModelRunner
    tokenizer_files: dict[str, bytes]
    vocab_size: int
    eos_token_ids: frozenset[int]
    clock: Callable[[], float] = time.monotonic  # measures steps
    memory: BlockMemory | None = None  # of its KV cache, if blocks may go to other workers and come from them


def chosen_hardware(
    name_or_path: str | None, *, simulated: bool, time_scale: float | None, model: Path | None, kv_cache_mib: int | None
) -> Hardware | None:
    """The hardware to simulate by command-line options; None where a checkpoint is served.

    Raises InvalidRequest for what does not go together, and for a hardware file that is none.
    """
    if not simulated:
        for field, value in (("hardware", name_or_path), ("time_scale", time_scale)):
            if value is not None:
                raise InvalidRequest(field, value, "only with --simulated")
        return None
    if model is not None:
        raise InvalidRequest("model", str(model), "not with --simulated, which computes nothing")
    if kv_cache_mib is not None:
        raise InvalidRequest(
            "kv_cache_mib", kv_cache_mib, "not with --simulated: the hardware says how much KV it holds"
        )
    check_time_scale(1.0 if time_scale is None else time_scale)
    from worker.hardware_file import load_hardware

    return load_hardware(name_or_path or DEFAULT_HARDWARE)


def check_time_scale(scale: float) -> None:
    """Raise InvalidRequest for one that no clock can follow."""
    if not 0 < scale <= MAX_TIME_SCALE:
        raise InvalidRequest("time_scale", scale, f"above 0 and at most {MAX_TIME_SCALE:g}")


def simulated_model(settings: WorkerSettings, hardware: Hardware) -> ServedModel:
    """A model of time only. Raises InvalidRequest."""
    from worker.byte_tokenizer import END, EOS, byte_tokenizer_files
    from worker.scheduler import SchedulerConfig
    from worker.simulated_network import simulated_memory
    from worker.simulated_runner import VOCAB_SIZE, SimulatedRunner

    num_blocks = hardware.kv_tokens // settings.block_size
    if not 1 <= num_blocks <= MAX_SIMULATED_BLOCKS:
        least = -(-hardware.kv_tokens // MAX_SIMULATED_BLOCKS)
        limit = f"{least} to {hardware.kv_tokens}, as {hardware.name} holds {hardware.kv_tokens} tokens of KV"
        raise InvalidRequest("block_size", settings.block_size, limit)
    config = SchedulerConfig(
        num_blocks=num_blocks,
        block_size=settings.block_size,
        max_model_len=_given(settings.max_model_len, num_blocks * settings.block_size),
        max_batched_tokens=_given(settings.max_batched_tokens, hardware.max_batched_tokens),
        max_running=_given(settings.max_running, hardware.max_running),
        max_waiting=settings.max_waiting,
        event_token_ids=settings.event_token_ids,
    )
    block_load_s = hardware.host_token_s * settings.block_size
    runner = SimulatedRunner(hardware.steps, block_load_s=block_load_s, time_scale=settings.time_scale)
    files = byte_tokenizer_files(LONGEST)
    memory = None
    if simulated_fetch_token_s(settings, hardware):
        memory = simulated_memory(num_blocks, names=(settings.served_name, settings.block_size))
    return ServedModel(config, runner, files, VOCAB_SIZE, frozenset({EOS, END}), clock=runner.busy_s, memory=memory)


def simulated_fetch_token_s(settings: WorkerSettings, hardware: Hardware) -> float:
    """What it takes to pull a token's KV from a peer; 0: these workers do not pull.

    Raises InvalidRequest for what routers would refuse.
    """
    seconds = hardware.fetch_token_s / settings.time_scale
    if seconds >= 1:
        limit = f"below {settings.time_scale:g}, for a token in less than 1 s at time_scale {settings.time_scale:g}"
        raise InvalidRequest(f"hardware {hardware.name}: fetch_token_s", hardware.fetch_token_s, limit)
    return seconds


def torch_model(settings: WorkerSettings, directory: Path) -> ServedModel:
    """Checkpoint -> model -> runner. Raises CheckpointError or InvalidRequest before memory is taken."""
    import torch

    from worker.checkpoint import load_model
    from worker.config import ModelConfig
    from worker.kv_cache.paged import blocks_within, transfer_memory
    from worker.runner import TorchRunner
    from worker.scheduler import SchedulerConfig
    from worker.tokenizer import tokenizer_files

    torch.set_num_threads(settings.threads or os.cpu_count() or 1)
    model_config = ModelConfig.load(directory)
    files = tokenizer_files(directory)
    num_blocks = blocks_within(settings.kv_cache_mib * 2**20, model_config, settings.block_size, torch.float32)
    longest = min(model_config.max_position_embeddings, num_blocks * settings.block_size)
    config = SchedulerConfig(
        num_blocks=num_blocks,
        block_size=settings.block_size,
        max_model_len=_given(settings.max_model_len, longest),
        max_batched_tokens=_given(settings.max_batched_tokens, 512),
        max_running=_given(settings.max_running, 64),
        max_waiting=settings.max_waiting,
        event_token_ids=settings.event_token_ids,
    )
    if config.max_model_len > model_config.max_position_embeddings:
        limit = f"at most the model's {model_config.max_position_embeddings}"
        raise InvalidRequest("max_model_len", config.max_model_len, limit)
    names = (settings.served_name, model_config.vocab_size, tokenizer_sha256(files))  # as a fleet tells models apart
    try:
        memory = transfer_memory(model_config, num_blocks, settings.block_size, torch.float32, names=names)
    except InvalidRequest:
        memory = None  # blocks too large to travel: they stay here
    runner = TorchRunner(load_model(directory), num_blocks, settings.block_size, config.host_blocks, memory)
    runner.warm_up(min(config.max_batched_tokens, config.max_model_len))
    return ServedModel(
        config, runner, files, model_config.vocab_size, model_config.eos_token_ids, memory=runner.cache.memory
    )


def _given(value: int | None, default: int) -> int:
    return default if value is None else value
