"""A fleet on a Ray cluster, from a machine of it: deployed, looked at, scaled, ended."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray

from deploy.fleet.logins import Logins
from deploy.fleet.plan import FleetPlan
from deploy.fleet.ray_manager import FleetManager
from deploy.fleet.ray_server import MANAGER, Environment
from kv_events.bus.redis_stream import AUTH_VARIABLE
from rhizome.errors import InvalidRequest, NotServed, RhizomeError, Unavailable
from rhizome.rpc import check_bind_host
from rhizome.ticket import SECRET_VARIABLE
from rhizome.v1 import launcher_pb2

PREFIX = "rhizome-"  # of a fleet's namespace
PASSED_ON = (AUTH_VARIABLE, "RHIZOME_RADIX")
POLL_S = 0.2
CONNECT_TIMEOUT_S = 5.0


class FleetError(RhizomeError):
    """An error that the manager told."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code  # type: ignore[misc]  # the class of it stayed there


class RayControl:
    """A fleet of a Ray cluster. Raises FleetError, and Unavailable where its manager is gone."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    async def status(self) -> launcher_pb2.FleetStatus:
        """Every server."""
        return launcher_pb2.FleetStatus.FromString(await self._call("status"))

    async def scale(self, group: str, count: int, drain_s: float) -> launcher_pb2.FleetStatus:
        """Returns when it is done."""
        return launcher_pb2.FleetStatus.FromString(await self._call("scale", group, count, drain_s))

    async def shutdown(self, drain_s: float) -> None:
        """Returns when all servers have ended."""
        await self._call("shutdown", drain_s)
        ray.kill(self._manager, no_restart=True)

    async def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return _value(await getattr(self._manager, method).remote(*arguments))
        except ray.exceptions.RayActorError as error:
            raise Unavailable(f"the fleet's manager is gone: {error}") from None


def connect(address: str) -> None:
    """Be a driver of the cluster at host:port; auto: of the one that runs on this machine. Raises Unavailable."""
    if ray.is_initialized():
        return
    try:
        if address != "auto" and "://" not in address:
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()  # Ray tries for long
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as error:
        which = "on this machine" if address == "auto" else f"at {address}"
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise Unavailable(f"no Ray cluster {which} ({first}); start one with: ray start --head") from None


def deploy_on_ray(plan: FleetPlan, address: str, say: Callable[[str], None] | None = None) -> list[str]:
    """Start a fleet, which stays there when this process ends; returns the routers' addresses.

    Raises InvalidRequest for a name that is taken, and where nodes would serve in the clear unasked; Unavailable.
    """
    say = say or _say
    connect(address)
    name = plan.config.name
    if name in _fleets():
        limit = f"another one: a fleet of that name runs on this cluster; rhizome down --ray --fleet {name}"
        raise InvalidRequest("name", name, limit)
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"]:
            _check_host(node["NodeManagerAddress"], insecure=plan.config.insecure)
    environment = Environment({variable: os.environ[variable] for variable in PASSED_ON if variable in os.environ})
    environment |= plan.logins.environment(os.environ)
    environment[SECRET_VARIABLE] = os.environ.get(SECRET_VARIABLE) or secrets.token_hex(32)
    namespace = PREFIX + name
    options = ray.remote(FleetManager).options(
        name=MANAGER, namespace=namespace, lifetime="detached", num_cpus=0, max_restarts=-1
    )
    manager: Any = options.remote(replace(plan, logins=Logins()), namespace, environment)
    try:
        routers: list[str] = _value(_watched(manager, say))
    except BaseException:
        ray.get(manager.abandon.remote())
        ray.kill(manager, no_restart=True)
        raise
    say(f"ready: rhizome chat --router {routers[0]}   (rhizome down --ray ends the fleet)")
    return routers


def ray_control(fleet: str | None, address: str) -> RayControl:
    """The fleet of that name, or the only one. Raises NotServed, InvalidRequest where several run, Unavailable."""
    connect(address)
    names = _fleets()
    if fleet is None and len(names) > 1:
        raise InvalidRequest("--fleet", None, f"one of {', '.join(names)}, which run on this cluster")
    name = fleet or "".join(names)
    if name not in names:
        which = f"no fleet {fleet}" if fleet else "no fleet"
        there = f" (there is {', '.join(names)})" if names else ""
        raise NotServed(f"{which} runs on this Ray cluster{there}")
    return RayControl(ray.get_actor(MANAGER, PREFIX + name))


def _fleets() -> list[str]:
    actors = ray.util.list_named_actors(all_namespaces=True)
    return sorted(
        actor["namespace"].removeprefix(PREFIX)
        for actor in actors
        if actor["name"] == MANAGER and actor["namespace"].startswith(PREFIX)
    )


def _watched(manager: Any, say: Callable[[str], None]) -> tuple[str, Any]:
    deployed, seen = manager.deploy.remote(), 0
    while True:
        done, _ = ray.wait([deployed], timeout=POLL_S)
        lines = ray.get(manager.messages.remote(seen))
        seen += len(lines)
        for line in lines:
            say(line)
        if done:
            answer: tuple[str, Any] = ray.get(deployed)
            return answer


def _check_host(host: str, *, insecure: bool) -> None:
    try:
        check_bind_host(host, insecure=insecure)
    except InvalidRequest:
        limit = f"true, as servers on the cluster's node {host} are reached over the network without TLS"
        raise InvalidRequest("insecure", insecure, limit) from None


def _value(answer: tuple[str, Any]) -> Any:
    code, value = answer
    if code:
        raise FleetError(code, value)
    return value


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
