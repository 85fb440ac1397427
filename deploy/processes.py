"""What one router process and one worker process are made of. Everything is wired here, and only here."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from deploy.doctor import announce_core
from deploy.router_list import RouterList
from deploy.served_model import check_time_scale
from deploy.transfers import DEFAULT_TRANSPORTS, check_transports, transfers
from kv_events.bus.redis_registry import events_at, parse_registry_url
from kv_events.bus.url import BusUrl, parse_bus_url, publishing
from kv_events.log import EventLog
from rhizome import rpc
from rhizome.errors import InvalidRequest, Unavailable
from rhizome.ticket import SECRET_VARIABLE, fleet_secret
from rhizome.tokenizer import tokenizer_sha256
from rhizome.v1 import fleet_pb2
from rhizome.validate import check_address, check_name

if TYPE_CHECKING:
    from worker.engine import Engine
    from worker.engine_thread import EngineThread
    from worker.service import WorkerIdentity
    from worker.step_time import Hardware
    from worker.transfer.memory import BlockMemory

_log = logging.getLogger(__name__)

EVENT_BATCHES_KEPT = 8192  # a router that is away for longer takes a snapshot
WILDCARDS = ("0.0.0.0", "::", "[::]")  # noqa: S104 - refused, not bound
WORKER_PLACE = "{worker}"
ROLES = {
    "both": fleet_pb2.WORKER_ROLE_BOTH,
    "prefill": fleet_pb2.WORKER_ROLE_PREFILL,
    "decode": fleet_pb2.WORKER_ROLE_DECODE,
}


@dataclass(frozen=True)
class WorkerSettings:
    """One engine worker. Sizes in bytes or tokens as named; None takes what the model or the machine gives."""

    model_dir: Path | None  # of a checkpoint; None where hardware is simulated
    worker_id: str
    routers: tuple[str, ...] = ()
    registry: str = ""  # redis://host:port/FLEET, where all routers that read it find this worker
    host: str = "127.0.0.1"
    port: int = 0
    role: str = "both"
    model_name: str | None = None  # default: the checkpoint folder's name, or the hardware's
    block_size: int = 16
    kv_cache_mib: int = 1024  # taken from the system as blocks are used
    max_model_len: int | None = None
    max_batched_tokens: int | None = None  # default: 512, or the hardware's
    max_running: int | None = None  # default: 64, or the hardware's
    max_waiting: int = 256
    events: tuple[str, ...] = ()  # bus URLs to publish at besides the own server; {worker} stands for the id
    transports: tuple[str, ...] = DEFAULT_TRANSPORTS  # for KV blocks from and for other workers, the best first
    event_token_ids: bool = False  # events tell the prompts' tokens; whoever reads them reads the prompts
    threads: int | None = None
    insecure: bool = False
    advertise: str | None = None  # the host by which routers and clients reach this worker; default: `host`
    validate: bool = False  # check every invariant of the engine after each step; for tests
    hardware: Hardware | None = None  # to simulate instead of computing
    time_scale: float = 1.0  # simulated hardware runs so many times faster

    def check(self) -> None:
        """Raise InvalidRequest for what can be seen to be wrong before the checkpoint is read."""
        if self.hardware is None and self.model_dir is None:
            raise InvalidRequest("model", None, "a folder with a Hugging Face checkpoint, or --simulated instead")
        rpc.check_bind_host(self.host, insecure=self.insecure)
        fleet_secret()  # refuses one that could be guessed
        check_name("id", self.worker_id)
        check_name("model_name", self.served_name)
        if self.host in WILDCARDS and (self.routers or self.registry) and not self.advertise:
            raise InvalidRequest("advertise", None, f"the host by which others reach it, as {self.host} is a wildcard")
        for router in self.routers:
            check_address("router", router)
        if self.registry:
            parse_registry_url(self.registry)
        for bus in self.buses:
            self._check_bus(bus)
        if self.role not in ROLES:
            raise InvalidRequest("role", self.role, f"one of {', '.join(ROLES)}")
        check_transports(self.transports)
        for name in ("kv_cache_mib", "block_size"):
            if getattr(self, name) < 1:
                raise InvalidRequest(name, getattr(self, name), "at least 1")
        if self.threads is not None and self.threads < 1:
            raise InvalidRequest("threads", self.threads, "at least 1")
        memory_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        if self.kv_cache_mib > memory_mib:
            raise InvalidRequest("kv_cache_mib", self.kv_cache_mib, f"at most this machine's {memory_mib} MiB")
        if self.hardware is not None:
            check_time_scale(self.time_scale)
        elif self.model_dir is not None and not self.model_dir.is_dir():
            raise InvalidRequest("model", str(self.model_dir), "a folder with a Hugging Face checkpoint")

    @property
    def served_name(self) -> str:
        """What clients call the model."""
        if self.model_name or self.hardware:
            return self.model_name or (self.hardware.name if self.hardware else "")
        return self.model_dir.resolve().name if self.model_dir else ""

    @property
    def buses(self) -> list[BusUrl]:
        """Where events are published besides: at a registry's Redis, too. Raises InvalidRequest."""
        buses = [parse_bus_url(url.replace(WORKER_PLACE, quote(self.worker_id, safe=""))) for url in self.events]
        if self.registry and not any(bus.scheme.startswith("redis") for bus in buses):
            buses.append(parse_bus_url(events_at(parse_registry_url(self.registry), self.worker_id)))
        return buses

    def _check_bus(self, bus: BusUrl) -> None:
        if bus.scheme == "memory":
            raise InvalidRequest("events", str(bus), "grpc://, zmq:// or redis://: nobody else reads this one")
        if bus.scheme in ("grpc", "zmq"):
            rpc.check_bind_host(bus.host, insecure=self.insecure)
            if bus.host in WILDCARDS and (self.routers or self.registry) and not self.advertise:
                raise InvalidRequest("advertise", None, f"the host by which others read {bus}")

    def reached_at(self, bound: str) -> str:
        """The address to register for one that is bound as host:port."""
        return f"{self.advertise}:{bound.rpartition(':')[2]}" if self.advertise else bound

    def read_at(self, url: str) -> str:
        """The bus URL to register for one that is published at."""
        bus = parse_bus_url(url)
        if not self.advertise or bus.host not in WILDCARDS:
            return url
        return replace(bus, host=self.advertise.strip("[]")).url

    def read_by_routers(self, urls: list[str]) -> str:
        """Which of those that are published at to register; empty: routers read at the worker's own port."""
        ours = [url for url in urls if parse_bus_url(url).dialect != "vllm"]  # that is for others, without digests
        return self.read_at(ours[0]) if ours else ""


