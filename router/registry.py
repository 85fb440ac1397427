"""Follows a fleet's registry in Redis: what workers announce there counts as if they had called this router.

Redis is transport, not truth: while it is away nobody's lease runs out, as nothing is heard of anybody; a worker that
is dead then is found by the requests that cannot get through.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import NoReturn, Protocol

from google.protobuf.message import DecodeError

from kv_events.bus.redis_registry import ANNOUNCE_S, Announcement, Registry
from kv_events.bus.url import BusUrl
from rhizome.errors import NotServed, RhizomeError, Unavailable
from rhizome.v1 import fleet_pb2
from router.core import Router

logger = logging.getLogger(__name__)

SILENT_S = 2 * ANNOUNCE_S  # Redis answers more often where it is there
RETRY_S = 0.25
MAX_REFUSALS_TOLD = 1024  # workers and reasons: each is logged once


class Joining(Protocol):
    """What workers do at a router (router.service.FleetService). Each raises RhizomeError."""

    def join(self, request: fleet_pb2.RegisterRequest) -> None: ...
    def hear(self, request: fleet_pb2.HeartbeatRequest) -> bool: ...
    def leave(self, request: fleet_pb2.DeregisterRequest) -> None: ...


class RegistryFollower:
    """Brings one registry's members into a router."""

    def __init__(self, bus: BusUrl, router: Router, joining: Joining) -> None:
        """Raises InvalidRequest for credentials that cannot be read."""
        self._registry = Registry(bus)
        self._router = router
        self._joining = joining
        self._heard_at = time.monotonic()
        self._members: set[str] = set()
        self._told: set[str] = set()

    async def run(self) -> NoReturn:
        """Until cancelled."""
        keeping = asyncio.create_task(self._keep_leases())
        away = False
        try:
            while True:
                try:
                    async for announcements in self._registry.read():
                        self._heard_at = time.monotonic()
                        if away:
                            logger.info("registry %s: it answers again", self._registry.where)
                            away = False
                        for announcement in announcements:
                            self._take(announcement)
                except Unavailable as error:
                    if not away:
                        logger.warning("registry %s; leases are kept until it answers", error)
                    away = True
                    await asyncio.sleep(RETRY_S)
                except Exception:  # a defect here must not leave the fleet unheard for good
                    logger.exception("registry %s: following it failed", self._registry.where)
                    await asyncio.sleep(RETRY_S)
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            await self._registry.close()

    async def _keep_leases(self) -> NoReturn:
        while True:
            await asyncio.sleep(ANNOUNCE_S)
            now = time.monotonic()
            if now - self._heard_at > SILENT_S:
                self._router.fleet.renew(self._members, now)

    def _take(self, announcement: Announcement) -> None:
        try:
            if announcement.leave:
                leave = fleet_pb2.DeregisterRequest.FromString(announcement.leave)
                self._joining.leave(leave)
                self._members.discard(leave.worker_id)
                return
            join = fleet_pb2.RegisterRequest.FromString(announcement.join)
            self._joining.join(join)
            self._members.add(join.worker_id)
            self._members &= {member.info.worker_id for member in self._router.fleet.members()}
            self._joining.hear(fleet_pb2.HeartbeatRequest.FromString(announcement.status))
        except NotServed:  # a goodbye of one who is not here
            return
        except (DecodeError, RhizomeError) as error:
            if str(error) not in self._told and len(self._told) < MAX_REFUSALS_TOLD:
                self._told.add(str(error))
                logger.warning("registry %s: %s", self._registry.where, error)
