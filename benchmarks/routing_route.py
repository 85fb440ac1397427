"""Decisions over the network: our router's gRPC `Route` beside the selection service of ai-dynamo-runtime.

That one takes requests over HTTP as JSON; each side is a process of its own on one core. Both get prompts as token ids,
hash them, choose among as many workers and reserve. Ours besides follows the workers' events and takes their reports
in; the peer's index is empty, it hears no reports, and what it reserved is given back untimed. What counts is the
process's own time for a decision, so that what else the machine does changes little.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import grpc
import numpy as np

from benchmarks.measure import cores
from benchmarks.peer_index import peer_name
from benchmarks.report import Row, figure, row
from benchmarks.routing_plan import Plan
from kv_events.bus.grpc import KvEventsService
from kv_events.events import BlockStored
from kv_events.log import EventLog
from radix.hashing import BlockHasher, derive_salt
from radix.keys import Tokens, hashes_of
from rhizome import rpc
from rhizome.tokenizer import tokenizer_sha256
from rhizome.v1 import fleet_pb2, fleet_pb2_grpc, generation_pb2, router_pb2, worker_pb2
from router.client import Client
from worker.byte_tokenizer import byte_tokenizer_files

MODEL, VOCABULARY, BLOCK_SIZE = "model", 128_256, 16
BLOCKS = 1 << 16  # of a worker's memory
HOLDERS = 4  # workers that hold a prompt's blocks: every other prompt's
CALLERS = 8  # requests under way
STEP_TOKENS, STEP_S = 8192, 0.0005  # so fast that no request has to wait in the router for its worker
REPORT_S = 0.5
MOST_UNREPORTED = 3  # requests: then a worker reports at once, as its queue would look too long
START_S = 60.0


@dataclass(slots=True)
class Measured:
    """What a server did."""

    decisions: int
    wall_s: float
    cpu_s: float  # of the server's process
    client_s: float  # of this one
    latencies_s: list[float] = field(default_factory=list)
    note: str = ""


def route_rows(plan: Plan) -> list[Row]:
    """Decisions in a second of the server's time, and how long a client waits."""
    rng = np.random.default_rng(5)
    prompts = list(rng.integers(0, VOCABULARY, (plan.route_prompts, plan.decision_tokens), dtype=np.uint32))
    ours, theirs = [], []
    peer = peer_name()
    for _ in range(plan.route_repeats):
        ours.append(asyncio.run(_ours(plan, prompts)))
        if peer:
            theirs.append(asyncio.run(_peers(plan, prompts)))
    return list(_rows(plan, ours, theirs, f"{peer}, select_and_reserve over HTTP"))


def _rows(plan: Plan, ours: list[Measured], theirs: list[Measured], name: str) -> Iterator[Row]:
    what = f"Route {{}} {plan.decision_tokens} tokens W{plan.decision_workers}"

    def compared(unit: str, of: Callable[[Measured], float], title: str, note: str = "") -> Row:
        mine = figure(of(each) for each in ours)
        other = figure(of(each) for each in theirs) if theirs else None
        return row(what.format(title), unit, mine, other, peer_name=name, note=note)

    note = f"in a second of the server's process time; {ours[0].decisions} decisions at {CALLERS} at a time"
    yield compared("decisions/s", lambda each: each.decisions / each.cpu_s, "decisions", f"{note}; {ours[0].note}")
    wall = "by the clock, server and client on a core each, which others use, too"
    yield compared("decisions/s", lambda each: each.decisions / each.wall_s, "decisions by the clock", wall)
    for percent in (50, 99):
        yield compared("us", lambda each, p=percent: _percentile(each, p), f"p{percent}", f"at {CALLERS} at a time")  # type: ignore[misc]


def _percentile(measured: Measured, percent: int) -> float:
    return float(np.percentile(measured.latencies_s, percent)) * 1e6


# The server processes.


