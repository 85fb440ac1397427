"""A worker's doors for KV blocks: served to other workers, and pulled from them on behalf of requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from rhizome.errors import InvalidRequest

if TYPE_CHECKING:
    import grpc

    from deploy.processes import WorkerSettings
    from worker.engine_thread import EngineThread
    from worker.peers import PeerBlocks
    from worker.service import WorkerIdentity
    from worker.transfer.holder import Holder
    from worker.transfer.memory import BlockMemory
    from worker.transfer.transports import Transport
    from worker.transfer.transports.nixl import NixlEndpoint

_log = logging.getLogger(__name__)

TRANSPORTS = ("local", "shm", "nixl", "tcp", "grpc")
# The best first. Within a host blocks are copied right out of the holder's pool (local, shm), as fast as memory is.
# Between hosts tcp is twice as fast as grpc, which is last: its messages go through the worker's event loop, but it
# needs no port besides the worker's own. nixl is only for who names it: on one host shm is faster, it polls while
# somebody reads, and whoever reaches its listeners reads the pool without a ticket. Where hosts are joined by a network
# that UCX speaks natively, `--transport shm --transport nixl --transport tcp` puts it first.
DEFAULT_TRANSPORTS = ("local", "shm", "tcp", "grpc")
GRPC_THREADS = 4  # in which batches for gRPC are digested and copied; calls wait for their turn


def check_transport(name: str) -> str:
    """The name again. Raises InvalidRequest for one that no transport has."""
    if name not in TRANSPORTS:
        raise InvalidRequest("transport", name, f"one of {', '.join(TRANSPORTS)}")
    return name


def check_transports(names: Sequence[str]) -> None:
    """Raise InvalidRequest for what cannot be had: an unknown name, one twice, none, or NIXL where it is not here."""
    from worker.transfer.transports.nixl import INSTALL, has_nixl

    if not names:
        raise InvalidRequest("transport", None, f"at least one of {', '.join(TRANSPORTS)}")
    for name in names:
        check_transport(name)
        if names.count(name) > 1:
            raise InvalidRequest("transport", name, "each only once")
    if "nixl" in names and not has_nixl():
        raise InvalidRequest("transport", "nixl", f"installed: {INSTALL}")


class Transfers:
    """What a worker has of them. None of it where its KV cache is no memory that others could read."""

    def __init__(
        self,
        settings: WorkerSettings,
        *,
        holder: Holder | None = None,
        peers: PeerBlocks | None = None,
        fetch_token_s: float = 0.0,
        handlers: Sequence[grpc.GenericRpcHandler] = (),
    ) -> None:
        """`handlers`: for the worker's own gRPC server."""
        self._settings = settings
        self._holder = holder
        self.peers = peers
        self.fetch_token_s = fetch_token_s
        self.handlers = tuple(handlers)

    def offers_at(self, address: str) -> tuple[str, ...]:
        """Where others reach this worker's blocks, once its server is bound to `address`: in its registration, and in
        its tickets."""
        if self._holder is None:
            return ()
        offers = [self._reached_at(offer) for offer in self._holder.offers]
        if self.handlers:
            offers.append(f"grpc://{self._settings.reached_at(address)}")
        named = [offer for offer in offers if offer.partition("://")[0] in self._settings.transports]
        self._holder.offers = tuple(named)
        if named:
            _log.info("blocks are served at %s", ", ".join(named))
        else:
            _log.warning("no transport of %s works here: no blocks travel", ", ".join(self._settings.transports))
        return self._holder.offers

    def _reached_at(self, offer: str) -> str:
        transport, _, address = offer.partition("://")
        return f"{transport}://{self._settings.reached_at(address)}" if transport in ("tcp", "nixl") else offer


@asynccontextmanager
async def transfers(
    settings: WorkerSettings, identity: WorkerIdentity, thread: EngineThread, memory: BlockMemory | None
) -> AsyncIterator[Transfers]:
    """Serve and pull until left. Raises InvalidRequest for an address that cannot be had."""
    if memory is None:
        yield Transfers(settings)
        return
    stack = ExitStack()
    try:
        yield _opened(settings, identity, thread, memory, stack)
    finally:
        # Waits for threads, which wait for the engine, which goes on.
        await asyncio.to_thread(stack.close)


