"""A fleet on a Ray cluster of three nodes: deployed, used, hurt, scaled, ended.

The tests share one cluster, and some of them a fleet: Ray takes its time to start.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest

from deploy.fleet.plan import plan_fleet
from deploy.fleet.reading import parse_fleet
from deploy.fleet.show import ask_routers, fleet_rows
from rhizome.ticket import SECRET_VARIABLE
from rhizome.v1 import generation_pb2, router_pb2
from router.client import Client
from tests.support.ray_nodes import RayNodes, started
from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.timeout(500)

SECRET = "only actors know this one"
PATIENCE_S = 120.0
FLEET = """
name: story
model: {simulated: 8b-1xh100}
insecure: true
routers: {count: 2, port: 0, resources: {cpus: 0.1, custom: {front: 1}}}
workers:
  - {name: chat, count: 2, resources: {cpus: 0.1, custom: {place: 0.5}}}
"""


@pytest.fixture(scope="session")
def ray_nodes() -> Iterator[RayNodes]:
    """A head and two nodes."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'rhizome[ray]'")
    nodes = started(2)
    yield nodes
    nodes.close()


async def until(client: Client, holds: Callable[[dict[str, router_pb2.WorkerEntry]], bool]) -> None:
    """Wait for the fleet, as a router sees it, to fulfil a condition."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                if holds({entry.worker_id: entry for entry in await client.workers()}):
                    return
            except grpc.aio.AioRpcError:
                pass
            await asyncio.sleep(0.05)


def test_a_fleet_on_three_nodes_is_deployed_used_hurt_and_scaled(
    ray_nodes: RayNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The life of a fleet, with a router for each half of its clients; what each part of it must be is said there."""
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    from deploy.fleet.ray_cluster import deploy_on_ray, ray_control

    plan = plan_fleet(parse_fleet(FLEET, "fleet.yaml"))
    routers = deploy_on_ray(plan, ray_nodes.address, lambda line: None)

    async def life() -> None:
        story = Story(ray_nodes, ray_control("story", ray_nodes.address), routers)
        async with Client(routers[0]) as story.client, Client(routers[1]) as story.other:
            for chapter in (
                story.workers_are_placed_by_resources,
                story.a_conversation_stays_with_its_history,
                story.a_killed_worker_comes_back_anew,
                story.a_lost_node_takes_only_its_own_requests,
                story.a_router_comes_back_to_its_address,
                story.a_killed_manager_is_not_missed,
                story.a_group_grows_and_shrinks_while_it_serves,
            ):
                await chapter()
        await story.control.shutdown(5.0)

    asyncio.run(life())
    import ray

    left = [actor for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == "rhizome-story"]
    assert left == []
    assert not any(SECRET in text for text in ray_nodes.logs()), "the secret is in no log"


