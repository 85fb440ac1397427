"""Router and torch workers together, in one process, every invariant checked after each step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import pytest

from deploy.processes import WorkerSettings, running_worker
from rhizome.errors import RhizomeError
from rhizome.v1 import fleet_pb2, fleet_pb2_grpc
from router.client import Client
from router.service import running_router

WORKERS = ("worker-0", "worker-1")


@asynccontextmanager
async def fleet(model: Path, **settings: object) -> AsyncIterator[Client]:
    """A client of two workers; at the end nothing runs, no block is in use, no request is counted in flight."""
    async with AsyncExitStack() as stack:
        address = await stack.enter_async_context(running_router(validate=True))
        for name in WORKERS:
            options = {"threads": 1, "kv_cache_mib": 8, "validate": True, "routers": (address,)} | settings
            await stack.enter_async_context(running_worker(WorkerSettings(model, name, **options)))  # type: ignore[arg-type]
        client = await stack.enter_async_context(Client(address))
        await client.wait_ready(len(WORKERS))
        yield client
        async with asyncio.timeout(30):
            while not all(
                worker.in_flight == worker.status.blocks_in_use == worker.status.running == worker.status.waiting == 0
                for worker in await client.workers()
            ):
                await asyncio.sleep(0.05)


def with_fleet(model: Path, test: Callable[[Client], Awaitable[None]], **settings: object) -> None:
    async def main() -> None:
        async with fleet(model, **settings) as client:
            await test(client)

    asyncio.run(main())


def test_routed_and_direct_answers_are_the_same_and_share_the_cache(tiny_model: Path) -> None:
    """Direct mode carries the router's keys: what one way stored, the other finds."""

    async def test(client: Client) -> None:
        messages = [{"role": "user", "content": "where do the roots end? " * 4}]
        routed = await client.complete(messages=messages, max_tokens=12, temperature=0.0)
        async with asyncio.timeout(30):
            while not (await client.explain(messages=messages)).candidates[0].cached_tokens:
                await asyncio.sleep(0.02)
        direct = await client.complete(messages=messages, max_tokens=12, temperature=0.0, direct=True)
        assert direct.token_ids == routed.token_ids
        assert direct.worker_id == routed.worker_id
        assert direct.cached_tokens == direct.prompt_tokens // 16 * 16

    with_fleet(tiny_model, test)


def test_an_empty_prompt_is_refused_although_a_tokenizer_would_begin_it(tiny_model: Path) -> None:
    """This one adds a BOS; an empty text is empty all the same. An empty message in a chat is no empty prompt."""

    async def test(client: Client) -> None:
        for empty in ({"prompt": ""}, {"token_ids": []}, {"messages": []}):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await client.complete(**empty, max_tokens=1)  # type: ignore[arg-type]
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (await client.complete(messages=[{"role": "user", "content": ""}], max_tokens=1)).prompt_tokens > 0

    with_fleet(tiny_model, test)


def test_many_at_once_on_little_memory_answer_as_each_would_alone(tiny_model: Path) -> None:
    """Preemption, eviction, forks and cancellations under way; every answer that is awaited is the lone one's."""

    async def test(client: Client) -> None:
        shared = "the same beginning for all of them " * 5

        async def ask(number: int, **extra: object) -> list[list[int]]:
            answer = await client.complete(
                f"{number // 2} {shared * (number % 4)} and number {number}",
                max_tokens=60,
                temperature=float(number % 2),
                seed=number,
                n=1 + number % 3,
                ignore_eos=True,
                direct=bool(number % 5 == 0),
                **extra,  # type: ignore[arg-type]
            )
            return [choice.token_ids for choice in answer.choices]

        alone = [await ask(number, bypass_prefix_cache=True) for number in range(24)]
        for _ in range(2):
            gone = [asyncio.create_task(ask(number)) for number in range(24)]
            together = asyncio.gather(*(ask(number) for number in range(24)))
            await asyncio.sleep(0)
            for task in gone:
                task.cancel()
            assert await together == alone
        workers = await client.workers()
        assert sum(worker.status.preemptions for worker in workers) > 0, "this was to be tight"

    with_fleet(tiny_model, test, kv_cache_mib=1, max_model_len=1024, block_size=16)


def test_an_option_that_is_unset_or_unknown(tiny_model: Path) -> None:
    """None is unset, vLLM's top_k=-1 is off, a name that does not exist is refused with those that do."""

    async def test(client: Client) -> None:
        answer = await client.complete("x", max_tokens=2, temperature=None, seed=None, top_k=-1, stop=None)  # type: ignore[arg-type]
        assert answer.completion_tokens == 2
        with pytest.raises(RhizomeError, match="sampling.best_of is 3: the options are .*temperature"):
            await client.complete("x", best_of=3)  # type: ignore[call-arg]

    with_fleet(tiny_model, test)


def test_a_worker_that_the_router_refuses_for_good_ends_with_its_reason(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another secret than the fleet's: not a clean exit, and not a retry for ever."""
    monkeypatch.setenv("RHIZOME_FLEET_SECRET", "quite another secret")

    async def main() -> None:
        async with running_router(secret=b"the fleet's own secret") as address:
            settings = WorkerSettings(tiny_model, "worker-0", routers=(address,), threads=1, kv_cache_mib=8)
            async with asyncio.timeout(60), running_worker(settings):
                await asyncio.Event().wait()

    with pytest.raises(RhizomeError, match="refuses this worker: RegisterRequest of worker .*: not signed under"):
        asyncio.run(main())


def test_a_router_with_a_passing_defect_keeps_its_workers(tiny_model: Path) -> None:
    """UNKNOWN from a heartbeat is no refusal: the worker registers again."""
    registered = asyncio.Event()

    class Flawed(fleet_pb2_grpc.FleetServicer):
        registrations = 0

        async def Register(self, request: fleet_pb2.RegisterRequest, context: object) -> fleet_pb2.RegisterResponse:
            self.registrations += 1
            if self.registrations == 2:
                registered.set()
            return fleet_pb2.RegisterResponse(lease_s=3, heartbeat_interval_s=0.05)

        async def Heartbeat(self, request: fleet_pb2.HeartbeatRequest, context: object) -> fleet_pb2.HeartbeatResponse:
            if self.registrations < 2:
                raise RuntimeError("a passing defect")
            return fleet_pb2.HeartbeatResponse()

        async def Deregister(
            self, request: fleet_pb2.DeregisterRequest, context: object
        ) -> fleet_pb2.DeregisterResponse:
            return fleet_pb2.DeregisterResponse()

    async def main() -> None:
        server = grpc.aio.server()
        fleet_pb2_grpc.add_FleetServicer_to_server(Flawed(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        settings = WorkerSettings(tiny_model, "w", routers=(f"127.0.0.1:{port}",), threads=1, kv_cache_mib=8)
        async with asyncio.timeout(60), running_worker(settings):
            await registered.wait()
        await server.stop(None)

    asyncio.run(main())
