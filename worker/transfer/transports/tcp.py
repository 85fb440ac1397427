"""`tcp`: scatter and gather over plain sockets, straight from pool to pool. It also controls `shm` and `nixl`."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress

from rhizome.errors import InvalidRequest
from worker.transfer.deadline import Deadline
from worker.transfer.errors import TransferFailed
from worker.transfer.messages import Kind, frame
from worker.transfer.transports import Offer
from worker.transfer.transports.sockets import SocketWire
from worker.transfer.transports.stream import StreamChannel

RELEASE_S = 0.05  # a full socket is not waited for: the lease ends by itself


class SocketStream:
    """See Stream."""

    def __init__(self, connected: socket.socket) -> None:
        self.wire = SocketWire(connected)

    def send(self, message: bytes, deadline: Deadline) -> None:
        """See Stream."""
        self.wire.send([message], deadline.left)

    def read_into(self, views: Sequence[memoryview], deadline: Deadline) -> int:
        """See Stream."""
        return self.wire.receive(views, deadline.left)

    def release(self, lease_id: bytes) -> None:
        """See Stream."""
        self.wire.send([frame(Kind.RELEASE, lease_id)], Deadline(RELEASE_S).left)

    def close(self) -> None:
        """See Stream."""
        self.wire.close()


def connect_tcp(offer: Offer, deadline: Deadline) -> socket.socket:
    """A connection to an offer's host and port. Raises TransferFailed."""
    try:
        connected = socket.create_connection(offer.host_port(), timeout=deadline.left())
    except (OSError, InvalidRequest) as error:
        raise TransferFailed(f"{offer}: {error}") from None
    with suppress(OSError):
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connected


class TcpTransport:
    """See the module."""

    name = "tcp"

    def __init__(self, *, verify: bool = True) -> None:
        self._verify = verify

    def reaches(self, offer: Offer) -> bool:  # noqa: ARG002 - whoever offers it can be reached
        """See Transport."""
        return True

    def connect(self, offer: Offer, deadline: Deadline) -> StreamChannel:
        """See Transport."""
        return StreamChannel(SocketStream(connect_tcp(offer, deadline)), verify=self._verify)
