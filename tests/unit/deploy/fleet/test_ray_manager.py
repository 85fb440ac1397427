"""What the manager of a fleet on Ray decides, without a cluster."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from deploy.fleet.plan import FleetPlan, plan_fleet
from deploy.fleet.reading import parse_fleet
from rhizome.errors import Unavailable
from rhizome.v1 import launcher_pb2

ray_manager = pytest.importorskip("deploy.fleet.ray_manager", reason="Ray is not installed: pip install 'rhizome[ray]'")


class Actor:
    """Stands for a handle: remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.set_routers = self
        self.remote = self.told.append


def launcher(text: str = "") -> tuple[Any, dict[str, Actor]]:
    plan: FleetPlan = plan_fleet(
        parse_fleet(f"model: {{simulated: 8b-1xh100}}\nrouters: {{count: 2}}\nworkers: [{{}}]\n{text}", "fleet.yaml")
    )
    made = ray_manager.RayLauncher(plan, "rhizome-x", ray_manager.Environment(secret="s"))
    actors = {server.name: Actor() for server in (*plan.routers, *plan.workers)}
    for server in (*plan.routers, *plan.workers):
        made._records[server.name] = ray_manager.Record(server, actors[server.name])
    return made, actors


def test_a_router_that_has_moved_is_told_to_the_workers() -> None:
    """Its node was lost, Ray has placed it elsewhere; with a registry they need not be told."""

    async def main() -> None:
        for text, told in (("", [["10.0.0.3:7700", "10.0.0.2:7701"]]), ("registry: redis://127.0.0.1/x\n", [])):
            fleet, actors = launcher(text)
            await fleet.serving("router-0", "10.0.0.1:7700")
            await fleet.serving("router-1", "10.0.0.2:7701")
            assert (await fleet.starting("both-0")).routers == ("10.0.0.1:7700", "10.0.0.2:7701")
            await fleet.serving("router-0", "10.0.0.1:7700")  # it restarted where it was
            assert actors["both-0"].told == []
            await fleet.serving("router-0", "10.0.0.3:7700")
            assert actors["both-0"].told == told

    asyncio.run(main())


def test_a_router_keeps_its_port_and_a_worker_waits_for_routers() -> None:
    """The first start takes the plan's port, later ones the one that was bound; a stranger is told so."""

    async def main() -> None:
        fleet, _ = launcher()
        waiting = asyncio.create_task(fleet.starting("both-0"))
        assert [(await fleet.starting(name)).port for name in ("router-0", "router-1")] == [7700, 7701]
        await fleet.serving("router-0", "10.0.0.1:7709")
        again = await fleet.starting("router-0")
        assert (again.port, again.restarts) == (7709, 1)
        assert not waiting.done()
        await fleet.serving("router-1", "10.0.0.2:7701")
        assert (await waiting).routers == ("10.0.0.1:7709", "10.0.0.2:7701")
        with pytest.raises(Unavailable, match="both-7 is not part of this fleet"):
            await fleet.starting("both-7")

    asyncio.run(main())


def test_what_ends_again_and_again_is_started_ever_more_rarely() -> None:
    """At once when it had lived for long; never later than the bound."""
    fleet, _ = launcher()
    record = fleet._records["both-0"]
    delays = [record.start(float(second)) for second in range(12)]
    assert delays[:2] == [0.0, 0.0]
    assert delays[2:] == sorted(delays[2:])
    assert (delays[2], delays[-1]) == (0.8, 10.0)
    assert record.start(1000.0) == 0.0


def test_a_manager_that_comes_back_learns_how_many_routers_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the actors' names, as of workers, whatever the file said."""
    fleet, actors = launcher("registry: redis://127.0.0.1/x\n")
    fleet._records.clear()
    names = ["router-0", "router-1", "router-2", "both-0"]
    found = [{"name": name, "namespace": "rhizome-x"} for name in names]
    monkeypatch.setattr(ray_manager.ray.util, "list_named_actors", lambda all_namespaces: found)
    monkeypatch.setattr(ray_manager.ray, "get_actor", lambda name, namespace: actors.get(name, Actor()))

    async def nothing() -> list[launcher_pb2.ServerStatus]:
        return [launcher_pb2.ServerStatus(name=name, address=f"h:{at}") for at, name in enumerate(names)]

    monkeypatch.setattr(fleet, "servers", nothing)
    asyncio.run(fleet.recover())
    assert [router.name for router in fleet.plan.routers] == names[:3]
    assert fleet.router_addresses == ["h:0", "h:1", "h:2"]


def test_the_environment_shows_names_alone() -> None:
    """It holds the fleet's secret."""
    assert repr(ray_manager.Environment(A="secret")) == "Environment(A)"
