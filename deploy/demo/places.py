"""Where the demo's fleets run: processes of this machine, or a Ray cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from deploy.fleet.commands import ray_cluster
from deploy.fleet.config import FleetConfig
from deploy.fleet.plan import plan_fleet
from deploy.local import LocalCluster

T = TypeVar("T")
Say = Callable[[str], None]


class Place(Protocol):
    """Nothing of a fleet is left behind, however its use ends."""

    def serve(self, fleet: FleetConfig, use: Callable[[str], Coroutine[Any, Any, T]]) -> T:
        """Start a fleet, use it by the address of its first router, and end it. Raises Unavailable."""


class Embedded:
    """Here."""

    def __init__(self, model_dir: Path, say: Say) -> None:
        self._model_dir = model_dir
        self._say = say

    def serve(self, fleet: FleetConfig, use: Callable[[str], Coroutine[Any, Any, T]]) -> T:
        """See Place."""

        async def serve() -> T:
            cluster = LocalCluster(plan_fleet(fleet), model_dir=self._model_dir, on_event=self._say)
            async with cluster:
                return await use(cluster.address)

        return asyncio.run(serve())


@contextmanager
def place(ray: str | None, model_dir: Path, say: Say) -> Iterator[Place]:
    """Embedded where `ray` is None; else the Ray cluster at host:port; auto: the one that runs on this machine, or a
    new one; local: a new one. Raises InvalidRequest where Ray is not installed, Unavailable."""
    if ray is None:
        yield Embedded(model_dir, say)
        return
    ray_cluster()
    from deploy.demo.on_ray import connected

    with connected(ray, say) as there:
        yield there
