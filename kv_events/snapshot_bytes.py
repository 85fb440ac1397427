"""Snapshots as bytes, for what carries no protobuf: the zmq and redis buses, recordings.

    magic "RZSN", version (1 byte), flags (1 byte: bit 0 = tier masks follow), length of the worker's name (u16)
    epoch (u64), next_seq (u64), block_size (u32), blocks (u32), digest (16 bytes)
    worker (UTF-8), block hashes (u64 each), parent hashes (u64 each), tier masks (u8 each, if so flagged)
    BLAKE2b-128 of all before

All little-endian. 16 bytes a block, 17 where tiers differ.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np

from kv_events.events import Snapshot
from kv_events.wire import MAX_BLOCK_SIZE, MAX_COUNT, MAX_STRING_BYTES, WireError
from radix.digest import DIGEST_BYTES

MAX_SNAPSHOT_BLOCKS = 2**24
"""256 MiB; a GPU of 192 GB holds about 2^17 blocks of 16 tokens of a small model."""

MAGIC = b"RZSN"
VERSION = 1

_HEADER = struct.Struct(f"<4sBBHQQII{DIGEST_BYTES}s")
_CHECK_BYTES = 16
_TIERED = 1

MAX_SNAPSHOT_BYTES = _HEADER.size + MAX_STRING_BYTES + 17 * MAX_SNAPSHOT_BLOCKS + _CHECK_BYTES


def encode_snapshot(snapshot: Snapshot) -> bytes:
    """A snapshot as bytes. Raises WireError for one over the limits."""
    worker = snapshot.worker.encode()
    blocks = len(snapshot.block_hashes)
    if blocks > MAX_SNAPSHOT_BLOCKS or len(worker) > MAX_STRING_BYTES:
        raise WireError(f"the snapshot of {snapshot.worker} with {blocks} blocks is too large to be sent")
    masks = b"" if snapshot.tier_masks is None else snapshot.tier_masks.astype(np.uint8, copy=False).tobytes()
    header = _HEADER.pack(
        MAGIC,
        VERSION,
        _TIERED if snapshot.tier_masks is not None else 0,
        len(worker),
        snapshot.epoch,
        snapshot.next_seq,
        snapshot.block_size,
        blocks,
        snapshot.digest,
    )
    hashes = snapshot.block_hashes.astype("<u8", copy=False).tobytes()
    parents = snapshot.parent_hashes.astype("<u8", copy=False).tobytes()
    whole = b"".join((header, worker, hashes, parents, masks))
    return whole + _check(whole)


def decode_snapshot(data: bytes) -> Snapshot:
    """A snapshot from its bytes. Raises WireError for anything else; allocates no more than `data` has."""
    if len(data) < _HEADER.size + _CHECK_BYTES:
        raise WireError(f"a snapshot has at least {_HEADER.size + _CHECK_BYTES} bytes, this has {len(data)}")
    magic, version, flags, name_bytes, epoch, next_seq, block_size, blocks, digest = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise WireError("not a snapshot")
    if version != VERSION or flags & ~_TIERED:
        raise WireError(f"the snapshot has version {version} and flags {flags}: version {VERSION} is known")
    if blocks > MAX_SNAPSHOT_BLOCKS:
        raise WireError(f"the snapshot has {blocks} blocks: at most {MAX_SNAPSHOT_BLOCKS}")
    check_header(name_bytes, epoch, next_seq, block_size)
    masks_at = _HEADER.size + name_bytes + 16 * blocks
    body = masks_at + (blocks if flags & _TIERED else 0)
    if len(data) != body + _CHECK_BYTES:
        raise WireError(f"the snapshot has {len(data)} bytes, {body + _CHECK_BYTES} are needed for {blocks} blocks")
    if _check(memoryview(data)[:body]) != data[body:]:
        raise WireError("the snapshot's checksum does not hold")
    try:
        worker = data[_HEADER.size : _HEADER.size + name_bytes].decode()
    except UnicodeDecodeError as error:
        raise WireError(f"the snapshot's worker is not UTF-8: {error}") from error
    hashes_at = _HEADER.size + name_bytes
    hashes = np.frombuffer(data, "<u8", blocks, hashes_at).astype(np.uint64)
    parents = np.frombuffer(data, "<u8", blocks, hashes_at + 8 * blocks).astype(np.uint64)
    masks = np.frombuffer(data, np.uint8, blocks, masks_at).copy() if flags & _TIERED else None
    return Snapshot(worker, epoch, next_seq, digest, block_size, hashes, parents, masks)


def check_header(name_bytes: int, epoch: int, next_seq: int, block_size: int) -> None:
    """Raise WireError for what no snapshot says of its worker; `name_bytes` is the length of the worker's name."""
    if not 1 <= name_bytes <= MAX_STRING_BYTES:
        raise WireError(f"the snapshot's worker has {name_bytes} bytes: 1 to {MAX_STRING_BYTES}")
    for name, value, low, high in (
        ("epoch", epoch, 1, MAX_COUNT),
        ("next_seq", next_seq, 0, MAX_COUNT),
        ("block_size", block_size, 1, MAX_BLOCK_SIZE),
    ):
        if not low <= value <= high:
            raise WireError(f"the snapshot's {name} is {value}: {low} to {high}")


def _check(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=_CHECK_BYTES).digest()
