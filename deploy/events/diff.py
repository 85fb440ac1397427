"""`rhizome events diff`: two recordings, two targets, or a router against its workers."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections import OrderedDict
from collections.abc import Collection
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from deploy.events.files import open_recording
from deploy.events.following import following, ticks
from deploy.events.progress import progress_bar, status_line
from deploy.events.show import Output
from deploy.events.targets import Targets, open_targets
from deploy.events.tree import NamedTree, read_tree
from kv_events.bus import Resync
from kv_events.events import EventBatch, Snapshot
from kv_events.inspect.diff import (
    LISTED_BLOCKS,
    NOTHING_HELD,
    Account,
    HeldState,
    StateDiff,
    StreamDiff,
    diff_accounts,
    diff_trees,
    states_of,
)
from kv_events.inspect.observer import ObservedStream, Observer
from kv_events.inspect.words import counted, key_text, printable, tiers_of
from rhizome.errors import InvalidRequest

SETTLE_S = 5.0
"""How long a router and its workers get to agree: a view is behind its worker by what is on its way."""

LOOK_S = 0.25
BEHIND_S = 1.0
"""How far behind its worker a view may be that counts as right."""

REMEMBERED_DIGESTS = 2**12
"""Of a worker's last batches: seconds of 1 ms steps."""


@dataclass(frozen=True, slots=True)
class DiffOptions:
    """What `diff` was asked for."""

    a: str
    b: str | None = None  # None: a router's own workers
    workers: tuple[str, ...] = ()
    limit: int = LISTED_BLOCKS  # of blocks that are listed
    as_json: bool = False


async def run_diff(options: DiffOptions) -> bool:
    """Print the differences, and return whether there are none. Raises InvalidRequest, Unavailable, WireError."""
    output = Output(as_json=options.as_json)
    if options.b is None:
        return await _router_against_workers(options, output)
    if "://" not in options.a and "://" not in options.b:
        streams = await asyncio.to_thread(_recordings, options)
        for stream in streams:
            _tell_stream(output, stream)
        equal = all(stream.equal for stream in streams)
    else:
        a, b = await _held(options.a, options.workers), await _held(options.b, options.workers)
        diffs = diff_trees(a, b, options.limit)
        for name, diff in diffs.items():
            _tell_state(output, name, diff, "A", "B")
        equal = all(diff.equal for diff in diffs.values())
    _tell_end(output, equal)
    return equal


# Recordings.


def _recordings(options: DiffOptions) -> list[StreamDiff]:
    assert options.b is not None
    with open_recording("a", Path(options.a)) as first, open_recording("b", Path(options.b)) as second:
        total = first.size_bytes + second.size_bytes
        with progress_bar("comparing", total) as advance:
            a = Account(first, advance)
            b = Account(second, lambda offset: advance(first.size_bytes + offset))
        streams = diff_accounts(a, b, options.limit)
    for worker in options.workers:
        if worker not in {stream.name for stream in streams}:
            raise InvalidRequest("worker", worker, f"one of {', '.join(stream.name for stream in streams) or 'none'}")
    return [stream for stream in streams if not options.workers or stream.name in options.workers]


def _tell_stream(output: Output, stream: StreamDiff) -> None:
    if output.as_json:
        output.json(stream.as_json())
        return
    name = printable(stream.name)
    if not (stream.in_a and stream.in_b):
        output.line([(name, "worker"), (f": only in {'A' if stream.in_a else 'B'}", "bad")])
        return
    batches = counted(stream.compared, "batch", "batches")
    if stream.equal:
        output.line(
            [(name, "worker"), (f": equal; {batches} compared, {stream.state.blocks_a:,} blocks at the end", "")]
        )
        return
    output.line([(name, "worker"), (f": {stream.differing:,} of {batches} differ", "bad" if stream.differing else "")])
    if stream.first is not None:
        output.text(f"  first: batch {stream.first.seq} of epoch {stream.first.epoch}", "bad")
        output.text(f"    A: {stream.first.a or 'does not have it'}", "note")
        output.text(f"    B: {stream.first.b or 'does not have it'}", "note")
    if stream.position_a != stream.position_b:
        ends = ["/".join(map(str, position)) for position in (stream.position_a, stream.position_b)]
        output.text(f"  they end at different batches: A before {ends[0]}, B before {ends[1]}")
    _tell_blocks(output, stream.state, "A", "B")


# States.


async def _held(target: str, workers: Collection[str]) -> dict[str, HeldState]:
    async with open_targets(target, workers) as targets:
        found = await read_tree(targets)
        for missing in found.left_out:
            print(f"rhizome: {printable(missing)}", file=sys.stderr)
        return await _held_by(found, workers)


async def _held_by(found: NamedTree, workers: Collection[str]) -> dict[str, HeldState]:
    """Who holds what now, or at a recording's end. A bus's stream is called as its worker."""
    names = [name if not workers or name in workers else "" for name in found.names]
    return await asyncio.to_thread(states_of, found.tree, names)


def _tell_state(output: Output, name: str, diff: StateDiff, a: str, b: str) -> None:
    if output.as_json:
        output.json({"name": name} | diff.as_json())
    elif diff.equal:
        output.line([(printable(name), "worker"), (f": equal, {counted(diff.blocks_a, 'block')}", "")])
    else:
        output.line([(printable(name), "worker"), (": differs", "bad")])
        _tell_blocks(output, diff, a, b)


