"""Observer: several workers' streams in one tree, each with its view and its statistics. No I/O, no clock.

    observer = Observer()
    observer.restore("w0", snapshot, received_s)
    observer.offer("w0", batch, received_s)
    await follow(source, observer.consumer("w0", clock))  # or: kv_events.bus.follow drives it

A stream is called as its user calls it. The worker's own name, which batches carry, is learned from the first snapshot
or batch; what another worker sends on the same stream is counted as stale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from kv_events.bus import Resync
from kv_events.events import EventBatch, Snapshot
from kv_events.inspect.recording_format import RecordKind
from kv_events.inspect.stats import RATE_WINDOW_S, StreamNumbers, StreamStats
from kv_events.view import ViewCounts, WorkerView
from radix import make_tree
from radix.tree import (
    DEFAULT_MAX_BLOCKS,
    DEFAULT_MAX_BLOCKS_PER_WORKER,
    MAX_WORKERS,
    Changes,
    PrefixTree,
)
from rhizome.errors import InvalidRequest

if TYPE_CHECKING:
    from kv_events.inspect.recording import Record


@dataclass(frozen=True, slots=True)
class StreamReport:
    """One stream as of some time: where it stands, what went wrong, and its numbers."""

    name: str  # of the stream
    worker: str  # as its batches say; empty before the first one
    number: int  # in the tree
    epoch: int
    next_seq: int
    synced: bool  # the view is known to be right
    digest: bytes  # of the view
    counts: ViewCounts
    numbers: StreamNumbers

    def as_json(self) -> dict[str, Any]:
        """Plain values: the fields, those of counts and numbers beside them, the digest in hexadecimal."""
        own = {"name": self.name, "worker": self.worker, "epoch": self.epoch, "next_seq": self.next_seq}
        state = {"synced": self.synced, "digest": self.digest.hex()}
        return own | state | asdict(self.counts) | self.numbers.as_json()


class Observer:
    """Views of any number of streams, all in `tree`, by name and by number."""

    def __init__(
        self,
        window_s: float | None = RATE_WINDOW_S,
        max_blocks: int = DEFAULT_MAX_BLOCKS,
        max_blocks_per_worker: int = DEFAULT_MAX_BLOCKS_PER_WORKER,
        tree: PrefixTree | None = None,
    ) -> None:
        """Rates are over the last `window_s` seconds, with None over all time. The caps are those of the
        tree, unless it is given."""
        self.tree = make_tree(max_blocks, max_blocks_per_worker) if tree is None else tree
        self._window_s = window_s
        self._max_blocks = max_blocks_per_worker
        self._streams: dict[str, _Stream] = {}

    @property
    def names(self) -> list[str]:
        """Of the streams, by their number in the tree."""
        return list(self._streams)

    def add(self, name: str) -> int:
        """The number of a stream, which is made if it is new. Raises InvalidRequest when there are too many."""
        stream = self._streams.get(name)
        if stream is None:
            if len(self._streams) == MAX_WORKERS:
                raise InvalidRequest("streams", len(self._streams) + 1, f"at most {MAX_WORKERS}")
            stats = StreamStats(self._window_s, self._max_blocks)
            stream = self._streams[name] = _Stream(len(self._streams), self.tree, stats)
        return stream.number

    def number(self, name: str) -> int:
        """A stream's number in the tree. Raises KeyError for one that was not added."""
        return self._streams[name].number

    def view(self, name: str) -> WorkerView | None:
        """None before anything came."""
        return self._streams[name].view

    def stats(self, name: str) -> StreamStats:
        """Its numbers."""
        return self._streams[name].stats

    def position(self, name: str) -> tuple[int, int]:
        """(epoch, next_seq); (0, 0) when nothing is known."""
        view = self._streams[name].view if name in self._streams else None
        return view.position() if view else (0, 0)

    def offer(self, name: str, batch: EventBatch, received_s: float, size_bytes: int | None = None) -> Resync:
        """Take a batch, in whatever order it comes, and its size if that is known; says what is needed now."""
        self.add(name)
        return self._streams[name].offer(batch, received_s, size_bytes)

    def live_from(self, name: str, position: tuple[int, int]) -> None:
        """What comes of a stream before this (epoch, seq) is not counted: nobody watched when it happened."""
        self.add(name)
        self._streams[name].live_from = position

    def restore(self, name: str, snapshot: Snapshot, received_s: float) -> bool:
        """Replace all that is known by a snapshot; False, and no change, when it is stale or does not verify."""
        self.add(name)
        return self._streams[name].restore(snapshot, received_s)

    def play(self, record: Record) -> Resync:
        """Take what a recording holds, as it came when it was recorded. Raises WireError where it cannot be read."""
        received_s = record.time_ns / 1e9
        if record.kind is RecordKind.SNAPSHOT:
            self.restore(record.worker, record.snapshot(), received_s)
        elif record.kind is RecordKind.BATCH:
            return self.offer(record.worker, record.batch(), received_s, len(record.payload))
        return Resync.NONE

    def consumer(self, name: str, clock: Callable[[], float]) -> ObservedStream:
        """A stream as an EventConsumer; `clock` tells received_s: wall time that does not step back."""
        self.add(name)
        return ObservedStream(self, name, clock)

    def report(self, name: str, now_s: float) -> StreamReport:
        """One stream as of now."""
        stream = self._streams[name]
        epoch, next_seq = self.position(name)
        return StreamReport(
            name=name,
            worker=stream.view.worker_name if stream.view else "",
            number=stream.number,
            epoch=epoch,
            next_seq=next_seq,
            synced=stream.view is not None and stream.view.synced,
            digest=self.tree.digest(stream.number),
            counts=stream.view.counts if stream.view else ViewCounts(),
            numbers=stream.stats.numbers(now_s),
        )

    def reports(self, now_s: float) -> list[StreamReport]:
        """All streams as of now, by number."""
        return [self.report(name, now_s) for name in self._streams]


