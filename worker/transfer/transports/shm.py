"""`shm`: the puller maps the holder's pool and copies out of it, once. Same host and user, Linux.

The pool is a memfd, which has no name and goes with its last user; it is passed, read-only, over a Unix socket in the
abstract namespace, which has no file. While the puller copies, the holder takes the digests on another core.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections import deque
from collections.abc import Generator, Sequence
from functools import cache
from hashlib import blake2b
from pathlib import Path

from rhizome.errors import InvalidRequest
from worker.transfer.deadline import Deadline
from worker.transfer.errors import Refused, TransferFailed
from worker.transfer.memory import TAG_BYTES, BlockLayout, BlockMemory
from worker.transfer.messages import HEADER, LEASE_ENDED, Grant, How, Kind, frame, read_header
from worker.transfer.transports import Batch, Offer
from worker.transfer.transports.stream import Stream, StreamChannel
from worker.transfer.transports.tcp import SocketStream

AHEAD = 4  # batches that may be copied before the holder told the first one's digests

_ATTACHED = struct.Struct(f"<QII{TAG_BYTES}s")  # block_bytes, planes, num_blocks, tag
_PEER = struct.Struct("3i")  # pid, uid, gid


@cache
def host_identity() -> str:
    """Equal for processes that can reach each other's abstract sockets: one boot, one network namespace. Or ""."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        network = os.stat("/proc/self/ns/net")
    except OSError:
        return ""
    return blake2b(f"{boot} {network.st_dev} {network.st_ino}".encode(), digest_size=8).hexdigest()


def same_user(connected: socket.socket) -> bool:
    """Whether who is at the other end of a Unix socket runs as the same user."""
    _, user, _ = _PEER.unpack(connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    return bool(user == os.geteuid())


def send_memory(connected: socket.socket, memory: BlockMemory) -> None:
    """Answer an ATTACH: the layout, and the memory itself. Raises OSError."""
    layout = memory.layout
    told = frame(Kind.ATTACHED, _ATTACHED.pack(layout.block_bytes, layout.planes, memory.num_blocks, layout.tag))
    descriptor = os.open(f"/proc/self/fd/{memory.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        rights = array.array("i", [descriptor])
        connected.sendmsg([told], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    finally:
        os.close(descriptor)


def receive_memory(stream: SocketStream, deadline: Deadline) -> BlockMemory:
    """Ask for the holder's memory. Raises TransferFailed, Refused or OutOfTime."""
    stream.send(frame(Kind.ATTACH), deadline)
    connected, size = stream.wire.socket, HEADER.size + _ATTACHED.size
    connected.settimeout(deadline.left())
    try:
        told, ancillary, flags, _ = connected.recvmsg(size, socket.CMSG_SPACE(4))
    except OSError as error:
        raise TransferFailed(f"no memory came: {error}") from None
    finally:
        connected.settimeout(None)
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) // 4 * 4])
    try:
        if len(told) != size or read_header(told[: HEADER.size], frozenset({Kind.ATTACHED}))[1] != _ATTACHED.size:
            raise TransferFailed(f"no memory came, but {len(told)} bytes")
        if len(descriptors) != 1 or flags & socket.MSG_CTRUNC:
            raise TransferFailed(f"{len(descriptors)} descriptors came")
        block_bytes, planes, num_blocks, tag = _ATTACHED.unpack_from(told, HEADER.size)
        return BlockMemory.mapped(os.dup(descriptors[0]), BlockLayout(block_bytes, planes, tag), num_blocks)
    except (InvalidRequest, OSError, ValueError) as error:
        raise TransferFailed(f"the holder's memory: {error}") from None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


class ShmChannel(StreamChannel):
    """Copies out of the mapped memory."""

    how = How.FROM_MEMORY

    def __init__(self, stream: Stream, source: BlockMemory, *, verify: bool = True) -> None:
        super().__init__(stream, verify=verify)
        self._source = source

    def fetch(self, grant: Grant, memory: BlockMemory, slots: Sequence[int], deadline: Deadline) -> Generator[Batch]:
        """See Channel."""
        source, blocks = self._source, grant.blocks.tolist()
        if source.layout != memory.layout:
            raise TransferFailed(f"the holder's blocks are {source.layout}")
        if max(blocks, default=0) >= source.num_blocks:
            raise TransferFailed(f"GRANT of block {max(blocks)} of {source.num_blocks}")
        copied: deque[tuple[slice, list[int]]] = deque()
        batches = iter(grant.batches())
        while True:
            while len(copied) < AHEAD and (batch := next(batches, None)) is not None:
                deadline.left()
                span = slice(batch.start, batch.stop)
                copied.append((span, memory.copy_in(slots[span], source, blocks[span], digest=self.verify)))
            if not copied:
                return
            span, found = copied.popleft()
            told = self.head(len(found), deadline)
            if (source.generations[grant.blocks[span]] != grant.generations[span]).any():
                raise Refused(LEASE_ENDED)
            yield Batch(told, found if self.verify else None)

    def close(self) -> None:
        """See Channel."""
        super().close()
        self._source.close()


class ShmTransport:
    """See the module."""

    name = "shm"

    def __init__(self, *, verify: bool = True) -> None:
        self._verify = verify

    def reaches(self, offer: Offer) -> bool:
        """See Transport."""
        host = host_identity()
        return bool(host) and offer.address.partition("/")[0] == host

    def connect(self, offer: Offer, deadline: Deadline) -> ShmChannel:
        """See Transport."""
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stream = SocketStream(connected)
        try:
            connected.settimeout(deadline.left())
            connected.connect(f"\0{offer.address.partition('/')[2]}")
            connected.settimeout(None)
            if not same_user(connected):
                raise TransferFailed(f"{offer} is of another user")
            return ShmChannel(stream, receive_memory(stream, deadline), verify=self._verify)
        except OSError as error:
            stream.close()
            raise TransferFailed(f"{offer}: {error}") from None
        except BaseException:
            stream.close()
            raise