class Story:
    """What happens to one fleet."""

    client: Client
    other: Client

    def __init__(self, nodes: RayNodes, control: Any, routers: list[str]) -> None:
        self.nodes = nodes
        self.control = control
        self.routers = routers

    async def rows(self) -> dict[str, dict[str, Any]]:
        """What `rhizome status` shows, by server."""
        status = await self.control.status()
        return {row["server"]: row for row in fleet_rows(status, await ask_routers(status))}

    async def workers_are_placed_by_resources(self) -> None:
        """Routers on the node that has what they need, each worker on a node of its own; all is seen in the status."""
        rows = await self.rows()
        assert sorted(rows) == ["chat-0", "chat-1", "router-0", "router-1"]
        head = self.nodes.cluster.head_node.node_id
        assert [rows[name]["node"] for name in ("router-0", "router-1")] == [head, head]
        assert {rows["chat-0"]["node"], rows["chat-1"]["node"]} == {node.node_id for node in self.nodes.nodes}
        for row in rows.values():
            assert row["state"] == "serving"
            assert row["address"].startswith(f"{row['host']}:")
            os.kill(row["pid"], 0)
        assert all(0 < rows[name]["lease_left_s"] < 60 and rows[name]["epoch"] for name in ("chat-0", "chat-1"))

    async def a_conversation_stays_with_its_history(self) -> None:
        """The second turn finds the first in the cache, through the other router, too."""
        messages = [{"role": "user", "content": "Which shelf holds the comet logs? " * 8}]
        first = await self.client.complete(messages=messages, max_tokens=8, temperature=0.0, ignore_eos=True)
        messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And who signed them?"}]
        await until(self.other, lambda workers: workers[first.worker_id].indexed_blocks > 0)
        for router in (self.client, self.other):
            await until(router, lambda workers: all(worker.index_synced for worker in workers.values()))
            turn = await router.complete(messages=messages, max_tokens=8, temperature=0.0)
            assert turn.worker_id == first.worker_id
            assert turn.cached_tokens >= first.prompt_tokens - 16

    async def a_killed_worker_comes_back_anew(self) -> None:
        """Its request ends UNAVAILABLE by its name, the other's goes on; its blocks leave the trees; it returns."""
        row = (await self.rows())["chat-0"]
        await self._hurt("chat-0", lambda: os.kill(row["pid"], signal.SIGKILL))

    async def a_lost_node_takes_only_its_own_requests(self) -> None:
        """The same for a node; the worker comes back on one that has room, once there is one."""
        row = (await self.rows())["chat-1"]
        await self._hurt("chat-1", lambda: self.nodes.lose(row["node"]), self.nodes.add)
        assert (await self.rows())["chat-1"]["node"] != row["node"]

    async def _hurt(self, victim: str, hurt: Callable[[], None], mend: Callable[[], None] = lambda: None) -> None:
        before = {entry.worker_id: entry for entry in await self.client.workers()}
        async with aclosing(_endless(self.client)) as one, aclosing(_endless(self.client)) as two:
            streams = {(await anext(stream)).worker_id: stream for stream in (one, two)}
            assert len(streams) == 2, "round robin"
            held = {entry.worker_id: entry.indexed_blocks for entry in await self.client.workers()}
            losing = asyncio.create_task(asyncio.to_thread(hurt))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in streams.pop(victim):
                    pass
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert victim in (caught.value.details() or "")
            await losing
            (survivor,) = streams.values()
            for _ in range(5):
                assert (await anext(survivor)).token_ids, "the others go on"
            answer = await self.client.complete("hello", max_tokens=2)
            assert answer.worker_id != victim
        mend()

        def back(workers: dict[str, router_pb2.WorkerEntry]) -> bool:
            entry = workers.get(victim)
            return entry is not None and entry.epoch > before[victim].epoch and entry.index_synced

        for router in (self.client, self.other):
            await until(router, back)
        (entry,) = [entry for entry in await self.client.workers() if entry.worker_id == victim]
        assert held[victim] > 0
        assert entry.indexed_blocks == entry.status.blocks_cached == 0, "nothing of the old incarnation is left"
        answers = [await self.client.complete("hello", max_tokens=2, policy="round-robin") for _ in range(2)]
        assert {answer.worker_id for answer in answers} == {"chat-0", "chat-1"}
        assert (await self.rows())[victim]["restarts"] == 1

    async def a_router_comes_back_to_its_address(self) -> None:
        """Workers and clients find it again where it was; the other one serves meanwhile."""
        row = (await self.rows())["router-1"]
        os.kill(row["pid"], signal.SIGKILL)
        assert (await self.client.complete("hello", max_tokens=2)).token_ids
        await until(self.other, lambda workers: len(workers) == 2)
        rows = await self.rows()
        assert (rows["router-1"]["address"], rows["router-1"]["restarts"]) == (self.routers[1], 1)
        assert (await self.other.complete("hello", max_tokens=2)).token_ids

    async def a_killed_manager_is_not_missed(self, fleet: str = "story") -> None:
        """Requests do not need it; it comes back knowing the fleet."""
        import ray

        before = await self.rows()
        manager = ray.get_actor("manager", f"rhizome-{fleet}")
        ray.kill(manager, no_restart=False)
        assert (await self.client.complete("hello", max_tokens=2)).token_ids
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    after = await self.rows()
                    break
                except Exception:
                    await asyncio.sleep(0.1)
        same = ("address", "epoch", "restarts", "pid", "state")
        assert {name: [row[key] for key in same] for name, row in after.items()} == {
            name: [row[key] for key in same] for name, row in before.items()
        }

    async def a_group_grows_and_shrinks_while_it_serves(self) -> None:
        """New workers get requests; one that leaves ends the answer that it is giving first."""
        await self.control.scale("chat", 3, 5.0)
        async with aclosing(_endless(self.client, 400, only="chat-2")) as stream:
            taken = len((await anext(stream)).token_ids)
            scaling = asyncio.create_task(self.control.scale("chat", 1, 30.0))
            async for chunk in stream:
                taken += len(chunk.token_ids)
        assert taken == 400, "it ended its answer"
        await scaling
        assert sorted(await self.rows()) == ["chat-0", "router-0", "router-1"]
        for router in (self.client, self.other):
            assert [entry.worker_id for entry in await router.workers()] == ["chat-0"]


async def _endless(
    client: Client, tokens: int = 4000, only: str = ""
) -> AsyncGenerator[generation_pb2.GenerateChunk, None]:
    """A long answer by the next worker, or by a certain one: others' are given up."""
    while True:
        prompt = f"a long story about roots, told at {time.monotonic()}, " * 4
        stream = client.generate(prompt, max_tokens=tokens, ignore_eos=True, policy="round-robin")
        async with aclosing(stream) as chunks:
            first = await anext(chunks)
            if only in ("", first.worker_id):
                yield first
                async for chunk in chunks:
                    yield chunk
                return


