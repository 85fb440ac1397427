"""Whatever a network did to the streams that were recorded: everybody who reads the recording ends where the recorder
stood, and what it went through is told."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pytest

from kv_events.bus import Resync
from kv_events.bus.follow import follow
from kv_events.bus.recorded import RecordedSource
from kv_events.events import BlockStored, EventBatch, Snapshot
from kv_events.inspect.diff import Account
from kv_events.inspect.observer import Observer
from kv_events.inspect.recorder import RecordedStream, Recorder
from kv_events.inspect.recording import RecordingReader, RecordingWriter
from kv_events.inspect.replay import Replayer
from kv_events.inspect.verify import verify_recording
from kv_events.log import EventLog
from kv_events.view import WorkerView
from radix import make_tree
from rhizome.errors import Conflict, Trimmed
from tests.support.recordings import Fleet, blocks

WORKER = "worker-0"
SCHEDULES = 40


class HostileLink:
    """One worker, its former incarnations, and a recorder at the other end of a bad line."""

    def __init__(self, recorder: Recorder, fleet: Fleet, chance: random.Random) -> None:
        self.stream: RecordedStream = recorder.consumer(WORKER)
        self.fleet = fleet
        self.chance = chance
        self.logs = [fleet.logs[WORKER]]
        self.delayed: list[EventBatch] = []

    @property
    def log(self) -> EventLog:
        return self.logs[-1]

    def run(self, steps: int) -> None:
        self.answer(Resync.SNAPSHOT, calm=True)
        for _ in range(steps):
            self.step()
        for _ in range(100):
            _, batch = self.fleet.step()
            self.answer(self.stream.offer(batch), calm=True)

    def step(self) -> None:
        if self.chance.random() < 0.01:
            self.fleet.restart(WORKER)
            self.logs.append(self.fleet.logs[WORKER])
        _, batch = self.fleet.step()
        match self.chance.random():
            case roll if roll < 0.05:
                return  # lost
            case roll if roll < 0.10:
                self.delayed.append(batch)
                return
            case roll if roll < 0.13:
                batch = self.damaged(batch)
        self.answer(self.stream.offer(batch), calm=False)
        if self.delayed and self.chance.random() < 0.2:
            late = self.delayed.pop(self.chance.randrange(len(self.delayed)))
            for _ in range(self.chance.randint(1, 2)):
                self.answer(self.stream.offer(late), calm=False)

    def damaged(self, batch: EventBatch) -> EventBatch:
        match self.chance.randrange(5):
            case 0:
                return batch._replace(events=(BlockStored(blocks(2**50), 0, 16),))
            case 1:
                return batch._replace(digest=bytes(15) + b"x")
            case 2:
                return batch._replace(seq=batch.seq + self.chance.randint(1, 1000))
            case 3:
                return batch._replace(epoch=batch.epoch + self.chance.randint(1, 3))
            case _:
                return batch._replace(worker="somebody")

    def answer(self, needed: Resync, *, calm: bool) -> None:
        """What the follow loop does, as far as the line lets it."""
        while needed is not Resync.NONE and (calm or self.chance.random() < 0.8):
            log = self.log if calm or self.chance.random() < 0.95 else self.chance.choice(self.logs)
            if needed is Resync.REPLAY:
                needed = self.replayed(log)
            else:
                snapshot = log.snapshot()
                bad = not calm and self.chance.random() < 0.1
                needed = self.restored(replace(snapshot, digest=bytes(16)) if bad else snapshot)

    def replayed(self, log: EventLog) -> Resync:
        epoch, next_seq = self.stream.position()
        try:
            log.check_epoch(epoch)
            batches = log.since(next_seq)
        except (Trimmed, Conflict):
            return Resync.SNAPSHOT
        needed = Resync.REPLAY
        for batch in batches:
            needed = self.stream.offer(batch)
        return Resync.SNAPSHOT if needed is Resync.REPLAY else needed

    def restored(self, snapshot: Snapshot) -> Resync:
        return Resync.NONE if self.stream.restore(snapshot) else Resync.SNAPSHOT


def hostile(path: Path, seed: int) -> tuple[Recorder, EventLog]:
    fleet, observer = Fleet(workers=1, seed=seed), Observer()
    with RecordingWriter(path.open("wb")) as writer:
        recorder = Recorder(writer, observer, lambda: fleet.time_ns)
        link = HostileLink(recorder, fleet, random.Random(seed))
        link.run(300)
    return recorder, link.log


@pytest.mark.parametrize("seed", range(SCHEDULES))
def test_everybody_ends_where_the_recorder_stood(tmp_path: Path, seed: int) -> None:
    """Played, replayed as logs, followed as a source, verified and compared: one position, one digest."""
    recorder, log = hostile(tmp_path / "a", seed)
    before = recorder.observer.report(WORKER, 0.0)
    assert before.synced
    assert (before.epoch, before.next_seq, before.digest) == (log.epoch, log.next_seq, log.digest), "healed"

    observer, replayer = Observer(), Replayer()
    with RecordingReader(tmp_path / "a") as reader:
        for record in reader.records():
            observer.play(record)
            replayer.take(record)
        account = Account(reader)
        (verdict,) = verify_recording(reader).streams
    after = observer.report(WORKER, 0.0)
    assert after.counts == before.counts
    assert (after.epoch, after.next_seq, after.digest) == (before.epoch, before.next_seq, before.digest)
    assert after.numbers.stored == before.numbers.stored

    stream = replayer.streams[WORKER]
    assert stream.log is not None
    assert (stream.log.epoch, stream.log.next_seq, stream.log.digest) == (log.epoch, log.next_seq, log.digest)
    assert (account.position(WORKER), account.states[WORKER].digest) == ((log.epoch, log.next_seq), log.digest)
    assert (verdict.epoch, verdict.next_seq, verdict.digest) == (log.epoch, log.next_seq, log.digest)
    assert verdict.mismatches == before.counts.mismatches
    assert asyncio.run(asyncio.wait_for(followed(tmp_path / "a", log), 30)) == log.digest


async def followed(path: Path, log: EventLog) -> bytes:
    view = WorkerView(WORKER, 0, make_tree())
    following = asyncio.create_task(follow(RecordedSource(path, WORKER), view, first_delay_s=0.0001, max_delay_s=0.001))
    while not (view.position() == (log.epoch, log.next_seq) and view.synced):
        await asyncio.sleep(0.001)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    return view.digest
