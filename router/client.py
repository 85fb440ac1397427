"""Clients of a router, asynchronous and synchronous. gRPC's errors are raised as they are: `details()` says it all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Generator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

import grpc
import numpy as np
from numpy.typing import ArrayLike

from radix.hashing import as_tokens
from radix.keys import Hashes
from radix.tree import HotPrefix
from rhizome import rpc
from rhizome.errors import InvalidRequest
from rhizome.v1 import generation_pb2, router_pb2, router_pb2_grpc, worker_pb2_grpc
from router.whole_tree import ChunkJoiner, WholeTree, joined

POLL_S = 0.05
CALL_TIMEOUT_S = 30.0
TREE_TIMEOUT_S = 300.0  # a whole index may be a gigabyte

_NOT_READY = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)


class Ask(TypedDict, total=False):
    """What may be said of a request beside its text: one of messages and token_ids instead, and how to answer."""

    messages: Sequence[Mapping[str, str]]  # each with role and content
    token_ids: ArrayLike
    model: str
    policy: str
    priority: int
    session_id: str
    tenant: str
    request_id: str
    bypass_prefix_cache: bool
    # Sampling: rhizome.v1.SamplingParams says what each means.
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    max_tokens: int
    min_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logprobs: int
    n: int


@dataclass(slots=True)
class Choice:
    """One answer of a request."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""  # "stop" or "length"
    logprobs: list[generation_pb2.TokenLogprob] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)  # from the call to each chunk that brought tokens

    @property
    def itl_s(self) -> list[float]:
        """Times between tokens as a client sees them: from each chunk that brought some to the next."""
        return [later - sooner for sooner, later in pairwise(self.times_s)]


@dataclass(slots=True)
class Completion:
    """A request's whole answer. `text`, `token_ids`, `finish_reason` and `itl_s` are the first choice's."""

    choices: list[Choice] = field(default_factory=list)
    worker_ids: list[str] = field(default_factory=list)  # that answered, in order
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    ttft_s: float = 0.0  # from the call to the first chunk
    total_s: float = 0.0

    @property
    def text(self) -> str:
        return self.choices[0].text if self.choices else ""

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids if self.choices else []

    @property
    def finish_reason(self) -> str:
        return self.choices[0].finish_reason if self.choices else ""

    @property
    def itl_s(self) -> list[float]:
        return self.choices[0].itl_s if self.choices else []

    @property
    def worker_id(self) -> str:
        """The first that answered."""
        return self.worker_ids[0] if self.worker_ids else ""

    def add(self, chunk: generation_pb2.GenerateChunk, elapsed_s: float) -> None:
        """Append a piece that came `elapsed_s` after the call."""
        self.ttft_s = self.ttft_s or elapsed_s
        self.total_s = elapsed_s
        if chunk.worker_id and chunk.worker_id not in self.worker_ids[-1:]:
            self.worker_ids.append(chunk.worker_id)
        while len(self.choices) <= chunk.index:
            self.choices.append(Choice())
        choice = self.choices[chunk.index]
        choice.text += chunk.text
        choice.token_ids += chunk.token_ids
        if chunk.token_ids:
            choice.times_s.append(elapsed_s)
        choice.logprobs += chunk.logprobs
        if chunk.finish_reason:
            choice.finish_reason = generation_pb2.FinishReason.Name(chunk.finish_reason)[14:].lower()
        if chunk.HasField("usage"):
            self.prompt_tokens = chunk.usage.prompt_tokens
            self.cached_tokens = chunk.usage.cached_tokens
            self.completion_tokens = max(self.completion_tokens, chunk.usage.completion_tokens)


def build_request(prompt: str | None = None, **ask: Unpack[Ask]) -> router_pb2.GenerateRequest:
    """The message of a request. Raises InvalidRequest for what no message can hold."""
    values: dict[str, Any] = {name: value for name, value in ask.items() if value is not None}
    for name in values.keys() - Ask.__annotations__.keys():
        limit = f"the options are {', '.join(sorted(Ask.__annotations__))}"
        raise InvalidRequest(f"sampling.{name}", values[name], limit)
    if values.get("top_k") == -1:  # vLLM's other word for off
        values["top_k"] = 0
    request = router_pb2.GenerateRequest()
    messages, token_ids = values.pop("messages", None), values.pop("token_ids", None)
    if sum(given is not None for given in (prompt, messages, token_ids)) != 1:
        raise InvalidRequest("prompt", prompt, "exactly one of a text, messages and token_ids")
    try:
        if prompt is not None:
            request.text = prompt
        elif messages is not None:
            request.chat.SetInParent()
            for message in messages:
                request.chat.messages.add(role=message["role"], content=message["content"])
        elif token_ids is not None:
            request.token_ids.packed = as_tokens(token_ids).astype("<u4", copy=False).tobytes()
    except (TypeError, ValueError, KeyError) as error:
        raise InvalidRequest("prompt", prompt or messages or token_ids, str(error)) from error
    for name in ("model", "policy", "priority", "session_id", "tenant", "request_id", "bypass_prefix_cache"):
        if name in values:
            _set(request, name, values.pop(name), name)
    for name, value in values.items():
        _set(request.sampling, name, value, f"sampling.{name}")
    return request


