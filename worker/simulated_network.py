"""Makes pulls of a simulated worker last as long as real blocks would take; what travels are stand-ins. Torch-free.

Tickets, leases, digests, messages and transports are the real ones; bytes that are reported are those of the stand-ins,
as they travelled. A holder's blocks stay pinned as long as the modelled pull lasts. The holder's end of the network,
where many may pull at once, is not modelled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from hashlib import blake2b
from threading import Lock

from worker.transfer.deadline import Deadline
from worker.transfer.memory import TAG_BYTES, BlockLayout, BlockMemory
from worker.transfer.messages import Grant
from worker.transfer.transports import POLL_S, Batch, Channel, Offer, Transport

BLOCK_BYTES = 256  # of a stand-in: the least that the native core copies and digests in one go
SLOWEST = 100  # times the modelled time: a pull may take this long, for others use the network, too


def simulated_memory(num_blocks: int, *, names: Sequence[object]) -> BlockMemory:
    """Stand-ins for blocks of KV, all zero. `names`: what pools must have in common to exchange them."""
    tag = blake2b(repr(("simulated", *names)).encode(), digest_size=TAG_BYTES).digest()
    layout = BlockLayout(BLOCK_BYTES, tag=tag)
    try:
        return BlockMemory.shared(layout, num_blocks)
    except (AttributeError, OSError):  # no Linux, or no descriptors left
        return BlockMemory(bytearray(num_blocks * BLOCK_BYTES), layout, num_blocks)


class SimulatedNetwork:
    """A worker's end of a network: its pulls take turns on it, so that all together are no faster than one."""

    def __init__(
        self,
        block_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`block_s`: to pull a block."""
        self.block_s = block_s
        self._clock = clock
        self._sleep = sleep
        self._lock = Lock()
        self._free_at = 0.0

    def over(self, transport: Transport) -> PacedTransport:
        """That transport, over this network."""
        return PacedTransport(transport, self)

    def now(self) -> float:
        return self._clock()

    def carry(self, blocks: int, since: float, deadline: Deadline) -> float:
        """Wait until so many blocks that are on their way `since` then are through. Returns when they were.

        Raises OutOfTime, at most POLL_S after the deadline, or after it was cancelled.
        """
        left = blocks * self.block_s
        while left > 0:
            deadline.left()
            turn = min(left, POLL_S)
            with self._lock:
                since = self._free_at = max(since, self._free_at) + turn
            while (wait := since - self._clock()) > 0:
                deadline.left()
                self._sleep(min(wait, POLL_S))
            left -= turn
        return since


class PacedTransport:
    """A transport whose blocks come at a network's pace."""

    def __init__(self, inner: Transport, network: SimulatedNetwork) -> None:
        self.name = inner.name
        self._inner = inner
        self._network = network

    def reaches(self, offer: Offer) -> bool:
        """See Transport."""
        return self._inner.reaches(offer)

    def connect(self, offer: Offer, deadline: Deadline) -> Channel:
        """See Transport."""
        return _PacedChannel(self._inner.connect(offer, deadline), self._network)


class _PacedChannel:
    def __init__(self, inner: Channel, network: SimulatedNetwork) -> None:
        self._inner = inner
        self._network = network

    def open(self, ticket: bytes, first: int, count: int, layout: BlockLayout, deadline: Deadline) -> Grant:
        """See Channel."""
        return self._inner.open(ticket, first, count, layout, deadline)

    def fetch(self, grant: Grant, memory: BlockMemory, slots: Sequence[int], deadline: Deadline) -> Generator[Batch]:
        """See Channel. What moving the stand-ins takes is part of the modelled time."""
        since = self._network.now()
        with closing(self._inner.fetch(grant, memory, slots, deadline)) as batches:
            for batch in batches:
                since = self._network.carry(len(batch.told), since, deadline)
                yield batch

    def release(self, lease_id: bytes) -> None:
        """See Channel."""
        self._inner.release(lease_id)

    def close(self) -> None:
        """See Channel."""
        self._inner.close()
