"""The embedded launcher's gRPC server on loopback, and how commands in other processes reach it."""

from __future__ import annotations

import hmac
import itertools
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from deploy.fleet import state_file
from deploy.fleet.control import READY_TIMEOUT_S, FleetControl
from deploy.fleet.state_file import FleetState
from rhizome import rpc
from rhizome.errors import Denied, InvalidRequest, NotServed
from rhizome.v1 import launcher_pb2, launcher_pb2_grpc

M = TypeVar("M", bound=Message)

SERVICE = "rhizome.v1.Launcher"
TOKEN = "rhizome-token"  # noqa: S105 - the name of the metadata, not a token
CALL_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 60.0  # for processes to end
# Nobody listens there any more, or somebody else does.
GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED)


class LauncherService:
    """rhizome.v1.Launcher."""

    def __init__(self, control: FleetControl, token: str, stopped: Callable[[], Awaitable[object]]) -> None:
        """`stopped` returns when everything but this server has ended."""
        self._control = control
        self._token = token
        self._stopped = stopped

    def handlers(self) -> grpc.GenericRpcHandler:
        """Each method, refused without the token."""
        methods = {
            "GetFleet": rpc.unary(launcher_pb2.GetFleetRequest, self._permitted(self.get_fleet)),
            "Scale": rpc.unary(launcher_pb2.ScaleRequest, self._permitted(self.scale)),
            "Shutdown": rpc.unary(launcher_pb2.ShutdownRequest, self._permitted(self.shutdown)),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def get_fleet(self, request: launcher_pb2.GetFleetRequest, context: rpc.Context) -> launcher_pb2.FleetStatus:
        """Every server."""
        return await self._control.status()

    async def scale(self, request: launcher_pb2.ScaleRequest, context: rpc.Context) -> launcher_pb2.FleetStatus:
        """Change a group's size. Raises InvalidRequest, Conflict, Unavailable."""
        return await self._control.scale(request.group, request.count, request.drain_s)

    async def shutdown(
        self, request: launcher_pb2.ShutdownRequest, context: rpc.Context
    ) -> launcher_pb2.ShutdownResponse:
        """Drain and end the fleet. Raises InvalidRequest, Conflict."""
        await self._control.shutdown(request.drain_s)
        await self._stopped()
        return launcher_pb2.ShutdownResponse()

    def _permitted(
        self, method: Callable[[M, rpc.Context], Awaitable[Message]]
    ) -> Callable[[M, rpc.Context], Awaitable[Message]]:
        async def checked(request: M, context: rpc.Context) -> Message:
            given = dict(context.invocation_metadata() or ()).get(TOKEN, b"")
            given = given.encode() if isinstance(given, str) else given
            if not hmac.compare_digest(given, self._token.encode()):
                raise Denied(f"{TOKEN}: not this fleet's")
            return await method(request, context)

        return checked


@asynccontextmanager
async def serving_control(
    control: FleetControl,
    name: str,
    *,
    named: bool,
    stopped: Callable[[], Awaitable[object]],
    on_event: Callable[[str], None],
) -> AsyncIterator[str]:
    """Serve a fleet's control on loopback until left, and write down where; yields the name it is found by.

    Where a fleet of that name runs already the name gets a number, unless it was given (`named`): InvalidRequest then.
    """
    token = secrets.token_hex(32)
    server = grpc.aio.server(options=rpc.SERVER_OPTIONS)
    server.add_generic_rpc_handlers((LauncherService(control, token, stopped).handlers(),))
    async with rpc.serving(server, "127.0.0.1", 0, (SERVICE,)) as address:
        found_by = await _free_name(name, named=named)
        with ExitStack() as stack:
            try:
                stack.enter_context(state_file.recorded(FleetState(found_by, address, token, os.getpid())))
            except OSError as error:
                on_event(f"rhizome status, scale and down will not find this fleet: {error}")
            yield found_by


async def _free_name(name: str, *, named: bool) -> str:
    taken = {control.state.name for control in await running_fleets()}
    if name in taken and named:
        limit = f"another one: a fleet of that name runs on this machine; rhizome down --fleet {name}"
        raise InvalidRequest("name", name, limit)
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return next(each for each in itertools.chain([name], numbered) if each not in taken)


class LocalControl:
    """A fleet of this machine, from another process. Raises gRPC's errors."""

    def __init__(self, state: FleetState) -> None:
        self.state = state

    async def status(self) -> launcher_pb2.FleetStatus:
        """Every server."""
        status: launcher_pb2.FleetStatus
        status = await self._call("GetFleet", launcher_pb2.GetFleetRequest(), CALL_TIMEOUT_S)
        return status

    async def scale(self, group: str, count: int, drain_s: float) -> launcher_pb2.FleetStatus:
        """Returns when it is done."""
        request = launcher_pb2.ScaleRequest(group=group, count=count, drain_s=drain_s)
        status: launcher_pb2.FleetStatus
        status = await self._call("Scale", request, READY_TIMEOUT_S + drain_s + STOP_TIMEOUT_S)
        return status

    async def shutdown(self, drain_s: float) -> None:
        """Returns when all servers have ended."""
        await self._call("Shutdown", launcher_pb2.ShutdownRequest(drain_s=drain_s), drain_s + STOP_TIMEOUT_S)

    async def _call(self, method: str, request: Message, timeout_s: float) -> Any:
        async with grpc.aio.insecure_channel(self.state.address, options=rpc.CHANNEL_OPTIONS) as channel:
            call = getattr(launcher_pb2_grpc.LauncherStub(channel), method)
            return await call(request, timeout=timeout_s, metadata=((TOKEN, self.state.token),))


async def running_fleets() -> list[LocalControl]:
    """Every fleet of this user that runs on this machine; what others left behind is removed."""
    found = []
    for state in state_file.find():
        control = LocalControl(state)
        try:
            await control.status()
        except grpc.aio.AioRpcError as error:
            if error.code() not in GONE:
                raise
            state_file.remove(state)
        else:
            found.append(control)
    return found


async def the_fleet(name: str | None) -> LocalControl:
    """The running fleet of that name, or the only one. Raises NotServed, and InvalidRequest where several run."""
    fleets = await running_fleets()
    names = [control.state.name for control in fleets]
    if name is None and len(fleets) > 1:
        raise InvalidRequest("--fleet", None, f"one of {', '.join(names)}, which run on this machine")
    for control in fleets:
        if name in (None, control.state.name):
            return control
    which = "no fleet" if name is None else f"no fleet {name}"
    raise NotServed(f"{which} of this user runs on this machine" + (f" (there is {', '.join(names)})" if names else ""))
