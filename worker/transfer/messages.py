"""What puller and holder say to each other, as bytes; every length is checked before anything is allocated for it.

Each message is a frame: magic "RZT1", kind u8, 3 zero bytes, payload length u32 (all little-endian), payload.

    PULL      how u8, 3 zero bytes, first u32, count u32, block_bytes u64, planes u32, tag 16 bytes, ticket
    RELEASE   lease id 16 bytes; no answer
    ATTACH    nothing: answered by ATTACHED, what a transport that reads the holder's memory needs to know of it
    GRANT     lease id, count u32, batch_blocks u32; told to who reads memory: count x block u32, count x generation u32
    REFUSED   text

After GRANT, padded to 64 bytes, come ceil(count / batch_blocks) batches without further ado. A batch is: magic "RZTB",
status u32 (0, or why there are no more), for each of its blocks the digest u64 xor both halves of its key, zeros up to
a multiple of 64 bytes, and IN_STREAM the bytes of its blocks.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from rhizome.errors import InvalidRequest
from rhizome.transfer_ticket import LEASE_ID_BYTES, MAX_KEYS, MAX_TICKET_BYTES
from worker.transfer.errors import Refused, TransferFailed
from worker.transfer.memory import TAG_BYTES, BlockLayout

HEADER = struct.Struct("<4sB3xI")
BATCH = struct.Struct("<4sI")
DIGEST_BYTES = 8
ALIGNED_BYTES = 64  # blocks begin at multiples of this in the stream: the kernel copies them a quarter faster
STREAM_BATCH_BYTES = 4 << 20  # of blocks in a batch, or one block: enough to cost little
MEMORY_BATCH_BYTES = 8 << 20  # whose digests are told at a time to who reads memory
MAX_BATCH_BLOCKS = 512
MAX_TEXT_BYTES = 1024
LEASE_ENDED = "the lease ended on the way"
MAX_ATTACHED_BYTES = 64 << 10  # a NIXL agent's metadata is under 1 KiB

_MAGIC = b"RZT1"
_BATCH_MAGIC = b"RZTB"
_PULL = struct.Struct(f"<B3xIIQI{TAG_BYTES}s")
_GRANT = struct.Struct(f"<{LEASE_ID_BYTES}sII28x")  # with its header 64 bytes


class Kind(IntEnum):
    """Of a message."""

    PULL = 1
    RELEASE = 2
    ATTACH = 3
    GRANT = 129
    REFUSED = 130
    ATTACHED = 131


class How(IntEnum):
    """The way of the blocks."""

    IN_STREAM = 0  # in the batches
    FROM_MEMORY = 1  # the puller reads the holder's memory


class Status(IntEnum):
    """Why a batch is the last one; 0: it is not."""

    OK = 0
    EXPIRED = 1


MAX_PAYLOAD = {
    Kind.PULL: _PULL.size + MAX_TICKET_BYTES,
    Kind.RELEASE: LEASE_ID_BYTES,
    Kind.ATTACH: 0,
    Kind.GRANT: _GRANT.size + 8 * MAX_KEYS,
    Kind.REFUSED: MAX_TEXT_BYTES,
    Kind.ATTACHED: MAX_ATTACHED_BYTES,
}
ASKED = frozenset({Kind.PULL, Kind.RELEASE, Kind.ATTACH})
ANSWERED = frozenset({Kind.GRANT, Kind.REFUSED, Kind.ATTACHED})


@dataclass(frozen=True, slots=True)
class PullRequest:
    """The blocks `first` to `first + count` of a ticket's."""

    ticket: bytes
    first: int
    count: int
    layout: BlockLayout
    how: How


@dataclass(frozen=True, slots=True)
class Grant:
    """How many of the blocks, from the first on, are there to be pulled, and in batches of how many.

    For who reads the holder's memory: where they are, and the generations that they have while this holds.
    """

    lease_id: bytes
    count: int
    batch_blocks: int
    blocks: NDArray[np.uint32]
    generations: NDArray[np.uint32]

    def batches(self) -> list[range]:
        """The blocks of each batch."""
        return [
            range(start, min(start + self.batch_blocks, self.count))
            for start in range(0, self.count, self.batch_blocks)
        ]


def frame(kind: Kind, *payload: bytes) -> bytes:
    """A message."""
    size = sum(map(len, payload))
    assert size <= MAX_PAYLOAD[kind], f"{kind.name} of {size} bytes"
    return b"".join((HEADER.pack(_MAGIC, kind, size), *payload))


