"""What one router process and one worker process are made of. Everything is wired here, and only here."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from kv_events.log import EventLog
from rhizome import rpc
from rhizome.errors import InvalidRequest
from rhizome.ticket import fleet_secret
from rhizome.tokenizer import tokenizer_sha256
from rhizome.v1 import fleet_pb2

if TYPE_CHECKING:
    from worker.client import FleetMember
    from worker.engine import Engine
    from worker.service import WorkerIdentity

_log = logging.getLogger(__name__)

EVENT_BATCHES_KEPT = 8192  # a router that is away for longer takes a snapshot
ROLES = {
    "both": fleet_pb2.WORKER_ROLE_BOTH,
    "prefill": fleet_pb2.WORKER_ROLE_PREFILL,
    "decode": fleet_pb2.WORKER_ROLE_DECODE,
}


@dataclass(frozen=True)
class WorkerSettings:
    """One engine worker. Sizes in bytes or tokens as named; None takes what the model or the machine gives."""

    model_dir: Path
    worker_id: str
    routers: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 0
    role: str = "both"
    model_name: str | None = None  # default: the checkpoint folder's name
    block_size: int = 16
    kv_cache_mib: int = 1024  # taken from the system as blocks are used
    max_model_len: int | None = None
    max_batched_tokens: int = 512
    max_running: int = 64
    max_waiting: int = 256
    threads: int | None = None
    insecure: bool = False

    def check(self) -> None:
        """Raise InvalidRequest for what can be seen to be wrong before the checkpoint is read."""
        rpc.check_bind_host(self.host, insecure=self.insecure)
        if self.role not in ROLES:
            raise InvalidRequest("role", self.role, f"one of {', '.join(ROLES)}")
        for name in ("kv_cache_mib", "block_size"):
            if getattr(self, name) < 1:
                raise InvalidRequest(name, getattr(self, name), "at least 1")
        if self.threads is not None and self.threads < 1:
            raise InvalidRequest("threads", self.threads, "at least 1")
        if not self.model_dir.is_dir():
            raise InvalidRequest("model", str(self.model_dir), "a folder with a Hugging Face checkpoint")


@asynccontextmanager
async def running_worker(settings: WorkerSettings) -> AsyncIterator[str]:
    """Load the model, serve it, and join the routers' fleets; yields the worker's address."""
    # Torch is loaded by the processes that compute, not by a router or a client.
    from worker.client import FleetMember, registration
    from worker.engine_thread import EngineThread
    from worker.service import running_server

    settings.check()
    epoch = time.time_ns() // 1_000_000
    identity, engine = await asyncio.to_thread(_build_engine, settings, epoch)
    thread = EngineThread(engine)
    thread.start()
    try:
        async with AsyncExitStack() as stack:
            address = await stack.enter_async_context(running_server(identity, thread, settings.host, settings.port))
            request = registration(identity, thread, address, ROLES[settings.role])
            for router in settings.routers:
                member = FleetMember(router, request, identity, thread)
                stack.push_async_callback(_cancel, asyncio.create_task(_stay(member)))
            yield address
    finally:
        thread.stop()


async def _stay(member: FleetMember) -> None:
    """A router that refuses this worker for good ends the whole process, with its reason."""
    try:
        await member.run()
    except grpc.aio.AioRpcError as error:
        _log.error("the router refuses this worker: %s", error.details())
        signal.raise_signal(signal.SIGTERM)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _build_engine(settings: WorkerSettings, epoch: int) -> tuple[WorkerIdentity, Engine]:
    """Checkpoint -> model -> runner -> engine. Raises CheckpointError or InvalidRequest before memory is taken."""
    import torch

    from worker.checkpoint import load_model
    from worker.config import ModelConfig
    from worker.engine import Engine
    from worker.kv_cache.paged import blocks_within
    from worker.runner import TorchRunner
    from worker.scheduler import SchedulerConfig
    from worker.service import WorkerIdentity
    from worker.tokenizer import Tokenizer, tokenizer_files

    torch.set_num_threads(settings.threads or os.cpu_count() or 1)
    model_config = ModelConfig.load(settings.model_dir)
    files = tokenizer_files(settings.model_dir)
    tokenizer = Tokenizer(files, settings.model_dir)
    num_blocks = blocks_within(settings.kv_cache_mib * 2**20, model_config, settings.block_size, torch.float32)
    longest = min(model_config.max_position_embeddings, num_blocks * settings.block_size)
    config = SchedulerConfig(
        num_blocks=num_blocks,
        block_size=settings.block_size,
        max_model_len=settings.max_model_len or longest,
        max_batched_tokens=settings.max_batched_tokens,
        max_running=settings.max_running,
        max_waiting=settings.max_waiting,
    )
    if config.max_model_len > model_config.max_position_embeddings:
        limit = f"at most the model's {model_config.max_position_embeddings}"
        raise InvalidRequest("max_model_len", config.max_model_len, limit)
    model = load_model(settings.model_dir)
    card = fleet_pb2.ModelCard(
        name=settings.model_name or settings.model_dir.resolve().name,
        max_model_len=config.max_model_len,
        vocab_size=model_config.vocab_size,
        block_size=settings.block_size,
        tokenizer_sha256=tokenizer_sha256(files),
    )
    engine = Engine(
        config,
        TorchRunner(model, num_blocks, settings.block_size),
        EventLog(settings.worker_id, epoch, settings.block_size, EVENT_BATCHES_KEPT),
        new_decoder=tokenizer.detokenizer,
        eos_token_ids=frozenset(model_config.eos_token_ids),
        clock=time.monotonic,
        wall_clock=time.time,
    )
    return WorkerIdentity(settings.worker_id, epoch, card, files, fleet_secret()), engine


async def serve_until_stopped(serving: AbstractAsyncContextManager[str], *, supervised: bool) -> None:
    """Run a server until SIGINT or SIGTERM. A supervised one also ends with its parent, and says where it serves."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    if supervised:
        # The parent holds the other end of standard input: its end is the parent's.
        loop.add_reader(sys.stdin.fileno(), lambda: None if os.read(sys.stdin.fileno(), 4096) else stopped.set())
    async with serving as address:
        if supervised:
            print(json.dumps({"address": address}), flush=True)
        else:
            _log.info("serving on %s", address)
        await stopped.wait()
