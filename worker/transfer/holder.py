"""The holder's side: leases blocks, signs tickets, and answers whoever shows one. Moves no bytes itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TypeAlias

import numpy as np

from rhizome.errors import Conflict, NotServed, Overloaded, RhizomeError
from rhizome.transfer_ticket import LEASE_ID_BYTES, TransferTicket, read_signed, sign
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
        self._counting = Lock()
        self.leases = Leases(max(1, memory.num_blocks // 2) if max_leased_blocks is None else max_leased_blocks, clock)

    def lease(self, keys: Sequence[bytes], ttl_s: float = MAX_LEASE_S) -> bytes:
        """Pin the longest held beginning of a chain of blocks, and sign a ticket for it.

        Raises NotServed if not even the first is held, Overloaded where too much is leased.
        """
        lease_id, expires_unix_ms = os.urandom(LEASE_ID_BYTES), int((self._wall_clock() + ttl_s) * 1000)
        lease = self._grant(lease_id, keys, ttl_s)
        held = b"".join(keys[: len(lease.blocks)])
        ticket = TransferTicket(self.worker_id, self.epoch, expires_unix_ms, held, self.offers, lease_id)
        return sign(self.secret, ticket)

    def serve(self, payload: bytes) -> Iterator[Pieces]:
        """Answer a PULL's payload: what is to be sent, in order, as soon as it is ready. A refusal is an answer.

        Raises Refused when the lease ends on the way: what was promised does not follow, and the stream is to be ended.
        """
        try:
            request = decode_pull(payload)
            lease = self._open(request)
        except RhizomeError as error:
            with self._counting:
                self.counts.refused += 1
            yield [encode_refused(str(error))]
            return
        count = max(0, min(request.count, len(lease.blocks) - request.first))
        span = slice(request.first, request.first + count if request.how is How.FROM_MEMORY else request.first)
        grant = Grant(
            lease.lease_id,
            count,
            batch_blocks_of(self.memory.layout),
            np.array(lease.blocks[span], dtype=np.uint32),
            np.array(lease.generations[span], dtype=np.uint32),
        )
        pieces: Pieces = [encode_grant(grant)]
        for batch in grant.batches():
            told, alive = self._batch(
                lease, range(request.first + batch.start, request.first + batch.stop), request.how
            )
            yield pieces + told
            pieces = []
            if not alive:
                raise Refused(LEASE_ENDED)
        if pieces:
            yield pieces

    def release(self, lease_id: bytes) -> None:
        """The puller is done. An unknown lease is ignored: it ended by itself."""
        lease = self.leases.remove(lease_id)
        if lease is not None:
            self._cache.unpin(lease.blocks)
            with self._counting:
                self.counts.released += 1

    def expire(self) -> int:
        """End what is over by now. Returns how many leases."""
        return self._revoke(self.leases.take_expired())

    def close(self) -> None:
        """End all leases."""
        self._revoke(self.leases.take_all())

    def _revoke(self, leases: Sequence[Lease]) -> int:
        for lease in leases:
            # First the generations, then the blocks: who reads the memory sees by them that its lease ended.
            self.memory.generations[lease.blocks] += 1
            self._cache.unpin(lease.blocks)
        with self._counting:
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
        return lease or self._grant(ticket.lease_id, ticket.key_list(), (ticket.expires_unix_ms - now_ms) / 1000)

    def _grant(self, lease_id: bytes, keys: Sequence[bytes], ttl_s: float) -> Lease:
        self.expire()
        room = self.leases.room
        if room == 0:
            raise Overloaded(f"{self.leases.blocks} blocks are leased: at most {self.leases.max_blocks}")
        blocks = self._cache.pin(keys[:room])
        if not blocks:
            raise NotServed(f"{self.worker_id} holds none of these blocks")
        ends_at = self._clock() + min(ttl_s, MAX_LEASE_S)
        lease = Lease(lease_id, blocks, self.memory.generations[blocks].tolist(), ends_at)
        entered = self.leases.add(lease)
        if entered is not lease:
            self._cache.unpin(blocks)
            if entered is None:
                raise Overloaded(f"{self.leases.blocks} blocks are leased: at most {self.leases.max_blocks}")
            return entered
        with self._counting:
            self.counts.leases += 1
        return lease

    def _batch(self, lease: Lease, positions: range, how: How) -> tuple[Pieces, bool]:
        """A batch, and whether the lease went on until its digests were taken."""
        blocks = [lease.blocks[position] for position in positions]
        digests = self._digests_of(lease, positions, blocks)
        if not self.leases.holds(lease):
            return [batch_head(Status.EXPIRED, digests)], False
        with self._counting:
            self.counts.blocks_told += len(positions)
        pieces: Pieces = [batch_head(Status.OK, digests)]
        if how is How.IN_STREAM:
            for block in blocks:
                pieces += self.memory.views(block)
        return pieces, True

    def _digests_of(self, lease: Lease, positions: range, blocks: Sequence[int]) -> list[int]:
        if not self._digests:
            return [0] * len(positions)
        known = [lease.digests[position] for position in positions if position in lease.digests]
        if len(known) < len(positions):
            known = self.memory.digests(blocks)
            lease.digests.update(zip(positions, known, strict=True))
        return known
