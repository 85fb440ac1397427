"""A fleet whose members find each other in Redis: several routers, each with a tree and a load picture of its own."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from deploy.processes import WorkerSettings, running_worker
from kv_events.bus.url import open_source
from rhizome.errors import InvalidRequest
from rhizome.v1.router_pb2 import WorkerEntry
from router.client import Client
from router.fleet import LEASE_S
from router.service import running_router
from tests.support.redis_server import RedisServer
from worker.step_time import HARDWARE

PATIENCE_S = 60.0
TURNS = 6


class Fleet:
    """Routers and simulated workers that know nothing but a registry."""

    def __init__(self, registry: str, stack: AsyncExitStack) -> None:
        self.registry = registry
        self._stack = stack
        self.clients: list[Client] = []
        self._workers: dict[str, AsyncExitStack] = {}

    async def add_router(self) -> None:
        address = await self._stack.enter_async_context(running_router(registry=self.registry, validate=True))
        self.clients.append(await self._stack.enter_async_context(Client(address)))

    async def add_worker(self, name: str, time_scale: float) -> None:
        settings = WorkerSettings(
            model_dir=None,
            worker_id=name,
            registry=self.registry,
            hardware=HARDWARE["8b-1xh100"],
            time_scale=time_scale,
            max_model_len=8192,
        )
        self._workers[name] = await self._stack.enter_async_context(AsyncExitStack())
        await self._workers[name].enter_async_context(running_worker(settings))

    async def remove_worker(self, name: str) -> None:
        await self._workers.pop(name).aclose()

    async def chat(self, session: int, turns: int = TURNS) -> list[str]:
        """A conversation, a turn at each router in turn; the workers that answered."""
        messages: list[dict[str, str]] = []
        served = []
        for turn in range(turns):
            messages.append({"role": "user", "content": f"Session {session}, turn {turn}: " + "comet logs " * 30})
            client = self.clients[(session + turn) % len(self.clients)]
            answer = await client.complete(messages=messages, max_tokens=4, session_id=f"s{session}")
            assert answer.finish_reason == "length"
            messages.append({"role": "assistant", "content": answer.text})
            served.append(answer.worker_id)
        return served

    async def until(self, holds: Callable[[list[list[WorkerEntry]]], bool]) -> None:
        """Wait for what the routers say of their workers."""
        async with asyncio.timeout(PATIENCE_S):
            while not holds([list(await client.workers()) for client in self.clients]):
                await asyncio.sleep(0.05)

    async def all_know(self, *names: str) -> None:
        def known(entries: list[list[WorkerEntry]]) -> bool:
            return all(sorted(entry.worker_id for entry in each) == sorted(names) for each in entries)

        await self.until(known)
        for client in self.clients:
            await client.wait_ready(len(names), timeout_s=PATIENCE_S)

    async def agree(self) -> None:
        """Every router's tree has each worker's whole block set: all that it has published, and its digest."""

        def equal(entries: list[list[WorkerEntry]]) -> bool:
            rows = [sorted((e.worker_id, e.next_event_seq, e.index_digest) for e in each) for each in entries]
            whole = all(
                e.index_synced and e.next_event_seq == e.status.next_event_seq for each in entries for e in each
            )
            return whole and all(row == rows[0] for row in rows)

        await self.until(equal)

    async def equal_the_workers(self) -> None:
        """Every router's tree has the very digest that each worker, asked by itself, has."""
        for client in self.clients:
            for entry in await client.workers():
                async with open_source(f"grpc://{entry.address}") as source:
                    snapshot = await source.snapshot()
                assert snapshot.digest == entry.index_digest
                assert len(snapshot.block_hashes) == entry.indexed_blocks > 0

    async def grow(self, session: int, turns: int) -> None:
        """A conversation of prompts that are slow to compute, after one of six beginnings."""
        prompt = tokens(f"beginning {session % 6}", 512)
        lengths = random.Random(session)
        for turn in range(turns):
            prompt += tokens(f"{session}, {turn}", lengths.randrange(600, 1800))
            client = self.clients[(session + turn) % len(self.clients)]
            answer = await client.complete(token_ids=prompt, max_tokens=4, ignore_eos=True, session_id=f"s{session}")
            prompt += answer.token_ids


