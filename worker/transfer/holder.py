"""The holder's side: leases blocks, signs tickets, and answers whoever shows one. Moves no bytes itself."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock, Thread
from typing import TypeAlias

import numpy as np

from rhizome.errors import Conflict, Denied, NotServed, Overloaded, RhizomeError
from rhizome.transfer_ticket import LEASE_ID_BYTES, MAX_KEYS, TransferTicket, read_signed, sign
from worker.transfer.digests import bound
from worker.transfer.errors import Refused
from worker.transfer.leases import MAX_LEASE_S, BlockHolder, Lease, Leases
from worker.transfer.memory import BlockMemory
from worker.transfer.messages import (
    LEASE_ENDED,
    Grant,
    How,
    PullRequest,
    Status,
    batch_blocks_of,
    batch_head,
    decode_pull,
    encode_grant,
    encode_refused,
)

HAND_OVER_S = 15.0  # until whoever goes on with a request has pulled
Pieces: TypeAlias = list[bytes | memoryview]
"""Buffers to be sent one after another. Those of blocks are the pool's memory itself."""


@dataclass(slots=True)
class HolderCounts:
    """Since the start."""

    leases: int = 0
    released: int = 0
    expired: int = 0
    refused: int = 0
    blocks_told: int = 0  # whose digests, and contents where they go in the stream, were handed to a transport