def _opened(
    settings: WorkerSettings, identity: WorkerIdentity, thread: EngineThread, memory: BlockMemory, stack: ExitStack
) -> Transfers:
    """Open the doors; `stack` closes them, pulls first."""
    from deploy.served_model import simulated_fetch_token_s
    from worker.peers import FETCH_BYTES_S, EngineBlocks, PeerBlocks
    from worker.simulated_network import SLOWEST, SimulatedNetwork
    from worker.transfer.holder import Holder
    from worker.transfer.puller import Puller
    from worker.transfer.server import TransferServer
    from worker.transfer.transports.grpc import aio_handlers

    holder = Holder(identity.worker_id, identity.epoch, memory, EngineBlocks(thread), secret=identity.secret)
    thread.engine.lend = holder.lend
    endpoint = _nixl_endpoint(settings, memory, stack) if "nixl" in settings.transports else None
    host = f"[{settings.host}]" if ":" in settings.host.strip("[]") else settings.host
    over_tcp = "tcp" in settings.transports or endpoint is not None  # NIXL's control goes over it, too
    server = TransferServer(
        holder,
        tcp=f"{host}:0" if over_tcp else None,
        shm="shm" in settings.transports,
        nixl=endpoint,
        insecure=settings.insecure,
    )
    stack.enter_context(server)
    handlers = []
    if "grpc" in settings.transports:
        threads = ThreadPoolExecutor(GRPC_THREADS, thread_name_prefix="rhizome-transfer")
        stack.callback(threads.shutdown)
        handlers.append(aio_handlers(holder, threads))
    ways = _ways(settings, endpoint, stack)
    fetch_token_s = memory.layout.block_bytes / settings.block_size / FETCH_BYTES_S if ways else 0.0
    slowest_block_s: float | None = None
    if settings.hardware is not None and ways:
        fetch_token_s = simulated_fetch_token_s(settings, settings.hardware)
        network = SimulatedNetwork(fetch_token_s * settings.block_size)
        ways, slowest_block_s = [network.over(way) for way in ways], SLOWEST * network.block_s
    puller = Puller(memory, ways, secret=identity.secret)
    peers = PeerBlocks(thread, puller, identity.secret, slowest_block_s=slowest_block_s)
    stack.callback(peers.close)
    return Transfers(settings, holder=holder, peers=peers, fetch_token_s=fetch_token_s, handlers=handlers)


def _ways(settings: WorkerSettings, endpoint: NixlEndpoint | None, stack: ExitStack) -> list[Transport]:
    """To pull, in the settings' order."""
    from worker.transfer.transports.grpc import GrpcTransport
    from worker.transfer.transports.local import LocalTransport
    from worker.transfer.transports.nixl import NixlTransport
    from worker.transfer.transports.shm import ShmTransport
    from worker.transfer.transports.tcp import TcpTransport

    over_grpc = GrpcTransport(_channel)
    stack.callback(over_grpc.close)
    known: dict[str, Transport] = {
        "local": LocalTransport(),
        "shm": ShmTransport(),
        "tcp": TcpTransport(),
        "grpc": over_grpc,
    }
    if endpoint is not None:
        known["nixl"] = NixlTransport(endpoint)
    return [known[name] for name in settings.transports if name in known]


def _channel(address: str) -> grpc.Channel:
    """To another worker's server."""
    import grpc

    from rhizome import rpc

    return grpc.insecure_channel(address, options=rpc.CHANNEL_OPTIONS)


def _nixl_endpoint(settings: WorkerSettings, memory: BlockMemory, stack: ExitStack) -> NixlEndpoint | None:
    """None where the agent does not start: blocks then travel another way."""
    from worker.transfer.transports.nixl import NixlEndpoint

    try:
        endpoint = NixlEndpoint(memory, insecure=settings.insecure)
    except Exception as error:  # NIXL's own, whatever they are
        _log.warning("nixl does not start here, and is left out: %s", error)
        return None
    stack.callback(endpoint.close)
    return endpoint
