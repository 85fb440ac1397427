"""Connected sockets that block, with deadlines kept by the kernel: one call moves a batch, outside of Python."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress

from worker.transfer.errors import TransferFailed
from worker.transfer.transports import POLL_S

MAX_PIECES = 1024  # in one call: Linux' IOV_MAX

_TIMEVAL = struct.Struct("@ll")


class SocketWire:
    """Whole buffers over one socket. `left` tells how long a call may still wait, or raises what ends it."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(True)
        self.socket = connected
        self._limits: dict[int, float] = {}

    def send(self, pieces: Sequence[bytes | memoryview], left: Callable[[], float]) -> None:
        """Send all pieces. Raises TransferFailed, and what `left` raises."""
        due = sum(map(len, pieces))
        waiting, at = [memoryview(piece) for piece in pieces], 0
        while due:
            self._limit(socket.SO_SNDTIMEO, left())
            try:
                moved = self.socket.sendmsg(waiting[at : at + MAX_PIECES])
            except BlockingIOError:
                continue
            except OSError as error:
                raise TransferFailed(f"cannot send: {error.strerror or error}") from None
            due -= moved
            if due:
                at = _advance(waiting, at, moved)

    def receive(self, views: Sequence[memoryview], left: Callable[[], float]) -> int:
        """Fill all views. Returns how many bytes came: fewer only at the end of the stream. Raises as `send` does."""
        due, came = sum(map(len, views)), 0
        waiting, at = list(views), 0
        while came < due:
            self._limit(socket.SO_RCVTIMEO, left())
            try:
                moved = self.socket.recvmsg_into(waiting[at : at + MAX_PIECES], 0, socket.MSG_WAITALL)[0]
            except BlockingIOError:
                continue
            except OSError as error:
                raise TransferFailed(f"cannot receive: {error.strerror or error}") from None
            if moved == 0:
                return came
            came += moved
            if came < due:
                at = _advance(waiting, at, moved)
        return came

    def close(self) -> None:
        """Also wakes a thread that waits in a call."""
        with suppress(OSError):  # the other end was faster
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def _limit(self, option: int, seconds: float) -> None:
        """How long the next call may wait: not the whole time, so that `left` is asked now and then."""
        seconds = POLL_S if seconds > POLL_S else max(seconds, 1e-3)
        if self._limits.get(option) != seconds:
            self.socket.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(int(seconds), int(seconds % 1 * 1e6)))
            self._limits[option] = seconds


def _advance(waiting: list[memoryview], at: int, moved: int) -> int:
    """Which piece is the first that is not done, after so many more bytes; it is cut to what is left of it."""
    while at < len(waiting) and moved >= len(waiting[at]):
        moved -= len(waiting[at])
        at += 1
    if moved:
        waiting[at] = waiting[at][moved:]
    return at
