"""Rows of the event benchmark: batches of 16 blocks from their bytes into a tree, on one core."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter_ns

import msgpack
import numpy as np

from benchmarks.events_peer import Payload, PeerEvents
from benchmarks.events_plan import BATCH_BLOCKS, Bench
from benchmarks.index_plan import OURS, PEER, Samples, size
from benchmarks.measure import in_turn
from benchmarks.report import Row
from benchmarks.workload import BLOCK_SIZE, Run, chain_at, stores
from kv_events import wire
from kv_events.columns import changes_of
from kv_events.events import BlockRemoved, BlockStored, Event
from kv_events.foreign.dialects import decode_foreign
from kv_events.foreign.mapper import KeyMapper
from kv_events.log import EventLog
from kv_events.view import WorkerView
from radix import make_tree
from radix.keys import ROOT_HASH
from radix.tree import PrefixTree

SESSION_BLOCKS = 64
FILLED_FROM = 1_000_000  # sessions beside those that are measured
GOAL = 3.0
KINDS = ("store", "remove")

Feed = Callable[[Sequence[Payload]], int]


def decode_rows(bench: Bench) -> list[Row]:
    """Our own payloads, into a bare tree and into views that prove it; both sides in turn, round by round."""
    feeds: dict[str, dict[str, Feed]] = {"tree": {OURS: _OurTree(bench).feed}, "view": {OURS: _OurViews(bench).feed}}
    peers = {}
    if bench.peer_name:
        peers = {into: _filled_peer(bench) for into in ("tree", "view", "all")}
        feeds["tree"][PEER] = peers["tree"].feed
        feeds["view"][PEER] = peers["view"].feed
    whole = _OurViews(bench).feed
    samples: dict[tuple[str, str], Samples] = {}
    for kind, turn, payloads in _rounds(bench, PeerEvents() if bench.peer_name else None):
        for into, sides in feeds.items():
            for side, feed in in_turn(list(sides.items()), turn):
                _add(samples, f"{kind} {into}", side, feed(payloads), len(payloads))
        if bench.peer_name:
            _add(samples, f"{kind} all", OURS, whole(payloads), len(payloads))
            _add(samples, f"{kind} all", PEER, peers["all"].feed_all(payloads, tokens=False), len(payloads))
    filled = f"{size(bench.plan.decode_filled * SESSION_BLOCKS)} blocks of as many other workers"
    notes = {
        "tree": f"wire form to tree, {filled} in it; the peer: msgspec's structs, then its tree, its JSON not timed",
        "view": "with order, epochs and the digest after each batch, which the peer does not check",
        "all": "the same; the peer's JSON made from the structs and timed",
    }
    rows = []
    for kind in KINDS:
        for into, note in notes.items():
            if (f"{kind} {into}", "batches/s") in samples:
                goal = GOAL if into != "all" else None
                rows += _rows(bench, f"{kind} {into}", samples, goal, note)
    return rows


def foreign_rows(bench: Bench) -> list[Row]:
    """A vLLM server's payloads with 256 tokens each: its blocks are given our keys; the peer takes the server's hashes
    and adds its own of the tokens."""
    plan = bench.plan
    ours, peer = _OurForeign(), PeerEvents() if bench.peer_name else None
    samples: dict[tuple[str, str], Samples] = {}
    rng = np.random.default_rng(1)
    for turn in range(plan.decode_rounds):
        payloads: dict[str, list[Payload]] = {kind: [] for kind in KINDS}
        for session in range(turn * plan.foreign_sessions, (turn + 1) * plan.foreign_sessions):
            for part in stores(Run(0, ROOT_HASH, chain_at(session, SESSION_BLOCKS)), BATCH_BLOCKS):
                tokens = rng.integers(150_000, size=BATCH_BLOCKS * BLOCK_SIZE).tolist()
                payloads["store"].append(Payload(0, _foreign_store(part, tokens), b""))
                payloads["remove"].insert(0, Payload(0, _foreign_remove(part), b""))
        for kind, its in payloads.items():
            _add(samples, f"foreign {kind}", OURS, ours.feed(its), len(its))
            if peer is not None:
                _add(samples, f"foreign {kind}", PEER, peer.feed_all(its, tokens=True), len(its))
    note = (
        "vLLM's payloads with 256 tokens: decoded, hashed to our keys, logged, into a view; the peer: msgspec, its hash"
    )
    return [each for kind in KINDS for each in _rows(bench, f"foreign {kind}", samples, None, note)]


def _rounds(bench: Bench, peer: PeerEvents | None) -> list[tuple[str, int, list[Payload]]]:
    """(kind, turn, payloads): each round's sessions are stored, and removed in the next round, so that the trees stay
    as large as two rounds make them."""
    plan = bench.plan
    logs = [EventLog(f"worker-{worker}", 1, BLOCK_SIZE) for worker in range(plan.workers)]

    def payload(run: Run, event: Event, prepared: bytes) -> Payload:
        return Payload(run.worker, wire.encode(logs[run.worker].append([event], 0.0)), prepared)

    def stored(run: Run) -> Payload:
        prepared = b"" if peer is None else peer.stored(run.hashes, run.parent)
        return payload(run, BlockStored(run.hashes, run.parent, BLOCK_SIZE), prepared)

    def removed(run: Run) -> Payload:
        backwards = run.hashes[::-1].copy()
        return payload(run, BlockRemoved(backwards), b"" if peer is None else peer.removed(backwards))

    rounds: list[tuple[str, int, list[Payload]]] = []
    before: list[Run] = []
    for turn in range(plan.decode_rounds):
        sessions = range(turn * plan.decode_sessions, (turn + 1) * plan.decode_sessions)
        runs = [
            part
            for session in sessions
            for part in stores(Run(session % plan.workers, ROOT_HASH, chain_at(session, SESSION_BLOCKS)), BATCH_BLOCKS)
        ]
        rounds.append(("store", turn, [stored(run) for run in runs]))
        if before:
            rounds.append(("remove", turn, [removed(run) for run in reversed(before)]))
        before = runs
    return rounds


def _filler(bench: Bench) -> Iterator[Run]:
    """Sessions that stay: the trees are as large as a fleet makes them."""
    for session in range(FILLED_FROM, FILLED_FROM + bench.plan.decode_filled):
        yield Run(bench.plan.workers + session % bench.plan.workers, ROOT_HASH, chain_at(session, SESSION_BLOCKS))


def _filled(bench: Bench) -> PrefixTree:
    tree = make_tree()
    for run in _filler(bench):
        tree.store(run.worker, run.hashes, run.parent)
    return tree


def _filled_peer(bench: Bench) -> PeerEvents:
    peer = PeerEvents()
    for run in _filler(bench):
        peer.index.tree.apply_event(run.worker, peer.stored(run.hashes, run.parent))
    return peer


def _add(samples: dict[tuple[str, str], Samples], what: str, side: str, took_ns: int, batches: int) -> None:
    for unit, each in (("batches/s", 1), ("M blocks/s", BATCH_BLOCKS / 1e6)):
        samples.setdefault((what, unit), Samples()).add(side, batches * each * 1e9 / took_ns)


def _rows(bench: Bench, what: str, samples: dict[tuple[str, str], Samples], goal: float | None, note: str) -> list[Row]:
    batches, blocks = samples[what, "batches/s"], samples[what, "M blocks/s"]
    return [
        bench.row(f"decode {what}", "batches/s", batches, goal, note=note),
        bench.row(f"decode {what} blocks", "M blocks/s", blocks, note="the same, in blocks"),
    ]


class _OurTree:
    def __init__(self, bench: Bench) -> None:
        self._tree = _filled(bench)

    def feed(self, payloads: Sequence[Payload]) -> int:
        """Nanoseconds for all."""
        decode, apply = wire.decode, self._tree.apply
        start = perf_counter_ns()
        for worker, data, _ in payloads:
            apply(worker, changes_of(decode(data).events))
        return perf_counter_ns() - start


class _OurViews:
    def __init__(self, bench: Bench) -> None:
        tree = _filled(bench)
        self._views = [WorkerView(f"worker-{worker}", worker, tree) for worker in range(bench.plan.workers)]

    def feed(self, payloads: Sequence[Payload]) -> int:
        """Nanoseconds for all."""
        views, decode = self._views, wire.decode
        start = perf_counter_ns()
        for worker, data, _ in payloads:
            views[worker].offer(decode(data))
        took = perf_counter_ns() - start
        assert all(views[worker].synced for worker, _, _ in payloads[:100]), "a view is not in step"
        return took


class _OurForeign:
    """One server: its mapper, the log that is kept for it, and a view of that."""

    def __init__(self) -> None:
        self._mapper = KeyMapper("model", BLOCK_SIZE)
        self._log = EventLog("server", 1, BLOCK_SIZE)
        self._view = WorkerView("server", 0, make_tree())

    def feed(self, payloads: Sequence[Payload]) -> int:
        """Nanoseconds for all."""
        mapper, log, view = self._mapper, self._log, self._view
        start = perf_counter_ns()
        for _, data, _ in payloads:
            events = [ours for event in decode_foreign(data).events for ours in mapper.map(event)]
            view.offer(log.append(events, 0.0))
        took = perf_counter_ns() - start
        assert view.synced, "the view is not in step"
        return took


def _foreign_store(run: Run, tokens: list[int]) -> bytes:
    event = {
        "type": "BlockStored",
        "block_hashes": run.hashes.tolist(),
        "parent_block_hash": run.parent or None,
        "token_ids": tokens,
        "block_size": BLOCK_SIZE,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
    }
    data: bytes = msgpack.packb([0.0, [event], 0])
    return data


def _foreign_remove(run: Run) -> bytes:
    event = {"type": "BlockRemoved", "block_hashes": run.hashes[::-1].tolist(), "medium": "GPU"}
    data: bytes = msgpack.packb([0.0, [event], 0])
    return data
