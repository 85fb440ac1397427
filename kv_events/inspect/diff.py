"""How two accounts of the same workers differ: two recordings batch by batch, or what two trees say who holds. No I/O
but through readers; no clock."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, EventBatch
from kv_events.inspect.recording import RecordingReader, RecordKind
from kv_events.inspect.words import key_text, tiers_of
from kv_events.view import WorkerView
from radix import make_tree
from radix.digest import EMPTY_DIGEST
from radix.keys import Hashes
from radix.tree import PrefixTree

LISTED_BLOCKS = 20
"""Blocks of each kind that a difference lists; all are counted."""

_TIER_BITS = 3

Masks: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class HeldState:
    """What a worker holds by some account."""

    digest: bytes
    hashes: Hashes  # ascending
    masks: Masks  # (blocks,): bit t where held in Tier t


NOTHING_HELD = HeldState(EMPTY_DIGEST, np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint8))


class TierChange(NamedTuple):
    """A block that both hold, in other tiers. Bit masks."""

    block_hash: int
    tiers_a: int
    tiers_b: int


@dataclass(frozen=True, slots=True)
class StateDiff:
    """How what a worker holds by account B differs from account A. Lists hold the first LISTED_BLOCKS, by hash."""

    equal: bool  # the digests
    blocks_a: int
    blocks_b: int
    missing: int  # blocks of A that B lacks
    extra: int  # blocks of B that A lacks
    moved: int  # blocks of both, in other tiers
    missing_blocks: Sequence[int] = ()
    extra_blocks: Sequence[int] = ()
    moved_blocks: Sequence[TierChange] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain values; hashes in hexadecimal, as integers of 64 bits break in JavaScript."""
        counts = {name: getattr(self, name) for name in ("equal", "blocks_a", "blocks_b", "missing", "extra", "moved")}
        return counts | {
            "missing_blocks": [key_text(block) for block in self.missing_blocks],
            "extra_blocks": [key_text(block) for block in self.extra_blocks],
            "moved_blocks": [
                {"block": key_text(block), "tiers_a": tiers_of(tiers_a), "tiers_b": tiers_of(tiers_b)}
                for block, tiers_a, tiers_b in self.moved_blocks
            ],
        }


def states_of(tree: PrefixTree, names: Sequence[str]) -> dict[str, HeldState]:
    """What each worker of a tree holds; `names` by number, "" for none."""
    dump = tree.dump()
    starts = np.concatenate([np.zeros(1, dtype=np.intp), dump.set_ends.astype(np.intp)])
    sizes = np.diff(starts)[dump.holder_sets] if len(dump.set_ends) else np.empty(0, dtype=np.intp)
    # One row for each (block, holder): the block's place, and the holder's place within the block's set.
    rows = np.repeat(np.arange(len(sizes)), sizes)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    members = dump.members[starts[dump.holder_sets[rows]] + within]
    numbers, masks = members >> _TIER_BITS, (members & ((1 << _TIER_BITS) - 1)).astype(np.uint8)
    hashes = dump.hashes[rows]
    order = np.lexsort((hashes, numbers))
    numbers, masks, hashes = numbers[order], masks[order], hashes[order]
    states = {}
    for number, name in enumerate(names):
        first, end = np.searchsorted(numbers, [number, number + 1])
        if name:
            states[name] = HeldState(tree.digest(number), hashes[first:end], masks[first:end])
    return states


def diff_states(a: HeldState, b: HeldState, listed: int = LISTED_BLOCKS) -> StateDiff:
    """What B lacks of A, has besides, and holds elsewhere."""
    missing, extra = np.setdiff1d(a.hashes, b.hashes, True), np.setdiff1d(b.hashes, a.hashes, True)
    both, in_a, in_b = np.intersect1d(a.hashes, b.hashes, True, return_indices=True)
    elsewhere = np.flatnonzero(a.masks[in_a] != b.masks[in_b])
    first = elsewhere[:listed]
    moved = zip(both[first].tolist(), a.masks[in_a[first]].tolist(), b.masks[in_b[first]].tolist(), strict=True)
    return StateDiff(
        equal=a.digest == b.digest,
        blocks_a=len(a.hashes),
        blocks_b=len(b.hashes),
        missing=len(missing),
        extra=len(extra),
        moved=len(elsewhere),
        missing_blocks=missing[:listed].tolist(),
        extra_blocks=extra[:listed].tolist(),
        moved_blocks=[TierChange(*each) for each in moved],
    )


class BatchDifference(NamedTuple):
    """A batch that is not the same in both, or not in both."""

    epoch: int
    seq: int
    a: str  # in words; "" where A lacks it
    b: str


@dataclass(frozen=True, slots=True)
class StreamDiff:
    """How one worker's stream differs in recording B from recording A.

    Batches are compared where both recorded: in the same epochs, from where the later one begins to where the sooner
    one ends.
    """

    name: str
    in_a: bool
    in_b: bool
    compared: int  # batches that either has of what both recorded
    differing: int  # of them: not the same, or in one alone
    first: BatchDifference | None
    position_a: tuple[int, int]  # (epoch, next_seq) at the end
    position_b: tuple[int, int]
    state: StateDiff  # at the end

    @property
    def equal(self) -> bool:
        """Whether no compared batch differs, and both end with the same blocks."""
        return self.in_a and self.in_b and not self.differing and self.state.equal

    def as_json(self) -> dict[str, Any]:
        """Plain values by field, and `equal`."""
        names = ("name", "in_a", "in_b", "equal", "compared", "differing", "position_a", "position_b")
        first = self.first._asdict() if self.first else None
        return {name: getattr(self, name) for name in names} | {"first": first, "state": self.state.as_json()}


