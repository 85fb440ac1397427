"""A fleet on Ray, started and hurt: `python -m benchmarks.fleet_ray [--quick] [--json FILE]`.

A cluster of three nodes on this machine is up and has idle worker processes (a warm image). Then a fleet of two routers
and two workers of a tiny model is deployed from a program that has connected, until its first answer; and one worker's
process is killed, until both routers would send it requests again. Wall time, with whatever else this machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import grpc

from benchmarks.report import Row, figure, machine, print_table, row, write_json
from deploy.fleet.plan import plan_fleet
from deploy.fleet.reading import parse_fleet
from radix import BACKEND
from router.client import Client

NODES = 3
STARTS = 3  # Ray gives a node 30 s, and a busy machine may need longer
ROUNDS, QUICK_ROUNDS = 5, 2
OBJECT_STORE_BYTES = 80 * 2**20
FLEET = """
name: benchmark
model: {tiny: true}
insecure: true
routers: {count: 2, port: 0, resources: {cpus: 0.5}}
workers: [{name: chat, count: 2, kv_cache_mib: 64, threads: 1, resources: {cpus: 1}}]
"""


def main() -> None:
    """Measure, print, and write what --json names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = measured(QUICK_ROUNDS if arguments.quick else ROUNDS)
    print_table("A fleet on Ray", rows)
    if arguments.json:
        write_json(arguments.json, "fleet_ray", {**machine(), "index": BACKEND, "quick": arguments.quick}, rows)


def measured(rounds: int) -> list[Row]:
    """A fleet that is deployed, hurt and ended so many times."""
    import ray

    began = time.perf_counter()
    cluster = _cluster()
    ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    print(f"{NODES} nodes are up after {time.perf_counter() - began:.1f} s", file=sys.stderr)
    try:
        times = [_round(cluster.address) for _ in range(rounds)]
    finally:
        ray.shutdown()
        cluster.shutdown()
    note = f"{NODES} local nodes, 2 routers, 2 workers of the tiny model on torch"
    return [
        row("deploy to first answer", "s", figure(deploy for deploy, _ in times), note=note),
        row("killed worker to serving", "s", figure(restart for _, restart in times), note="at both routers"),
    ]


def _cluster() -> Any:
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "object_store_memory": OBJECT_STORE_BYTES}
    for tries_left in reversed(range(STARTS)):
        cluster: Any = Cluster()
        try:
            cluster.add_node(**node, include_dashboard=False)
            for _ in range(NODES - 1):
                cluster.add_node(**node)
            cluster.wait_for_nodes()
            return cluster
        except Exception as error:
            cluster.shutdown()
            if not tries_left:
                raise
            print(f"{str(error).splitlines()[0]}; trying again", file=sys.stderr)
    raise AssertionError("unreachable")


def _round(address: str) -> tuple[float, float]:
    from deploy.fleet.ray_cluster import deploy_on_ray, ray_control

    began = time.perf_counter()
    routers = deploy_on_ray(plan_fleet(parse_fleet(FLEET, "fleet.yaml")), address, lambda _line: None)

    async def use() -> tuple[float, float]:
        control = ray_control("benchmark", address)
        async with Client(routers[0]) as client, Client(routers[1]) as other:
            await client.complete("hello", max_tokens=1)
            deployed_s = time.perf_counter() - began
            (victim,) = [server for server in (await control.status()).servers if server.name == "chat-0"]
            (before,) = [entry.epoch for entry in await client.workers() if entry.worker_id == victim.name]
            killed = time.perf_counter()
            os.kill(victim.pid, signal.SIGKILL)
            await asyncio.gather(*(_back(router, victim.name, before) for router in (client, other)))
            restarted_s = time.perf_counter() - killed
        await control.shutdown(5.0)
        return deployed_s, restarted_s

    return asyncio.run(use())


async def _back(client: Client, worker: str, epoch: int) -> None:
    while True:
        try:
            if any(entry.worker_id == worker and entry.epoch > epoch for entry in await client.workers()):
                return
        except grpc.aio.AioRpcError:
            pass
        await asyncio.sleep(0.02)


if __name__ == "__main__":
    main()
