"""Bytes from afar: tickets and messages."""

from __future__ import annotations

import hashlib
import hmac
import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rhizome.errors import Denied, InvalidRequest
from rhizome.transfer_ticket import MAX_KEYS, MAX_TICKET_BYTES, TransferTicket, read_signed, sign
from worker.transfer.errors import Refused, TransferFailed
from worker.transfer.memory import BlockLayout
from worker.transfer.messages import (
    ANSWERED,
    ASKED,
    HEADER,
    MAX_PAYLOAD,
    Grant,
    How,
    Kind,
    PullRequest,
    Status,
    batch_head,
    batch_head_size,
    decode_grant,
    decode_pull,
    decode_release,
    encode_grant,
    encode_pull,
    encode_refused,
    read_batch_head,
    read_header,
    refusal,
)

SECRET = b"a fleet's secret"
TICKET = TransferTicket("worker-1", 2**64 - 1, 5_000, bytes(range(64)), ("tcp://[::1]:80", "shm://a/b"))
LAYOUT = BlockLayout(4096, 4, b"0123456789abcdef")


def test_a_ticket_is_read_as_it_was_signed() -> None:
    """Every field; until the millisecond that it names."""
    data = sign(SECRET, TICKET)
    assert read_signed(SECRET, data, 5_000) == TICKET
    assert TICKET.key_list() == [bytes(range(at, at + 16)) for at in range(0, 64, 16)]
    with pytest.raises(Denied, match="expired 1 ms ago"):
        read_signed(SECRET, data, 5_001)


@given(st.integers(0, len(sign(SECRET, TICKET)) - 1), st.integers(1, 255))
def test_a_changed_ticket_does_not_hold(at: int, change: int) -> None:
    """Whichever byte it is."""
    data = bytearray(sign(SECRET, TICKET))
    data[at] ^= change
    with pytest.raises((Denied, InvalidRequest)):
        read_signed(SECRET, bytes(data), 0)


@given(st.binary(max_size=300))
def test_what_is_signed_may_still_be_nonsense(body: bytes) -> None:
    """Then it is refused, by the same error: a fleet's member may be of another version."""
    whole = sign(b"", TICKET)
    for nonsense in (body, b"RZTK1" + body, whole[:40] + body):
        signature = hmac.new(SECRET, b"transfer ticket" + nonsense, hashlib.sha256).digest()
        with pytest.raises((InvalidRequest, Denied)):
            read_signed(SECRET, nonsense + signature, 2**64)


@pytest.mark.parametrize(
    "fields",
    [
        {"holder": ""},
        {"holder": "x" * 256},
        {"keys": b""},
        {"keys": bytes(15)},
        {"keys": bytes(16 * (MAX_KEYS + 1))},
        {"offers": ("tcp://a",) * 9},
        {"offers": ("tcp://" + "a" * 300,)},
        {"offers": ("tcp://\n",)},
        {"lease_id": b"short"},
        {"epoch": -1},
        {"expires_unix_ms": 2**64},
    ],
)
def test_a_ticket_has_bounds(fields: dict[str, object]) -> None:
    """Nobody makes one beyond them."""
    with pytest.raises(InvalidRequest):
        TransferTicket(
            **{"holder": "w", "epoch": 1, "expires_unix_ms": 1, "keys": bytes(16), "offers": (), **fields}  # type: ignore[arg-type]
        )
    largest = TransferTicket("w" * 255, 1, 1, bytes(16 * MAX_KEYS), ("a" * 256,) * 8)
    assert len(sign(SECRET, largest)) <= MAX_TICKET_BYTES


@pytest.mark.parametrize("how", list(How))
def test_messages_are_read_as_they_were_written(how: How) -> None:
    """A PULL, and its GRANT."""
    request = PullRequest(b"ticket", 3, 5, LAYOUT, how)
    message = encode_pull(request)
    assert read_header(message[: HEADER.size], ASKED) == (Kind.PULL, len(message) - HEADER.size)
    assert decode_pull(message[HEADER.size :]) == request
    told = 4 if how is How.FROM_MEMORY else 0
    numbers = np.arange(told, dtype=np.uint32)
    granted = decode_grant(encode_grant(Grant(bytes(16), 4, 2, numbers, numbers + 9))[HEADER.size :], request)
    assert (granted.count, granted.batches()) == (4, [range(2), range(2, 4)])
    assert granted.blocks.tolist() == list(range(told))
    assert granted.generations.tolist() == list(range(9, 9 + told))


def test_batches_begin_with_digests() -> None:
    """And blocks after them at a multiple of 64 bytes."""
    for count in (1, 7, 8, 512):
        digests = [2**64 - 1 - at for at in range(count)]
        head = batch_head(Status.OK, digests)
        assert len(head) == batch_head_size(count)
        assert len(head) % 64 == 0
        assert read_batch_head(head, count) == digests
    with pytest.raises(Refused, match="lease ended"):
        read_batch_head(batch_head(Status.EXPIRED, [1]), 1)
    with pytest.raises(TransferFailed):
        read_batch_head(bytes(64), 1)


def test_a_refusal_is_a_line() -> None:
    """Of bounded length, whatever the holder writes."""
    message = encode_refused("no\n\x1b[31m" + "x" * 5_000)
    text = str(refusal(message[HEADER.size :]))
    assert text.isprintable()
    assert len(text) <= 1024


@given(st.binary(min_size=HEADER.size, max_size=HEADER.size))
def test_a_header_promises_a_bounded_payload(data: bytes) -> None:
    """Of a kind that may come now, or it is none."""
    for data_ in (data, b"RZT1" + data[4:]):
        for expected in (ASKED, ANSWERED):
            try:
                kind, size = read_header(data_, expected)
            except TransferFailed:
                continue
            assert kind in expected
            assert size <= MAX_PAYLOAD[kind] < 2 << 20


@given(st.binary(max_size=100), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_payloads_are_read_or_refused(data: bytes, first: int, second: int) -> None:
    """Nothing else comes of them."""
    request = PullRequest(b"", 0, 4, LAYOUT, How.FROM_MEMORY)
    for payload in (data, struct.pack("<B3xIIQI16s", 1, first, second, second, first, bytes(16)) + data):
        for decode in (decode_pull, decode_release):
            with suppress(InvalidRequest):
                decode(payload)
    for payload in (data, bytes(16) + struct.pack("<II", first % 6, second) + bytes(28) + data):
        try:
            granted = decode_grant(payload, request)
        except TransferFailed:
            continue
        assert granted.count <= 4
        assert len(granted.blocks) == granted.count
