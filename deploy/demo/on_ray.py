"""The demo's fleets on Ray, which is started here, and ended, where none runs."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from deploy.demo.places import Say, T
from deploy.fleet.config import FleetConfig
from deploy.fleet.plan import plan_fleet
from deploy.fleet.ray_cluster import connect, deploy_on_ray, ray_control
from rhizome.errors import Unavailable

STARTS = 3  # Ray gives its first node 30 s, and a busy machine may need longer
OBJECT_STORE_BYTES = 80 * 2**20  # about the least that Ray takes: nothing of a fleet goes through it
CPUS = 2  # as Ray counts them; it starts as many processes beforehand
LOOPBACK = "127.0.0.2"  # Ray takes 127.0.0.1 for a word that means the machine's outer address
DRAIN_S = 5.0
REMOVE_TIMEOUT_S = 10.0
POLL_S = 0.2
SHORT_FOLDER = Path("/tmp")  # noqa: S108 - Ray's sockets lie in it, and their paths may have 107 characters


class OnRay:
    """A place of the demo; this process is a driver of the cluster."""

    def __init__(self, address: str, say: Say) -> None:
        self._address = address
        self._say = say

    def serve(self, fleet: FleetConfig, use: Callable[[str], Coroutine[Any, Any, T]]) -> T:
        """See deploy.demo.places.Place."""
        self._say("placing routers and workers; each is a process that imports what it needs, which takes a while")
        address = deploy_on_ray(plan_fleet(fleet), self._address, self._say)[0]
        try:
            return asyncio.run(use(address))
        finally:
            self._say("ending the fleet")
            asyncio.run(ray_control(fleet.name, self._address).shutdown(DRAIN_S))


@contextmanager
def connected(address: str, say: Say) -> Iterator[OnRay]:
    """Be a driver of the cluster at `address`; of a new one for local, or auto where none runs. Raises Unavailable."""
    try:
        if address == "local" or (address == "auto" and not _found(say)):
            with _started(say):
                yield OnRay(address, say)
        else:
            connect(address)
            yield OnRay(address, say)
    finally:
        ray.shutdown()


def _found(say: Say) -> bool:
    try:
        connect("auto")
    except Unavailable:
        say("no Ray cluster runs on this machine")
        return False
    say(f"using the Ray cluster at {ray.get_runtime_context().gcs_address}")
    return True


@contextmanager
def _started(say: Say) -> Iterator[None]:
    """A cluster of one node, on loopback, all of whose files lie in one folder. Raises Unavailable."""
    parent = SHORT_FOLDER if SHORT_FOLDER.is_dir() else None
    folder = tempfile.mkdtemp(prefix="rhizome-ray-", dir=parent)
    try:
        _start(folder, say)
        yield
    finally:
        say("ending Ray")
        ray.shutdown()
        _remove(folder)


def _remove(folder: str) -> None:
    """Ray's processes may write to it to their last, and that is after they were told to end."""
    deadline_s = time.monotonic() + REMOVE_TIMEOUT_S
    while os.path.exists(folder) and time.monotonic() < deadline_s:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(POLL_S)
    # One that comes late may make it anew, as Ray does with a folder that is not there.
    shutil.rmtree(folder, ignore_errors=True)


def _start(folder: str, say: Say) -> None:
    # Of Ray's processes: what they leave behind when they are killed is in the folder, too.
    variables = {"TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
    for tries_left in reversed(range(STARTS)):
        say(f"starting Ray for the demo alone, in {folder}: 10 s or so, longer where the machine is busy")
        try:
            with _environment(variables):
                ray.init(
                    address="local",
                    num_cpus=CPUS,
                    object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                    _node_ip_address=LOOPBACK,
                    _temp_dir=folder,
                )
            return
        except (OSError, ValueError, RuntimeError) as error:
            ray.shutdown()
            if not tries_left:
                first = (str(error).splitlines() or [type(error).__name__])[0]
                raise Unavailable(f"Ray does not start: {first}") from None


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
