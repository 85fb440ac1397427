"""A worker's doors for KV blocks: served to other workers, and pulled from them on behalf of requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deploy.processes import WorkerSettings
    from worker.engine_thread import EngineThread
    from worker.peers import PeerBlocks
    from worker.service import WorkerIdentity
    from worker.transfer.memory import BlockMemory
    from worker.transfer.transports import Transport

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Transfers:
    """What a worker has of them. None of it where its KV cache is no memory that others could read."""

    peers: PeerBlocks | None = None
    offers: tuple[str, ...] = ()  # to register
    fetch_token_s: float = 0.0


@asynccontextmanager
async def transfers(
    settings: WorkerSettings, identity: WorkerIdentity, thread: EngineThread, memory: BlockMemory | None
) -> AsyncIterator[Transfers]:
    """Serve and pull until left. Raises InvalidRequest for an address that cannot be had."""
    if memory is None:
        yield Transfers()
        return
    from deploy.served_model import simulated_fetch_token_s
    from worker.peers import FETCH_BYTES_S, EngineBlocks, PeerBlocks
    from worker.simulated_network import SLOWEST, SimulatedNetwork
    from worker.transfer.holder import Holder
    from worker.transfer.puller import Puller
    from worker.transfer.server import TransferServer
    from worker.transfer.transports.local import LocalTransport
    from worker.transfer.transports.shm import ShmTransport
    from worker.transfer.transports.tcp import TcpTransport

    holder = Holder(identity.worker_id, identity.epoch, memory, EngineBlocks(thread), secret=identity.secret)
    thread.engine.lend = holder.lend
    ways: list[Transport] = [LocalTransport(), ShmTransport(), TcpTransport()]
    fetch_token_s = memory.layout.block_bytes / settings.block_size / FETCH_BYTES_S
    slowest_block_s: float | None = None
    if settings.hardware is not None:
        fetch_token_s = simulated_fetch_token_s(settings, settings.hardware)
        network = SimulatedNetwork(fetch_token_s * settings.block_size)
        ways, slowest_block_s = [network.over(way) for way in ways], SLOWEST * network.block_s
    puller = Puller(memory, ways, secret=identity.secret)
    peers = PeerBlocks(thread, puller, identity.secret, slowest_block_s=slowest_block_s)
    host = f"[{settings.host}]" if ":" in settings.host.strip("[]") else settings.host
    server = TransferServer(holder, tcp=f"{host}:0", insecure=settings.insecure)
    server.__enter__()
    try:
        offers = tuple(_reached_at(settings, offer) for offer in holder.offers)
        _log.info("blocks are served at %s", ", ".join(offers))
        yield Transfers(peers, offers, fetch_token_s)
    finally:
        # Both wait for threads, which wait for the engine, which goes on.
        await asyncio.to_thread(peers.close)
        await asyncio.to_thread(server.__exit__, None, None, None)


def _reached_at(settings: WorkerSettings, offer: str) -> str:
    transport, _, address = offer.partition("://")
    return f"{transport}://{settings.reached_at(address)}" if transport == "tcp" else offer