@asynccontextmanager
async def running_worker(settings: WorkerSettings, routers: RouterList | None = None) -> AsyncIterator[str]:
    """Load the model, serve it, and join the routers' fleets; yields the worker's address.

    `routers` are those of the settings, unless given as a list that changes.

    Raises InvalidRequest or CheckpointError for what cannot be served; later Refused when a router will not have this
    worker, and Unavailable when its engine has failed for good.
    """
    # Torch is loaded by the processes that compute, not by a router or a client.
    from worker.client import FleetMember, registration
    from worker.engine_thread import EngineThread
    from worker.registry_member import RegistryMember
    from worker.service import running_server

    settings.check()
    epoch = time.time_ns() // 1_000_000
    identity, engine, memory = await asyncio.to_thread(_build_engine, settings, epoch)
    thread = EngineThread(engine)
    thread.start()
    try:
        async with (
            _published(engine.event_log, settings) as urls,  # outside, for the end of the log is published, too
            transfers(settings, identity, thread, memory) as moved,
            running_server(
                identity, thread, settings.host, settings.port, moved.peers, handlers=moved.handlers
            ) as address,
        ):
            events_url = settings.read_by_routers(urls)
            request = registration(
                identity,
                thread,
                settings.reached_at(address),
                ROLES[settings.role],
                events_url,
                offers=moved.offers_at(address),
                fetch_token_s=moved.fetch_token_s,
            )
            listed = routers or RouterList(settings.routers)
            members = [listed.follow(lambda router: FleetMember(router, request, identity, thread).run())]
            if settings.registry:
                members.append(RegistryMember(parse_registry_url(settings.registry), request, identity, thread).run())
            async with _beside(_end_with(thread), *members):
                yield address
    finally:
        thread.stop()


