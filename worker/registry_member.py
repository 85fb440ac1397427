"""The worker's side of a registry in Redis: says what it is and how it is, for all routers that read there."""

from __future__ import annotations

import asyncio
import logging
from typing import NoReturn

from kv_events.bus.redis_registry import ANNOUNCE_S, Announcement, Registry
from kv_events.bus.url import BusUrl
from rhizome import ticket
from rhizome.errors import Unavailable
from rhizome.v1 import fleet_pb2
from worker.engine_thread import EngineThread
from worker.service import WorkerIdentity, status_message

_log = logging.getLogger(__name__)

GOODBYE_S = 1.0


class RegistryMember:
    """Membership by announcement. `run` goes on until cancelled; Redis may come and go meanwhile."""

    def __init__(
        self, bus: BusUrl, request: fleet_pb2.RegisterRequest, identity: WorkerIdentity, thread: EngineThread
    ) -> None:
        """`request`: the signed registration. Raises InvalidRequest for credentials that cannot be read."""
        self._registry = Registry(bus)
        self._join = request.SerializeToString()
        self._identity = identity
        self._thread = thread

    async def run(self) -> NoReturn:
        """Announce this worker until cancelled, then say goodbye."""
        told, away = 0, False
        try:
            while True:
                position, status = self._status(told)
                try:
                    await self._registry.announce(Announcement(join=self._join, status=status))
                    told = position
                    if away:
                        _log.info("registry %s: it answers again", self._registry.where)
                    away = False
                except Unavailable as error:
                    _log.log(logging.DEBUG if away else logging.WARNING, "registry %s; trying on", error)
                    away = True
                await asyncio.sleep(ANNOUNCE_S)
        finally:
            await self._leave()

    def _status(self, told: int) -> tuple[int, bytes]:
        position, prefilled, finished = self._thread.engine.progress_since(told)
        status = status_message(self._identity, self._thread.status)
        status.prefilled_request_ids.extend(prefilled)
        status.finished_request_ids.extend(finished)
        heartbeat = fleet_pb2.HeartbeatRequest(status=status)
        ticket.sign_member(self._identity.secret, heartbeat)
        return position, heartbeat.SerializeToString()

    async def _leave(self) -> None:
        request = fleet_pb2.DeregisterRequest(worker_id=self._identity.worker_id, epoch=self._identity.epoch)
        ticket.sign_member(self._identity.secret, request)
        try:
            async with asyncio.timeout(GOODBYE_S):
                await self._registry.announce(Announcement(leave=request.SerializeToString()))
        except (Unavailable, TimeoutError) as error:
            _log.debug("registry %s: %s", self._registry.where, error)
        finally:
            await self._registry.close()
