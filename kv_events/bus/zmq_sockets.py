"""ZeroMQ sockets in an event loop, with the limits that every one of ours has.

Plain sockets and their file descriptor, not pyzmq's asyncio ones: those make some futures for each message, and one
that is sent with NOBLOCK cannot tell apart a full queue from a peer that left.
"""

from __future__ import annotations

import asyncio
import os
import threading
from typing import Any, cast

import zmq

from kv_events.wire import MAX_PAYLOAD_BYTES

MAX_FRAME_BYTES = MAX_PAYLOAD_BYTES + 1024
"""Of what is received from a publisher: one batch. (How many frames a message has, libzmq does not bound.)"""

QUEUED_MESSAGES = 256
"""Batches that a subscriber's slowness may pile up, at the publisher (one copy for all subscribers) and again at the
subscriber: 2.5 s of 10 ms steps, usually some 100 kB. What comes further is dropped, found missing, and asked for."""

HEARTBEAT_MS = 2_000
HEARTBEAT_TIMEOUT_MS = 6_000
"""A peer that is silent so long is taken for gone, and connected to again."""

RECONNECT_MS = 50
MAX_RECONNECT_MS = 1_000
MAX_SOCKETS = 65_535  # of a router of many workers, two each; libzmq's own default is 1023

FAIR_MESSAGES = 32  # received before other tasks get the loop

# As plain integers: pyzmq's flags are enums, and joining them costs more than sending.
_NOWAIT = int(zmq.NOBLOCK)
_NOWAIT_MORE = int(zmq.NOBLOCK) | int(zmq.SNDMORE)

_context: tuple[int, zmq.Context[Any]] | None = None
_context_lock = threading.Lock()


def context() -> zmq.Context[Any]:
    """One for the process, for its life: an I/O thread serves many sockets. A forked child gets its own."""
    global _context
    with _context_lock:
        if _context is None or _context[0] != os.getpid():
            made: zmq.Context[Any] = zmq.Context()
            made.set(zmq.MAX_SOCKETS, min(MAX_SOCKETS, made.get(zmq.SOCKET_LIMIT)))
            _context = os.getpid(), made
        return _context[1]


class LoopSocket:
    """A socket of the running event loop. One task at a time may await it; any may send without waiting."""

    def __init__(self, kind: int, **options: int | bytes) -> None:
        """`options` by their names in lower case; see zmq_setsockopt(3)."""
        self.raw: zmq.Socket[bytes] = context().socket(kind)
        defaults = {
            "linger": 0,
            "ipv6": 1,
            "maxmsgsize": MAX_FRAME_BYTES,
            "heartbeat_ivl": HEARTBEAT_MS,
            "heartbeat_timeout": HEARTBEAT_TIMEOUT_MS,
            "reconnect_ivl": RECONNECT_MS,
            "reconnect_ivl_max": MAX_RECONNECT_MS,
        }
        for name, value in {**defaults, **options}.items():
            self.raw.setsockopt(getattr(zmq, name.upper()), value)
        self._attach()

    @classmethod
    def monitoring(cls, watched: LoopSocket, events: int) -> LoopSocket:
        """Of what becomes of another socket's connections. Close it before that one."""
        self = cls.__new__(cls)
        self.raw = watched.raw.get_monitor_socket(events)
        self._attach()
        return self

    def _attach(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._received = 0
        self._awaited = 0  # the events that the task which waits wants
        self._looking = False
        self._fd = cast(int, self.raw.get(zmq.FD))
        self._loop.add_reader(self._fd, self._on_readable)

    def _on_readable(self) -> None:
        # The descriptor says that something changed, once; asking for the events takes that back (zmq_getsockopt(3)).
        self._events()
        self._changed.set()

    def connect(self, host: str, port: int) -> None:
        """To a publisher, now or once it is there, and again whenever the connection is lost."""
        self.raw.connect(f"tcp://{f'[{host}]' if ':' in host else host}:{port}")

    def _look(self) -> None:
        self._looking = False
        if not self.raw.closed and self._events() & self._awaited:
            self._changed.set()

    def take(self) -> list[bytes] | None:
        """The next message, if one is here."""
        try:
            return self.raw.recv_multipart(_NOWAIT)
        except zmq.Again:
            return None

    async def receive(self, timeout_s: float | None = None) -> list[bytes] | None:
        """The next message; None when there is none in time. Lets other tasks run now and then, however many come."""
        self._received += 1
        if self._received % FAIR_MESSAGES == 0:
            await asyncio.sleep(0)
        if (frames := self.take()) is None:
            try:
                async with asyncio.timeout(timeout_s):
                    while (frames := self.take()) is None:
                        await self._change(zmq.POLLIN)
            except TimeoutError:
                return None
        return frames

    def send(self, frames: list[bytes]) -> bool:
        """Send without waiting; False when the queue is full, or (DEALER) nobody is connected.

        Raises zmq.ZMQError when (ROUTER) the peer has left.
        """
        if not self._looking:  # sending may take the descriptor's sign from the task that waits for it
            self._looking = True
            self._loop.call_soon(self._look)
        try:
            for frame in frames[:-1]:
                self.raw.send(frame, _NOWAIT_MORE)
            self.raw.send(frames[-1], _NOWAIT)
        except zmq.Again:  # at the first frame, or not at all (zmq_msg_send(3))
            return False
        return True

    async def send_within(self, frames: list[bytes], timeout_s: float) -> bool:
        """Send as soon as it can be; False when it cannot in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self.send(frames):
                    await self._change(zmq.POLLOUT)
        except TimeoutError:
            return False
        return True

    async def _change(self, wanted: int) -> None:
        """Until something may have become of what is wanted."""
        self._changed.clear()
        self._awaited = wanted
        if not self._events() & wanted:
            await self._changed.wait()

    def _events(self) -> int:
        return cast(int, self.raw.get(zmq.EVENTS))

    def close(self, linger_ms: int = 0) -> None:
        """Close the socket; what is queued may leave for `linger_ms`, unheeded."""
        if not self.raw.closed:
            self._loop.remove_reader(self._fd)
            self.raw.disable_monitor()
            self.raw.close(linger_ms)


def subscriber(*topics: bytes) -> LoopSocket:
    """A socket, not connected yet, that gets what is published under topics that begin so, in a bounded queue."""
    live = LoopSocket(zmq.SUB, rcvhwm=QUEUED_MESSAGES)
    for topic in topics:
        live.raw.setsockopt(zmq.SUBSCRIBE, topic)
    return live


def asker(host: str, replay_port: int) -> LoopSocket:
    """A socket to a publisher's replay socket, which takes requests only while there is a connection."""
    asking = LoopSocket(zmq.DEALER, immediate=1)
    asking.connect(host, replay_port)
    return asking