@asynccontextmanager
async def _published(log: EventLog, settings: WorkerSettings) -> AsyncIterator[list[str]]:
    """Publish `log` at all of the settings' buses until left; yields the URLs to read it at."""
    topic = f"kv@{settings.worker_id}@{settings.served_name}"
    async with AsyncExitStack() as stack:
        urls = []
        for bus in settings.buses:
            publication = publishing(log, bus, topic=topic, insecure=settings.insecure)
            urls.append(await stack.enter_async_context(publication))
            _log.info("events are published at %s", parse_bus_url(urls[-1]))
        yield urls


@asynccontextmanager
async def _beside(*works: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `works` beside a block. The first that fails ends the block, which then raises that error.

    Unlike a TaskGroup it leaves the block's own errors as they are.
    """
    owner = asyncio.current_task()
    assert owner is not None
    failures: list[BaseException] = []

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            failures.append(error)
            owner.cancel()

    tasks = [asyncio.create_task(work) for work in works]
    for task in tasks:
        task.add_done_callback(ended)
    try:
        yield
    except asyncio.CancelledError:
        if not failures:
            raise
        owner.uncancel()
        raise failures[0] from None
    finally:
        for task in tasks:
            task.remove_done_callback(ended)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _end_with(thread: EngineThread) -> None:
    try:
        await asyncio.shield(asyncio.wrap_future(thread.ended))
    except Exception as error:
        raise Unavailable(f"the engine failed: {error}") from error


def _build_engine(settings: WorkerSettings, epoch: int) -> tuple[WorkerIdentity, Engine, BlockMemory | None]:
    """Model -> engine, and its KV cache where blocks of it can travel.

    Raises CheckpointError or InvalidRequest before memory is taken.
    """
    from deploy.served_model import simulated_model, torch_model
    from worker.engine import Engine
    from worker.service import WorkerIdentity
    from worker.tokenizer import Tokenizer

    if settings.hardware is not None:
        model = simulated_model(settings, settings.hardware)
    else:
        assert settings.model_dir is not None  # checked
        model = torch_model(settings, settings.model_dir)
    config = model.config
    card = fleet_pb2.ModelCard(
        name=settings.served_name,
        max_model_len=config.max_model_len,
        vocab_size=model.vocab_size,
        block_size=config.block_size,
        tokenizer_sha256=tokenizer_sha256(model.tokenizer_files),
    )
    _log.info(
        "model %s: %d blocks of %d tokens, at most %d tokens a request",
        card.name,
        config.num_blocks,
        config.block_size,
        config.max_model_len,
    )
    tokenizer = Tokenizer(model.tokenizer_files, settings.model_dir or "")
    engine = Engine(
        config,
        model.runner,
        EventLog(settings.worker_id, epoch, settings.block_size, EVENT_BATCHES_KEPT),
        new_decoder=tokenizer.detokenizer,
        eos_token_ids=model.eos_token_ids,
        clock=model.clock,
        wall_clock=time.time,
        validate=settings.validate,
    )
    identity = WorkerIdentity(settings.worker_id, epoch, card, model.tokenizer_files, fleet_secret())
    return identity, engine, model.memory


async def serve_until_stopped(serving: AbstractAsyncContextManager[str], *, supervised: bool) -> None:
    """Run a server until SIGINT or SIGTERM. A supervised one also ends with its parent, and says where it serves."""

    async def serve() -> None:
        async with serving as address:
            if supervised:
                print(json.dumps({"address": address}), flush=True)
            else:
                if not fleet_secret():
                    _log.info("no %s: nothing is signed, and block keys are made from public names", SECRET_VARIABLE)
                announce_core()
                _log.info("serving on %s", address)
            await asyncio.Event().wait()

    await until_signal(serve(), end_with_stdin=supervised)


async def until_signal(work: Coroutine[Any, Any, None], *, end_with_stdin: bool = False) -> None:
    """Run `work` until it ends or a first SIGINT or SIGTERM cancels it, at whatever point; a second one is not held up.

    With `end_with_stdin` the end of standard input does the same: its other end is held by the parent process.
    """
    task = asyncio.create_task(work)
    loop = asyncio.get_running_loop()

    def stop() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        if end_with_stdin:
            loop.remove_reader(sys.stdin.fileno())
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    if end_with_stdin:
        loop.add_reader(sys.stdin.fileno(), lambda: None if os.read(sys.stdin.fileno(), 4096) else stop())
    with suppress(asyncio.CancelledError):
        await task
