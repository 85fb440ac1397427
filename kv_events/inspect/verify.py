"""Whether event streams are whole and right: every sequence number, and after every batch the digest.

The blocks that a stream tells of are kept in a tree of its own, and the digest over them is compared with the one that
the worker sent: after each batch, and with each snapshot. No I/O but through the reader; no clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kv_events.bus import Resync
from kv_events.columns import changes_of, changes_to
from kv_events.cursor import Apply, DropBlocks, Duplicate, EventCursor, NeedReplay, NeedSnapshot, StaleEpoch
from kv_events.events import EventBatch, Snapshot
from kv_events.inspect.recording import RecordingError, RecordingReader, RecordKind, Summary
from kv_events.inspect.recording_format import DIGESTS_MADE_HERE
from kv_events.inspect.replay import OldEpochs, is_sound
from kv_events.wire import WireError
from radix import make_tree
from radix.digest import EMPTY_DIGEST
from radix.tree import MAX_WORKERS, PrefixTree
from rhizome.errors import InvalidRequest


class Finding(NamedTuple):
    """Something that is wrong with a stream, and where."""

    what: str
    epoch: int
    seq: int

    def __str__(self) -> str:
        return f"{self.what} at batch {self.seq} of epoch {self.epoch}"


@dataclass(slots=True)
class StreamVerdict:
    """What was found on one stream. Batches unless said otherwise."""

    name: str
    worker: str = ""
    epoch: int = 0
    next_seq: int = 0
    digest: bytes = EMPTY_DIGEST  # of the blocks that its events tell of
    blocks: int = 0
    applied: int = 0
    snapshots: int = 0
    digests_sent: bool = True  # False: a foreign server's, which sends none; only the order of batches is checked
    # Of no harm:
    duplicates: int = 0
    late: int = 0  # times that batches came after later ones, or in a replay
    restarts: int = 0  # of the worker
    stale: int = 0  # of an old epoch, or of another worker
    # Harm:
    lost: int = 0  # that never came; a snapshot went on after them
    mismatches: int = 0  # after which digests differed, while they agreed before
    bad_snapshots: int = 0  # whose digest is not that of their blocks, or of what the events before them told
    malformed: int = 0  # records that are no batch or snapshot
    open_gap: bool = False  # it ends with batches missing before others
    first: Finding | None = None  # the first harm

    @property
    def ok(self) -> bool:
        """Whether nothing harmful was found."""
        return self.first is None

    def as_json(self) -> dict[str, Any]:
        """Plain values by field, the digest in hexadecimal, and `ok`."""
        fields = {name: getattr(self, name) for name in self.__slots__ if name not in ("digest", "first")}
        first = self.first._asdict() if self.first else None
        return fields | {"digest": self.digest.hex(), "ok": self.ok, "first": first}


class StreamVerifier:
    """Checks one stream: a kv_events.bus.EventConsumer."""

    def __init__(self, name: str, number: int, tree: PrefixTree) -> None:
        """`number` in the tree is its own."""
        self._verdict = StreamVerdict(name)
        self._number = number
        self._tree = tree
        self._cursor = EventCursor()
        self._agrees = False
        self._late_at = (0, -1)
        self._old_epochs = OldEpochs()

    def position(self) -> tuple[int, int]:
        """See EventConsumer."""
        return self._cursor.position

    def offer(self, batch: EventBatch) -> Resync:
        """See EventConsumer."""
        verdict = self._verdict
        if (verdict.worker or batch.worker) != batch.worker:
            verdict.stale += 1
            return Resync.NONE
        verdict.worker = batch.worker
        instructions = self._cursor.offer(batch)
        if batch.epoch == self._cursor.position[0]:
            self._old_epochs = OldEpochs()
        for instruction in instructions:
            match instruction:
                case Apply(joined):
                    self._apply(joined)
                case Duplicate():
                    verdict.duplicates += 1
                case StaleEpoch():
                    verdict.stale += 1
                case DropBlocks():
                    verdict.restarts += bool(verdict.snapshots or verdict.applied)
                    self._tree.clear(self._number)
                    self._agrees = True
                case NeedReplay() | NeedSnapshot():
                    verdict.late += self._late_at != self._cursor.position
                    self._late_at = self._cursor.position
        if batch.epoch < self._cursor.position[0]:
            return Resync.SNAPSHOT  # should the newer one have been misheard, snapshots tell
        if not self._cursor.has_gap:
            return Resync.NONE if self._agrees else Resync.SNAPSHOT
        return Resync.REPLAY if self._agrees and self._cursor.position[1] else Resync.SNAPSHOT

    def restore(self, snapshot: Snapshot) -> bool:
        """See EventConsumer."""
        verdict, (epoch, next_seq) = self._verdict, self._cursor.position
        verdict.snapshots += 1
        if (verdict.worker or snapshot.worker) != snapshot.worker:
            verdict.stale += 1
            return False
        verdict.worker = snapshot.worker
        if not is_sound(snapshot):
            self._bad_snapshot("a snapshot whose digest is not that of its blocks", snapshot)
            return False
        if snapshot.epoch < epoch:
            if not self._old_epochs.outvote():
                verdict.stale += 1
                return False
            self._harm(f"what came of epoch {epoch}, which the worker never had,", *self._cursor.position)
            self._cursor, self._agrees, (epoch, next_seq) = EventCursor(), False, (0, 0)
        position = snapshot.epoch, snapshot.next_seq
        if self._agrees and position <= (epoch, next_seq):
            if position == (epoch, next_seq) and snapshot.digest != self._digest:
                self._bad_snapshot("a snapshot that is not what the events told", snapshot)
            self._cursor.restored(epoch, next_seq)  # what waits in vain goes
            return True
        if epoch:
            self._missed(snapshot)
        self._tree.clear(self._number)
        self._tree.apply(self._number, changes_to(snapshot))
        self._agrees = True
        for joined in self._cursor.restored(*position):
            self._apply(joined.batch)
        return self._agrees

    def without_digests(self) -> None:
        """The digests are the reader's own: that they agree says nothing."""
        self._verdict.digests_sent = False

    def malformed(self) -> None:
        """See EventConsumer."""
        self._verdict.malformed += 1
        self._harm("what is no batch and no snapshot", *self._cursor.position)

    def verdict(self) -> StreamVerdict:
        """As of now."""
        verdict = self._verdict
        verdict.epoch, verdict.next_seq = self._cursor.position
        verdict.digest, verdict.blocks = self._digest, self._tree.count(self._number)
        verdict.open_gap = self._cursor.has_gap
        if verdict.open_gap:
            self._harm("batches are missing", *self._cursor.position)
        return verdict

    @property
    def _digest(self) -> bytes:
        return self._tree.digest(self._number)

    def _apply(self, batch: EventBatch) -> None:
        self._tree.apply(self._number, changes_of(batch.events))
        self._verdict.applied += 1
        agreed, self._agrees = self._agrees, self._digest == batch.digest
        if agreed and not self._agrees:
            self._verdict.mismatches += 1
            found, sent = self._digest.hex(), batch.digest.hex()
            self._harm(f"the digest is {found}, the worker's {sent},", batch.epoch, batch.seq)

    def _missed(self, snapshot: Snapshot) -> None:
        """Which batches a snapshot stands for."""
        epoch, next_seq = self._cursor.position
        first = next_seq if snapshot.epoch == epoch else 0
        self._verdict.restarts += snapshot.epoch != epoch
        if snapshot.next_seq > first:
            self._verdict.lost += snapshot.next_seq - first
            self._harm(f"{snapshot.next_seq - first} batches never came, beginning", snapshot.epoch, first)

    def _bad_snapshot(self, what: str, snapshot: Snapshot) -> None:
        self._verdict.bad_snapshots += 1
        self._harm(what, snapshot.epoch, snapshot.next_seq)

    def _harm(self, what: str, epoch: int, seq: int) -> None:
        self._verdict.first = self._verdict.first or Finding(what, epoch, seq)


