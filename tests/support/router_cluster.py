"""A real router server with a client, for scripted workers to join."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from rhizome.v1 import router_pb2, worker_pb2
from router.client import Client
from router.service import running_router
from tests.support.scripted_worker import ScriptedWorker, chunk, serving_worker

PROMPT = list(range(100)) * 4
LONG_LEASE_S = 60.0  # scripted workers send no heartbeats unless told to


class Cluster:
    """A router, a client to it, and workers by id."""

    def __init__(self, address: str, client: Client, stack: AsyncExitStack) -> None:
        self.address = address
        self.client = client
        self._stack = stack

    async def join(self, worker_id: str = "worker-0", epoch: int = 1, **options: Any) -> ScriptedWorker:
        return await self._stack.enter_async_context(serving_worker(self.address, worker_id, epoch, **options))

    async def ready(self, workers: int = 1) -> None:
        await self.client.wait_ready(workers, timeout_s=30)

    async def entry(self, worker_id: str = "worker-0") -> router_pb2.WorkerEntry | None:
        return next((entry for entry in await self.client.workers() if entry.worker_id == worker_id), None)

    async def until(self, holds: Callable[[router_pb2.WorkerEntry | None], bool], worker_id: str = "worker-0") -> None:
        """Wait for what the router says of a worker to fulfil a condition."""
        async with asyncio.timeout(30):
            while not holds(await self.entry(worker_id)):
                await asyncio.sleep(0.01)

    @asynccontextmanager
    async def heartbeats(self, worker: ScriptedWorker) -> AsyncIterator[None]:
        """Keep the worker's lease meanwhile."""

        async def beat() -> None:
            while True:
                try:
                    await worker.heartbeat(self.address)
                except grpc.aio.AioRpcError:
                    await worker.register(self.address)
                await asyncio.sleep(0.1)

        task = asyncio.create_task(beat())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def nothing_in_flight(self) -> None:
        await self.until_all(lambda entry: entry.in_flight == 0)

    async def until_all(self, holds: Callable[[router_pb2.WorkerEntry], bool]) -> None:
        async with asyncio.timeout(30):
            while not all(holds(entry) for entry in await self.client.workers()):
                await asyncio.sleep(0.01)


@asynccontextmanager
async def cluster(**options: Any) -> AsyncIterator[Cluster]:
    """Nothing may be in flight at the end, whatever the test did."""
    options = {"lease_s": LONG_LEASE_S, "validate": True} | options
    async with running_router(**options) as address, Client(address) as client, AsyncExitStack() as stack:
        running = Cluster(address, client, stack)
        yield running
        await running.nothing_in_flight()


def with_cluster(test: Callable[[Cluster], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), cluster(**options) as running:
            await test(running)

    asyncio.run(main())


async def refusal(call: Awaitable[object], code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is code, caught.value.details()
    return caught.value


def detail(error: grpc.aio.AioRpcError, message: Any) -> Any:
    status = rpc_status.from_call(error)
    assert status is not None
    assert status.details[0].Unpack(message)
    return message


async def hangs(request: worker_pb2.WorkerGenerateRequest, context: Any) -> AsyncIterator[bytes]:
    yield chunk("first ", worker_id="scripted")
    await asyncio.Event().wait()
