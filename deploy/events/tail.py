"""`rhizome events tail`: what workers say as they say it, an event a line, or a line of rates each second."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deploy.events.reading import Item, Named, Note, from_seq, kept, live, read_all
from deploy.events.show import Output, clock_text
from deploy.events.targets import Targets, open_targets
from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventBatch, UnknownEvent, tier_of
from kv_events.inspect.words import KeyRange, counted, key_text, printable
from radix.keys import ROOT_HASH, Hashes

KINDS = ("stored", "removed", "cleared")
KEYS_SHOWN = 2
"""Of more only the first and the last: their number stands beside them."""

_NO_BLOCKS: Hashes = np.empty(0, dtype=np.uint64)
_LOUD = ("gap", "lost", "trimmed", "malformed")  # notes of what went wrong


@dataclass(frozen=True, slots=True)
class TailOptions:
    """What `tail` was asked for."""

    target: str
    workers: tuple[str, ...] = ()  # none: all
    kinds: tuple[str, ...] = ()  # none: all
    key: KeyRange | None = None  # only events that name such a block
    start: int | None = None  # a sequence number; None: what comes, or all there is of what ends
    follow: bool = True
    limit: int | None = None  # lines
    rates: bool = False
    as_json: bool = False

    def keys_of(self, event: Event) -> Hashes:
        """The blocks of an event that were asked for."""
        hashes = event.block_hashes if isinstance(event, BlockStored | BlockRemoved) else _NO_BLOCKS
        if self.key is None:
            return hashes
        return hashes[(hashes >= np.uint64(self.key.low)) & (hashes <= np.uint64(self.key.high))]

    def events_of(self, batch: EventBatch) -> list[Event]:
        """The events of a batch that were asked for."""
        wanted = [event for event in batch.events if not self.kinds or kind_of(event) in self.kinds]
        return wanted if self.key is None else [event for event in wanted if len(self.keys_of(event))]


@dataclass(frozen=True, slots=True)
class _Line:
    """Something to print: as segments, and as plain values."""

    segments: list[tuple[str, str]]
    values: dict[str, Any]
    counts: bool = True  # towards the limit


async def run_tail(options: TailOptions) -> None:
    """Print until the limit, the end, or for ever. Raises InvalidRequest, Unavailable, WireError."""
    output = Output(as_json=options.as_json)
    printed = 0
    async with open_targets(options.target, options.workers) as targets:
        if not targets.streams and targets.recording is None:
            _print(output, _note_line("", Note("joined", "no worker is there yet")))
        for name, problem in targets.problems.items():
            _print(output, _note_line(name, Note("lost", problem)))
        lines = _rate_lines(targets, options) if options.rates else _event_lines(targets, options)
        async with aclosing(lines):
            async for line in lines:
                _print(output, line)
                printed += line.counts
                if printed == options.limit:
                    return


def _print(output: Output, line: _Line) -> None:
    if output.as_json:
        output.json(line.values)
    else:
        output.line(line.segments)
    output.flush()


async def _items(targets: Targets, options: TailOptions) -> AsyncGenerator[tuple[float, Named], None]:
    """What the target brings, and when it came (seconds, wall time)."""
    start = live if options.start is None else from_seq(options.start)
    if targets.recording is not None:
        names = {stream.name for stream in targets.streams}
        async with aclosing(_recorded(targets.recording, names, options.start or 0)) as recorded:
            async for timed in recorded:
                yield timed
    elif options.follow:
        async with aclosing(read_all(targets, start)) as items:
            async for named in items:
                if _is_of(named, targets, options.workers):
                    yield time.time(), named
    else:
        there = [(s.name, batch) for s in targets.streams for batch in await kept(s.source, options.start or 0)]
        for name, batch in sorted(there, key=lambda pair: pair[1].ts):
            if _is_of(Named(name, batch), targets, options.workers):
                yield batch.ts, Named(name, batch)


def _is_of(named: Named, targets: Targets, workers: tuple[str, ...]) -> bool:
    """Whether it is of a worker that was asked for. A router's streams are chosen already, and called as it does."""
    item = named.item
    return not workers or targets.router is not None or isinstance(item, Note) or item.worker in workers


async def _recorded(path: Path, names: set[str], start: int) -> AsyncGenerator[tuple[float, Named], None]:
    from kv_events.inspect.recording import RecordingReader, RecordKind

    with RecordingReader(path) as reader:
        for record in reader.records(names):
            item: Item
            if record.kind is RecordKind.BATCH:
                item = record.batch()
                if item.seq < start:
                    continue
            elif record.kind is RecordKind.SNAPSHOT:
                snapshot = record.snapshot()
                blocks = counted(len(snapshot.block_hashes), "block")
                item = Note("snapshot", f"{blocks} as of {snapshot.epoch}/{snapshot.next_seq}")
            else:
                item = Note("mark", record.mark())
            yield record.time_ns / 1e9, Named(record.worker, item)
            await asyncio.sleep(0)
        if not reader.complete:
            print(f"rhizome: {path} was cut off: this is what is whole", file=sys.stderr)


# An event a line.


async def _event_lines(targets: Targets, options: TailOptions) -> AsyncGenerator[_Line, None]:
    width = 0
    async with aclosing(_items(targets, options)) as items:
        async for _, (name, item) in items:
            shown = _shown_name(targets, name, item)
            width = max(width, len(shown))
            if isinstance(item, Note):
                yield _note_line(shown, item)
                continue
            for event in options.events_of(item):
                yield _event_line(shown, width, item, event, options.keys_of(event))


def _shown_name(targets: Targets, name: str, item: Item) -> str:
    """A bus may not know whose events it brings before they come."""
    unnamed = targets.router is None and targets.recording is None
    return item.worker if unnamed and isinstance(item, EventBatch) else name


