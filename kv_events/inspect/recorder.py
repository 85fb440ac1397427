"""Recorder: writes down what comes on some streams, as it comes, and keeps a view of each. No clock of its own."""

from __future__ import annotations

from collections.abc import Callable

from kv_events.bus import Resync
from kv_events.events import EventBatch, Snapshot
from kv_events.inspect.observer import Observer
from kv_events.inspect.recording import RecordingWriter
from kv_events.inspect.recording_format import DIGESTS_MADE_HERE
from kv_events.wire import WireError


class Recorder:
    """What several streams bring goes into one recording, and into `observer`, which says what is missing.

    Everything that came is written in the order in which it came: duplicates, late batches, and the snapshots and
    replays that healed a gap. So a recording replays to what the recorder saw.
    """

    def __init__(
        self, writer: RecordingWriter, observer: Observer, clock_ns: Callable[[], int], max_batches: int | None = None
    ) -> None:
        """`clock_ns` tells wall time in ns that does not step back. After `max_batches` nothing more is written."""
        self.writer = writer
        self.observer = observer
        self.clock_ns = clock_ns
        self.batches = 0  # written
        self.unwritten = 0  # batches that have no bytes: a snapshot was taken in the place of each
        self._max_batches = max_batches

    @property
    def full(self) -> bool:
        """Whether all batches that were wanted are written."""
        return self._max_batches is not None and self.batches >= self._max_batches

    def consumer(self, name: str = "") -> RecordedStream:
        """A stream, as an EventConsumer for kv_events.bus.follow; without a name it is called as its worker."""
        return RecordedStream(self, name)


class RecordedStream:
    """One stream of a recorder: a kv_events.bus.EventConsumer."""

    def __init__(self, recorder: Recorder, name: str) -> None:
        self._recorder = recorder
        self._name = name  # empty as long as it is not known
        self._needed = Resync.NONE
        self._foreign = False

    def position(self) -> tuple[int, int]:
        """See EventConsumer."""
        return self._recorder.observer.position(self._name)

    def offer(self, batch: EventBatch) -> Resync:
        """See EventConsumer."""
        recorder = self._recorder
        if recorder.full:
            return Resync.NONE
        self._name = self._name or batch.worker
        now_ns = recorder.clock_ns()
        try:
            recorder.writer.batch(self._name, batch, now_ns)
        except WireError as error:  # larger than what any bus carries
            recorder.unwritten += 1
            recorder.writer.mark(self._name, f"not written: {error}", now_ns)
            return Resync.SNAPSHOT
        recorder.batches += 1
        needed = recorder.observer.offer(self._name, batch, now_ns / 1e9)
        if needed is not Resync.NONE and needed is not self._needed:
            epoch, seq = self.position()
            recorder.writer.mark(self._name, f"{needed.value} asked for at batch {seq} of epoch {epoch}", now_ns)
        self._needed = needed
        return needed

    def restore(self, snapshot: Snapshot) -> bool:
        """See EventConsumer."""
        recorder = self._recorder
        self._name = self._name or snapshot.worker
        now_ns = recorder.clock_ns()
        recorder.writer.snapshot(self._name, snapshot, now_ns)
        taken = recorder.observer.restore(self._name, snapshot, now_ns / 1e9)
        if taken:
            self._needed = Resync.NONE
        else:
            recorder.writer.mark(self._name, "the snapshot was refused", now_ns)
        return taken

    def mark_foreign(self) -> None:
        """Note once that the digests are not the server's, as soon as anything came."""
        if self._name and not self._foreign:
            self._foreign = True
            self._recorder.writer.mark(self._name, DIGESTS_MADE_HERE, self._recorder.clock_ns())

    def malformed(self) -> None:
        """See EventConsumer. What comes before the worker is known is not noted."""
        if not self._name:
            return
        recorder = self._recorder
        recorder.writer.mark(self._name, "malformed: not a batch", recorder.clock_ns())
        if view := recorder.observer.view(self._name):
            view.malformed()