def _tell_blocks(output: Output, diff: StateDiff, a: str, b: str) -> None:
    if diff.equal:
        output.text(f"  equal at the end: {counted(diff.blocks_a, 'block')}")
        return
    output.text(f"  {a} holds {counted(diff.blocks_a, 'block')}, {b} {diff.blocks_b:,}")
    for what, count, blocks in (
        (f"missing in {b}", diff.missing, diff.missing_blocks),
        (f"only in {b}", diff.extra, diff.extra_blocks),
    ):
        if count:
            more = f" and {count - len(blocks):,} more" if count > len(blocks) else ""
            keys = f"{' '.join(map(key_text, blocks))}{more}"
            output.line([(f"  {what}: {counted(count, 'block')}  ", "bad"), (keys, "key")])
    if diff.moved:
        output.text(f"  in other tiers: {counted(diff.moved, 'block')}", "bad")
        for block, tiers_a, tiers_b in diff.moved_blocks:
            tiers = f"{a} {'+'.join(tiers_of(tiers_a))}, {b} {'+'.join(tiers_of(tiers_b))}"
            output.line([(f"    {key_text(block)}", "key"), (f"  {tiers}", "")])


def _tell_end(output: Output, equal: bool) -> None:
    if not output.as_json:
        output.text("equal" if equal else "they differ", "stored" if equal else "bad")


# A router against its workers.


class _Truth:
    """What a worker says of itself: an EventConsumer that remembers the digests after its last batches."""

    def __init__(self, stream: ObservedStream) -> None:
        self._stream = stream
        self._until_s: OrderedDict[bytes, float] = OrderedDict()  # digest -> when the next one came
        self._last = b""

    def position(self) -> tuple[int, int]:
        return self._stream.position()

    def offer(self, batch: EventBatch) -> Resync:
        self._remember(batch.digest)
        return self._stream.offer(batch)

    def restore(self, snapshot: Snapshot) -> bool:
        self._remember(snapshot.digest)
        return self._stream.restore(snapshot)

    def malformed(self) -> None:
        self._stream.malformed()

    def was(self, digest: bytes, since_s: float) -> bool:
        """Whether this was the worker's digest at some time since then, or is it now."""
        return self._until_s.get(digest, -math.inf) >= since_s

    def _remember(self, digest: bytes) -> None:
        self._until_s[self._last] = time.monotonic()
        self._until_s.pop(digest, None)  # to the end
        self._until_s[digest] = math.inf
        self._last = digest
        if len(self._until_s) > REMEMBERED_DIGESTS:
            self._until_s.popitem(last=False)


async def _router_against_workers(options: DiffOptions, output: Output) -> bool:
    async with open_targets(options.a, options.workers) as targets:
        if targets.router is None:
            raise InvalidRequest("b", None, "a second target, unless the first one is a router, router://HOST:PORT")
        diffs, unread = await _settled(targets, options)
    for name, diff in diffs.items():
        _tell_state(output, name, diff, "the worker", "the router")
    for name, why in unread.items():
        if output.as_json:
            output.json({"name": name, "equal": False, "unread": why})
        else:
            output.line([(printable(name), "worker"), (f": not compared: {printable(why)}", "bad")])
    equal = all(diff.equal for diff in diffs.values())
    if unread and equal:
        if not output.as_json:
            output.text("not all could be compared", "bad")
        return False
    _tell_end(output, equal)
    return equal


async def _settled(targets: Targets, options: DiffOptions) -> tuple[dict[str, StateDiff], dict[str, str]]:
    """The differences that are left once the router has had the time to catch up; and the workers of which nothing
    came, by name: why.

    A view is right where the worker was so a moment ago: the router's digest is looked for among those that the
    worker's stream has shown. So a busy worker is no difference.
    """
    observer, truths, views = Observer(), dict[str, _Truth](), dict[str, HeldState]()
    looked_s = 0.0

    def truth_of(name: str) -> _Truth:
        truths[name] = _Truth(observer.consumer(name, time.time))
        return truths[name]

    def apart() -> set[str]:
        since_s = looked_s - BEHIND_S
        agree = {name for name, truth in truths.items() if truth.was(views.get(name, NOTHING_HELD).digest, since_s)}
        return {*truths, *views} - agree

    async with following(targets, truth_of) as followed:
        with status_line() as show:
            show(f"comparing {targets.target} with its workers")
            async with aclosing(ticks(LOOK_S, SETTLE_S)) as ticking:
                async for _ in ticking:
                    await followed.refresh()
                    looked_s = time.monotonic()
                    views = await _held_by(await read_tree(targets), options.workers)
                    if truths and not apart():
                        break
        followed.check_reached()
        unread = followed.unread
        for problem in followed.problems:
            print(f"rhizome: {printable(problem)}", file=sys.stderr)
    held = await asyncio.to_thread(states_of, observer.tree, observer.names)
    diffs, differing = diff_trees(held, views, options.limit), apart()
    for name in diffs.keys() - differing:  # the worker has gone on meanwhile
        blocks = len(views.get(name, NOTHING_HELD).hashes)
        diffs[name] = StateDiff(equal=True, blocks_a=blocks, blocks_b=blocks, missing=0, extra=0, moved=0)
    return {name: diff for name, diff in diffs.items() if name not in unread}, unread
