"""What `top` shows, without a screen: who holds how much and how that changes, and where matches go."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from deploy.events.following import Following, wall_clock_ns
from deploy.events.targets import Stream, Targets, open_targets
from kv_events.inspect.forest import Forest
from kv_events.inspect.observer import Observer, StreamReport
from kv_events.inspect.tree_cut import TreeCut, cut_forest
from kv_events.inspect.words import KeyRange
from kv_events.wire import WireError
from radix.tree import HotPrefix
from rhizome.errors import InvalidRequest
from rhizome.v1.fleet_pb2 import WorkerRole

PREFIXES = 50
"""Shown at most."""

SHARE_WINDOW_S = 10.0
"""Over which the share of prompt tokens is taken that came from the cache."""


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """One worker, as of now. None: not known, as of a stream without a router."""

    name: str
    blocks: int
    growth_per_s: float  # blocks: stored less removed
    stored_per_s: float
    removed_per_s: float
    hit_share: float | None  # of the prompt tokens of the last seconds, found in its cache
    lag_s: float | None  # median, from the worker's clock to ours
    gaps: int
    in_flight: int | None  # requests of the router
    state: str  # in step, behind, draining, or what is wrong


@dataclass(frozen=True, slots=True)
class PrefixRow:
    """A prefix that matches went through, or, where nothing is known of matches, one with much below it."""

    block_hash: int  # of its last block
    depth: int  # blocks
    hits: int  # of the router's last 4,096 matches
    below: int  # blocks below it; 0 where hits are known
    holders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Totals:
    """Over all workers."""

    workers: int
    blocks: int  # distinct ones are not told apart: a block counts for each worker that holds it
    stored_per_s: float
    removed_per_s: float
    hit_share: float | None
    in_flight: int | None


@dataclass(frozen=True, slots=True)
class Picture:
    """All of it at one time."""

    target: str
    workers: Sequence[WorkerRow]
    prefixes: Sequence[PrefixRow]
    totals: Totals
    by_hits: bool  # the prefixes are the hottest ones; else the largest
    problem: str = ""  # with the target as a whole


class ShareWindow:
    """Prompt tokens of the last seconds, and how many of them came from a cache: from counters that only grow."""

    def __init__(self, window_s: float = SHARE_WINDOW_S) -> None:
        self._window_s = window_s
        self._counts: deque[tuple[float, int, int]] = deque()  # when, prompt tokens, cached ones

    def add(self, now_s: float, prompt: int, cached: int) -> None:
        """The counters as of now; where they have gone back, the worker started anew."""
        if self._counts and prompt < self._counts[-1][1]:
            self._counts.clear()
        self._counts.append((now_s, prompt, cached))
        while len(self._counts) > 2 and self._counts[1][0] <= now_s - self._window_s:
            self._counts.popleft()

    @property
    def tokens(self) -> tuple[int, int]:
        """(prompt tokens, cached ones) within the window."""
        if not self._counts:
            return 0, 0
        (_, first, first_cached), (_, last, last_cached) = self._counts[0], self._counts[-1]
        return last - first, last_cached - first_cached


class TopModel:
    """Follows all streams of a target, and asks its router, if it has one. `look` tells what there is to see."""

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._observer = Observer()
        clock = wall_clock_ns()
        self._followed = Following(targets, lambda name: self._observer.consumer(name, lambda: clock() / 1e9))
        self._shares: dict[str, ShareWindow] = {}
        self._hottest: list[HotPrefix] = []
        self._large: list[PrefixRow] = []
        self._look_again_s = 0.0  # for large prefixes: reading all of a tree takes a while

    async def look(self) -> Picture:
        """Everything as of now. What is wrong with a worker or the router is told, not raised."""
        await self._followed.refresh()
        problem = self._followed.router_problem or await self._ask_router()
        self._forget_those_who_left()
        now_s = time.time()
        rows = [self._row(stream, now_s) for stream in self._targets.streams]
        known = self._targets.router is not None
        prefixes = [self._hot_row(hot) for hot in self._hottest] if known else await self._large_rows()
        return Picture(self._targets.target, rows, prefixes, self._totals(rows), known, problem)

    async def cut(self, below: KeyRange | None, worker: str | None, max_nodes: int) -> TreeCut:
        """What is below a block, or all that a worker holds. Raises InvalidRequest where it is gone."""
        number = None if worker is None else self._observer.number(self._stream_of(worker))
        return await asyncio.to_thread(self._cut, below, number, max_nodes)

    def _cut(self, below: KeyRange | None, worker: int | None, max_nodes: int) -> TreeCut:
        forest = Forest(self._observer.tree.dump(), self._hottest, worker)
        return cut_forest(forest, self._names(), below=below, max_nodes=max_nodes)

    async def close(self) -> None:
        """Follow nobody any more."""
        await self._followed.close()

    # Who is there.

    async def _ask_router(self) -> str:
        """What went wrong; empty when nothing did."""
        import grpc

        if self._targets.router is None:
            return ""
        now_s = time.monotonic()
        for name, entry in self._targets.entries.items():
            if entry.HasField("status"):  # the worker has reported
                window = self._shares.setdefault(name, ShareWindow())
                window.add(now_s, entry.status.prompt_tokens, entry.status.cached_prompt_tokens)
        try:
            self._hottest = await self._targets.router.hottest(PREFIXES)
        except WireError as error:
            return str(error)
        except grpc.aio.AioRpcError as error:
            return f"{error.code().name}: {error.details()}"
        return ""

    def _forget_those_who_left(self) -> None:
        """What they held is held no more."""
        present = {stream.name for stream in self._targets.streams}
        for name in set(self._observer.names) - present:
            self._shares.pop(name, None)
            if view := self._observer.view(name):
                view.forget()

    # Rows.

    def _row(self, stream: Stream, now_s: float) -> WorkerRow:
        report = self._observer.report(stream.name, now_s)
        numbers = report.numbers
        entry = self._targets.entries.get(stream.name)
        window = self._shares.get(stream.name)
        return WorkerRow(
            name=self._shown(stream.name, report.worker),
            blocks=numbers.blocks,
            growth_per_s=numbers.stored_per_s - numbers.removed_per_s,
            stored_per_s=numbers.stored_per_s,
            removed_per_s=numbers.removed_per_s,
            hit_share=_share([window]) if window else None,
            lag_s=numbers.lag_p50_s,
            gaps=report.counts.gaps,
            in_flight=entry.in_flight if entry else None,
            state=self._state(stream.name, report),
        )

    def _state(self, name: str, report: StreamReport) -> str:
        if problem := self._followed.problem_of(name):
            return problem
        entry = self._targets.entries.get(name)
        if entry and entry.draining:
            return "draining"
        if not report.synced:
            return "behind"
        return "observed" if entry and entry.role == WorkerRole.WORKER_ROLE_OBSERVED else "in step"

    def _totals(self, rows: Sequence[WorkerRow]) -> Totals:
        known = self._targets.router is not None
        return Totals(
            workers=len(rows),
            blocks=sum(row.blocks for row in rows),
            stored_per_s=sum(row.stored_per_s for row in rows),
            removed_per_s=sum(row.removed_per_s for row in rows),
            hit_share=_share(self._shares.values()),
            in_flight=sum(row.in_flight or 0 for row in rows) if known else None,
        )

    def _hot_row(self, hot: HotPrefix) -> PrefixRow:
        names = self._names()
        holders = sorted(names[number] for number in self._observer.tree.holders(hot.block_hash).tolist())
        return PrefixRow(hot.block_hash, hot.depth, hot.hits, 0, tuple(holders))

    async def _large_rows(self) -> list[PrefixRow]:
        """Where most blocks are, read anew no more often than takes a tenth of the time."""
        if time.monotonic() >= self._look_again_s:
            started_s = time.monotonic()
            cut = await asyncio.to_thread(self._cut, None, None, PREFIXES)
            nodes = sorted((node for node, _ in cut.nodes()), key=lambda node: -node.below - node.blocks)
            self._large = [
                PrefixRow(n.last, n.depth + n.blocks, 0, n.below, tuple(holder.worker for holder in n.holders))
                for n in nodes
            ]
            self._look_again_s = time.monotonic() + 10 * (time.monotonic() - started_s)
        return self._large

    # Names: a bus does not know whose events it brings before they come.

    def _shown(self, name: str, worker: str) -> str:
        return name if self._targets.router is not None or not worker else worker

    def _names(self) -> list[str]:
        """By number in the tree."""
        views = ((name, self._observer.view(name)) for name in self._observer.names)
        return [self._shown(name, view.worker_name if view else "") for name, view in views]

    def _stream_of(self, shown: str) -> str:
        return dict(zip(self._names(), self._observer.names, strict=True)).get(shown, shown)


def _share(windows: Iterable[ShareWindow]) -> float | None:
    tokens = [window.tokens for window in windows]
    prompt = sum(prompt for prompt, _ in tokens)
    return sum(cached for _, cached in tokens) / prompt if prompt else None


@asynccontextmanager
async def watching(target: str, workers: Collection[str] = ()) -> AsyncIterator[TopModel]:
    """A model of a target, until left. Raises InvalidRequest, and Unavailable for one that cannot be reached."""
    async with open_targets(target, workers) as targets:
        if targets.recording is not None:
            raise InvalidRequest("target", target, "what is live; `rhizome events stats` is for recordings")
        if targets.router is None:
            for stream in targets.streams:
                await stream.source.snapshot()  # raises where nobody is
        model = TopModel(targets)
        try:
            yield model
        finally:
            await model.close()