class ObservedStream:
    """One stream of an observer: a kv_events.bus.EventConsumer."""

    def __init__(self, observer: Observer, name: str, clock: Callable[[], float]) -> None:
        self._observer = observer
        self._name = name
        self._clock = clock

    def position(self) -> tuple[int, int]:
        """See EventConsumer."""
        return self._observer.position(self._name)

    def live_from(self, position: tuple[int, int]) -> None:
        """Batches before this (epoch, seq) were there before anybody watched: they are held, and in no rate or lag."""
        self._observer.live_from(self._name, position)

    def offer(self, batch: EventBatch) -> Resync:
        """See EventConsumer."""
        return self._observer.offer(self._name, batch, self._clock())

    def restore(self, snapshot: Snapshot) -> bool:
        """See EventConsumer."""
        return self._observer.restore(self._name, snapshot, self._clock())

    def malformed(self) -> None:
        """See EventConsumer. What comes before the first batch or snapshot is not counted."""
        if view := self._observer.view(self._name):
            view.malformed()


class _Stream:
    """A view, and what it does to the tree on its way to the statistics.

    The view puts batches in order, so only what it does to the tree tells what applied, and when. It sees this object
    as its tree: the few methods that it uses are passed on.
    """

    def __init__(self, number: int, tree: PrefixTree, stats: StreamStats) -> None:
        self.number = number
        self.stats = stats
        self.view: WorkerView | None = None
        self._tree = tree
        self.live_from = (0, 0)
        self._now_s = 0.0
        self._restoring = False
        self.digest, self.refused, self.room, self.count = tree.digest, tree.refused, tree.room, tree.count

    def offer(self, batch: EventBatch, received_s: float, size_bytes: int | None) -> Resync:
        self._now_s = received_s
        if (batch.epoch, batch.seq) >= self.live_from:
            self.stats.received(batch, received_s, size_bytes)
        return self._known(batch.worker).offer(batch)

    def restore(self, snapshot: Snapshot, received_s: float) -> bool:
        self._now_s = received_s
        self._restoring = True
        try:
            return self._known(snapshot.worker).restore(snapshot)
        finally:
            self._restoring = False

    def clear(self, worker: int) -> int:
        if not self._restoring:
            self.stats.cleared(self._now_s)
        return self._tree.clear(worker)

    def apply(self, worker: int, changes: Changes) -> None:
        if self._restoring:  # the first apply takes the snapshot over, further ones are batches that had waited for it
            self.stats.replaced(changes, self._now_s)
            self._restoring = False
        elif self.view is not None and self.view.position() <= self.live_from:
            self.stats.caught_up(changes, self._now_s)
        else:
            self.stats.applied(changes, self._now_s)
        self._tree.apply(worker, changes)

    def _known(self, worker: str) -> WorkerView:
        if self.view is None:
            self.view = WorkerView(worker, self.number, cast(PrefixTree, self))
        return self.view
