"""The embedded cluster with real processes: what a user sees when parts of it die."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest

from deploy.fleet.config import FleetConfig, Model, Routers, WorkerGroup
from deploy.fleet.plan import FleetPlan, plan_fleet
from deploy.local import LocalCluster
from rhizome.errors import Unavailable
from rhizome.v1 import router_pb2
from router.client import Client
from tests.support.processes import Launcher, wait_until_gone

SMALL = ("--kv-cache-mib", "8", "--validate")


async def until(client: Client, holds: Callable[[list[router_pb2.WorkerEntry]], bool]) -> list[router_pb2.WorkerEntry]:
    """Wait for the fleet, as the router sees it, to fulfil a condition."""
    async with asyncio.timeout(60):
        while not holds(workers := list(await client.workers())):
            await asyncio.sleep(0.02)
    return workers


def idle(workers: list[router_pb2.WorkerEntry]) -> bool:
    """Nothing runs anywhere, and the router counts nothing in flight: no block and no reservation leaked."""
    return all(
        worker.in_flight == 0
        and worker.status.blocks_in_use == 0
        and worker.status.running == 0
        and worker.status.waiting == 0
        for worker in workers
    )


def fleet(model: Path, workers: int) -> FleetPlan:
    """One router on a free port, and so many workers."""
    group = WorkerGroup(name="worker", count=workers)
    return plan_fleet(FleetConfig(model=Model(path=model), routers=Routers(port=0), workers=[group]))


def in_cluster(model: Path, test: Callable[[LocalCluster, Client], Awaitable[None]], workers: int = 2) -> None:
    async def main() -> None:
        cluster = LocalCluster(fleet(model, workers), worker_arguments=SMALL)
        async with cluster, Client(cluster.address) as client:
            await client.wait_ready(workers=workers)
            await test(cluster, client)
            await until(client, idle)

    asyncio.run(main())


def test_a_worker_killed_in_mid_answer_is_unavailable_by_name_and_comes_back_with_a_new_epoch(
    tiny_model: Path,
) -> None:
    """The request in flight ends UNAVAILABLE; its blocks leave the tree; the restarted worker is used again."""

    async def test(cluster: LocalCluster, client: Client) -> None:
        prompt = "a long story about roots and what they find in the dark soil below the observatory"
        stream = client.generate(prompt, max_tokens=1500, temperature=0.0, ignore_eos=True)
        first = await anext(stream)
        before = {worker.worker_id: worker.epoch for worker in await client.workers()}
        (child,) = [child for child in cluster.workers if child.name == first.worker_id]
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stream:
                pass
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert child.name in (caught.value.details() or "")

        other = await client.complete(prompt, max_tokens=4, temperature=0.0, ignore_eos=True)
        assert len(other.token_ids) == 4, "the others go on"

        def back(workers: list[router_pb2.WorkerEntry]) -> bool:
            epochs = {worker.worker_id: worker.epoch for worker in workers}
            return epochs.get(child.name, 0) > before[child.name] and all(worker.index_synced for worker in workers)

        workers = await until(client, back)
        (returned,) = [worker for worker in workers if worker.worker_id == child.name]
        assert returned.indexed_blocks == returned.status.blocks_cached, "nothing of the old incarnation is left"
        answers = [await client.complete("hello", max_tokens=2, policy="round-robin") for _ in range(2)]
        assert {answer.worker_id for answer in answers} == {"worker-0", "worker-1"}

    in_cluster(tiny_model, test)


def test_a_router_that_restarts_finds_its_fleet_again(tiny_model: Path) -> None:
    """Nothing durable is needed: workers register again and the tree is rebuilt from them."""

    async def test(cluster: LocalCluster, client: Client) -> None:
        prompt = "what is remembered " * 8
        first = await client.complete(prompt, max_tokens=4, temperature=0.0, ignore_eos=True)
        os.kill(cluster.router.pid, signal.SIGKILL)
        await cluster.restarted(cluster.router)
        await client.wait_ready(workers=2)
        await until(client, lambda workers: all(worker.index_synced for worker in workers))
        again = await client.complete(prompt, max_tokens=4, temperature=0.0, ignore_eos=True)
        assert again.token_ids == first.token_ids
        assert (again.worker_id, again.cached_tokens > 0) == (first.worker_id, True)

    in_cluster(tiny_model, test)


def test_a_client_that_disconnects_frees_its_blocks(tiny_model: Path) -> None:
    """Through the router too, a cancelled call is gone from the engine."""

    async def test(cluster: LocalCluster, client: Client) -> None:
        stream = client.generate("never to be read", max_tokens=1500, temperature=0.0, ignore_eos=True)
        await anext(stream)
        await stream.aclose()
        workers = await until(client, idle)
        assert sum(worker.status.decode_tokens for worker in workers) < 1500

    in_cluster(tiny_model, test)


def test_a_cluster_that_cannot_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    """A folder without a checkpoint: the worker's own words, then an error; no process remains."""
    (tmp_path / "config.json").write_text("{}")
    children: list[int] = []

    async def main() -> None:
        cluster = LocalCluster(fleet(tmp_path, 1))
        try:
            async with cluster:
                pass
        finally:
            children.extend(child.pid for child in (cluster.router, *cluster.workers))

    with pytest.raises(Unavailable, match=r"worker-0 did not start \(exit code 2\)"):
        asyncio.run(main())
    for pid in children:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_port_in_use_ends_the_command_with_one_line(tiny_model: Path) -> None:
    """Exit code 2, and the message names the port."""

    async def test(cluster: LocalCluster, client: Client) -> None:
        port = cluster.address.rpartition(":")[2]
        command = (sys.executable, "-m", "deploy.cli", "router", "--port", port)
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert f"port is {port}: it must be free on 127.0.0.1" in done.stderr.splitlines()[-1]

    in_cluster(tiny_model, test, workers=1)


def test_children_end_when_their_parent_is_killed(tiny_model: Path) -> None:
    """SIGKILL leaves the launcher no time to clean up; its children notice."""
    with Launcher(tiny_model) as launcher:
        launcher.process.kill()
    assert len(launcher.children) == 2
    for pid in launcher.children:
        wait_until_gone(pid)


def test_ctrl_c_ends_a_cluster_that_is_still_starting(tiny_model: Path) -> None:
    """Not only once it is ready: the workers are still loading."""
    with Launcher(tiny_model, until="router-0 serves") as launcher:
        launcher.process.send_signal(signal.SIGINT)
        assert launcher.process.stderr is not None
        assert "ready:" not in launcher.process.stderr.read()
        assert launcher.process.wait(timeout=30) == 0
    for pid in launcher.children:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_ctrl_c_ends_all_of_it(tiny_model: Path) -> None:
    """SIGINT to the launcher: it exits with 0, and every child has ended before it."""
    with Launcher(tiny_model) as launcher:
        launcher.process.send_signal(signal.SIGINT)
        assert launcher.process.wait(timeout=30) == 0
    for pid in launcher.children:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