def _set(message: Any, name: str, value: object, field: str) -> None:
    try:
        if name in ("stop", "stop_token_ids"):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidRequest(field, value, str(error)) from error


def _joined(chunks: Iterable[router_pb2.IndexChunk]) -> tuple[Hashes, bytes]:
    parts = list(chunks)
    hashes = np.frombuffer(b"".join(part.block_hashes for part in parts), "<u8").astype(np.uint64)
    return hashes, parts[0].digest


def _timed_out(workers: int, timeout_s: float, problem: str) -> TimeoutError:
    return TimeoutError(f"no {workers} workers were ready within {timeout_s:g} s: {problem}")


# Whoever stops listening half-way ends the call at once: the engine frees its blocks then.


async def _streamed(call: Any) -> AsyncGenerator[generation_pb2.GenerateChunk, None]:
    try:
        async for chunk in call:
            yield chunk
    finally:
        call.cancel()


def _streamed_sync(call: Any) -> Generator[generation_pb2.GenerateChunk, None, None]:
    try:
        yield from call
    finally:
        call.cancel()


class Client:
    """A client of one router; use it with `async with`."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=rpc.CHANNEL_OPTIONS)
        self.stub: router_pb2_grpc.RouterAsyncStub = router_pb2_grpc.RouterStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def generate(
        self, prompt: str | None = None, *, timeout_s: float | None = None, direct: bool = False, **ask: Unpack[Ask]
    ) -> AsyncGenerator[generation_pb2.GenerateChunk, None]:
        """The answer as it comes; `direct` streams it from the worker itself.

        Raises InvalidRequest for what no message can hold, grpc.aio.AioRpcError for all that the servers refuse.
        """
        request = build_request(prompt, **ask)
        if not direct:
            async with aclosing(_streamed(self.stub.Generate(request, timeout=timeout_s))) as chunks:
                async for chunk in chunks:
                    yield chunk
            return
        started = time.monotonic()
        route = await self.stub.Route(request, timeout=timeout_s)
        left_s = None if timeout_s is None else timeout_s - (time.monotonic() - started)
        async with grpc.aio.insecure_channel(route.worker_address, options=rpc.CHANNEL_OPTIONS) as channel:
            worker = worker_pb2_grpc.WorkerStub(channel)
            async with aclosing(_streamed(worker.Generate(route.request, timeout=left_s))) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def complete(
        self, prompt: str | None = None, *, timeout_s: float | None = None, direct: bool = False, **ask: Unpack[Ask]
    ) -> Completion:
        """The whole answer. Raises like `generate`."""
        completion = Completion()
        started = time.monotonic()
        async for chunk in self.generate(prompt, timeout_s=timeout_s, direct=direct, **ask):
            completion.add(chunk, time.monotonic() - started)
        return completion

    async def explain(self, prompt: str | None = None, **ask: Unpack[Ask]) -> router_pb2.Decision:
        """Where the router would send this request, and why."""
        return await self.stub.Explain(build_request(prompt, **ask), timeout=CALL_TIMEOUT_S)

    async def workers(self) -> list[router_pb2.WorkerEntry]:
        """Every registered worker, with what the router knows of it."""
        response = await self.stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=CALL_TIMEOUT_S)
        return list(response.workers)

    async def index(self, worker_id: str) -> tuple[Hashes, bytes]:
        """The router's view of a worker: block hashes, shape (blocks,), ascending, and the view's digest."""
        call = self.stub.GetIndex(router_pb2.GetIndexRequest(worker_id=worker_id), timeout=CALL_TIMEOUT_S)
        return _joined([chunk async for chunk in call])

    async def tree(self, hottest: int = 100) -> WholeTree:
        """The router's whole tree, loaded into one of our own, and its hottest prefixes (at most 1,000).

        Raises kv_events.wire.WireError for bytes that are none, or more than are taken.
        """
        joiner = ChunkJoiner()
        call = self.stub.GetTree(router_pb2.GetTreeRequest(hottest=hottest), timeout=TREE_TIMEOUT_S)
        try:
            async for chunk in call:
                joiner.add(chunk)
        finally:
            call.cancel()
        return await asyncio.to_thread(joiner.finish)

    async def hottest(self, limit: int = 20) -> list[HotPrefix]:
        """Where the router's last matches went: at most `limit` prefixes, most hits first."""
        request = router_pb2.GetTreeRequest(hottest=limit, without_tree=True)
        return joined([chunk async for chunk in self.stub.GetTree(request, timeout=CALL_TIMEOUT_S)]).hottest

    async def set_draining(self, worker_id: str, draining: bool) -> None:
        """Stop or resume routing to a worker."""
        request = router_pb2.SetDrainingRequest(worker_id=worker_id, draining=draining)
        await self.stub.SetDraining(request, timeout=CALL_TIMEOUT_S)

    async def clear_caches(self) -> int:
        """Clear the prefix caches of all workers; returns how many blocks they dropped."""
        response = await self.stub.ClearCaches(router_pb2.ClearCachesRequest(), timeout=CALL_TIMEOUT_S)
        return response.blocks

    async def wait_ready(self, workers: int = 1, model: str = "", timeout_s: float = 60.0) -> None:
        """Wait until so many workers would be candidates for a request. Raises TimeoutError saying what is missing."""
        deadline = time.monotonic() + timeout_s
        problem = "no answer"
        while time.monotonic() < deadline:
            try:
                decision = await self.explain(token_ids=[0], model=model)
                if len(decision.candidates) >= workers:
                    return
                problem = f"{len(decision.candidates)} are"
            except grpc.aio.AioRpcError as error:
                if error.code() not in _NOT_READY:
                    raise
                problem = error.details() or ""
            await asyncio.sleep(POLL_S)
        raise _timed_out(workers, timeout_s, problem)


