"""Tickets for prefixes from a peer: the router's word that a worker may pull what another holds of a prompt."""

from __future__ import annotations

from rhizome.transfer_ticket import KEY_BYTES, TransferTicket, sign
from rhizome.v1 import worker_pb2
from router.decision import Decision
from router.fleet import Fleet

LIFETIME_MS = 30_000  # until the pull begins, and while it lasts


def pull_ticket(
    secret: bytes, message: worker_pb2.WorkerGenerateRequest, decision: Decision, fleet: Fleet, unix_ms: int
) -> bytes:
    """A signed ticket for the leading blocks that the decision wants fetched; empty where there are none to fetch."""
    source = fleet.find(decision.fetch_from) if decision.fetched_tokens else None
    if source is None or not source.info.transfer_offers:
        return b""
    blocks = decision.cached_tokens // source.info.model.block_size
    keys = message.block_keys[: blocks * KEY_BYTES]
    if not keys:
        return b""
    info = source.info
    ticket = TransferTicket(info.worker_id, info.epoch, unix_ms + LIFETIME_MS, keys, info.transfer_offers)
    return sign(secret, ticket)
