"""Transfer tickets: the fleet's signed word that whoever shows it may pull certain blocks from one holder for a while.

A worker that holds blocks signs one when it leases them, or a router that sends a worker to a peer for a prefix. The
holder checks it before it shows anything, and the puller before it connects anywhere or believes what it gets: offers
are signed, too, so nobody is led to a server outside the fleet. HMAC-SHA256 (RFC 2104) under the fleet's secret;
without a secret the signature is a checksum only.

    magic "RZTK1" | holder: u8 length, UTF-8 | epoch u64 | lease id 16 bytes | expires_unix_ms u64
    | offers: u8 count, each u16 length, ASCII | keys: u32 count, 16 bytes each | signature 32 bytes     (little-endian)
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from rhizome.errors import Denied, InvalidRequest

KEY_BYTES = 16
LEASE_ID_BYTES = 16
MAX_KEYS = 65_536  # a million tokens in blocks of 16
MAX_OFFERS = 8
MAX_OFFER_BYTES = 256
MAX_HOLDER_BYTES = 255
MAX_TICKET_BYTES = 64 + MAX_HOLDER_BYTES + MAX_OFFERS * (MAX_OFFER_BYTES + 2) + MAX_KEYS * KEY_BYTES + 32

_MAGIC = b"RZTK1"
_SIGNATURE_BYTES = 32
_FIXED = struct.Struct(f"<Q{LEASE_ID_BYTES}sQ")


@dataclass(frozen=True, slots=True)
class TransferTicket:
    """What may be pulled from whom, until when, and where the holder can be reached.

    `keys`: 16 bytes for each block, in the order of the prefix; `offers`: URLs of its transports, `tcp://host:port`.
    """

    holder: str
    epoch: int
    expires_unix_ms: int
    keys: bytes
    offers: tuple[str, ...]
    lease_id: bytes = field(default_factory=lambda: os.urandom(LEASE_ID_BYTES))

    def __post_init__(self) -> None:
        """Raises InvalidRequest for what could not be sent."""
        if not 0 < len(self.holder.encode()) <= MAX_HOLDER_BYTES:
            raise InvalidRequest("ticket.holder", self.holder, f"1 to {MAX_HOLDER_BYTES} bytes")
        if len(self.lease_id) != LEASE_ID_BYTES:
            raise InvalidRequest("ticket.lease_id", self.lease_id, f"{LEASE_ID_BYTES} bytes")
        if not 0 < len(self.keys) <= MAX_KEYS * KEY_BYTES or len(self.keys) % KEY_BYTES:
            raise InvalidRequest("ticket.keys", f"{len(self.keys)} bytes", f"{KEY_BYTES} for each of 1 to {MAX_KEYS}")
        check_offers("ticket.offers", self.offers)
        if not (0 <= self.epoch < 2**64 and 0 <= self.expires_unix_ms < 2**64):
            raise InvalidRequest("ticket.epoch", (self.epoch, self.expires_unix_ms), "64 bits each")

    def __len__(self) -> int:
        """Blocks."""
        return len(self.keys) // KEY_BYTES

    def key_list(self) -> list[bytes]:
        """Each block's key."""
        return [self.keys[at : at + KEY_BYTES] for at in range(0, len(self.keys), KEY_BYTES)]


def check_offers(field: str, offers: Sequence[str]) -> None:
    """Raise InvalidRequest for offers that no ticket could hold."""
    if len(offers) > MAX_OFFERS:
        raise InvalidRequest(field, len(offers), f"at most {MAX_OFFERS}")
    for offer in offers:
        if not 0 < len(offer) <= MAX_OFFER_BYTES or not offer.isascii() or not offer.isprintable():
            raise InvalidRequest(field, offer, f"1 to {MAX_OFFER_BYTES} printable ASCII characters")


def sign(secret: bytes, ticket: TransferTicket) -> bytes:
    """The ticket as it is handed on."""
    holder = ticket.holder.encode()
    parts = [_MAGIC, bytes((len(holder),)), holder]
    parts.append(_FIXED.pack(ticket.epoch, ticket.lease_id, ticket.expires_unix_ms))
    parts.append(bytes((len(ticket.offers),)))
    for offer in ticket.offers:
        parts += [len(offer).to_bytes(2, "little"), offer.encode()]
    parts += [len(ticket).to_bytes(4, "little"), ticket.keys]
    body = b"".join(parts)
    return body + _signature(secret, body)


def read_signed(secret: bytes, data: bytes, unix_ms: int) -> TransferTicket:
    """The ticket, if it is whole, signed under the fleet's secret and not expired.

    Raises InvalidRequest for what is no ticket, Denied for one that does not hold. Nothing is read before the signature
    was checked.
    """
    if not len(_MAGIC) + _SIGNATURE_BYTES < len(data) <= MAX_TICKET_BYTES or not data.startswith(_MAGIC):
        raise InvalidRequest("ticket", f"{len(data)} bytes", f"a transfer ticket of at most {MAX_TICKET_BYTES} bytes")
    body, signature = data[:-_SIGNATURE_BYTES], data[-_SIGNATURE_BYTES:]
    if not hmac.compare_digest(signature, _signature(secret, body)):
        raise Denied("transfer ticket: not signed under the fleet's secret")
    ticket = _read(body)
    if unix_ms > ticket.expires_unix_ms:
        raise Denied(f"transfer ticket: expired {unix_ms - ticket.expires_unix_ms} ms ago")
    return ticket


def _signature(secret: bytes, body: bytes) -> bytes:
    return hmac.new(secret, b"transfer ticket" + body, hashlib.sha256).digest()


def _read(body: bytes) -> TransferTicket:
    at = len(_MAGIC)

    def take(count: int) -> bytes:
        nonlocal at
        if count > len(body) - at:
            raise InvalidRequest("ticket", f"{len(body)} bytes", f"it ends where {count} bytes should follow")
        at += count
        return body[at - count : at]

    try:
        holder = take(take(1)[0]).decode()
        epoch, lease_id, expires_unix_ms = _FIXED.unpack(take(_FIXED.size))
        offers = tuple(take(int.from_bytes(take(2), "little")).decode("ascii") for _ in range(take(1)[0]))
        keys = take(int.from_bytes(take(4), "little") * KEY_BYTES)
    except UnicodeDecodeError as error:
        raise InvalidRequest("ticket", error.object[:20], "its names are text") from None
    if at != len(body):
        raise InvalidRequest("ticket", f"{len(body)} bytes", f"{at} bytes of ticket in them")
    return TransferTicket(holder, epoch, expires_unix_ms, keys, offers, lease_id)
