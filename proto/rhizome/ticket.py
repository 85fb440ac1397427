"""Signatures under the fleet's secret: HMAC-SHA256 (RFC 2104).

A ticket is the router's word that a worker may take a request's salt and block keys as they are: a client that makes
up keys of its own could otherwise plant blocks under the keys of somebody else's prompt. A worker ignores keys that
come without a ticket and hashes by itself.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from typing import TypeAlias

from rhizome.errors import Denied, InvalidRequest
from rhizome.v1 import fleet_pb2, worker_pb2

SECRET_VARIABLE = "RHIZOME_FLEET_SECRET"  # noqa: S105 - the name of the variable, not a secret
MIN_SECRET_BYTES = 16
TICKET_LIFETIME_MS = 60_000


def fleet_secret() -> bytes:
    """The secret from the environment; empty when the fleet has none (then nothing is signed).

    Raises InvalidRequest for one that could be guessed.
    """
    secret = os.environ.get(SECRET_VARIABLE, "").encode()
    if 0 < len(secret) < MIN_SECRET_BYTES:
        raise InvalidRequest(SECRET_VARIABLE, f"{len(secret)} bytes", f"at least {MIN_SECRET_BYTES} bytes, or unset")
    return secret


def _mac(secret: bytes, *parts: bytes) -> bytes:
    mac = hmac.new(secret, digestmod=hashlib.sha256)
    for part in parts:
        mac.update(len(part).to_bytes(8, "little"))
        mac.update(part)
    return mac.digest()


def _request_mac(secret: bytes, request: worker_pb2.WorkerGenerateRequest) -> bytes:
    ticket = request.ticket
    return _mac(
        secret,
        b"ticket",
        ticket.worker_id.encode(),
        ticket.epoch.to_bytes(8, "little"),
        ticket.expires_unix_ms.to_bytes(8, "little"),
        request.token_ids,
        request.salt,
        request.block_keys,
        b"hold" if request.hold else b"",
    )


def sign_request(
    secret: bytes, request: worker_pb2.WorkerGenerateRequest, worker_id: str, epoch: int, unix_ms: int
) -> None:
    """Attach a ticket for `worker_id` to a request; without a secret, nothing."""
    if not secret:
        return
    request.ticket.worker_id = worker_id
    request.ticket.epoch = epoch
    request.ticket.expires_unix_ms = unix_ms + TICKET_LIFETIME_MS
    request.ticket.signature = _request_mac(secret, request)


def has_valid_ticket(
    secret: bytes, request: worker_pb2.WorkerGenerateRequest, worker_id: str, epoch: int, unix_ms: int
) -> bool:
    """Whether keys and salt may be taken as they are. Raises Denied for a ticket that was tampered with or is old."""
    if not request.HasField("ticket") or not secret:
        return False
    ticket = request.ticket
    if not hmac.compare_digest(ticket.signature, _request_mac(secret, request)):
        raise Denied("ticket: the signature does not fit this request")
    if ticket.worker_id != worker_id or ticket.epoch != epoch:
        raise Denied(
            f"ticket: issued for {ticket.worker_id} of epoch {ticket.epoch}, this is {worker_id} of epoch {epoch}"
        )
    if unix_ms > ticket.expires_unix_ms:
        raise Denied(f"ticket: expired {unix_ms - ticket.expires_unix_ms} ms ago")
    return True


FleetRequest: TypeAlias = fleet_pb2.RegisterRequest | fleet_pb2.HeartbeatRequest | fleet_pb2.DeregisterRequest


def _proof(secret: bytes, request: FleetRequest) -> bytes:
    unsigned = type(request)()
    unsigned.CopyFrom(request)  # type: ignore[arg-type]  # the same type by construction
    unsigned.ClearField("proof")
    return _mac(secret, request.DESCRIPTOR.full_name.encode(), unsigned.SerializeToString(deterministic=True))


def sign_member(secret: bytes, request: FleetRequest) -> None:
    """Prove that a request comes from a worker of the fleet; without a secret, nothing."""
    if secret:
        request.proof = _proof(secret, request)


def check_member(secret: bytes, request: FleetRequest) -> None:
    """Raise Denied unless the request is signed under the fleet's secret, or there is none on either side: without
    the secret of a fleet its keys cannot be made."""
    status = request.status if isinstance(request, fleet_pb2.HeartbeatRequest) else request
    who = f"{request.DESCRIPTOR.name} of worker {status.worker_id}"
    if not secret and request.proof:
        raise Denied(f"{who}: it is signed, and here is no {SECRET_VARIABLE}")
    if secret and not hmac.compare_digest(request.proof, _proof(secret, request)):
        raise Denied(f"{who}: not signed under the fleet's secret")
