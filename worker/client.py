"""The worker's side of the fleet: registers with a router and keeps the lease by heartbeats."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

import grpc

from rhizome import rpc, ticket
from rhizome.errors import RhizomeError
from rhizome.v1 import fleet_pb2, fleet_pb2_grpc
from worker.engine_thread import EngineThread
from worker.service import WorkerIdentity, status_message

_log = logging.getLogger(__name__)

RETRY_S = 0.25
MAX_RETRY_S = 4.0
CALL_TIMEOUT_S = 5.0


FINAL_REFUSALS = (
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
)


class Refused(RhizomeError):
    """A router will not have this worker, and trying again would not help."""

    code = "FAILED_PRECONDITION"


def registration(
    identity: WorkerIdentity,
    thread: EngineThread,
    address: str,
    role: fleet_pb2.WorkerRole.ValueType,
    events_url: str = "",
    *,
    offers: Sequence[str] = (),
    fetch_token_s: float = 0.0,
) -> fleet_pb2.RegisterRequest:
    """The signed registration of a worker that serves at `address`. `events_url` says where routers are to read its
    events; empty: there, too. `offers` say where others may pull its blocks, `fetch_token_s` what it takes to pull a
    token's from another; 0: it cannot."""
    config = thread.engine.config
    request = fleet_pb2.RegisterRequest(
        worker_id=identity.worker_id,
        epoch=identity.epoch,
        address=address,
        role=role,
        model=identity.model,
        blocks_total=config.num_blocks,
        max_running=config.max_running,
        max_waiting=config.max_waiting,
        max_batched_tokens=config.max_batched_tokens,
        events_url=events_url,
        transfer_offers=offers,
        fetch_token_s=fetch_token_s,
    )
    ticket.sign_member(identity.secret, request)
    return request


class FleetMember:
    """Membership in one router's fleet. `run` goes on until cancelled; the router may come and go meanwhile."""

    def __init__(self, router: str, request: fleet_pb2.RegisterRequest, identity: WorkerIdentity, thread: EngineThread):
        self._router = router
        self._request = request
        self._identity = identity
        self._thread = thread

    async def run(self) -> None:
        """Register, then send heartbeats; register again whenever the router does not know this worker.

        Raises Refused when the router refuses this worker for good (wrong proof, old epoch, model unlike the fleet's).
        """
        async with grpc.aio.insecure_channel(self._router, options=rpc.CHANNEL_OPTIONS) as channel:
            fleet = fleet_pb2_grpc.FleetStub(channel)
            failures = 0
            try:
                while True:
                    failures = await self._stay(fleet, failures)
            finally:
                await self._leave(fleet)

    async def _stay(self, fleet: fleet_pb2_grpc.FleetAsyncStub, failures: int) -> int:
        """One lease: from registration until the router is gone or has forgotten us.

        Returns the number of tries in a row that failed, given that of those before.
        """
        try:
            lease = await fleet.Register(self._request, timeout=CALL_TIMEOUT_S)
            _log.info("registered with router %s", self._router)
            failures = 0
            position = 0
            while True:
                position, prefilled, finished = self._thread.engine.progress_since(position)
                status = status_message(self._identity, self._thread.status)
                status.prefilled_request_ids.extend(prefilled)
                status.finished_request_ids.extend(finished)
                heartbeat = fleet_pb2.HeartbeatRequest(status=status)
                ticket.sign_member(self._identity.secret, heartbeat)
                await fleet.Heartbeat(heartbeat, timeout=CALL_TIMEOUT_S)
                await asyncio.sleep(lease.heartbeat_interval_s)
        except grpc.aio.AioRpcError as error:
            if error.code() in FINAL_REFUSALS:
                raise Refused(f"router {self._router} refuses this worker: {error.details()}") from error
            level = logging.DEBUG if failures else logging.WARNING  # said once, not every time
            _log.log(level, "router %s: %s; trying to register until it answers", self._router, error.details())
            await asyncio.sleep(min(MAX_RETRY_S, RETRY_S * 2.0 ** min(failures, 10)))
            return failures + 1

    async def _leave(self, fleet: fleet_pb2_grpc.FleetAsyncStub) -> None:
        request = fleet_pb2.DeregisterRequest(worker_id=self._identity.worker_id, epoch=self._identity.epoch)
        ticket.sign_member(self._identity.secret, request)
        try:
            await fleet.Deregister(request, timeout=1.0)
        except grpc.aio.AioRpcError as error:
            _log.debug("router %s: %s", self._router, error.details())