def rhizome(*arguments: str) -> str:
    """What the command prints on standard output."""
    command = (sys.executable, "-m", "deploy.cli", "--log-level=error", *arguments)
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_deploy_show_and_end_a_fleet_of_real_models(ray_nodes: RayNodes, tmp_path: Path) -> None:
    """A tiny model made by each actor is the same one: its workers answer alike."""
    file = tmp_path / "fleet.yaml"
    file.write_text(
        "name: commands\nmodel: {tiny: true}\ninsecure: true\nrouters: {port: 0, resources: {cpus: 0.1}}\n"
        "workers: [{name: chat, count: 2, kv_cache_mib: 8, resources: {cpus: 0.1}}]\n"
    )
    ray = f"--ray={ray_nodes.address}"
    rhizome("up", ray, "--config", str(file))
    told = json.loads(rhizome("status", ray, "--fleet", "commands", "--json"))
    assert [(row["server"], row["state"]) for row in told["servers"]] == [
        ("router-0", "serving"),
        ("chat-0", "serving"),
        ("chat-1", "serving"),
    ]

    async def ask() -> list[tuple[str, list[int]]]:
        async with Client(told["servers"][0]["address"]) as client:
            asked = {"max_tokens": 6, "temperature": 0.0, "policy": "round-robin"}
            answers = [await client.complete("what is remembered", **asked) for _ in range(2)]
            return [(answer.worker_id, answer.token_ids) for answer in answers]

    (one, tokens), (two, same) = asyncio.run(ask())
    assert (one != two, tokens) == (True, same)
    rhizome("down", ray, "--fleet", "commands", "--drain", "5")
    again = subprocess.run(
        (sys.executable, "-m", "deploy.cli", "status", ray, "--fleet", "commands"), capture_output=True, text=True
    )
    assert again.returncode == 1
    assert "no fleet commands runs on this Ray cluster" in again.stderr


def test_routers_come_and_go_where_a_registry_is(ray_nodes: RayNodes) -> None:
    """A new router knows all workers; so does a manager that comes back know it. The registry's password is in no
    process's command line, in no log and not in the manager's plan."""
    from deploy.fleet.ray_cluster import deploy_on_ray, ray_control

    password = "Xylophon"
    text = FLEET.replace("name: story", "name: routers").replace("count: 2, port", "count: 1, port")

    async def life(routers: list[str]) -> None:
        story = Story(ray_nodes, ray_control("routers", ray_nodes.address), routers)
        assert sorted(await story.rows()) == ["chat-0", "chat-1", "router-0"]
        await story.control.scale("routers", 2, 5.0)
        for row in (await story.rows()).values():
            assert row["state"] == "serving"
            assert password not in Path(f"/proc/{row['pid']}/cmdline").read_text()
        async with Client((await story.rows())["router-1"]["address"]) as story.client:
            assert {entry.worker_id for entry in await story.client.workers()} == {"chat-0", "chat-1"}
            assert (await story.client.complete("hello", max_tokens=2)).token_ids
            await story.a_killed_manager_is_not_missed("routers")
        await story.control.scale("routers", 1, 5.0)
        assert sorted(await story.rows()) == ["chat-0", "chat-1", "router-0"]
        async with Client(routers[0]) as first:
            assert (await first.complete("hello", max_tokens=2)).token_ids
        await story.control.shutdown(5.0)

    with RedisServer("--requirepass", password) as redis:
        registry = redis.url("routers").replace("://", f"://:{password}@")
        plan = plan_fleet(parse_fleet(f"{text}registry: {registry}\n", "fleet.yaml"))
        asyncio.run(life(deploy_on_ray(plan, ray_nodes.address, lambda line: None)))
    assert not any(password in text for text in ray_nodes.logs())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("insecure: true", ""), "insecure is False: true, as servers on the cluster's node"),
        (("8b-1xh100", "8b-1xh100, time_scale: 1, name: a b"), r"chat-\d did not start: model_name"),
    ],
)
def test_a_fleet_that_cannot_start_says_why_and_leaves_nothing(
    ray_nodes: RayNodes, change: tuple[str, str], says: str
) -> None:
    """Before anything is placed, or by the words of the first actor that fails."""
    from deploy.fleet.ray_cluster import deploy_on_ray

    text = FLEET.replace(*change).replace("name: story", "name: failing")
    with pytest.raises(Exception, match=says):
        deploy_on_ray(plan_fleet(parse_fleet(text, "fleet.yaml")), ray_nodes.address, lambda line: None)
    import ray

    names = [actor["namespace"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    assert "rhizome-failing" not in names


def test_the_demo_plays_on_a_cluster_that_runs_and_takes_its_fleet_away(ray_nodes: RayNodes) -> None:
    """It serves off-host only where it may; the cluster remains, and the JSON is all that is on standard output."""
    arguments = ("demo", "--json", f"--ray={ray_nodes.address}", "--sessions=1", "--turns=2")
    command = (sys.executable, "-m", "deploy.cli", *arguments)
    refused = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert refused.returncode == 2, refused.stderr
    assert "insecure is False: true" in refused.stderr
    report = json.loads(rhizome(*arguments, "--insecure"))
    assert report["answers_identical"] is True
    assert report["trees_equal"] is True
    assert {row["worker"] for row in report["rows"]} <= {"worker-0", "worker-1"}
    import ray

    names = [actor["namespace"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    assert not any(name.startswith("rhizome-demo-") for name in names)
