"""Events within a process: the log itself, read from an event loop. The other transports serve from the same tail."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress

from kv_events.events import EventBatch, Snapshot
from kv_events.log import EventLog, LoggedBatch
from rhizome.errors import InvalidRequest, Unavailable

READ_BATCHES = 256
"""Taken from the log at a time: what one subscriber holds."""


class PublicationSource(ABC):
    """An EventSource over a log that comes and goes."""

    @abstractmethod
    async def publication(self) -> Publication:
        """What is published now. Raises Unavailable when nothing is."""

    async def subscribe(self, epoch: int, from_seq: int) -> AsyncGenerator[EventBatch, None]:
        """See EventSource. Raises Unavailable, too, when the publication is withdrawn."""
        publication = await self.publication()
        async with aclosing(tail(publication.log, epoch, from_seq, publication)) as entries:
            async for entry in entries:
                yield entry.batch

    async def replay(self, epoch: int, from_seq: int) -> list[EventBatch]:
        """See EventSource."""
        log = (await self.publication()).log
        log.check_epoch(epoch)
        return log.since(from_seq)

    async def snapshot(self) -> Snapshot:
        """See EventSource."""
        return (await self.publication()).log.snapshot()


class MemoryEventSource(PublicationSource):
    """An EventSource over a log of the same process, which needs no name."""

    def __init__(self, log: EventLog) -> None:
        self._log = log

    async def publication(self) -> Publication:
        """See PublicationSource. Never withdrawn."""
        return Publication(self._log)


class PublishedEventSource(PublicationSource):
    """An EventSource over whichever log is published under a name now (see `published`)."""

    def __init__(self, name: str) -> None:
        self._name = name

    async def publication(self) -> Publication:
        """See PublicationSource."""
        publication = _publications.get(self._name)
        if publication is None:
            raise Unavailable(f"nothing is published at memory://{self._name}")
        return publication


class Publication:
    """A log that is published until it is withdrawn: its readers are told then."""

    def __init__(self, log: EventLog) -> None:
        self.log = log
        self.withdrawn = False
        self._lock = threading.Lock()
        self._readers: set[Callable[[], None]] = set()

    def withdraw(self) -> None:
        """End all subscriptions with Unavailable."""
        self.withdrawn = True
        with self._lock:
            readers = list(self._readers)
        for reader in readers:
            with suppress(RuntimeError):  # its loop is over
                reader()

    def subscribe(self, reader: Callable[[], None]) -> None:
        """Have the log, and its withdrawal, signalled to `reader`."""
        with self._lock:
            self._readers.add(reader)
        self.log.subscribe(reader)

    def unsubscribe(self, reader: Callable[[], None]) -> None:
        """Take a reader back."""
        self.log.unsubscribe(reader)
        with self._lock:
            self._readers.discard(reader)


_publications: dict[str, Publication] = {}
_publications_lock = threading.Lock()


@contextmanager
def published(log: EventLog, name: str) -> Iterator[None]:
    """Let this process read `log` at memory://NAME until left. Raises InvalidRequest for a name that is taken."""
    publication = Publication(log)
    with _publications_lock:
        if name in _publications:
            raise InvalidRequest("events_url", f"memory://{name}", "a name that nothing in this process publishes at")
        _publications[name] = publication
    try:
        yield
    finally:
        with _publications_lock:
            del _publications[name]
        publication.withdraw()


async def tail(
    log: EventLog, epoch: int, from_seq: int, publication: Publication | None = None
) -> AsyncGenerator[LoggedBatch, None]:
    """What `log` keeps from `from_seq` on, then what is appended, until it is closed. Raises like `pages`."""
    async with aclosing(pages(log, epoch, from_seq, publication)) as read:
        async for entries in read:
            for entry in entries:
                yield entry


async def pages(
    log: EventLog, epoch: int, from_seq: int, publication: Publication | None = None
) -> AsyncGenerator[list[LoggedBatch], None]:
    """The same, as much at a time as is there: 1 to READ_BATCHES.

    Raises Conflict for another epoch or a position that the log has not reached, Trimmed when batches that were not
    read yet are gone, Unavailable when the log's publication is withdrawn. Nothing is queued: however slow the reader,
    it holds READ_BATCHES batches at most.
    """
    log.check_epoch(epoch)
    signal = Signal()
    subject = publication or log
    subject.subscribe(signal)
    try:
        while True:
            closed = log.closed  # before reading: a close after it is seen next time
            if publication is not None and publication.withdrawn and not closed:
                raise Unavailable(f"{log.worker}: its events are not published any more")
            entries = log.read(from_seq, READ_BATCHES)
            if entries:
                yield entries
            from_seq += len(entries)
            if len(entries) == READ_BATCHES:
                await asyncio.sleep(0)  # far behind, or the engine is faster: other tasks want the loop, too
            elif not entries:
                if closed:
                    return
                await signal.wait()
    finally:
        subject.unsubscribe(signal)


SIGNAL_DELAY_S = 0.0005
"""From the news to its being heard: what a loop does about it (encoding, sending) begins after the engine's step,
instead of taking the interpreter from it."""


class Signal:
    """Carries "something is new" from any thread to the loop that made it, at most once until it is heard."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._pending = False

    def __call__(self) -> None:
        if not self._pending:
            self._pending = True
            self._loop.call_soon_threadsafe(self._loop.call_later, SIGNAL_DELAY_S, self._event.set)

    async def wait(self) -> None:
        """Until something is new since the last wait."""
        await self._event.wait()
        self._event.clear()
        self._pending = False  # before the log is read: whoever finds it set has appended already
