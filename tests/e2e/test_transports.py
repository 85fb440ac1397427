"""Each way on which blocks travel between two worker processes, chosen with --transport."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from deploy.fleet.config import FleetConfig, Model, Routers, WorkerGroup
from deploy.fleet.plan import plan_fleet
from deploy.local import LocalCluster
from router.client import Client
from tests.e2e.test_peer_fetch import ALONE, entries, taken_along
from worker.transfer.transports.nixl import INSTALL, has_nixl

needs_nixl = pytest.mark.skipif(not has_nixl(), reason=f"nixl is not here: {INSTALL}")


@pytest.mark.parametrize("way", ["tcp", "grpc", pytest.param("nixl", marks=needs_nixl)])
def test_blocks_travel_the_way_that_was_chosen(tiny_model: Path, way: str) -> None:
    """Over it alone, and the answer is the one that was computed whole; `rhizome status` shows what travelled how."""

    async def main() -> None:
        group = WorkerGroup(name="worker", count=2)
        plan = plan_fleet(FleetConfig(model=Model(path=tiny_model), routers=Routers(port=0), workers=[group]))
        cluster = LocalCluster(plan, worker_arguments=(*ALONE, "--transport", way))
        async with asyncio.timeout(150), cluster, Client(cluster.address) as client:
            await client.wait_ready(workers=2)
            _, answer = await taken_along(client, max_tokens=8)
            status = (await entries(client))[answer.worker_id].status
            assert (status.pulled_blocks, status.pulls_short, status.pull_transport) == (93, 0, way)
            (counts,) = status.pull_counts
            assert (counts.transport, counts.pulls, counts.failed, counts.blocks) == (way, 1, 0, 93)
            assert counts.size_bytes == status.pulled_bytes
            await asyncio.to_thread(_shown, cluster.address, way)

    asyncio.run(main())


def _shown(router: str, way: str) -> None:
    """What `rhizome status --router` says: for people and for programs."""
    text = CliRunner().invoke(app, ["status", "--router", router]).stdout
    (line,) = [line.split() for line in text.splitlines() if f" {way} " in line]
    assert line[1:3] == [way, "93"]
    told = json.loads(CliRunner().invoke(app, ["status", "--router", router, "--json"]).stdout)
    pulled = [counts for entry in told["workers"] for counts in entry["status"].get("pull_counts", [])]
    assert [counts["transport"] for counts in pulled] == [way]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["tcp", "pigeon"], "transport is 'pigeon': one of local, shm, nixl, tcp, grpc"),
        (["tcp", "tcp"], "transport is 'tcp': each only once"),
    ],
)
def test_a_way_that_is_not_there_is_refused(tiny_model: Path, names: list[str], says: str) -> None:
    """By name, before the model is read."""
    arguments = ["worker", "--model", str(tiny_model), *(word for name in names for word in ("--transport", name))]
    error = CliRunner().invoke(app, arguments).exception
    assert says in str(error)