@contextmanager
def _server(arguments: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A Python module as a process on the last core of those we may use; this one keeps to the others while it runs."""
    allowed = cores()
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        preexec_fn=partial(os.sched_setaffinity, 0, allowed[-1:]),
        stderr=subprocess.DEVNULL,
        **options,
    )
    if allowed[:-1]:
        os.sched_setaffinity(0, allowed[:-1])
    with process:  # closes its pipes, too
        try:
            yield process
        finally:
            os.sched_setaffinity(0, allowed)
            process.terminate()


def _cpu_s(pid: int) -> float:
    """The time that a process's threads have run."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


async def _driven(
    process: subprocess.Popen[bytes], count: int, decide: Callable[[int, int], Awaitable[None]]
) -> Measured:
    """`count` decisions by as many callers as go side by side: decide(number, caller)."""
    latencies: list[float] = []
    numbers = iter(range(count))

    async def call(caller: int) -> None:
        for number in numbers:
            start = perf_counter()
            await decide(number, caller)
            latencies.append(perf_counter() - start)

    cpu, own, start = _cpu_s(process.pid), process_time(), perf_counter()
    await asyncio.gather(*map(call, range(CALLERS)))
    wall_s = perf_counter() - start
    return Measured(count, wall_s, _cpu_s(process.pid) - cpu, process_time() - own, latencies)


# Ours.


class _Worker:
    """A worker without an engine: it has a tokenizer, tells of blocks, and reports."""

    def __init__(self, number: int, files: dict[str, bytes], max_model_len: int) -> None:
        self.name = f"worker-{number}"
        self.log = EventLog(self.name, 1, BLOCK_SIZE)
        self.files = files
        self.done: list[str] = []  # requests that the next report ends
        self.steps = 0
        self.registration = fleet_pb2.RegisterRequest(
            worker_id=self.name,
            epoch=1,
            role=fleet_pb2.WORKER_ROLE_BOTH,
            model=fleet_pb2.ModelCard(
                name=MODEL,
                max_model_len=max_model_len,
                vocab_size=VOCABULARY,
                block_size=BLOCK_SIZE,
                tokenizer_sha256=tokenizer_sha256(files),
            ),
            blocks_total=BLOCKS,
            max_running=256,
            max_waiting=4096,
            max_batched_tokens=STEP_TOKENS,
        )

    async def _tokenizer(self, request: worker_pb2.GetTokenizerRequest, context: rpc.Context) -> None:  # noqa: ARG002
        for name, data in self.files.items():
            await context.write(worker_pb2.FileChunk(name=name, data=data).SerializeToString())

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        server = grpc.aio.server(options=rpc.SERVER_OPTIONS)
        handlers = {"GetTokenizer": rpc.streaming(worker_pb2.GetTokenizerRequest, self._tokenizer)}
        worker = grpc.method_handlers_generic_handler("rhizome.v1.Worker", handlers)
        server.add_generic_rpc_handlers((worker, KvEventsService(self.log).handler()))
        self.registration.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        try:
            yield
        finally:
            self.log.close()
            await server.stop(None)

    def report(self) -> fleet_pb2.HeartbeatRequest:
        done, self.done = self.done, []
        self.steps += 1
        status = worker_pb2.WorkerStatus(
            worker_id=self.name,
            epoch=1,
            blocks_total=BLOCKS,
            blocks_in_use=BLOCKS // 4,
            blocks_cached=BLOCKS // 2,
            prefill_steps=self.steps,
            prefill_tokens=self.steps * STEP_TOKENS,
            prefill_s=self.steps * STEP_S,
            decode_steps=self.steps,
            decode_tokens=8 * self.steps,
            decode_s=self.steps * STEP_S,
            prefilled_request_ids=done,
            finished_request_ids=done,
        )
        return fleet_pb2.HeartbeatRequest(status=status)


async def _ours(plan: Plan, prompts: list[Tokens]) -> Measured:
    environment = {name: value for name, value in os.environ.items() if name != "RHIZOME_FLEET_SECRET"}
    arguments = ("deploy.cli", "router", "--port", "0", "--supervised")
    files = byte_tokenizer_files(2 * plan.decision_tokens)
    workers = [_Worker(number, files, 2 * plan.decision_tokens) for number in range(plan.decision_workers)]
    _fill(workers, prompts)
    with _server(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        address = json.loads(await asyncio.to_thread(process.stdout.readline))["address"]
        async with AsyncExitStack() as stack:
            for worker in workers:
                await stack.enter_async_context(worker.serving())
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, options=rpc.CHANNEL_OPTIONS))
            fleet = fleet_pb2_grpc.FleetStub(channel)
            for worker in workers:
                await fleet.Register(worker.registration)
            reporting = asyncio.create_task(_report(fleet, workers))
            try:
                return await _routed(plan, process, address, fleet, workers, prompts)
            finally:
                reporting.cancel()
                await asyncio.gather(reporting, return_exceptions=True)


def _fill(workers: list[_Worker], prompts: list[Tokens]) -> None:
    hasher = BlockHasher(BLOCK_SIZE, derive_salt(MODEL))
    for number, tokens in enumerate(prompts[::2]):
        hashes = hashes_of(hasher.keys(tokens))
        for holder in range(HOLDERS):
            worker = workers[(HOLDERS * number + holder) % len(workers)]
            worker.log.append([BlockStored(hashes, 0, BLOCK_SIZE)], 0.0)


async def _report(fleet: Any, workers: list[_Worker]) -> None:
    while True:
        for worker in workers:
            await fleet.Heartbeat(worker.report())
            await asyncio.sleep(REPORT_S / len(workers))


