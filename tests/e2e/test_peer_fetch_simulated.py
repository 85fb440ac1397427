"""Prefixes from a peer on simulated workers: real tickets and transports, and the time that real blocks would take."""

from __future__ import annotations

import asyncio

from deploy.fleet.config import FleetConfig, Model, Routers, WorkerGroup
from deploy.fleet.plan import plan_fleet
from deploy.local import LocalCluster
from router.client import Ask, Client
from tests.e2e.test_peer_fetch import GREEDY, PREFIX, end, entries, fill, keep_busy, nothing_held, until
from worker.step_time import HARDWARE

BUSY_WITH_TWO = ("--validate", "--max-running", "1", "--max-waiting", "1")
HARDWARE_NAME = "8b-1xh100"
TIME_SCALE = 2.0


def test_a_request_takes_a_busy_workers_prefix_along() -> None:
    """Routers learn the modelled pace; the idle worker pulls what the busy one holds, over shared memory, in the time
    that the modelled network takes; all that was held for it comes back."""

    async def main() -> None:
        model = Model(simulated=HARDWARE_NAME, time_scale=TIME_SCALE)
        group = WorkerGroup(name="worker", count=2)
        plan = plan_fleet(FleetConfig(model=model, routers=Routers(port=0), workers=[group]))
        cluster = LocalCluster(plan, worker_arguments=BUSY_WITH_TWO)
        async with asyncio.timeout(150), cluster, Client(cluster.address) as client:
            await client.wait_ready(workers=2)
            holder = await fill(client)
            tasks = await keep_busy(client, holder)
            asked: Ask = {"token_ids": [*PREFIX, 253, 254], "max_tokens": 4, **GREEDY}
            answer = await client.complete(**asked)
            await end(tasks)
            assert answer.worker_id != holder
            assert answer.cached_tokens == 93 * 16
            token_s = HARDWARE[HARDWARE_NAME].fetch_token_s / TIME_SCALE
            assert answer.ttft_s >= 93 * 16 * token_s
            await until(client, lambda known: nothing_held(known) and known[answer.worker_id].status.pulls > 0)
            known = await entries(client)
            status = known[answer.worker_id].status
            assert (status.pulled_blocks, status.pulls_short, status.pull_transport) == (93, 0, "shm")
            assert known[holder].status.lent_blocks == 93
            await until(client, lambda known: known[answer.worker_id].indexed_blocks >= 93)

    asyncio.run(main())
