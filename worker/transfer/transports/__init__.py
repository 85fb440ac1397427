"""Ways to a holder. A transport opens channels; a channel fetches blocks into the puller's memory, batch by batch.

What a transport must do, whatever happens: write into no other slots than those it was given, into none after `fetch`
ended or its generator was closed (or enter them in the memory's `in_flight`, zero them when that is over, and take them
out), and raise only TransferFailed, Refused or OutOfTime.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from rhizome.errors import InvalidRequest
from rhizome.transfer_ticket import MAX_OFFER_BYTES
from worker.transfer.deadline import Deadline
from worker.transfer.memory import BlockLayout, BlockMemory
from worker.transfer.messages import Grant

POLL_S = 0.25  # how soon who waits in a transport sees that it is given up, or must stop


class Batch(NamedTuple):
    """The next blocks lie in their slots: what the holder told of them, and the digests of what is there (None: not
    to be verified)."""

    told: list[int]
    found: list[int] | None


class Channel(Protocol):
    """An open way to one holder, for one pull at a time."""

    def open(self, ticket: bytes, first: int, count: int, layout: BlockLayout, deadline: Deadline) -> Grant:
        """Show the ticket, to pull the blocks `first` to `first + count` of it. `fetch` must follow, to its end, or
        `close`."""
        ...

    def fetch(self, grant: Grant, memory: BlockMemory, slots: Sequence[int], deadline: Deadline) -> Generator[Batch]:
        """Move the granted blocks into as many slots, in order."""
        ...

    def release(self, lease_id: bytes) -> None:
        """Tell the holder that its blocks are no longer needed; does not wait for an answer."""
        ...

    def close(self) -> None:
        """The channel is not used again."""
        ...


class Transport(Protocol):
    """One kind of way."""

    name: str

    def reaches(self, offer: Offer) -> bool:
        """Whether an offer of this transport's name is for us: from this host or this process, where that is needed."""
        ...

    def connect(self, offer: Offer, deadline: Deadline) -> Channel:
        """Open a way. Raises TransferFailed or OutOfTime."""
        ...


@dataclass(frozen=True, slots=True)
class Offer:
    """Where a holder can be reached: a transport's name, and an address that this transport understands."""

    transport: str
    address: str

    def __str__(self) -> str:
        return f"{self.transport}://{self.address}"

    @classmethod
    def parse(cls, url: str) -> Offer:
        """From `transport://address`. Raises InvalidRequest."""
        transport, separator, address = url.partition("://")
        if not separator or not transport or not address or len(url) > MAX_OFFER_BYTES:
            raise InvalidRequest("offer", url, f"transport://address, at most {MAX_OFFER_BYTES} characters")
        return cls(transport, address)

    def host_port(self) -> tuple[str, int]:
        """The address as host and port. Raises InvalidRequest."""
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise InvalidRequest("offer", str(self), "host:port")
        return host.strip("[]"), int(port)
