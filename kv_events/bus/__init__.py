"""How events get from a worker to whoever follows it: one interface, a transport a file."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from enum import Enum
from typing import Protocol

from kv_events.events import EventBatch, Snapshot

MAX_REPLAY_BATCHES = 2**16  # eight times what our own workers keep
MAX_REPLAY_BYTES = 128 * 2**20
"""Of one replay's payloads; a log of ours keeps a third of that. A reader holds no more, whatever comes from afar."""


class Resync(Enum):
    """What a consumer needs after a batch to be in step again."""

    NONE = "none"
    REPLAY = "replay"  # batches are missing from position() on
    SNAPSHOT = "snapshot"  # nothing less heals


class EventSource(Protocol):
    """One worker's events, seen from afar.

    Every method raises rhizome.errors: Unavailable when the worker cannot be reached, Conflict when it is in another
    epoch than the one asked for (0 takes any) or has not got as far as the position asked for, Trimmed when batches are
    asked for that are not kept any more. kv_events.wire.WireError: what came is not a batch.
    """

    def subscribe(self, epoch: int, from_seq: int) -> AsyncGenerator[EventBatch, None]:
        """The kept batches from `from_seq` on, then live ones; ends when the worker says goodbye.

        Raises Trimmed, too, when the subscriber fell behind what is kept. Close the generator to unsubscribe.
        """
        ...

    async def replay(self, epoch: int, from_seq: int) -> list[EventBatch]:
        """The kept batches from `from_seq` to the newest."""
        ...

    async def snapshot(self) -> Snapshot:
        """Everything that the worker holds, and the sequence number from which to subscribe."""
        ...


class EventConsumer(Protocol):
    """Who is kept in step by bus.follow; kv_events.view.WorkerView is the standard one."""

    def position(self) -> tuple[int, int]:
        """(epoch, next_seq); (0, 0) when nothing is known."""
        ...

    def offer(self, batch: EventBatch) -> Resync:
        """Take a batch, in whatever order it comes; says what is needed now."""
        ...

    def restore(self, snapshot: Snapshot) -> bool:
        """Replace all that is known by a snapshot; False, and no change, when it is stale or does not verify."""
        ...

    def malformed(self) -> None:
        """Count something that came and was neither a batch nor a snapshot."""
        ...
