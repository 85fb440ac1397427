"""What every Rhizome server and channel shares: message limits, keepalive, health, reflection, errors with details."""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NoReturn, TypeAlias, TypeVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health as grpc_health
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from rhizome.errors import InvalidRequest, Overloaded, RhizomeError

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
M = TypeVar("M", bound=Message)

MAX_MESSAGE_BYTES = 16 * 2**20  # a prompt of 1M tokens with its keys is 5 MB
MAX_CONCURRENT_STREAMS = 1024

CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A peer that restarts on its old port must be found again soon.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]
SERVER_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Without this a second server would share the port silently.
    ("grpc.so_reuseport", 0),
]


def _details(error: RhizomeError) -> list[any_pb2.Any]:
    message: Any
    if isinstance(error, InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.limit)
        message = error_details_pb2.BadRequest(field_violations=[violation])
    elif isinstance(error, Overloaded):
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(error.retry_after_s * 1000))
        message = error_details_pb2.RetryInfo(retry_delay=delay)
    else:
        return []
    packed = any_pb2.Any()
    packed.Pack(message)
    return [packed]


async def abort(context: Context, error: RhizomeError) -> NoReturn:
    """End a call with the error's status, its message and google.rpc details."""
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code), message=str(error), details=_details(error))
    await context.abort_with_status(rpc_status.to_status(status))
    raise AssertionError("abort_with_status raises")


def check_bind_host(host: str, *, insecure: bool) -> None:
    """Only loopback is served in the clear, unless the operator says so."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not insecure:
        raise InvalidRequest("host", host, "a loopback address, or --insecure to serve off-host without TLS")


# Handlers take and give bytes: requests are parsed here, for an error that says what is wrong (gRPC's own deserializing
# says UNKNOWN), and an answer that is passed on is not parsed at all.


def parse(message_type: type[M], data: bytes) -> M:
    """A message from its bytes. Raises InvalidRequest."""
    try:
        return message_type.FromString(data)
    except DecodeError as error:
        limit = f"a {message_type.DESCRIPTOR.full_name} whose strings are UTF-8 ({error})"
        raise InvalidRequest("request", f"{len(data)} bytes", limit) from None


def unary(message_type: type[M], method: Callable[[M, Context], Awaitable[Message]]) -> Handler:
    """The handler of a call with one answer. What the method raises as RhizomeError becomes the call's status."""

    async def handle(data: bytes, context: Context) -> bytes:
        try:
            response = await method(parse(message_type, data), context)
        except RhizomeError as error:
            await abort(context, error)
        return response.SerializeToString()

    return grpc.unary_unary_rpc_method_handler(handle)


def streaming(message_type: type[M], method: Callable[[M, Context], Awaitable[None]]) -> Handler:
    """The handler of a call whose method writes its answers, as bytes, to the context."""

    # A coroutine that writes, not a generator: a cancelled call then ends at once.
    async def handle(data: bytes, context: Context) -> None:
        try:
            await method(parse(message_type, data), context)
        except RhizomeError as error:
            await abort(context, error)

    return grpc.unary_stream_rpc_method_handler(handle)


@asynccontextmanager
async def serving(server: grpc.aio.Server, host: str, port: int, services: Sequence[str]) -> AsyncIterator[str]:
    """Run `server` with health and reflection for the named services; yields the bound `host:port`.

    Port 0 takes a free one. Raises InvalidRequest when the port cannot be bound. Leaving stops the server after a
    grace of two seconds.
    """
    name = f"[{host}]" if ":" in host and not host.startswith("[") else host  # an IPv6 address
    health = grpc_health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = (*services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    try:
        bound = server.add_insecure_port(f"{name}:{port}")
    except RuntimeError as error:
        raise InvalidRequest("port", port, f"it must be free on {host} ({error})") from error
    await server.start()
    for service in ("", *services):
        await health.set(service, health_pb2.HealthCheckResponse.SERVING)
    try:
        yield f"{name}:{bound}"
    finally:
        await health.enter_graceful_shutdown()
        await server.stop(grace=2.0)
