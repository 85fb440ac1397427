"""Prefixes from other workers, and for them: the threads between an engine and worker.transfer.

A pull takes slots from the pool between two steps, fills them in a thread of its own while the engine goes on, and
gives them back between two steps, those that arrived in the prefix cache. Whatever fails, the engine computes.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from threading import Semaphore
from typing import TypeVar

from rhizome.errors import RhizomeError
from rhizome.transfer_ticket import KEY_BYTES, TransferTicket, read_signed
from worker.block_claims import Reservation
from worker.cached_block import CachedBlock
from worker.engine_thread import EngineThread
from worker.late_slots import LateSlots
from worker.pull_pace import PullPace
from worker.sequence import EngineRequest
from worker.sequence import Sequence as TokenSequence
from worker.transfer.deadline import Deadline
from worker.transfer.puller import Puller, PullResult

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

MAX_PULLS = 8  # at once: each has a thread, and slots of the pool; others wait, no more than requests may wait
MAX_RELEASES = 64  # of leases that nobody needs, waiting to be told; the others end by themselves, soon
PATIENCE_S = 2.0  # with the engine, which answers between two steps
START_S = 1.0  # a pull may take this and ...
SLOWEST_BYTES_S = 100e6  # ... as long as its blocks take at that pace; slower than this, computing is as good
LONG_S = 0.1  # a pull that may take as long, besides START_S, tells its pace: 10 MB
FETCH_BYTES_S = 1e9  # what routers are told to expect


class EngineBlocks:
    """An engine's prefix cache for worker.transfer.Holder, which calls from threads of its own."""

    def __init__(self, thread: EngineThread) -> None:
        self._thread = thread

    def pin(self, keys: Sequence[bytes]) -> list[int]:
        """See BlockHolder. Nothing is pinned where the engine does not answer."""
        blocks = _between_steps(self._thread, lambda: self._thread.engine.pin(keys))
        return blocks or []

    def unpin(self, blocks: Sequence[int]) -> None:
        """See BlockHolder."""
        _post(self._thread, lambda: self._thread.engine.unpin(blocks))


class PeerBlocks:
    """One worker's pulls on behalf of requests."""

    def __init__(
        self, thread: EngineThread, puller: Puller, secret: bytes = b"", *, slowest_block_s: float | None = None
    ) -> None:
        """`slowest_block_s`: a pull may take as long for each block [its bytes at SLOWEST_BYTES_S]."""
        self._thread = thread
        self._puller = puller
        self._secret = secret
        own_pace_s = puller.memory.layout.block_bytes / SLOWEST_BYTES_S
        self._slowest_block_s = own_pace_s if slowest_block_s is None else slowest_block_s
        # Used on the engine's thread.
        self._pace = PullPace(thread.engine.config.block_size, math.ceil(LONG_S / self._slowest_block_s))
        self._late = LateSlots(puller.memory.in_flight, self._give_back_late)
        self._threads = ThreadPoolExecutor(MAX_PULLS, thread_name_prefix="rhizome-pull")
        self._room = Semaphore(MAX_PULLS + thread.engine.config.max_waiting)
        self._releasing = ThreadPoolExecutor(1, thread_name_prefix="rhizome-release")
        self._releases = Semaphore(MAX_RELEASES)

    async def fetch(self, request: EngineRequest, signed: bytes) -> None:
        """Bring what the ticket's holder has of the request's prompt into the prefix cache, as far as it lacks here.

        Never raises for what fails. While as many pulls are under way as may be, it waits for its turn: within the time
        that the pull may take. Where too many wait, nothing is pulled.
        """
        if request.bypass_prefix_cache or not self._room.acquire(blocking=False):
            return
        deadline = Deadline(START_S + len(request.keys) * self._slowest_block_s)
        future = self._threads.submit(self._fetch, request, signed, deadline)
        future.add_done_callback(lambda _: self._room.release())
        try:
            await asyncio.shield(asyncio.wrap_future(future))  # one that waits its turn has a lease to give back
        except asyncio.CancelledError:
            deadline.cancel()  # the thread gives the slots back
            raise
        except Exception:
            _log.exception("a pull for request %s failed", request.request_id)

    def close(self) -> None:
        """Wait for what is under way, at most as long as its deadlines."""
        self._threads.shutdown()
        self._releasing.shutdown(cancel_futures=True)
        self._late.close()
        self._puller.close()

    def _fetch(self, request: EngineRequest, signed: bytes, deadline: Deadline) -> None:
        try:
            ticket = read_signed(self._secret, signed, int(time.time() * 1000))
        except RhizomeError as error:
            _log.warning("request %s: nothing is pulled: %s", request.request_id, error)
            return
        contents = _named(TokenSequence(request, 0).reusable(), ticket)
        reservation: Reservation | None = None
        if contents and not deadline.over:
            reservation = _between_steps(self._thread, lambda: self._thread.engine.reserve(contents))
        if reservation is None:
            self._release_soon(signed)
            return
        result: PullResult | None = None
        try:
            keys = [content.key for content in reservation.contents]
            result = self._puller.pull(signed, keys, reservation.slots, deadline)
        finally:
            self._give_back(reservation, result)
        if result.reason:
            told = "request %s: %d of %d blocks came from %s: %s"
            _log.info(told, request.request_id, result.blocks, result.wanted, ticket.holder, result.reason)

    def _release_soon(self, signed: bytes) -> None:
        """On a thread of its own: the request does not wait for its holder, which may be slow to answer, or gone."""
        if self._releases.acquire(blocking=False):
            future = self._releasing.submit(self._puller.release, signed)
            future.add_done_callback(lambda _: self._releases.release())

    def _give_back(self, reservation: Reservation, result: PullResult | None) -> None:
        """Those that arrived are cached from now on, the others are free; but for what may still be written."""
        engine = self._thread.engine
        late = self._puller.memory.in_flight.intersection(reservation.slots)
        settled = replace(reservation, slots=[slot for slot in reservation.slots if slot not in late])

        def adopt() -> None:
            if result is None:
                engine.adopt(settled, 0, 0, "")
                return
            engine.adopt(settled, result.blocks, result.size_bytes, result.transport)
            self._pace.add(result.wanted, result.blocks, result.seconds)
            ways = tuple((name, replace(counts)) for name, counts in self._puller.counts.items() if counts.pulls)
            engine.scheduler.claims.note_pulls(ways, self._pace.token_s)

        _post(self._thread, adopt)
        self._late.keep(late)

    def _give_back_late(self, slots: Sequence[int]) -> None:
        _post(self._thread, lambda: self._thread.engine.unpin(slots))


def _named(contents: list[CachedBlock], ticket: TransferTicket) -> list[CachedBlock]:
    """The leading blocks that the ticket is for."""
    count = 0
    for at, content in zip(range(0, len(ticket.keys), KEY_BYTES), contents, strict=False):
        if ticket.keys[at : at + KEY_BYTES] != content.key:
            break
        count += 1
    return contents[:count]


def _between_steps(thread: EngineThread, function: Callable[[], _T]) -> _T | None:
    """What the engine answers; None where it does not in time, and then it was not asked."""
    future = thread.call(function)
    try:
        return future.result(PATIENCE_S)
    except FutureTimeout:
        if future.cancel():
            return None
        return future.result()
    except CancelledError:
        return None


def _post(thread: EngineThread, function: Callable[[], None]) -> None:
    """Have the engine do something, without waiting. After its end nothing needs to be done."""
    thread.call(function).add_done_callback(_tell)


def _tell(future: Future[None]) -> None:
    if not future.cancelled() and (error := future.exception()):
        _log.error("the engine could not take blocks back", exc_info=error)