class Holder:
    """One worker's blocks for others. All methods may be called from any thread."""

    def __init__(
        self,
        worker_id: str,
        epoch: int,
        memory: BlockMemory,
        cache: BlockHolder,
        *,
        secret: bytes = b"",
        max_leased_blocks: int | None = None,
        digests: bool = True,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`max_leased_blocks` [half the pool]: what leases may keep from the cache. `digests=False` only to measure
        what they cost."""
        self.worker_id = worker_id
        self.epoch = epoch
        self.memory = memory
        self.secret = secret
        self.offers: tuple[str, ...] = ()  # of whoever serves this holder
        self.counts = HolderCounts()
        self._cache = cache
        self._digests = digests
        self._clock, self._wall_clock = clock, wall_clock
        self._lock = Lock()  # around counts and the sealing's state
        self._to_seal: deque[Lease] = deque()  # as many as there may be leases
        self._sealer: Thread | None = None  # while there is something to seal
        self._seal_step = batch_blocks_of(memory.layout, How.IN_STREAM)
        most = max(1, memory.num_blocks // 2) if max_leased_blocks is None else max_leased_blocks
        self.leases = Leases(most, memory.generations, clock)

    def lease(self, keys: Sequence[bytes], ttl_s: float = MAX_LEASE_S) -> bytes:
        """Pin the longest held beginning of a chain of blocks, and sign a ticket for it.

        Raises NotServed if not even the first is held, Overloaded where too much is leased.
        """
        lease = self._grant(os.urandom(LEASE_ID_BYTES), keys, ttl_s)
        try:
            ticket = self._ticket(lease, ttl_s)
        except BaseException:
            self.release(lease.lease_id)
            raise
        self._seal_soon(lease)
        return ticket

    def lend(self, keys: Sequence[bytes], blocks: Sequence[int], ttl_s: float = HAND_OVER_S) -> bytes:
        """The same for as many blocks as keys, which the cache's owner has pinned: for the leading ones, as many as
        there is room for. They are unpinned when the lease ends, the others at once.

        Asks the cache for nothing. Raises Overloaded where there is no room at all. Whatever it raises, nothing is
        leased then, and all blocks are the caller's to unpin.
        """
        count = min(self._room(), len(blocks))
        lease = self._lease(os.urandom(LEASE_ID_BYTES), keys[:count], blocks[:count], ttl_s)
        ticket = self._ticket(lease, ttl_s)
        self._enter(lease)
        self._seal_soon(lease)
        if count < len(blocks):
            self._cache.unpin(blocks[count:])
        return ticket

    def serve(self, payload: bytes) -> Iterator[Pieces]:
        """Answer a PULL's payload: what is to be sent, in order, as soon as it is ready. A refusal is an answer.

        Raises Refused when the lease ends on the way: what was promised does not follow, and the stream is to be ended.
        """
        try:
            request = decode_pull(payload)
            lease = self._open(request)
        except RhizomeError as error:
            with self._lock:
                self.counts.refused += 1
            yield [encode_refused(str(error))]
            return
        count = max(0, min(request.count, len(lease.blocks) - request.first))
        span = slice(request.first, request.first + count if request.how is How.FROM_MEMORY else request.first)
        grant = Grant(
            lease.lease_id,
            count,
            batch_blocks_of(self.memory.layout, request.how),
            np.array(lease.blocks[span], dtype=np.uint32),
            np.array(lease.generations[span], dtype=np.uint32),
        )
        pieces: Pieces = [encode_grant(grant)]
        if request.how is How.FROM_MEMORY and count > grant.batch_blocks:
            yield pieces  # the puller copies while we take the first digests
            pieces = []
        for batch in grant.batches():
            positions = range(request.first + batch.start, request.first + batch.stop)
            digests = self._digests_of(lease, positions)
            if not self.leases.holds(lease):
                yield [*pieces, batch_head(Status.EXPIRED, digests)]
                raise Refused(LEASE_ENDED)
            with self._lock:
                self.counts.blocks_told += len(positions)
            told = bound(digests, lease.keys[positions.start : positions.stop])
            pieces.append(batch_head(Status.OK, told))
            if request.how is How.IN_STREAM:
                pieces += self.memory.views(lease.blocks[positions.start : positions.stop])
            yield pieces
            pieces = []
        if pieces:
            yield pieces

    def release(self, lease_id: bytes) -> None:
        """The puller is done. An unknown lease is ignored: it ended by itself."""
        lease = self.leases.remove(lease_id)
        if lease is not None:
            self._cache.unpin(lease.blocks)
            with self._lock:
                self.counts.released += 1

    def expire(self) -> int:
        """End what is over by now. Returns how many leases."""
        return self._revoke(self.leases.take_expired())

    def close(self) -> None:
        """End all leases, for good: there will be no others."""
        self._revoke(self.leases.close())
        with self._lock:
            self._to_seal.clear()
            sealer = self._sealer
        if sealer is not None:
            sealer.join()  # after its step: its lease has ended

    def _revoke(self, leases: Sequence[Lease]) -> int:
        for lease in leases:
            # Their generations have grown: who reads the memory sees by them that its lease ended.
            self._cache.unpin(lease.blocks)
        with self._lock:
            self.counts.expired += len(leases)
        return len(leases)

    def _open(self, request: PullRequest) -> Lease:
        now_ms = int(self._wall_clock() * 1000)
        ticket = read_signed(self.secret, request.ticket, now_ms)
        if (ticket.holder, ticket.epoch) != (self.worker_id, self.epoch):
            raise Conflict(
                f"transfer ticket: for {ticket.holder} of epoch {ticket.epoch}, "
                f"this is {self.worker_id} of epoch {self.epoch}"
            )
        if request.layout != self.memory.layout:
            raise Conflict(f"layout: blocks here are {self.memory.layout}, asked for {request.layout}")
        lease = self.leases.get(ticket.lease_id)
        if lease is not None:
            return lease
        left_s = (ticket.expires_unix_ms - now_ms) / 1000
        if left_s <= 0:
            raise Denied("transfer ticket: expires now")
        return self._grant(ticket.lease_id, ticket.key_list(), left_s)

    def _grant(self, lease_id: bytes, keys: Sequence[bytes], ttl_s: float) -> Lease:
        keys = keys[: self._room()]
        blocks = self._cache.pin(keys)
        if not blocks:
            raise NotServed(f"{self.worker_id} holds none of these blocks")
        lease, entered = self._lease(lease_id, keys[: len(blocks)], blocks, ttl_s), None
        try:
            entered = self._enter(lease)
        finally:
            if entered is not lease:
                self._cache.unpin(blocks)
        return entered

    def _room(self) -> int:
        """How many blocks may be leased now, 1 or more, and what a ticket holds at most. Raises Overloaded."""
        self.expire()
        room = min(self.leases.room, MAX_KEYS)
        if room == 0:
            raise self._full()
        return room

    def _enter(self, lease: Lease) -> Lease:
        """The lease that counts: another that has its id and was there before. Raises Overloaded."""
        entered = self.leases.add(lease)
        if entered is None:
            raise self._full()
        if entered is lease:
            with self._lock:
                self.counts.leases += 1
        return entered

    def _full(self) -> Overloaded:
        return Overloaded(f"{self.leases.blocks} blocks are leased: at most {self.leases.max_blocks}")

    def _lease(self, lease_id: bytes, keys: Sequence[bytes], blocks: Sequence[int], ttl_s: float) -> Lease:
        ends_at = self._clock() + min(ttl_s, MAX_LEASE_S)
        return Lease(lease_id, list(keys), list(blocks), ends_at)

    def _ticket(self, lease: Lease, ttl_s: float) -> bytes:
        expires_unix_ms = int((self._wall_clock() + min(ttl_s, MAX_LEASE_S)) * 1000)
        held = b"".join(lease.keys)
        ticket = TransferTicket(self.worker_id, self.epoch, expires_unix_ms, held, self.offers, lease.lease_id)
        return sign(self.secret, ticket)

    def _digests_of(self, lease: Lease, positions: range) -> list[int]:
        if not self._digests:
            return [0] * len(positions)
        if positions.stop <= len(lease.digests):
            return lease.digests[positions.start : positions.stop]
        return self.memory.digests(lease.blocks[positions.start : positions.stop])

    def _seal_soon(self, lease: Lease) -> None:
        """Take the digests of what was leased here while its ticket is on the way, if there is some work in it."""
        if not self._digests or len(lease.blocks) <= self._seal_step:
            return
        with self._lock:
            self._to_seal.append(lease)
            if self._sealer is None:
                # No daemon: the interpreter's end aborts the process where it finds one in native code.
                sealer = Thread(target=self._seal, name="rhizome-seal")
                try:
                    sealer.start()
                except RuntimeError:  # no more threads: digests are taken when they are asked for
                    self._to_seal.clear()
                else:
                    self._sealer = sealer

    def _seal(self) -> None:
        while True:
            with self._lock:
                if not self._to_seal:
                    self._sealer = None
                    return
                lease = self._to_seal.popleft()
            for start in range(0, len(lease.blocks), self._seal_step):
                digests = self.memory.digests(lease.blocks[start : start + self._seal_step])
                if not self.leases.holds(lease):
                    break
                lease.digests.extend(digests)