@dataclass(slots=True)
class _Ledger:
    """The batches of one stream in one epoch, in the order in which they came: 16 bytes each."""

    seqs: array[int] = field(default_factory=lambda: array("Q"))
    contents: array[int] = field(default_factory=lambda: array("Q"))

    def distinct(self) -> tuple[Hashes, Hashes]:
        """Sequence numbers, ascending, and what the first batch with each holds."""
        seqs, first = np.unique(np.frombuffer(self.seqs, dtype=np.uint64), return_index=True)
        return seqs, np.frombuffer(self.contents, dtype=np.uint64)[first]


class Account:
    """What a recording tells of its streams: which batches, and what is held at the end."""

    def __init__(self, reader: RecordingReader, progress: Callable[[int], None] = lambda _: None) -> None:
        """Reads all of it. Raises WireError for damage. `progress` is told offsets in the file, in bytes."""
        self._reader = reader
        self._tree = make_tree()
        self._views: dict[str, WorkerView] = {}
        self.ledgers: dict[str, dict[int, _Ledger]] = {}  # by stream and epoch
        for record in reader.records():
            progress(record.offset)
            if record.kind is RecordKind.BATCH:
                batch = record.batch()
                ledger = self.ledgers.setdefault(record.worker, {}).setdefault(batch.epoch, _Ledger())
                ledger.seqs.append(batch.seq)
                ledger.contents.append(_content(record.payload))
                self._view(record.worker, batch.worker).offer(batch)
            elif record.kind is RecordKind.SNAPSHOT:
                snapshot = record.snapshot()
                self._view(record.worker, snapshot.worker).restore(snapshot)
        self.states = states_of(self._tree, list(self._views))

    @property
    def names(self) -> Collection[str]:
        """Of the streams."""
        return self._views.keys()

    def position(self, name: str) -> tuple[int, int]:
        """(epoch, next_seq) at the end; (0, 0) of an unknown stream."""
        return self._views[name].position() if name in self._views else (0, 0)

    def describe(self, name: str, epoch: int, seq: int) -> str:
        """A batch in words; "" where there is none."""
        for record in self._reader.records([name], position=(name, epoch, seq)):
            if record.kind is RecordKind.BATCH and (batch := record.batch())[1:3] == (epoch, seq):
                return describe(batch)
        return ""

    def _view(self, name: str, worker: str) -> WorkerView:
        view = self._views.get(name)
        if view is None:
            view = self._views[name] = WorkerView(worker, len(self._views), self._tree)
        return view


def diff_accounts(a: Account, b: Account, listed: int = LISTED_BLOCKS) -> list[StreamDiff]:
    """Stream by stream, by name."""
    return [_diff_stream(name, a, b, listed) for name in sorted({*a.names, *b.names})]


def diff_trees(
    a: Mapping[str, HeldState], b: Mapping[str, HeldState], listed: int = LISTED_BLOCKS
) -> dict[str, StateDiff]:
    """By worker, in order of their names; one that an account does not know holds nothing by it."""
    names = sorted({*a, *b})
    return {name: diff_states(a.get(name, NOTHING_HELD), b.get(name, NOTHING_HELD), listed) for name in names}


def describe(batch: EventBatch) -> str:
    """What a batch says, in a line."""
    stored = sum(len(event.block_hashes) for event in batch.events if isinstance(event, BlockStored))
    removed = sum(len(event.block_hashes) for event in batch.events if isinstance(event, BlockRemoved))
    cleared = sum(isinstance(event, AllBlocksCleared) for event in batch.events)
    what = f"{len(batch.events)} events, {stored} stored, {removed} removed{', cleared' if cleared else ''}"
    return f"{what}, digest {batch.digest.hex()}, ts {batch.ts!r}"


def _diff_stream(name: str, a: Account, b: Account, listed: int) -> StreamDiff:
    ledgers_a, ledgers_b = a.ledgers.get(name, {}), b.ledgers.get(name, {})
    compared = differing = 0
    first: BatchDifference | None = None
    for epoch in sorted(ledgers_a.keys() & ledgers_b.keys()):
        seqs, differs = _compared(ledgers_a[epoch], ledgers_b[epoch])
        compared += len(seqs)
        differing += int(differs.sum())
        if first is None and differs.any():
            seq = int(seqs[differs][0])
            first = BatchDifference(epoch, seq, a.describe(name, epoch, seq), b.describe(name, epoch, seq))
    return StreamDiff(
        name=name,
        in_a=name in a.names,
        in_b=name in b.names,
        compared=compared,
        differing=differing,
        first=first,
        position_a=a.position(name),
        position_b=b.position(name),
        state=diff_states(a.states.get(name, NOTHING_HELD), b.states.get(name, NOTHING_HELD), listed),
    )


def _compared(a: _Ledger, b: _Ledger) -> tuple[Hashes, NDArray[np.bool_]]:
    """The sequence numbers that either has where both recorded, ascending, and whether their batches differ."""
    (seqs_a, contents_a), (seqs_b, contents_b) = a.distinct(), b.distinct()
    low, high = max(seqs_a[0], seqs_b[0]), min(seqs_a[-1], seqs_b[-1])
    seqs = np.union1d(seqs_a, seqs_b)
    seqs = seqs[(seqs >= low) & (seqs <= high)]
    in_a, in_b = np.isin(seqs, seqs_a), np.isin(seqs, seqs_b)
    differs = ~(in_a & in_b)
    both = seqs[~differs]
    differs[~differs] = contents_a[np.searchsorted(seqs_a, both)] != contents_b[np.searchsorted(seqs_b, both)]
    return seqs, differs


def _content(payload: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(payload, digest_size=8).digest(), "little")