class Verifier:
    """Checks several streams, by name."""

    def __init__(self, tree: PrefixTree | None = None) -> None:
        self._tree = make_tree() if tree is None else tree
        self._streams: dict[str, StreamVerifier] = {}

    def consumer(self, name: str) -> StreamVerifier:
        """The verifier of a stream, made when it is first asked for."""
        if name not in self._streams:
            if len(self._streams) == MAX_WORKERS:
                raise InvalidRequest("streams", MAX_WORKERS + 1, f"at most {MAX_WORKERS}")
            self._streams[name] = StreamVerifier(name, len(self._streams), self._tree)
        return self._streams[name]

    def verdicts(self) -> list[StreamVerdict]:
        """As of now, in the order in which streams were first asked for."""
        return [stream.verdict() for stream in self._streams.values()]


@dataclass(slots=True)
class RecordingVerdict:
    """What was found in a recording."""

    complete: bool  # False: the recorder was cut off
    streams: list[StreamVerdict] = field(default_factory=list)
    damage: str = ""  # why it could not be read further, and where
    index_differs: bool = False  # the index tells of other batches than there are

    @property
    def ok(self) -> bool:
        """Whether the recording is whole, and all streams are."""
        return self.complete and not self.damage and not self.index_differs and all(one.ok for one in self.streams)


def verify_recording(reader: RecordingReader, progress: Callable[[int], None] = lambda _: None) -> RecordingVerdict:
    """Check everything in a recording; `progress` is told offsets in the file, in bytes. Damage is part of what is
    found."""
    verifier, verdict = Verifier(), RecordingVerdict(reader.complete)
    batches: Counter[tuple[str, int]] = Counter()  # by worker and epoch
    try:
        for record in reader.records():
            progress(record.offset)
            stream = verifier.consumer(record.worker)
            try:
                if record.kind is RecordKind.BATCH:
                    batch = record.batch()
                    batches[record.worker, batch.epoch] += 1
                    stream.offer(batch)
                elif record.kind is RecordKind.SNAPSHOT:
                    stream.restore(record.snapshot())
                elif record.mark() == DIGESTS_MADE_HERE:
                    stream.without_digests()
            except WireError:
                stream.malformed()
        if reader.complete:
            verdict.index_differs = _batches_in(reader.summary()) != batches
    except RecordingError as error:
        verdict.damage = str(error)
    verdict.streams = verifier.verdicts()
    return verdict


def _batches_in(summary: Summary) -> Counter[tuple[str, int]]:
    told = Counter[tuple[str, int]]()
    for name, worker in summary.workers.items():
        told.update({(name, epoch): span.batches for epoch, span in worker.spans.items() if span.batches})
    return told
