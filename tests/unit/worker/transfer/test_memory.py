"""Pools' memory: where blocks lie, who may map it, and their digests and copies."""

from __future__ import annotations

import fcntl
import mmap
import os

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from radix.backend import native
from rhizome.errors import InvalidRequest
from worker.transfer import digests as digests_module
from worker.transfer.digests import bound, copy_blocks, digests_of
from worker.transfer.memory import BlockLayout, BlockMemory


def filled(planes: int, blocks: int, piece_bytes: int, seed: int = 0, *, offset: int = 0) -> np.ndarray:
    """A pool of chance bytes, its first one so far from an aligned address."""
    flat = np.random.default_rng(seed).integers(0, 256, planes * blocks * piece_bytes + offset, dtype=np.uint8)
    return flat[offset:].reshape(planes, blocks, piece_bytes)


@given(
    st.integers(1, 5),
    st.one_of(st.integers(1, 20).map(lambda stripes: 64 * stripes), st.integers(1, 300), st.sampled_from([1024, 4096])),
    st.lists(st.integers(0, 6), unique=True, min_size=1, max_size=7),
    st.randoms(use_true_random=False),
    st.sampled_from([0, 1, 32]),
)
def test_copies_are_right_and_so_are_their_digests(planes, piece_bytes, blocks, random, offset) -> None:  # type: ignore[no-untyped-def]
    """XXH3-64 of all pieces, one after another, whichever code takes it; nothing else is written."""
    pool, into = filled(planes, 7, piece_bytes, offset=offset), np.zeros((planes, 9, piece_bytes), np.uint8)
    slots = random.sample(range(9), len(blocks))
    expected = [xxhash.xxh3_64_intdigest(pool[:, block].tobytes()) for block in blocks]
    for digest in (True, False):
        into[:] = 0
        assert copy_blocks(into, slots, pool, blocks, digest=digest) == (expected if digest else [0] * len(blocks))
        assert (into[:, slots] == pool[:, blocks]).all()
        assert not into[:, sorted(set(range(9)) - set(slots))].any()
    assert digests_of(pool, blocks) == expected


@pytest.mark.skipif(native is None, reason="the native core is not there")
def test_native_copies_refuse_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers beyond a pool, pools of other pieces, memory that may not be written: before anything is."""
    assert native is not None
    pool, numbers = filled(1, 4, 256), np.array([0, 3], dtype=np.uint32)
    with pytest.raises(ValueError, match="blocks is 4: 0 to 3"):
        native.block_digests(pool, np.array([0, 4], dtype=np.uint32))
    with pytest.raises(ValueError, match="slots is 3"):
        native.copy_blocks(filled(1, 3, 256), numbers, pool, numbers)
    with pytest.raises(ValueError, match="other pieces"):
        native.copy_blocks(filled(1, 4, 512), numbers, pool, numbers)
    with pytest.raises(ValueError, match="not as many"):
        native.copy_blocks(filled(1, 4, 256), numbers[:1], pool, numbers)
    with pytest.raises(ValueError, match="multiples of 64"):
        native.block_digests(filled(1, 4, 260), numbers)
    locked = filled(1, 4, 256)
    locked.flags.writeable = False
    with pytest.raises(TypeError, match="writable"):
        native.copy_blocks(locked, numbers, pool, numbers)
    with pytest.raises(TypeError, match="uint32"):
        native.block_digests(pool, np.array([0, 3]))
    told = digests_of(pool, [0, 3])
    monkeypatch.setattr(digests_module, "native", None)
    assert digests_of(pool, [0, 3]) == told


def test_digests_are_bound_to_both_halves_of_keys() -> None:
    """So that a block under another key is broken."""
    keys = [bytes(16), b"\1" + bytes(15), bytes(15) + b"\1"]
    assert bound([5, 5, 5], keys) == [5, 4, 5 ^ 1 << 56]


@pytest.mark.parametrize(
    ("block_bytes", "planes", "tag"), [(0, 1, 16), (65 << 20, 1, 16), (10, 3, 16), (10, 0, 16), (9, 1, 4)]
)
def test_a_layout_has_bounds(block_bytes: int, planes: int, tag: int) -> None:
    """Beyond them it is refused, whoever names it."""
    with pytest.raises(InvalidRequest):
        BlockLayout(block_bytes, planes, bytes(tag))


def test_pieces_of_a_block_lie_plane_by_plane() -> None:
    """In any buffer that is large enough."""
    memory = BlockMemory(bytearray(range(24)), BlockLayout(6, planes=2), 4)
    assert [bytes(view) for view in memory.views([1])] == [bytes([3, 4, 5]), bytes([15, 16, 17])]
    memory.zero([1])
    assert bytes(memory.views([1])[1]) == bytes(3)
    assert bytes(memory.views([2])[0]) == bytes([6, 7, 8])
    with pytest.raises(InvalidRequest):
        BlockMemory(bytearray(23), BlockLayout(6), 4)


def test_shared_memory_is_mapped_for_reading_and_cannot_shrink() -> None:
    """Whoever maps it sees blocks and generations, cannot write, and is not killed by a file that becomes smaller."""
    layout = BlockLayout(4096)
    memory = BlockMemory.shared(layout, 3)
    assert memory.descriptor is not None
    memory.pieces[0, 2] = 7
    seen = BlockMemory.mapped(os.open(f"/proc/self/fd/{memory.descriptor}", os.O_RDONLY), layout, 3)
    memory.generations[1] = 5
    assert seen.pieces[0, 2].tolist() == [7] * 4096
    assert seen.generations.tolist() == [0, 5, 0]
    with pytest.raises(ValueError, match="read-only"):
        seen.pieces[0, 0] = 1
    with pytest.raises(PermissionError):
        os.ftruncate(memory.descriptor, 10)
    seen.close()
    memory.close()
    memory.close()


def test_only_memory_that_is_sealed_and_large_enough_is_mapped() -> None:
    """Another file is refused, and its descriptor closed."""
    layout = BlockLayout(4096)
    for size, sealed in ((4096 + 64, False), (100, True)):
        descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, 4096 + 4 if not sealed else size)
        if sealed:
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        with pytest.raises(InvalidRequest):
            BlockMemory.mapped(descriptor, layout, 1)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
    assert mmap.PAGESIZE  # mappings of other tests stay