def kind_of(event: Event) -> str:
    """stored, removed, cleared, or what an unknown event calls itself."""
    match event:
        case BlockStored():
            return "stored"
        case BlockRemoved():
            return "removed"
        case AllBlocksCleared():
            return "cleared"
        case UnknownEvent():
            return event.kind


def _event_line(name: str, width: int, batch: EventBatch, event: Event, keys: Hashes) -> _Line:
    kind = kind_of(event)
    segments = [
        (f"{clock_text(batch.ts)}  ", "note"),
        (f"{printable(name):<{width}}  ", "worker"),
        (f"{batch.epoch}/{batch.seq}  ", "note"),
    ]
    segments.append((f"{printable(kind):<7}", kind if kind in KINDS else "bad"))
    values: dict[str, Any] = {"ts": batch.ts, "worker": name, "epoch": batch.epoch, "seq": batch.seq}
    values["kind"] = kind
    if isinstance(event, BlockStored | BlockRemoved):
        tier = tier_of(event.medium).name.lower()
        segments.append((f"  {tier:<6}  {counted(len(event.block_hashes), 'block'):<9}", ""))
        segments.append((f"  {_keys_text(keys)}", "key"))
        values |= {"tier": tier, "blocks": len(event.block_hashes), "keys": [key_text(k) for k in keys.tolist()]}
    if isinstance(event, BlockStored):
        root = event.parent_hash == ROOT_HASH
        segments.append(("  first of a prompt" if root else f"  after {key_text(event.parent_hash)}", "note"))
        values |= {"parent": None if root else key_text(event.parent_hash), "block_size": event.block_size}
        if event.token_ids is not None:
            segments.append((f"  {counted(len(event.token_ids), 'token')}", "note"))
            values["tokens"] = len(event.token_ids)
    return _Line(segments, values)


def _keys_text(keys: Hashes) -> str:
    if len(keys) <= KEYS_SHOWN:
        return " ".join(map(key_text, keys.tolist()))
    return f"{key_text(int(keys[0]))} … {key_text(int(keys[-1]))}"


def _note_line(name: str, note: Note) -> _Line:
    style = "bad" if note.kind in _LOUD else "note"
    text = printable(f"{name}: {note.text}" if name else note.text)
    return _Line([(f"-- {text}", style)], {"note": note.kind, "worker": name, "text": note.text}, counts=False)


# Rates.


@dataclass(slots=True)
class _Second:
    """What one worker said in one second."""

    batches: int = 0
    stored: int = 0  # blocks
    removed: int = 0  # blocks
    cleared: int = 0  # times

    def add(self, events: list[Event], options: TailOptions) -> None:
        self.batches += bool(events)
        for event in events:
            match event:
                case BlockStored():
                    self.stored += len(options.keys_of(event))
                case BlockRemoved():
                    self.removed += len(options.keys_of(event))
                case AllBlocksCleared():
                    self.cleared += 1


@dataclass(slots=True)
class _Seconds:
    """Adds up, second by second."""

    options: TailOptions
    workers: dict[str, _Second] = field(default_factory=dict)
    second: int = 0

    def lines(self, time_s: float) -> Iterator[_Line]:
        """Those of the second that has passed, once it has."""
        if int(time_s) > self.second:
            for name, said in self.workers.items() if self.second else ():
                yield self._line(name, said)
                self.workers[name] = _Second()
            self.second = int(time_s)

    def add(self, name: str, batch: EventBatch) -> None:
        """A batch of the second that runs."""
        self.workers.setdefault(name, _Second()).add(self.options.events_of(batch), self.options)

    def _line(self, name: str, said: _Second) -> _Line:
        width = max(map(len, self.workers))
        text = f"{said.batches:>6,} batches/s  {said.stored:>8,} stored/s  {said.removed:>8,} removed/s"
        cleared = f"  cleared {counted(said.cleared, 'time')}" if said.cleared else ""
        segments = [
            (f"{clock_text(self.second)[:8]}  ", "note"),
            (f"{printable(name):<{width}}", "worker"),
            (text + cleared, ""),
        ]
        values = {"batches": said.batches, "stored": said.stored, "removed": said.removed, "cleared": said.cleared}
        return _Line(segments, {"ts": self.second, "worker": name} | values)


async def _rate_lines(targets: Targets, options: TailOptions) -> AsyncGenerator[_Line, None]:
    """In recordings and in what is kept seconds pass as they did then."""
    seconds = _Seconds(options)
    ticking = options.follow and targets.recording is None
    if ticking:
        seconds.workers = {stream.name: _Second() for stream in targets.streams if targets.router}
    items = _items(targets, options)
    async with aclosing(items), aclosing(_with_ticks(items) if ticking else items) as timed:
        async for time_s, named in timed:
            for line in seconds.lines(time_s):
                yield line
            if named is None:
                continue
            shown = _shown_name(targets, *named)
            if isinstance(named.item, Note):
                yield _note_line(shown, named.item)
            else:
                seconds.add(shown, named.item)
    if any(said != _Second() for said in seconds.workers.values()):
        for line in seconds.lines(seconds.second + 1):
            yield line


async def _with_ticks(
    items: AsyncGenerator[tuple[float, Named], None],
) -> AsyncGenerator[tuple[float, Named | None], None]:
    """The items, and something at every turn of a second, too."""
    coming = asyncio.ensure_future(anext(items))
    try:
        while True:
            now_s = time.time()
            done, _ = await asyncio.wait({coming}, timeout=1.001 - now_s % 1)
            if not done:
                yield time.time(), None
                continue
            yield coming.result()
            coming = asyncio.ensure_future(anext(items))
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