def tokens(of: str, count: int) -> list[int]:
    """Always the same ones."""
    random_tokens = random.Random(of)
    return [random_tokens.randrange(1, 250) for _ in range(count)]


@asynccontextmanager
async def fleet_of(redis: RedisServer, workers: int, routers: int, *, time_scale: float = 50.0) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        fleet = Fleet(redis.url("fleet"), stack)
        for _ in range(routers):
            await fleet.add_router()
        for number in range(workers):
            await fleet.add_worker(f"w{number}", time_scale)
        await fleet.all_know(*(f"w{number}" for number in range(workers)))
        yield fleet


def test_two_routers_see_one_fleet() -> None:
    """Under load both trees come to hold what the workers hold, blocks of the other's requests included; a worker that
    comes later and one that leaves are known to both, and so is everything to a router that comes later."""

    async def main() -> None:
        async with fleet_of(redis, 2, 2) as fleet:
            served = await asyncio.gather(*(fleet.chat(session) for session in range(8)))
            assert {worker for each in served for worker in each} == {"w0", "w1"}
            await fleet.agree()
            told = [entry.status.cached_prompt_tokens for entry in await fleet.clients[0].workers()]
            assert sum(told) > 0  # turns found what those at the other router have left
            await fleet.add_worker("w2", 50.0)
            await fleet.all_know("w0", "w1", "w2")
            await fleet.remove_worker("w0")
            await fleet.all_know("w1", "w2")
            await fleet.add_router()
            await fleet.all_know("w1", "w2")
            await fleet.chat(9)
            await fleet.agree()

    with RedisServer() as redis:
        asyncio.run(main())


def test_two_routers_balance_a_load_as_one_does(capsys: pytest.CaptureFixture[str]) -> None:
    """Each knows what it has sent itself at once, and what the other has sent by the workers' reports: by what they say
    they were given (largest over mean, prompt tokens), no worker is spared, and none much busier than with one router.
    Both trees are the workers' own, digest by digest."""
    sessions, turns, workers = 32, 4, 4

    async def given(routers: int) -> list[float]:
        """Each worker's share of the prompt tokens; 1 is the mean."""
        async with fleet_of(redis, workers, routers, time_scale=0.25) as fleet:
            await asyncio.gather(*(fleet.grow(session, turns) for session in range(sessions)))
            await fleet.agree()
            await fleet.equal_the_workers()
            told = [entry.status.prompt_tokens for entry in await fleet.clients[0].workers()]
            return sorted(workers * each / sum(told) for each in told)

    with RedisServer() as redis:
        one, two = asyncio.run(given(1)), asyncio.run(given(2))
    with capsys.disabled():
        print(f"\nload imbalance, largest over mean: one router {one[-1]:.2f}, two routers {two[-1]:.2f}")
    assert two[0] > 1 / 3
    assert two[-1] < 1.5 * one[-1]


def test_redis_may_die_and_come_back_empty() -> None:
    """Meanwhile routers keep the workers they know, for longer than any lease, and serve; then all converges, and who
    left while nobody could hear it is dropped by its lease."""

    async def main() -> None:
        async with fleet_of(redis, 3, 2) as fleet:
            await asyncio.gather(*(fleet.chat(session) for session in range(4)))
            redis.kill()
            until = time.monotonic() + LEASE_S + 1
            while time.monotonic() < until:
                await asyncio.gather(*(fleet.chat(session, 2) for session in range(4)))
            await fleet.all_know("w0", "w1", "w2")
            await fleet.remove_worker("w2")
            await asyncio.gather(*(fleet.chat(session, 2) for session in range(10, 14)))
            redis.start()
            await fleet.all_know("w0", "w1")
            await asyncio.gather(*(fleet.chat(session) for session in range(20, 24)))
            await fleet.agree()

    with RedisServer() as redis:
        asyncio.run(main())


@pytest.mark.parametrize("url", ["zmq://h:1", "redis://h:0/x", "redis://h:1", "nonsense"])
def test_what_is_no_registry_is_refused(url: str) -> None:
    """Before anything is served."""

    async def main() -> None:
        async with running_router(registry=url):
            pass

    with pytest.raises(InvalidRequest, match="registry"):
        asyncio.run(main())
