"""Workers that work at random, and recordings of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventBatch
from kv_events.inspect.recording import RecordingWriter
from kv_events.log import EventLog
from radix.keys import ROOT_HASH, Hashes

START_NS = 1_700_000_000 * 10**9
STEP_NS = 10**7


def blocks(*hashes: int) -> Hashes:
    return np.array(hashes, dtype=np.uint64)


class Fleet:
    """Workers that take turns; the wall clock moves 10 ms a step. Same seed, same streams."""

    def __init__(self, workers: int = 3, seed: int = 7) -> None:
        self.chance = random.Random(seed)
        self.logs = {f"worker-{number}": EventLog(f"worker-{number}", 1, 16) for number in range(workers)}
        self.time_ns = START_NS

    def step(self) -> tuple[str, EventBatch]:
        """One step of the next worker."""
        self.time_ns += STEP_NS
        name = self.chance.choice(list(self.logs))
        events = [self._event() for _ in range(self.chance.randint(0, 3))]
        return name, self.logs[name].append(events, self.time_ns / 1e9 - 0.002)

    def steps(self, count: int) -> Iterator[tuple[str, EventBatch]]:
        for _ in range(count):
            yield self.step()

    def restart(self, name: str) -> None:
        self.logs[name] = EventLog(name, self.logs[name].epoch + 1, 16)

    def begin(self, writer: RecordingWriter) -> None:
        """What a recorder does first."""
        for name, log in self.logs.items():
            writer.snapshot(name, log.snapshot(), self.time_ns)

    def record(self, writer: RecordingWriter, steps: int) -> None:
        for name, batch in self.steps(steps):
            writer.batch(name, batch, self.time_ns)

    def _event(self) -> Event:
        """Chains of one small forest, so that workers share blocks and removals hit."""
        tree, start = self.chance.randrange(4), self.chance.randrange(8)
        chain = [1 + 2**61 + 16 * tree + depth for depth in range(start, min(12, start + self.chance.randint(1, 5)))]
        medium = self.chance.choice(["GPU", "GPU", "GPU", "CPU", "DISK"])
        match self.chance.random():
            case roll if roll < 0.55:
                tokens = np.arange(90_000, 90_000 + 16 * len(chain), dtype=np.uint32) if roll < 0.05 else None
                return BlockStored(blocks(*chain), chain[0] - 1 if start else ROOT_HASH, 16, tokens, medium)
            case roll if roll < 0.98:
                return BlockRemoved(blocks(*self.chance.sample(chain, self.chance.randint(1, len(chain)))), medium)
            case _:
                return AllBlocksCleared()


def recorded(path: Path, steps: int = 200, workers: int = 3, seed: int = 7, before: int = 20) -> Fleet:
    """A recording of `steps` steps, of workers that had done some `before`."""
    fleet = Fleet(workers, seed)
    list(fleet.steps(before))
    with RecordingWriter(path.open("wb"), START_NS) as writer:
        fleet.begin(writer)
        fleet.record(writer, steps)
    return fleet
