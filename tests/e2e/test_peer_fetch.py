"""Prefixes from a peer, with real processes: a request that avoids a busy worker takes that worker's blocks along."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from deploy.fleet.config import FleetConfig, Model, Routers, WorkerGroup
from deploy.fleet.plan import plan_fleet
from deploy.local import LocalCluster
from rhizome.ticket import SECRET_VARIABLE
from rhizome.v1 import router_pb2
from router.client import Ask, Client, Completion
from router.service import running_router

LEASE_S = 12.0
SECRET = "of the routers and workers of these tests"
PREFIX = [1 + at * 7 % 250 for at in range(1500)]  # 93 full blocks
ALONE = ("--kv-cache-mib", "16", "--validate", "--max-running", "1", "--max-waiting", "1")
GREEDY: Ask = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers' and this process's."""
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)


@asynccontextmanager
async def fleet(model: Path) -> AsyncIterator[tuple[LocalCluster, Client]]:
    """Two workers that are full with two requests each. The router that is asked is in this process: it gives leases
    that a machine that is busy with much else does not lose."""
    group = WorkerGroup(name="worker", count=2)
    plan = plan_fleet(FleetConfig(model=Model(path=model), routers=Routers(port=0), workers=[group]))
    async with asyncio.timeout(150), running_router(lease_s=LEASE_S, secret=SECRET.encode()) as address:
        cluster = LocalCluster(plan, worker_arguments=(*ALONE, f"--router={address}"))
        async with cluster, Client(address) as client:
            await client.wait_ready(workers=2, timeout_s=60)
            yield cluster, client


async def entries(client: Client) -> dict[str, router_pb2.WorkerEntry]:
    return {entry.worker_id: entry for entry in await client.workers()}


async def until(client: Client, holds: Callable[[dict[str, router_pb2.WorkerEntry]], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds(await entries(client)):
            await asyncio.sleep(0.02)


async def fill(client: Client) -> str:
    """Let one worker compute the prefix, and the router know of it."""
    ask: Ask = {"token_ids": [*PREFIX, 251], "max_tokens": 2, **GREEDY}
    first = await client.complete(**ask)
    await until(client, lambda known: known[first.worker_id].indexed_blocks >= 93)
    return first.worker_id


async def keep_busy(client: Client, worker_id: str) -> list[asyncio.Task[None]]:
    """Requests that run and wait where the prefix is, until that worker is full."""

    async def ask(number: int) -> None:
        ask_for: Ask = {"token_ids": [*PREFIX, 252, number], "max_tokens": 500, "policy": "round-robin", **GREEDY}
        async with aclosing(client.generate(**ask_for)) as chunks:
            async for _ in chunks:
                pass

    tasks = []
    (other,) = (await entries(client)).keys() - {worker_id}
    await client.set_draining(other, True)
    for number in range(2):
        tasks.append(asyncio.create_task(ask(number)))
        await until(client, lambda known, least=number: known[worker_id].in_flight > least)  # type: ignore[misc]
    await client.set_draining(other, False)
    return tasks


async def end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def nothing_held(known: dict[str, router_pb2.WorkerEntry]) -> bool:
    return all(entry.in_flight == entry.status.blocks_in_use == 0 for entry in known.values())


async def taken_along(client: Client, max_tokens: int) -> tuple[str, Completion]:
    """A request goes to the idle worker, as the one that holds its prefix is busy, and is answered as by one worker.
    Returns who held it, and the answer, when a pull is reported and nothing is held any more."""
    asked: Ask = {"token_ids": [*PREFIX, 253, 254], "max_tokens": max_tokens, **GREEDY}
    alone: Ask = {**asked, "bypass_prefix_cache": True}
    whole = await client.complete(**alone)
    holder = await fill(client)
    tasks = await keep_busy(client, holder)
    answer = await client.complete(**asked)
    await end(tasks)
    assert answer.worker_id != holder
    assert answer.token_ids == whole.token_ids
    await until(client, lambda known: nothing_held(known) and known[answer.worker_id].status.pulls > 0)
    return holder, answer


def with_fleet(model: Path, test: Callable[[LocalCluster, Client], Awaitable[None]]) -> None:
    async def main() -> None:
        async with fleet(model) as (cluster, client):
            await test(cluster, client)

    asyncio.run(main())


def test_a_request_takes_a_busy_workers_prefix_along(tiny_model: Path) -> None:
    """It goes to the idle worker, which pulls what the busy one holds over shared memory; the answer is the same, bit
    for bit; all that was held for it comes back; the blocks are the puller's own from then on."""

    async def test(_: LocalCluster, client: Client) -> None:
        holder, answer = await taken_along(client, max_tokens=24)
        assert answer.cached_tokens == 93 * 16
        known = await entries(client)
        status = known[answer.worker_id].status
        assert (status.pulled_blocks, status.pulls_short, status.pull_transport) == (93, 0, "shm")
        assert status.pulled_bytes > 93 * 16
        await until(client, lambda known: known[holder].status.lent_blocks == 93)
        await until(client, lambda known: known[answer.worker_id].indexed_blocks >= 93)

    with_fleet(tiny_model, test)


def test_a_draining_workers_prefix_is_taken_along(tiny_model: Path) -> None:
    """It takes no requests any more; who does gets its blocks."""

    async def test(_: LocalCluster, client: Client) -> None:
        holder = await fill(client)
        await client.set_draining(holder, True)
        answer = await client.complete(token_ids=[*PREFIX, 253, 254], max_tokens=4, **GREEDY)
        assert (answer.worker_id != holder, answer.cached_tokens) == (True, 93 * 16)
        await until(client, lambda known: nothing_held(known) and known[holder].status.lent_blocks == 93)

    with_fleet(tiny_model, test)


def test_the_holder_dies_and_the_rest_is_computed(tiny_model: Path) -> None:
    """Killed when a request was routed by what it holds: it is answered as by one worker, and nothing stays held."""

    async def test(cluster: LocalCluster, client: Client) -> None:
        asked: Ask = {"token_ids": [*PREFIX, 253, 254], "max_tokens": 24, **GREEDY}
        alone: Ask = {**asked, "bypass_prefix_cache": True}
        whole = await client.complete(**alone)
        holder = await fill(client)
        tasks = await keep_busy(client, holder)
        (child,) = [child for child in cluster.workers if child.name == holder]
        (other,) = (await entries(client)).keys() - {holder}
        os.kill(child.pid, signal.SIGSTOP)  # accepts connections, and answers nothing
        answering = asyncio.create_task(client.complete(**asked))
        await until(client, lambda known: known[other].in_flight > 0)  # the pull is ordered
        await end(tasks)  # else they are tried again where the answer is awaited, and there is no room for all
        os.kill(child.pid, signal.SIGKILL)
        answer = await answering
        assert answer.worker_id != holder
        assert answer.token_ids == whole.token_ids
        await until(client, lambda known: nothing_held(known) and known[answer.worker_id].status.pulls > 0)
        status = (await entries(client))[answer.worker_id].status
        assert (status.pulls_short, status.pulled_blocks) == (1, 0)

    with_fleet(tiny_model, test)
