"""A vLLM or SGLang server as its event sockets show it, in plain pyzmq: PUB, and a ROUTER that repeats what is kept."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from typing import Any, Self

import msgpack
import zmq

END = b"\xff" * 8
LOOK_S = 0.01  # real ones look at their replay socket every 0.1 s
PATIENCE_S = 30.0


def stored(hashes: list[int], parent: int | None = None, block_size: int = 4, first_token: int = 0) -> dict[str, Any]:
    """A BlockStored event in the map encoding."""
    tokens = list(range(first_token, first_token + block_size * len(hashes)))
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": parent,
        "token_ids": tokens,
        "block_size": block_size,
        "lora_id": None,
        "medium": "GPU",
    }


def removed(hashes: list[int]) -> dict[str, Any]:
    """A BlockRemoved event in the map encoding."""
    return {"type": "BlockRemoved", "block_hashes": hashes, "medium": "GPU"}


class VllmServer:
    """`with VllmServer() as server:` it serves at server.url until the end, numbering batches from 0."""

    def __init__(
        self,
        port: int = 0,
        replay_port: int = 0,
        *,
        topic: bytes | None = b"kv-events",
        topic_in_replay: bool = True,
        replays: bool = True,
        keeps: int = 10_000,
    ) -> None:
        """`topic` None: the framing of two frames. `replays` False: no replay socket; `keeps`: batches."""
        self._topic = [] if topic is None else [topic]
        self._replay_topic = self._topic if topic_in_replay else []
        self._kept: deque[tuple[bytes, bytes]] = deque(maxlen=keeps)
        self._queue: queue.Queue[tuple[bytes, bool]] = queue.Queue()
        self._context = zmq.Context()
        self._live = self._context.socket(zmq.PUB)
        self._router = self._context.socket(zmq.ROUTER)
        self.port = _bind(self._live, port)
        self.replay_port = _bind(self._router, replay_port)
        if not replays:
            self._router.close(0)
        self._seq = 0
        self._over = threading.Event()
        self.replays = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        """Where its events are."""
        return f"zmq://127.0.0.1:{self.port}?replay={self.replay_port}"

    def publish(self, *events: Any, lost: bool = False) -> None:
        """One batch of events; `lost`: the PUB socket drops it."""
        self.publish_payload(msgpack.packb([time.time(), list(events), 0]), lost=lost)

    def publish_payload(self, payload: bytes, *, lost: bool = False) -> None:
        """One batch, as it is."""
        self._queue.put((payload, lost))

    def flush(self) -> None:
        """Until all has been published."""
        deadline = time.monotonic() + PATIENCE_S
        while self._queue.unfinished_tasks:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def publish_raw(self, *frames: bytes) -> None:
        """A message that is no batch. Only while nothing else is published."""
        self._live.send_multipart(frames)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(PATIENCE_S)
        for socket in (self._live, self._router):
            socket.close(0)
        self._context.term()

    def _run(self) -> None:
        while not self._over.is_set():
            if not self._router.closed and self._router.poll(0):
                self._answer(self._router.recv_multipart())
            try:
                payload, lost = self._queue.get(timeout=LOOK_S)
            except queue.Empty:
                continue
            number = self._seq.to_bytes(8, "big")
            if not lost:
                self._live.send_multipart([*self._topic, number, payload])
            self._kept.append((number, payload))
            self._seq += 1
            self._queue.task_done()

    def _answer(self, request: list[bytes]) -> None:
        client, _, start = request  # what has not three frames kills it
        self.replays += 1
        for number, payload in self._kept:
            if int.from_bytes(number, "big") >= int.from_bytes(start, "big"):
                self._router.send_multipart([client, b"", *self._replay_topic, number, payload])
        self._router.send_multipart([client, b"", *(b"" for _ in self._replay_topic), END, b""])


def _bind(socket: zmq.Socket[bytes], port: int) -> int:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            socket.bind(f"tcp://127.0.0.1:{port or '*'}")
            return int(socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").rpartition(b":")[2])
        except zmq.ZMQError:  # a former server's port is given back a moment after it was closed
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