async def _routed(
    plan: Plan,
    process: subprocess.Popen[bytes],
    address: str,
    fleet: Any,
    workers: list[_Worker],
    prompts: list[Tokens],
) -> Measured:
    by_name = {worker.name: worker for worker in workers}
    held = 0
    async with Client(address) as client:
        stub: Any = client.stub
        await client.wait_ready(len(workers), timeout_s=START_S)
        async with asyncio.timeout(START_S):
            while not all(entry.index_synced and entry.status.prefill_steps > 2 for entry in await client.workers()):
                await asyncio.sleep(REPORT_S)
        blocks = sum(entry.indexed_blocks for entry in await client.workers())

        async def decide(number: int, caller: int) -> None:  # noqa: ARG001
            nonlocal held
            packed = generation_pb2.TokenIds(packed=prompts[number % len(prompts)].astype("<u4", copy=False).tobytes())
            answer = await stub.Route(router_pb2.GenerateRequest(request_id=str(number), token_ids=packed))
            held += answer.decision.held_s > 0
            worker = by_name[answer.decision.worker_id]
            worker.done.append(answer.request.request_id)
            if len(worker.done) >= MOST_UNREPORTED:
                await fleet.Heartbeat(worker.report())

        await _driven(process, plan.route_warm_up, decide)
        held, reports = 0, sum(worker.steps for worker in workers)
        measured = await _driven(process, plan.route_decisions, lambda number, caller: decide(-1 - number, caller))
        reports = sum(worker.steps for worker in workers) - reports
    measured.note = f"ours indexes {blocks} blocks and took in {reports} reports meanwhile; {held} held"
    return measured


# The peer's.


async def _peers(plan: Plan, prompts: list[Tokens]) -> Measured:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "DYN_LOG": "off"}
    arguments = ("dynamo.select_service", "--port", str(port), "--threads", "1")
    with _server(arguments, env=environment, stdout=subprocess.DEVNULL) as process:
        async with AsyncExitStack() as stack:
            callers = [_Http(port) for _ in range(CALLERS)]
            for caller in callers:
                await stack.enter_async_context(caller.connected())
            for number in range(plan.decision_workers):
                worker = {
                    "worker_id": number,
                    "model_name": MODEL,
                    "endpoint": f"http://127.0.0.1:{number + 1}",
                    "block_size": BLOCK_SIZE,
                    "max_num_batched_tokens": STEP_TOKENS,
                    "total_kv_blocks": BLOCKS,
                    "kv_events_endpoint": f"tcp://127.0.0.1:{port}",  # required; nothing comes from there
                }
                await callers[0].call("POST", "/workers", json.dumps(worker).encode())
            return await _selected(plan, process, callers, prompts)


async def _selected(
    plan: Plan, process: subprocess.Popen[bytes], callers: list[_Http], prompts: list[Tokens]
) -> Measured:
    texts = [f'{{"model_name":"{MODEL}","token_ids":{tokens.tolist()},"selection_id":"'.encode() for tokens in prompts]

    async def decide(number: int, caller: int) -> None:
        await callers[caller].call("POST", "/select_and_reserve", texts[number % len(texts)] + b'%d"}' % number)

    async def free(numbers: Sequence[int]) -> None:
        for number in numbers:
            await callers[0].call("DELETE", f"/reservations/{number}")

    await _driven(process, plan.route_warm_up, decide)
    await free(range(plan.route_warm_up))
    whole = Measured(0, 0.0, 0.0, 0.0)
    while whole.decisions < plan.route_decisions:  # reservations are given back between, untimed
        part = await _driven(process, min(plan.route_warm_up, plan.route_decisions - whole.decisions), decide)
        await free(range(part.decisions))
        whole.decisions += part.decisions
        whole.wall_s += part.wall_s
        whole.cpu_s += part.cpu_s
        whole.latencies_s += part.latencies_s
    return whole


class _Http:
    """One connection of a client that does no more than it must: HTTP/1.1 with the lengths given."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Once the server is there."""
        async with asyncio.timeout(START_S):
            while True:
                with suppress(OSError):
                    self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
                    break
                await asyncio.sleep(0.1)
        try:
            yield
        finally:
            self._writer.close()

    async def call(self, method: str, path: str, body: bytes = b"") -> bytes:
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
        self._writer.write(head.encode() + str(len(body)).encode() + b"\r\n\r\n" + body)
        answer = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = int(answer.partition(b"content-length:")[2].partition(b"\r\n")[0])
        content = await self._reader.readexactly(length)
        if not answer.startswith((b"http/1.1 200", b"http/1.1 201")):
            raise RuntimeError(f"{method} {path}: {content[:200]!r}")
        return content
