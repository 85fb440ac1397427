"""Rows of the index benchmark: events all the way into a router's view of a worker, with cursor and digests."""

from __future__ import annotations

from time import perf_counter_ns

from benchmarks.index_plan import OURS, Bench, Samples
from benchmarks.report import Row
from benchmarks.workload import BLOCK_SIZE, Run, chain_at, chunks, stores
from kv_events import wire
from kv_events.events import BlockRemoved, BlockStored, Event
from kv_events.log import EventLog
from kv_events.view import WorkerView
from radix import make_tree
from radix.keys import ROOT_HASH

WORKERS = 64


def view_rows(bench: Bench) -> list[Row]:
    """Payload, wire.decode, WorkerView.offer: one event a payload, each digest compared. The peer has no such check."""
    plan = bench.plan
    sizes = plan.event_blocks
    sessions = plan.view_chunks * plan.chunk_sessions * len(sizes)
    tree = make_tree()
    logs = [EventLog(f"worker-{worker}", 1, BLOCK_SIZE) for worker in range(WORKERS)]
    views = [WorkerView(log.worker, worker, tree) for worker, log in enumerate(logs)]
    rows = []
    groups = chunks(range(sessions), plan.chunk_sessions)
    for what in ("store", "remove"):
        samples = {blocks: Samples() for blocks in sizes}
        for repeat, group in enumerate(groups):
            blocks = sizes[repeat % len(sizes)]
            payloads = []
            runs = [Run(session % WORKERS, ROOT_HASH, chain_at(session, 64)) for session in group]
            for part in (part for run in runs for part in stores(run, blocks)):
                event: Event = BlockRemoved(part.hashes)
                if what == "store":
                    event = BlockStored(part.hashes, part.parent, BLOCK_SIZE)
                payloads.append((views[part.worker], wire.encode(logs[part.worker].append([event], 0.0))))
            start = perf_counter_ns()
            for view, payload in payloads:
                view.offer(wire.decode(payload))
            took = perf_counter_ns() - start
            samples[blocks].add(OURS, 64 * len(group) * 1e3 / took)
        note = "into WorkerView: decoding, cursor, tree, and the digest compared after each event"
        rows += [bench.row(f"view {what} W{WORKERS} E{each}", "M blocks/s", samples[each], note=note) for each in sizes]
    assert all(view.synced for view in views if view.position() != (0, 0)), "a view is not in step"
    return rows
