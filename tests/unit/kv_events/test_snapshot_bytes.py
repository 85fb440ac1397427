"""Snapshots as bytes: whole, checked, bounded."""

from __future__ import annotations

import hashlib
import struct
import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kv_events import snapshot_bytes
from kv_events.events import Snapshot
from kv_events.snapshot_bytes import decode_snapshot, encode_snapshot
from kv_events.wire import MAX_COUNT, WireError


def some_snapshot(worker: str = "w0", blocks: int = 3, tiered: bool = False) -> Snapshot:
    hashes = np.arange(1, blocks + 1, dtype=np.uint64) << np.uint64(40)
    masks: NDArray[np.uint8] | None = np.ones(blocks, dtype=np.uint8) if tiered else None
    return Snapshot(worker, 5, 7, bytes(range(16)), 16, hashes, np.r_[np.uint64(0), hashes[:-1]][:blocks], masks)


def assert_equal(one: Snapshot, other: Snapshot) -> None:
    for name in ("worker", "epoch", "next_seq", "digest", "block_size"):
        assert getattr(one, name) == getattr(other, name)
    for name in ("block_hashes", "parent_hashes"):
        assert getattr(one, name).dtype == getattr(other, name).dtype == np.uint64
        assert np.array_equal(getattr(one, name), getattr(other, name))
    assert (one.tier_masks is None) == (other.tier_masks is None)
    assert one.tier_masks is None or np.array_equal(one.tier_masks, other.tier_masks)


hashes_of = st.lists(st.integers(0, 2**64 - 1), max_size=20)


@given(
    st.text(min_size=1, max_size=64),
    st.integers(1, MAX_COUNT),
    st.integers(0, MAX_COUNT),
    st.binary(min_size=16, max_size=16),
    st.integers(1, 2**20),
    hashes_of,
    st.booleans(),
)
def test_what_is_encoded_is_decoded(
    worker: str, epoch: int, next_seq: int, digest: bytes, block_size: int, blocks: list[int], tiered: bool
) -> None:
    """Field by field."""
    hashes = np.array(blocks, dtype=np.uint64)
    masks = (hashes % np.uint64(8)).astype(np.uint8) if tiered else None
    snapshot = Snapshot(worker, epoch, next_seq, digest, block_size, hashes, hashes[::-1].copy(), masks)
    assert_equal(decode_snapshot(encode_snapshot(snapshot)), snapshot)


def test_decoded_arrays_are_their_own() -> None:
    """And can be written to: the bytes may be gone."""
    decoded = decode_snapshot(encode_snapshot(some_snapshot(tiered=True)))
    for array in (decoded.block_hashes, decoded.parent_hashes, decoded.tier_masks):
        assert array is not None
        array[0] = 1


@pytest.mark.parametrize("tiered", [False, True])
def test_every_flipped_bit_and_every_cut_shows(tiered: bool) -> None:
    """As WireError."""
    data = encode_snapshot(some_snapshot(tiered=tiered))
    for bit in range(8 * len(data)):
        with pytest.raises(WireError):
            decode_snapshot(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
    for size in range(len(data)):
        with pytest.raises(WireError):
            decode_snapshot(data[:size])
    with pytest.raises(WireError):
        decode_snapshot(data + b"x")


def checked(body: bytes) -> bytes:
    return body + hashlib.blake2b(body, digest_size=16).digest()


HEADER = struct.Struct("<4sBBHQQII16s")


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        (0, b"RZSX", "not a snapshot"),
        (1, 2, "version 2"),
        (2, 2, "flags 2"),
        (3, 0, "worker has 0 bytes"),
        (3, 257, "worker has 257 bytes"),
        (4, 0, "epoch is 0"),
        (4, 2**63, "epoch is"),
        (5, 2**63, "next_seq is"),
        (6, 0, "block_size is 0"),
        (6, 2**20 + 1, "block_size is"),
        (7, 2**24 + 1, "at most 16777216"),
        (7, 2**24, "are needed for"),
        (7, 2, "are needed for"),
    ],
)
def test_each_field_has_its_limits(field: int, value: object, error: str) -> None:
    """Though the checksum holds; nothing is allocated for a number of blocks that is only claimed."""
    data = encode_snapshot(some_snapshot())[:-16]
    values = list(HEADER.unpack_from(data))
    values[field] = value
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match=error):
            decode_snapshot(checked(HEADER.pack(*values) + data[HEADER.size :]))
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_a_worker_that_is_no_text_is_refused() -> None:
    """With WireError."""
    data = bytearray(encode_snapshot(some_snapshot("w0"))[:-16])
    data[HEADER.size] = 0xFF
    with pytest.raises(WireError, match="UTF-8"):
        decode_snapshot(checked(bytes(data)))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_snapshot_or_refused(data: bytes) -> None:
    """With WireError only."""
    for candidate in (data, b"RZSN\1" + data, checked(b"RZSN\1\0" + data)):
        with suppress(WireError):
            decode_snapshot(candidate)


def test_what_is_too_large_is_not_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """It could not be read."""
    monkeypatch.setattr(snapshot_bytes, "MAX_SNAPSHOT_BLOCKS", 3)
    encode_snapshot(some_snapshot(blocks=3))
    with pytest.raises(WireError, match="too large"):
        encode_snapshot(some_snapshot(blocks=4))
    with pytest.raises(WireError, match="too large"):
        encode_snapshot(some_snapshot("w" * 257))
