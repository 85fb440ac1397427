"""A whole tree as bytes, and back: versioned, compact, checked.

All integers are little-endian. A snapshot is

    header     magic "RHZTREE\\0", version, and the lengths of the columns below, as in _HEADER
    hashes     uint64 (blocks,)       distinct, in an order in which chains run on
    follows    bit (blocks,)          the block's parent is the block before it; the low bit of a byte comes first
    parents    uint64 (parents,)      of the other blocks, in their order
    run_sets   uint32 (runs,)         runs of blocks with equal holders: the row of their set,
    run_sizes  uint32 (runs,)         and how many blocks
    set_sizes  uint32 (sets,)         members of each set of holders
    members    uint32 (members,)      worker << 3 | bit mask of tiers; ascending in each set
    checksum   BLAKE2b (RFC 7693), 32 bytes, of everything before it

A long chain with one holder comes to little more than 8 bytes a block. The checksum tells of damage; it is no
defence against forgers, so what is loaded is checked as if there were none.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from radix.keys import ROOT_HASH, Hashes
from radix.tree import LARGEST_MAX_BLOCKS, MAX_WORKERS, Dump, PrefixTree, Tier

VERSION = 1

_MAGIC = b"RHZTREE\0"
_HEADER = struct.Struct("<8sI5Q")  # magic, version, blocks, parents, runs, sets, members
_CHECKSUM_BYTES = 32
_TIER_BITS = 3

_Rows: TypeAlias = NDArray[np.intp]


class SnapshotError(ValueError):
    """These bytes are no snapshot that this release can load."""


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    """The columns of a snapshot; see the top of this file."""

    hashes: Hashes
    follows: NDArray[np.bool_]
    parents: Hashes
    run_sets: NDArray[np.uint32]
    run_sizes: NDArray[np.uint32]
    set_sizes: NDArray[np.uint32]
    members: NDArray[np.uint32]


def encode(tree: PrefixTree) -> bytes:
    """All that the tree holds."""
    dump = tree.dump()
    order = _chain_order(dump)
    hashes, parents, sets = dump.hashes[order], dump.parents[order], dump.holder_sets[order]
    follows = np.zeros(len(hashes), dtype=np.bool_)
    follows[1:] = parents[1:] == hashes[:-1]
    starts = _starts(sets[1:] == sets[:-1], len(sets))
    parts = [
        hashes.astype("<u8", copy=False),
        np.packbits(follows, bitorder="little"),
        parents[~follows].astype("<u8", copy=False),
        sets[starts].astype("<u4", copy=False),
        np.diff(starts, append=len(sets)).astype("<u4"),
        np.diff(dump.set_ends, prepend=np.uint32(0)).astype("<u4", copy=False),
        dump.members.astype("<u4", copy=False),
    ]
    header = _HEADER.pack(_MAGIC, VERSION, len(hashes), len(parts[2]), len(starts), len(parts[5]), len(dump.members))
    body = b"".join([header, *(part.tobytes() for part in parts)])
    return body + _checksum(body)


def load(tree: PrefixTree, data: bytes) -> None:
    """Store a snapshot in an empty tree, whose caps refuse and count what is too much, like in any store.

    Raises SnapshotError, and stores nothing, for bytes that are damaged or contradict themselves; ValueError for a
    tree that holds something. A snapshot does not tell who contradicted a parent link: where one worker lied about a
    parent, the match of another that holds the same block may be too deep after loading.
    """
    if len(tree):
        raise ValueError(f"the tree holds {len(tree)} entries: a snapshot is loaded into an empty one")
    columns = _parse(data)
    _check(columns)
    row_sets = np.repeat(columns.run_sets, columns.run_sizes)
    starts = _starts(columns.follows[1:] & (row_sets[1:] == row_sets[:-1]), len(row_sets))
    parents = _all_parents(columns)[starts].tolist()
    members = np.split(columns.members, np.cumsum(columns.set_sizes)[:-1])
    holders = [[(int(member) >> _TIER_BITS, _tiers(int(member))) for member in each] for each in members]
    sets = row_sets[starts].tolist()
    for (start, end), parent, row_set in zip(pairwise([*starts.tolist(), len(row_sets)]), parents, sets, strict=True):
        chain = columns.hashes[start:end]
        for worker, tiers in holders[row_set]:
            for tier in tiers:
                tree.store(worker, chain, parent, tier)


def _chain_order(dump: Dump) -> _Rows:
    """Rows in an order in which chains run on: trees mostly give them so, and what runs is moved as a piece.

    A piece is followed by one that hangs on its last block, one with the same holders if there is any.
    """
    starts = _starts(dump.parents[1:] == dump.hashes[:-1], len(dump.hashes))
    sizes = np.diff(starts, append=len(dump.hashes))
    ends = starts + sizes - 1
    pieces = np.arange(len(starts))
    above = _find(dump.parents[starts], dump.hashes[ends])
    same = dump.holder_sets[starts] == dump.holder_sets[ends[above]]
    chosen = np.full(len(pieces), -1)
    for choice in (above >= 0, (above >= 0) & same):  # of several choices the last one stays
        chosen[above[choice]] = pieces[choice]
    follows = np.zeros(len(pieces), dtype=np.bool_)
    follows[chosen[chosen >= 0]] = True
    heads, places = _follow(np.where(follows, above, pieces), follows)
    order = np.argsort((heads << 32) + places)
    firsts = np.cumsum(sizes[order]) - sizes[order]  # where each piece comes to stand
    return np.repeat(starts[order] - firsts, sizes[order]) + np.arange(len(dump.hashes))


def _find(wanted: Hashes, among: Hashes) -> _Rows:
    """The row of `among` with each hash; -1 where there is none. Both are sorted: random searches cost far more."""
    if not len(among):
        return np.full(len(wanted), -1)
    by_wanted, by_hash = np.argsort(wanted), np.argsort(among)
    ascending = among[by_hash]
    places = np.minimum(np.searchsorted(ascending, wanted[by_wanted]), len(among) - 1)
    rows: _Rows = np.empty(len(wanted), dtype=np.intp)
    rows[by_wanted] = np.where(ascending[places] == wanted[by_wanted], by_hash[places], -1)
    return rows


def _follow(above: _Rows, follows: NDArray[np.bool_]) -> tuple[_Rows, _Rows]:
    """Each piece's head, and its place behind it. In a circle, which only made-up parents form, all are heads.

    `above` is the piece before, where `follows`, else the piece itself. Pointer doubling: after round i, `heads` is
    the piece 2^i up.
    """
    heads, places = above, follows.astype(np.intp)
    for _ in range(len(above).bit_length()):
        if not follows[heads].any():
            break
        places = places + places[heads]
        heads = heads[heads]
    circles = follows[heads]
    heads = np.where(circles, np.arange(len(above)), heads)
    return heads, np.where(circles, 0, places)


def _starts(joined: NDArray[np.bool_], rows: int) -> _Rows:
    """Where runs of rows begin, when `joined` (rows - 1,) says which rows belong to the row before them."""
    return np.concatenate([np.zeros(min(rows, 1), dtype=np.intp), np.flatnonzero(~joined) + 1])


def _all_parents(columns: _Columns) -> Hashes:
    parents = np.empty_like(columns.hashes)
    parents[1:] = columns.hashes[:-1]
    parents[~columns.follows] = columns.parents
    return parents


def _tiers(member: int) -> list[Tier]:
    return [tier for tier in Tier if member >> tier & 1]


def _checksum(body: bytes | memoryview) -> bytes:
    return hashlib.blake2b(body, digest_size=_CHECKSUM_BYTES).digest()


def _parse(data: bytes) -> _Columns:
    """Views of the columns, after checks of all that says where they are."""
    if len(data) < _HEADER.size + _CHECKSUM_BYTES:
        raise SnapshotError(f"snapshot has {len(data)} bytes: {_HEADER.size + _CHECKSUM_BYTES} or more are needed")
    magic, version, blocks, parents, runs, sets, members = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise SnapshotError(f"snapshot begins with {magic!r}: {_MAGIC!r} is needed")
    if version != VERSION:
        raise SnapshotError(f"snapshot has version {version}: this release reads {VERSION}")
    sizes = [8 * blocks, -(-blocks // 8), 8 * parents, 4 * runs, 4 * runs, 4 * sets, 4 * members]
    needed = _HEADER.size + sum(sizes) + _CHECKSUM_BYTES
    if len(data) != needed:
        raise SnapshotError(f"snapshot has {len(data)} bytes: its counts need {needed}")
    if _checksum(memoryview(data)[:-_CHECKSUM_BYTES]) != data[-_CHECKSUM_BYTES:]:
        raise SnapshotError("snapshot is damaged: its checksum is another")
    if blocks > LARGEST_MAX_BLOCKS:
        raise SnapshotError(f"snapshot has {blocks} blocks: up to {LARGEST_MAX_BLOCKS} are allowed")
    views: list[NDArray[Any]] = []
    offset = _HEADER.size
    for size, dtype in zip(sizes, ("<u8", "u1", "<u8", "<u4", "<u4", "<u4", "<u4"), strict=True):
        views.append(np.frombuffer(data, dtype, count=size // np.dtype(dtype).itemsize, offset=offset))
        offset += size
    bits = np.unpackbits(views[1], bitorder="little")
    if bits[blocks:].any():
        raise SnapshotError("follows has bits set beyond the last block")
    hashes, explicit = (views[i].astype(np.uint64) for i in (0, 2))
    return _Columns(hashes, bits[:blocks].astype(np.bool_), explicit, *(v.astype(np.uint32) for v in views[3:]))


def _check(columns: _Columns) -> None:
    """Raise SnapshotError unless the columns fit each other and all values are in range."""
    blocks = len(columns.hashes)
    ascending = np.sort(columns.hashes)
    if blocks and ascending[0] == ROOT_HASH:
        raise SnapshotError(f"hashes hold {ROOT_HASH}: it stands for the root, a block has another")
    if (ascending[1:] == ascending[:-1]).any():
        raise SnapshotError("hashes hold a block twice")
    if columns.follows[:1].any():
        raise SnapshotError("follows says that the first block has a block before it")
    explicit = blocks - int(np.count_nonzero(columns.follows))
    if len(columns.parents) != explicit:
        raise SnapshotError(f"parents has {len(columns.parents)} rows: follows leaves {explicit}")
    _check_holders(columns, blocks)


def _check_holders(columns: _Columns, blocks: int) -> None:
    run_sets, run_sizes, set_sizes, members = columns.run_sets, columns.run_sizes, columns.set_sizes, columns.members
    if not run_sizes.all() or int(run_sizes.sum(dtype=np.uint64)) != blocks:
        raise SnapshotError(
            f"run_sizes sum up to {run_sizes.sum(dtype=np.uint64)}, or hold 0: there are {blocks} blocks"
        )
    if len(run_sets) and run_sets.max() >= len(set_sizes):
        raise SnapshotError(f"run_sets hold {run_sets.max()}: there are {len(set_sizes)} sets")
    if not set_sizes.all() or _sum(set_sizes) != len(members):
        raise SnapshotError(f"set_sizes sum up to {_sum(set_sizes)}, or hold 0: there are {len(members)} members")
    workers = members >> _TIER_BITS
    if len(members) and workers.max() >= MAX_WORKERS:
        raise SnapshotError(f"members hold worker {workers.max()}: 0 to {MAX_WORKERS - 1} are allowed")
    if not (members & (2**_TIER_BITS - 1)).all():
        raise SnapshotError("members hold a worker in no tier")
    first = np.zeros(len(members), dtype=np.bool_)
    first[np.cumsum(set_sizes, dtype=np.intp)[:-1]] = True
    if not (first[1:] | (workers[1:] > workers[:-1])).all():
        raise SnapshotError("members of a set do not ascend by worker")
    entries = _sum(set_sizes[run_sets].astype(np.uint64) * run_sizes)
    if entries > LARGEST_MAX_BLOCKS:
        raise SnapshotError(f"snapshot has {entries} entries: up to {LARGEST_MAX_BLOCKS} are allowed")


def _sum(counts: NDArray[np.unsignedinteger[Any]]) -> int:
    return int(counts.sum(dtype=np.uint64))
