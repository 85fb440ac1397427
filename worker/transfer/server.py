"""The holder's doors: sockets and threads around a `Holder`, and the clock that ends its leases.

A thread for each connection, at most MAX_CONNECTIONS of them: sending blocks waits in the kernel, outside of Python.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import TracebackType

from rhizome.errors import InvalidRequest, RhizomeError
from rhizome.rpc import check_bind_host
from worker.transfer.deadline import Deadline
from worker.transfer.errors import OutOfTime, TransferFailed
from worker.transfer.holder import Holder
from worker.transfer.leases import MAX_LEASE_S
from worker.transfer.messages import ASKED, HEADER, How, Kind, decode_release, read_header
from worker.transfer.transports import Offer
from worker.transfer.transports.local import local_offer
from worker.transfer.transports.nixl import NixlEndpoint
from worker.transfer.transports.shm import host_identity, same_user, send_memory
from worker.transfer.transports.sockets import SocketWire

MAX_CONNECTIONS = 64  # each may hold a ticket of 1 MiB and a thread
FIRST_WORD_S = 5.0  # for who has not asked anything yet
IDLE_S = 60.0  # for who asked before: longer than pullers keep unused connections
REAP_S = 0.25  # how late an ended lease may be noticed at most

Attach = Callable[[socket.socket], None]
"""Answers an ATTACH on its connection."""


class TransferServer:
    """Serves one holder's blocks while entered; then `holder.offers` names the ways.

    `local` is offered always, `shm` where the memory is shared, `tcp` at an address [loopback, any port], `nixl`
    through an endpoint. `grpc` is for whoever has a gRPC server: see transports.grpc.aio_handlers.
    """

    def __init__(
        self,
        holder: Holder,
        *,
        tcp: str | None = "127.0.0.1:0",
        shm: bool = True,
        nixl: NixlEndpoint | None = None,
        insecure: bool = False,
    ) -> None:
        """`nixl`: over the holder's memory. Raises InvalidRequest for a TCP address that is not loopback, unless
        `insecure`: tickets and blocks go in the clear."""
        self.holder = holder
        self._tcp = None if tcp is None else _address(tcp, insecure)
        self._shm = shm and holder.memory.descriptor is not None and host_identity() != ""
        self._nixl = nixl
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._listeners: list[socket.socket] = []
        self._connections: dict[SocketWire, threading.Thread] = {}
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> TransferServer:
        offers = [local_offer(self.holder)]
        try:
            if self._shm:
                name = f"rhizome-{os.urandom(8).hex()}"
                listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._listeners.append(listener)
                listener.bind(f"\0{name}")
                self._listen(listener, self._send_memory)
                offers.append(Offer("shm", f"{host_identity()}/{name}"))
            if self._tcp is not None:
                host, port = self._tcp
                listener = socket.create_server((host, port), family=_family(host))
                self._listeners.append(listener)
                self._listen(listener, self._send_agent)
                shown = f"[{host}]" if ":" in host else host
                address = f"{shown}:{listener.getsockname()[1]}"
                offers += [Offer("nixl", address)] if self._nixl is not None else []
                offers.append(Offer("tcp", address))
        except OSError as error:
            self._stop()
            raise InvalidRequest("transfer address", self._tcp, str(error)) from None
        self.holder.offers = tuple(map(str, offers))
        self._start(self._reap)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        self.holder.close()

    def _stop(self) -> None:
        self._stopping.set()
        for listener in self._listeners:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes who accepts
            listener.close()
        with self._lock:
            connections = dict(self._connections)
        for wire in connections:
            wire.close()
        for thread in (*self._threads, *connections.values()):
            thread.join()

    def _listen(self, listener: socket.socket, attach: Attach) -> None:
        listener.listen(MAX_CONNECTIONS)
        self._start(lambda: self._accept(listener, attach))

    def _start(self, run: Callable[[], None]) -> None:
        thread = threading.Thread(target=run, name="rhizome-transfer", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _reap(self) -> None:
        while not self._stopping.is_set():
            self.holder.expire()
            ends_at = self.holder.leases.next_end()
            left = REAP_S if ends_at is None else ends_at - time.monotonic()
            self._stopping.wait(min(REAP_S, max(left, 0.001)))

    def _accept(self, listener: socket.socket, attach: Attach) -> None:
        while not self._stopping.is_set():
            try:
                connected, _ = listener.accept()
            except OSError:
                if not self._stopping.is_set():
                    self._stopping.wait(0.05)  # too many open files: later
                continue
            with self._lock:
                if self._stopping.is_set() or len(self._connections) >= MAX_CONNECTIONS:
                    connected.close()
                    continue
                wire = SocketWire(connected)
                thread = threading.Thread(
                    target=self._converse, args=(wire, attach), name="rhizome-transfer", daemon=True
                )
                self._connections[wire] = thread
                thread.start()

    def _converse(self, wire: SocketWire, attach: Attach) -> None:
        try:
            with suppress(OSError):
                if wire.socket.family != socket.AF_UNIX:
                    wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                elif not same_user(wire.socket):
                    return
            self._answer_all(wire, attach)
        except (RhizomeError, OSError):
            pass  # whoever asked sees the connection end; a refusal was an answer
        finally:
            wire.close()
            with self._lock:
                del self._connections[wire]

    def _answer_all(self, wire: SocketWire, attach: Attach) -> None:
        """Answer what is asked, until the other end hangs up."""
        with ExitStack() as reading:  # holds something while the other end reads our memory through NIXL
            patience = FIRST_WORD_S
            while (message := self._message(wire, patience)) is not None:
                kind, payload = message
                if self._nixl is not None and wire.socket.family != socket.AF_UNIX and _reads_memory(kind, payload):
                    reading.close()
                    self._nixl.begin()
                    reading.callback(self._nixl.end)
                if kind is Kind.PULL:
                    left = self._within(MAX_LEASE_S)
                    for pieces in self.holder.serve(payload):
                        wire.send(pieces, left)
                elif kind is Kind.RELEASE:
                    reading.close()
                    self.holder.release(decode_release(payload))
                else:
                    attach(wire.socket)
                patience = IDLE_S

    def _message(self, wire: SocketWire, patience: float) -> tuple[Kind, bytes] | None:
        header = bytearray(HEADER.size)
        if wire.receive([memoryview(header)], self._within(patience)) < len(header):
            return None
        kind, size = read_header(header, ASKED)
        payload = bytearray(size)
        if wire.receive([memoryview(payload)], self._within(FIRST_WORD_S)) < size:
            return None
        return kind, bytes(payload)

    def _within(self, seconds: float) -> Callable[[], float]:
        deadline = Deadline(seconds)

        def left() -> float:
            if self._stopping.is_set():
                raise OutOfTime("stopping")
            return deadline.left()

        return left

    def _send_memory(self, connected: socket.socket) -> None:
        send_memory(connected, self.holder.memory)

    def _send_agent(self, connected: socket.socket) -> None:
        if self._nixl is None:
            raise TransferFailed("no nixl here")
        connected.sendall(self._nixl.attached())


def _reads_memory(kind: Kind, payload: bytes) -> bool:
    return kind is Kind.ATTACH or (kind is Kind.PULL and payload[:1] == bytes((How.FROM_MEMORY,)))


def _address(text: str, insecure: bool) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidRequest("transfer address", text, "host:port")
    try:
        check_bind_host(host, insecure=insecure)
    except InvalidRequest:
        limit = "loopback: blocks go in the clear (or say insecure)"
        raise InvalidRequest("transfer address", text, limit) from None
    return host, int(port)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
