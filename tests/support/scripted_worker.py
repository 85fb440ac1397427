"""A worker whose answers a test writes: real gRPC, real events, real tokenizer files, no engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kv_events.bus.grpc import KvEventsService
from kv_events.events import AllBlocksCleared, BlockStored
from kv_events.log import EventLog
from radix.hashing import BlockHasher, derive_salt
from radix.keys import hashes_of
from rhizome import rpc, ticket
from rhizome.tokenizer import tokenizer_sha256
from rhizome.v1 import fleet_pb2, fleet_pb2_grpc, generation_pb2, worker_pb2

MODEL = "scripted"
BLOCK_SIZE = 16
VOCAB_SIZE = 259
MAX_MODEL_LEN = 4096
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

Script = Callable[[worker_pb2.WorkerGenerateRequest, "grpc.aio.ServicerContext[Any, Any]"], AsyncIterator[bytes]]


def byte_tokenizer_files() -> dict[str, bytes]:
    """A byte-level tokenizer: one token a byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|bos|>", "<|eos|>", "<|pad|>"])
    config = {"bos_token": "<|bos|>", "eos_token": {"content": "<|eos|>"}, "chat_template": TEMPLATE}
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


def chunk(text: str, **fields: Any) -> bytes:
    """A chunk as it goes over the wire."""
    return generation_pb2.GenerateChunk(text=text, token_ids=list(text.encode()), **fields).SerializeToString()


async def two_words(request: worker_pb2.WorkerGenerateRequest, context: Any) -> AsyncIterator[bytes]:
    """The usual script."""
    usage = generation_pb2.Usage(prompt_tokens=len(request.token_ids) // 4)
    yield chunk("hello ", worker_id="scripted", usage=usage)
    yield chunk("world", finish_reason=generation_pb2.FINISH_REASON_STOP, usage=usage)


class ScriptedWorker:
    """Answers by `script`, keeps the requests it got, counts the calls that were cancelled."""

    def __init__(self, worker_id: str = "worker-0", epoch: int = 1, secret: bytes = b"", **registration: Any) -> None:
        self.files = byte_tokenizer_files()
        self.log = EventLog(worker_id, epoch, BLOCK_SIZE)
        self.script: Script = two_words
        self.requests: list[worker_pb2.WorkerGenerateRequest] = []
        self.time_left: list[float | None] = []
        self.cancelled = asyncio.Event()
        self.status = worker_pb2.WorkerStatus(worker_id=worker_id, epoch=epoch, blocks_total=1000)
        self.secret = secret
        model = fleet_pb2.ModelCard(
            name=MODEL,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB_SIZE,
            block_size=BLOCK_SIZE,
            tokenizer_sha256=tokenizer_sha256(self.files),
        )
        self.registration = fleet_pb2.RegisterRequest(
            worker_id=worker_id,
            epoch=epoch,
            role=fleet_pb2.WORKER_ROLE_BOTH,
            model=model,
            blocks_total=1000,
            max_running=8,
            max_waiting=8,
            max_batched_tokens=512,
        )
        self.registration.MergeFrom(fleet_pb2.RegisterRequest(**registration))
        self.server: grpc.aio.Server

    @property
    def worker_id(self) -> str:
        return self.registration.worker_id

    async def generate(self, request: worker_pb2.WorkerGenerateRequest, context: Any) -> None:
        self.requests.append(request)
        self.time_left.append(context.time_remaining())
        try:
            async for piece in self.script(request, context):
                await context.write(piece)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def get_tokenizer(self, request: worker_pb2.GetTokenizerRequest, context: Any) -> None:
        for name, data in self.files.items():
            half = len(data) // 2
            for part in (data[:half], data[half:]):
                await context.write(worker_pb2.FileChunk(name=name, data=part).SerializeToString())

    async def clear_cache(self, request: worker_pb2.ClearCacheRequest, context: Any) -> bytes:
        blocks = len(self.log)
        self.log.append([AllBlocksCleared()], 0.0)
        return worker_pb2.ClearCacheResponse(blocks=blocks).SerializeToString()

    def hold(self, tokens: list[int]) -> int:
        """Say that the blocks of these tokens are held; returns how many."""
        hashes = hashes_of(BlockHasher(BLOCK_SIZE, derive_salt(MODEL)).keys(tokens))
        self.log.append([BlockStored(hashes, 0, BLOCK_SIZE)], 0.0)
        return len(hashes)

    async def start(self) -> None:
        """Serve on a free port."""
        self.server = grpc.aio.server(options=rpc.SERVER_OPTIONS)
        handlers = {
            "Generate": grpc.unary_stream_rpc_method_handler(
                self.generate, request_deserializer=worker_pb2.WorkerGenerateRequest.FromString
            ),
            "GetTokenizer": grpc.unary_stream_rpc_method_handler(
                self.get_tokenizer, request_deserializer=worker_pb2.GetTokenizerRequest.FromString
            ),
            "ClearCache": grpc.unary_unary_rpc_method_handler(
                self.clear_cache, request_deserializer=worker_pb2.ClearCacheRequest.FromString
            ),
        }
        worker = grpc.method_handlers_generic_handler("rhizome.v1.Worker", handlers)
        self.server.add_generic_rpc_handlers((worker, KvEventsService(self.log).handler()))
        self.registration.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        await self.server.start()

    async def register(self, router: str) -> fleet_pb2.RegisterResponse:
        """Join once; raises what the router refuses."""
        ticket.sign_member(self.secret, self.registration)
        async with grpc.aio.insecure_channel(router) as channel:
            return await fleet_pb2_grpc.FleetStub(channel).Register(self.registration, timeout=10)

    async def heartbeat(self, router: str) -> fleet_pb2.HeartbeatResponse:
        """One report."""
        async with grpc.aio.insecure_channel(router) as channel:
            request = fleet_pb2.HeartbeatRequest(status=self.status)
            ticket.sign_member(self.secret, request)
            return await fleet_pb2_grpc.FleetStub(channel).Heartbeat(request, timeout=10)

    async def deregister(self, router: str) -> None:
        """Leave."""
        async with grpc.aio.insecure_channel(router) as channel:
            registration = self.registration
            request = fleet_pb2.DeregisterRequest(worker_id=registration.worker_id, epoch=registration.epoch)
            ticket.sign_member(self.secret, request)
            await fleet_pb2_grpc.FleetStub(channel).Deregister(request, timeout=10)

    async def kill(self) -> None:
        """Gone, without a word."""
        await self.server.stop(None)


@asynccontextmanager
async def serving_worker(router: str, *args: Any, **kwargs: Any) -> AsyncIterator[ScriptedWorker]:
    """A scripted worker that has joined a router; killed at the end."""
    worker = ScriptedWorker(*args, **kwargs)
    await worker.start()
    try:
        await worker.register(router)
        yield worker
    finally:
        await worker.kill()
