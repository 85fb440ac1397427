"""The holder's process of the transfer benchmark: its pool behind our doors, and the same pool behind bare ones."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection

import grpc
import numpy as np

from benchmarks.measure import cores
from rhizome.transfer_ticket import read_signed
from worker.transfer.holder import Holder
from worker.transfer.memory import BlockLayout, BlockMemory
from worker.transfer.messages import How, batch_blocks_of
from worker.transfer.server import TransferServer
from worker.transfer.transports.grpc import aio_handlers
from worker.transfer.transports.nixl import NixlEndpoint, has_nixl

IN_CALL = 1 << 20  # bytes in one call of a bare socket, and in one message of bare gRPC
BARE_SERVICE = "bench.Bare"


@dataclass(frozen=True, slots=True)
class Doors:
    """Where the holder's process answers."""

    socket_port: int
    grpc_address: str
    nixl: tuple[bytes, int] | None  # an agent's metadata, and the pool's address


class Everything:
    """A cache that holds every block of a pool: key n is block order[n]. Nothing is counted."""

    def __init__(self, order: Sequence[int]) -> None:
        self._order = list(order)

    def pin(self, keys: Sequence[bytes]) -> list[int]:
        """See BlockHolder."""
        return [self._order[int.from_bytes(key, "little")] for key in keys]

    def unpin(self, blocks: Sequence[int]) -> None:
        """See BlockHolder."""


def bench_keys(count: int) -> list[bytes]:
    """Key n is the number n."""
    return [number.to_bytes(16, "little") for number in range(count)]


def shuffled(count: int, seed: int) -> list[int]:
    """The numbers below `count`, in an order of chance."""
    order: list[int] = np.random.default_rng(seed).permutation(count).tolist()
    return order


def filled(layout: BlockLayout, num_blocks: int) -> BlockMemory:
    """A shared pool with every byte written, so that all its pages are there."""
    memory = BlockMemory.shared(layout, num_blocks)
    memory.pieces[:] = np.random.default_rng(1).integers(0, 256, layout.block_bytes, dtype=np.uint8)
    memory.pieces.view(np.uint64)[..., 0] = np.arange(num_blocks)  # no two blocks are alike
    return memory


def hold(connection: Connection, block_bytes: int, num_blocks: int) -> None:
    """Say where the doors are; then for each (count, digests) a ticket for the first `count` keys. None: all are
    connected."""
    layout = BlockLayout(block_bytes)
    memory = filled(layout, num_blocks)
    cache = Everything(shuffled(num_blocks, 2))
    with ExitStack() as stack:
        endpoint = None
        if has_nixl():
            endpoint = NixlEndpoint(memory)
            endpoint.begin()  # until all are connected: reads by UCX do not take part in the holder's process
            stack.callback(endpoint.close)
        holders = {}
        bare = _bare_grpc(stack, memory, cache)
        for digests in (True, False):
            holder = Holder("bench", 1, memory, cache, max_leased_blocks=64 * num_blocks, digests=digests)
            address = _our_grpc(stack, holder)
            stack.enter_context(TransferServer(holder, nixl=endpoint))
            holder.offers += (f"grpc://{address}",)
            holders[digests] = holder
        where = None if endpoint is None else (endpoint.agent.get_agent_metadata(), memory.address)
        connection.send((Doors(_bare_socket(memory, cache), bare, where), cores()))
        while True:
            try:
                asked = connection.recv()
            except EOFError:
                return
            if asked is not None:
                count, digests = asked
                connection.send(_leased(holders[digests], count, digests))
            elif endpoint is not None:
                endpoint.end()


def _leased(holder: Holder, count: int, digests: bool) -> tuple[bytes, float]:
    """A ticket, when the digests behind it are taken, and how long that took."""
    start = time.perf_counter()
    ticket = holder.lease(bench_keys(count))
    lease = holder.leases.get(read_signed(b"", ticket, 0).lease_id)
    assert lease is not None
    while digests and len(lease.digests) < count and count > batch_blocks_of(holder.memory.layout, How.IN_STREAM):
        time.sleep(0.0002)
    return ticket, time.perf_counter() - start


def _bare_socket(memory: BlockMemory, cache: Everything) -> int:
    """Sends the blocks of so many keys (8 bytes) in order, without a word about them."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            connected, _ = listener.accept()
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while asked := connected.recv(8, socket.MSG_WAITALL):
                blocks = cache.pin(bench_keys(int.from_bytes(asked, "little")))
                for views in calls(memory, blocks):
                    send_all(connected, views)

    threading.Thread(target=serve, daemon=True).start()
    port: int = listener.getsockname()[1]
    return port


def calls(memory: BlockMemory, blocks: Sequence[int]) -> Iterator[list[memoryview]]:
    """The views of as many blocks as go into one call."""
    step = max(1, IN_CALL // memory.layout.block_bytes)
    for start in range(0, len(blocks), step):
        yield memory.views(blocks[start : start + step])


def send_all(connected: socket.socket, views: list[memoryview]) -> None:
    """Send all bytes."""
    while views:
        moved = connected.sendmsg(views)
        while views and moved >= len(views[0]):
            moved -= len(views.pop(0))
        if moved:
            views[0] = views[0][moved:]


def receive_all(connected: socket.socket, views: list[memoryview]) -> None:
    """Fill all views."""
    while views:
        moved = connected.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]
        assert moved, "the holder hung up"
        while views and moved >= len(views[0]):
            moved -= len(views.pop(0))
        if moved:
            views[0] = views[0][moved:]


def _our_grpc(stack: ExitStack, holder: Holder) -> str:
    """Our handlers in an event loop, as a worker has them. Returns the address."""

    async def start() -> tuple[grpc.aio.Server, str]:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((aio_handlers(holder, threads),))
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        return server, address

    threads = stack.enter_context(ThreadPoolExecutor(4))
    loop = asyncio.new_event_loop()
    runner = threading.Thread(target=loop.run_forever)
    runner.start()
    stack.callback(loop.close)
    stack.callback(runner.join)
    stack.callback(loop.call_soon_threadsafe, loop.stop)
    server, address = asyncio.run_coroutine_threadsafe(start(), loop).result()
    stack.callback(lambda: asyncio.run_coroutine_threadsafe(server.stop(None), loop).result())
    return address


def _bare_grpc(stack: ExitStack, memory: BlockMemory, cache: Everything) -> str:
    """Streams the blocks of so many keys in messages of 1 MiB, or of a block where that is smaller."""

    def pull(payload: bytes, _: grpc.ServicerContext) -> Iterator[bytes]:
        for views in calls(memory, cache.pin(bench_keys(int.from_bytes(payload, "little")))):
            yield b"".join(views)

    methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {"Pull": grpc.unary_stream_rpc_method_handler(pull)}
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(BARE_SERVICE, methods),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    stack.callback(server.stop, None)
    return address