def read_header(header: bytes | bytearray, expected: frozenset[Kind]) -> tuple[Kind, int]:
    """A message's kind and the length of its payload. Raises TransferFailed."""
    magic, kind, size = HEADER.unpack(header)
    if magic != _MAGIC or kind not in expected:
        raise TransferFailed(f"a message begins {bytes(header[:5])!r}: not of this protocol, or not now")
    if size > MAX_PAYLOAD[Kind(kind)]:
        raise TransferFailed(f"{Kind(kind).name} of {size} bytes: at most {MAX_PAYLOAD[Kind(kind)]}")
    return Kind(kind), size


def encode_pull(request: PullRequest) -> bytes:
    """A PULL frame."""
    layout = request.layout
    fixed = _PULL.pack(request.how, request.first, request.count, layout.block_bytes, layout.planes, layout.tag)
    return frame(Kind.PULL, fixed, request.ticket)


def decode_pull(payload: bytes) -> PullRequest:
    """A PULL's payload. Raises InvalidRequest."""
    if len(payload) < _PULL.size:
        raise InvalidRequest("pull", f"{len(payload)} bytes", f"at least {_PULL.size}")
    how, first, count, block_bytes, planes, tag = _PULL.unpack_from(payload)
    if how not in tuple(How):
        raise InvalidRequest("how", how, "0 or 1")
    if not 0 < count <= MAX_KEYS or first > MAX_KEYS - count:
        raise InvalidRequest("count", (first, count), f"1 to {MAX_KEYS} blocks")
    return PullRequest(payload[_PULL.size :], first, count, BlockLayout(block_bytes, planes, tag), How(how))


def encode_grant(grant: Grant) -> bytes:
    """A GRANT frame."""
    fixed = _GRANT.pack(grant.lease_id, grant.count, grant.batch_blocks)
    return frame(Kind.GRANT, fixed, grant.blocks.tobytes(), grant.generations.tobytes())


def decode_grant(payload: bytes, request: PullRequest) -> Grant:
    """A GRANT's payload, as an answer to that request. Raises TransferFailed."""
    if len(payload) < _GRANT.size:
        raise TransferFailed(f"GRANT of {len(payload)} bytes: at least {_GRANT.size}")
    lease_id, count, batch_blocks = _GRANT.unpack_from(payload)
    told = count if request.how is How.FROM_MEMORY else 0
    if count > request.count or len(payload) != _GRANT.size + 8 * told:
        raise TransferFailed(f"GRANT of {count} blocks in {len(payload)} bytes: {request.count} were asked for")
    if not 0 < batch_blocks <= MAX_BATCH_BLOCKS:
        raise TransferFailed(f"GRANT in batches of {batch_blocks}: 1 to {MAX_BATCH_BLOCKS}")
    places = np.frombuffer(payload, dtype="<u4", offset=_GRANT.size).astype(np.uint32)
    return Grant(lease_id, count, batch_blocks, places[:told], places[told:])


def encode_refused(reason: str) -> bytes:
    """A REFUSED frame."""
    return frame(Kind.REFUSED, reason.encode()[:MAX_TEXT_BYTES])


def refusal(payload: bytes) -> Refused:
    """What a REFUSED says, printable."""
    text = payload.decode(errors="replace")
    return Refused("".join(char if char.isprintable() else "?" for char in text))


def decode_release(payload: bytes) -> bytes:
    """The lease id. Raises InvalidRequest."""
    if len(payload) != LEASE_ID_BYTES:
        raise InvalidRequest("lease_id", f"{len(payload)} bytes", f"{LEASE_ID_BYTES}")
    return payload


def batch_blocks_of(layout: BlockLayout, how: How) -> int:
    """How many blocks travel, or are told, under one header."""
    size = STREAM_BATCH_BYTES if how is How.IN_STREAM else MEMORY_BATCH_BYTES
    return max(1, min(MAX_BATCH_BLOCKS, size // layout.block_bytes))


def batch_head(status: Status, digests: Sequence[int]) -> bytes:
    """What goes before a batch's blocks."""
    head = BATCH.pack(_BATCH_MAGIC, status) + struct.pack(f"<{len(digests)}Q", *digests)
    return head.ljust(batch_head_size(len(digests)), b"\0")


def batch_head_size(blocks: int) -> int:
    """Bytes before the blocks of a batch."""
    return -(-(BATCH.size + DIGEST_BYTES * blocks) // ALIGNED_BYTES) * ALIGNED_BYTES


def read_batch_head(head: bytes | bytearray, blocks: int) -> list[int]:
    """The digests of so many blocks. Raises TransferFailed for what is no batch, Refused if the holder ends here."""
    magic, status = BATCH.unpack_from(head)
    if magic != _BATCH_MAGIC:
        raise TransferFailed(f"a batch begins {bytes(head[:4])!r}")
    if status == Status.EXPIRED:
        raise Refused(LEASE_ENDED)
    if status != Status.OK:
        raise TransferFailed(f"a batch of status {status}")
    return list(struct.unpack_from(f"<{blocks}Q", head, BATCH.size))
