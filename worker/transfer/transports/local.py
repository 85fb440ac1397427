"""`local`: puller and holder in one process; one copy from pool to pool."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress

from worker.transfer.deadline import Deadline
from worker.transfer.errors import Refused, TransferFailed
from worker.transfer.holder import Holder
from worker.transfer.messages import ASKED, HEADER, Kind, read_header
from worker.transfer.transports import Offer
from worker.transfer.transports.stream import Refill, StreamChannel

_PROCESS = os.urandom(8).hex()
_holders: weakref.WeakValueDictionary[str, Holder] = weakref.WeakValueDictionary()


def local_offer(holder: Holder) -> Offer:
    """Where pullers of this process find it, as long as it lives."""
    address = f"{_PROCESS}/{id(holder):x}"
    _holders[address] = holder
    return Offer("local", address)


class LocalStream:
    """Calls instead of messages."""

    def __init__(self, holder: Holder) -> None:
        self._holder = holder
        self._answer = Refill(iter(()))

    def send(self, message: bytes, deadline: Deadline) -> None:
        """See Stream."""
        deadline.left()
        kind, _ = read_header(message[: HEADER.size], ASKED)
        if kind is not Kind.PULL:
            raise TransferFailed(f"{kind.name} has no answer here")
        self._answer = Refill(_pieces(self._holder, message[HEADER.size :]))

    def read_into(self, views: Sequence[memoryview], deadline: Deadline) -> int:
        """See Stream."""
        deadline.left()
        return self._answer.read_into(views)

    def release(self, lease_id: bytes) -> None:
        """See Stream."""
        self._holder.release(lease_id)

    def close(self) -> None:
        """See Stream."""


def _pieces(holder: Holder, payload: bytes) -> Iterator[memoryview]:
    with suppress(Refused):
        for pieces in holder.serve(payload):
            for piece in pieces:
                yield memoryview(piece)


class LocalTransport:
    """See the module."""

    name = "local"

    def __init__(self, *, verify: bool = True) -> None:
        self._verify = verify

    def reaches(self, offer: Offer) -> bool:
        """See Transport."""
        return offer.address in _holders

    def connect(self, offer: Offer, deadline: Deadline) -> StreamChannel:
        """See Transport."""
        deadline.left()
        holder = _holders.get(offer.address)
        if holder is None:
            raise TransferFailed(f"{offer} is gone")
        return StreamChannel(LocalStream(holder), verify=self._verify)