class SyncClient:
    """The same without asyncio; use it with `with`. Raises grpc.RpcError where Client raises AioRpcError."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=rpc.CHANNEL_OPTIONS)
        self.stub = router_pb2_grpc.RouterStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._channel.close()

    def generate(
        self, prompt: str | None = None, *, timeout_s: float | None = None, direct: bool = False, **ask: Unpack[Ask]
    ) -> Generator[generation_pb2.GenerateChunk, None, None]:
        """See Client.generate."""
        request = build_request(prompt, **ask)
        if not direct:
            yield from _streamed_sync(self.stub.Generate(request, timeout=timeout_s))
            return
        started = time.monotonic()
        route = self.stub.Route(request, timeout=timeout_s)
        left_s = None if timeout_s is None else timeout_s - (time.monotonic() - started)
        with grpc.insecure_channel(route.worker_address, options=rpc.CHANNEL_OPTIONS) as channel:
            worker = worker_pb2_grpc.WorkerStub(channel)
            yield from _streamed_sync(worker.Generate(route.request, timeout=left_s))

    def complete(
        self, prompt: str | None = None, *, timeout_s: float | None = None, direct: bool = False, **ask: Unpack[Ask]
    ) -> Completion:
        """See Client.complete."""
        completion = Completion()
        started = time.monotonic()
        for chunk in self.generate(prompt, timeout_s=timeout_s, direct=direct, **ask):
            completion.add(chunk, time.monotonic() - started)
        return completion

    def explain(self, prompt: str | None = None, **ask: Unpack[Ask]) -> router_pb2.Decision:
        """See Client.explain."""
        return self.stub.Explain(build_request(prompt, **ask), timeout=CALL_TIMEOUT_S)

    def workers(self) -> list[router_pb2.WorkerEntry]:
        """See Client.workers."""
        return list(self.stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=CALL_TIMEOUT_S).workers)

    def index(self, worker_id: str) -> tuple[Hashes, bytes]:
        """See Client.index."""
        return _joined(self.stub.GetIndex(router_pb2.GetIndexRequest(worker_id=worker_id), timeout=CALL_TIMEOUT_S))

    def tree(self, hottest: int = 100) -> WholeTree:
        """See Client.tree."""
        return joined(self.stub.GetTree(router_pb2.GetTreeRequest(hottest=hottest), timeout=TREE_TIMEOUT_S))

    def hottest(self, limit: int = 20) -> list[HotPrefix]:
        """See Client.hottest."""
        request = router_pb2.GetTreeRequest(hottest=limit, without_tree=True)
        return joined(self.stub.GetTree(request, timeout=CALL_TIMEOUT_S)).hottest

    def set_draining(self, worker_id: str, draining: bool) -> None:
        """See Client.set_draining."""
        request = router_pb2.SetDrainingRequest(worker_id=worker_id, draining=draining)
        self.stub.SetDraining(request, timeout=CALL_TIMEOUT_S)

    def clear_caches(self) -> int:
        """See Client.clear_caches."""
        return self.stub.ClearCaches(router_pb2.ClearCachesRequest(), timeout=CALL_TIMEOUT_S).blocks

    def wait_ready(self, workers: int = 1, model: str = "", timeout_s: float = 60.0) -> None:
        """See Client.wait_ready."""
        deadline = time.monotonic() + timeout_s
        problem = "no answer"
        while time.monotonic() < deadline:
            try:
                decision = self.explain(token_ids=[0], model=model)
                if len(decision.candidates) >= workers:
                    return
                problem = f"{len(decision.candidates)} are"
            except grpc.RpcError as error:
                if error.code() not in _NOT_READY:
                    raise
                problem = error.details() or ""
            time.sleep(POLL_S)
        raise _timed_out(workers, timeout_s, problem)
