"""Blocks that move between simulated workers: real tickets and transports, and the time that real blocks would take."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from deploy.fleet.config import FleetConfig, Model, Routers, WorkerGroup
from deploy.fleet.plan import plan_fleet
from deploy.local import LocalCluster
from router.client import Ask, Client
from tests.e2e.test_peer_fetch import GREEDY, PREFIX, end, entries, fill, keep_busy, nothing_held, until
from worker.step_time import HARDWARE

BUSY_WITH_TWO = ("--max-running", "1", "--max-waiting", "1")
HARDWARE_NAME = "8b-1xh100"
TIME_SCALE = 2.0
PULL_S = 93 * 16 * HARDWARE[HARDWARE_NAME].fetch_token_s / TIME_SCALE  # of the prefix's full blocks


@asynccontextmanager
async def fleet(*groups: WorkerGroup, options: tuple[str, ...] = ()) -> AsyncIterator[Client]:
    """Simulated workers, ready; nothing may be held anywhere at the end."""
    model = Model(simulated=HARDWARE_NAME, time_scale=TIME_SCALE)
    routers = Routers(port=0, local_prefill_ms=0)
    plan = plan_fleet(FleetConfig(model=model, routers=routers, workers=list(groups)))
    cluster = LocalCluster(plan, worker_arguments=("--validate", *options))
    async with asyncio.timeout(150), cluster, Client(cluster.address) as client:
        await client.wait_ready(workers=sum(group.count for group in groups))
        yield client
        await until(client, nothing_held)


def test_a_request_takes_a_busy_workers_prefix_along() -> None:
    """The idle worker pulls what the busy one holds, over shared memory, in the time that the modelled network takes;
    the blocks are its own from then on."""

    async def main() -> None:
        async with fleet(WorkerGroup(name="worker", count=2), options=BUSY_WITH_TWO) as client:
            holder = await fill(client)
            tasks = await keep_busy(client, holder)
            asked: Ask = {"token_ids": [*PREFIX, 253, 254], "max_tokens": 4, **GREEDY}
            answer = await client.complete(**asked)
            await end(tasks)
            assert answer.worker_id != holder
            assert answer.cached_tokens == 93 * 16
            assert answer.ttft_s >= PULL_S
            await until(client, lambda known: known[answer.worker_id].status.pulls > 0)
            known = await entries(client)
            status = known[answer.worker_id].status
            assert (status.pulled_blocks, status.pulls_short, status.pull_transport) == (93, 0, "shm")
            await until(client, lambda known: known[holder].status.lent_blocks == 93)
            await until(client, lambda known: known[answer.worker_id].indexed_blocks >= 93)

    asyncio.run(main())


def test_prefill_apart_from_decode_needs_no_gpus() -> None:
    """The prefill worker begins, a decode worker pulls at the modelled pace and goes on; the answer is that of one
    worker."""

    async def main() -> None:
        groups = (WorkerGroup(role="prefill", name="prefill"), WorkerGroup(role="decode", name="decode", count=2))
        async with fleet(*groups) as client:
            asked: Ask = {"token_ids": [*PREFIX, 251], "max_tokens": 8, **GREEDY}
            answer = await client.complete(**asked)
            begun, decoder = answer.worker_ids
            assert begun == "prefill-0"
            assert decoder.startswith("decode-")
            assert answer.total_s >= PULL_S + 8 * HARDWARE[HARDWARE_NAME].steps.decode_step_s / TIME_SCALE
            await until(client, lambda known: known[decoder].status.pulled_blocks == 93)
            known = await entries(client)
            # Routers learn the modelled pace, whatever the stand-ins take.
            assert known[decoder].status.fetch_token_s >= PULL_S / (93 * 16)
            assert known[begun].status.decode_tokens == 0
            alone = await client.complete(**asked, bypass_prefix_cache=True)
            assert alone.token_ids == answer.token_ids

    asyncio.run(main())
