"""A block pool's memory as transfers see it: one buffer, blocks addressed by number. Torch-free."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rhizome.errors import InvalidRequest
from worker.transfer.digests import copy_blocks, digests_of

Bytes: TypeAlias = NDArray[np.uint8]

MAX_BLOCK_BYTES = 64 << 20
MAX_PLANES = 1024
TAG_BYTES = 16

# What a reader of another's memory must know: it cannot be made smaller under the reader, which would then be killed.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if hasattr(fcntl, "F_SEAL_SHRINK") else 0
_GET_SEALS, _ADD_SEALS = getattr(fcntl, "F_GET_SEALS", 0), getattr(fcntl, "F_ADD_SEALS", 0)


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """What a block is made of; only equal layouts exchange blocks.

    A block is `planes` pieces of equal size, such as a layer's keys: 1 where a block lies in one piece. Its bytes are
    those of its pieces, in order. `tag` (16 bytes) stands for what they mean: model, dtype, tokens in a block.
    """

    block_bytes: int
    planes: int = 1
    tag: bytes = bytes(TAG_BYTES)

    def __post_init__(self) -> None:
        if not 0 < self.block_bytes <= MAX_BLOCK_BYTES:
            raise InvalidRequest("block_bytes", self.block_bytes, f"1 to {MAX_BLOCK_BYTES}")
        if not 0 < self.planes <= MAX_PLANES or self.block_bytes % self.planes:
            raise InvalidRequest("planes", self.planes, f"1 to {MAX_PLANES}, in a block of {self.block_bytes} bytes")
        if len(self.tag) != TAG_BYTES:
            raise InvalidRequest("tag", self.tag, f"{TAG_BYTES} bytes")

    @property
    def piece_bytes(self) -> int:
        return self.block_bytes // self.planes


class BlockMemory:
    """`num_blocks` blocks in one buffer, plane by plane: piece p of block b is at (p * num_blocks + b) * piece_bytes.

    `generations` (uint32, one a block) tells those who read the memory from outside that a block was taken back.
    """

    def __init__(self, buffer: Any, layout: BlockLayout, num_blocks: int) -> None:
        """Over anything that has a writable, contiguous buffer of that many bytes, or more."""
        self.layout = layout
        self.num_blocks = num_blocks
        self.size_bytes = layout.block_bytes * num_blocks
        self._piece_bytes = layout.piece_bytes
        view = memoryview(buffer).cast("B")
        if num_blocks < 1 or len(view) < self.size_bytes:
            raise InvalidRequest("num_blocks", num_blocks, f"1 or more, in {len(view)} bytes of memory")
        self._view = view[: self.size_bytes]
        flat: Bytes = np.frombuffer(self._view, dtype=np.uint8)
        self.pieces: Bytes = flat.reshape(layout.planes, num_blocks, layout.piece_bytes)
        self.address: int = flat.ctypes.data
        self.generations: NDArray[np.uint32] = np.zeros(num_blocks, dtype=np.uint32)
        self.in_flight: set[int] = set()  # slots that a transport may still write, after its pull was given up
        self.descriptor: int | None = None  # of the file that others can map, if it is shared

    @classmethod
    def shared(cls, layout: BlockLayout, num_blocks: int) -> BlockMemory:
        """Memory that processes on this host can map, without a name that a crash would leave behind. Linux only.

        It lasts as long as the process: to be shared it must not move.
        """
        descriptor = os.memfd_create("rhizome-blocks", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        size = _shared_bytes(layout, num_blocks)
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, _ADD_SEALS, _SEALS)
        return cls._over(mmap.mmap(descriptor, size), layout, num_blocks, descriptor)

    @classmethod
    def mapped(cls, descriptor: int, layout: BlockLayout, num_blocks: int) -> BlockMemory:
        """Another process's memory, to be read only; takes the descriptor over. Raises InvalidRequest if it does not
        hold what it should, or could be made smaller."""
        try:
            size = _shared_bytes(layout, num_blocks)
            if os.fstat(descriptor).st_size != size:
                raise InvalidRequest("shared memory", os.fstat(descriptor).st_size, f"{size} bytes by its layout")
            if not fcntl.fcntl(descriptor, _GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise InvalidRequest("shared memory", "not sealed", "its size must be fixed")
            mapping = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
        except BaseException:
            os.close(descriptor)
            raise
        return cls._over(mapping, layout, num_blocks, descriptor)

    @classmethod
    def _over(cls, mapping: mmap.mmap, layout: BlockLayout, num_blocks: int, descriptor: int) -> BlockMemory:
        memory = cls(mapping, layout, num_blocks)
        start = _shared_bytes(layout, num_blocks) - 4 * num_blocks
        memory.generations = np.frombuffer(mapping, dtype=np.uint32, offset=start, count=num_blocks)
        memory.descriptor = descriptor
        return memory

    def views(self, blocks: Sequence[int]) -> list[memoryview]:
        """The pieces of blocks, in order."""
        view, size = self._view, self._piece_bytes
        if self.layout.planes == 1:
            return [view[block * size : block * size + size] for block in blocks]
        starts = range(0, self.size_bytes, self.num_blocks * size)  # of planes
        return [view[start + block * size : start + block * size + size] for block in blocks for start in starts]

    def digests(self, blocks: Sequence[int]) -> list[int]:
        """The digests of blocks' bytes."""
        return digests_of(self.pieces, blocks)

    def copy_in(
        self, slots: Sequence[int], source: BlockMemory, blocks: Sequence[int], *, digest: bool = True
    ) -> list[int]:
        """Another memory's blocks, of the same layout, into slots of this one. Returns their digests, or zeros."""
        return copy_blocks(self.pieces, slots, source.pieces, blocks, digest=digest)

    def zero(self, blocks: Iterable[int]) -> None:
        """Overwrite what lies there."""
        for block in blocks:
            self.pieces[:, block] = 0

    def check_blocks(self, field: str, blocks: Sequence[int]) -> None:
        """Raise InvalidRequest unless these are different blocks of this memory."""
        if len(set(blocks)) != len(blocks):
            raise InvalidRequest(field, "blocks", "each only once")
        if blocks and not 0 <= min(blocks) <= max(blocks) < self.num_blocks:
            raise InvalidRequest(field, (min(blocks), max(blocks)), f"0 to {self.num_blocks - 1}")
        if self.in_flight and not self.in_flight.isdisjoint(blocks):
            raise InvalidRequest(field, "blocks", "a transfer that was given up still writes to some of them")

    def close(self) -> None:
        """Let go of the file that is shared; the memory itself goes with its last user."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def _shared_bytes(layout: BlockLayout, num_blocks: int) -> int:
    """Blocks, and a generation for each, which is aligned."""
    return -(-layout.block_bytes * num_blocks // 64) * 64 + 4 * num_blocks
