"""Rows of the index benchmark: bytes an entry, each index in a process of its own.

`python -m benchmarks.index_memory SIDE ENTRIES WORKERS PREFIXES` is that process; it prints the bytes.
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks.index_match import feed_runs
from benchmarks.index_plan import PEER, REFERENCE, Bench, Samples, size
from benchmarks.measure import resident_bytes
from benchmarks.our_index import Index, OurIndex
from benchmarks.peer_index import PeerIndex
from benchmarks.report import AT_MOST, Row, number
from benchmarks.workload import Workload
from radix.reference import ReferenceTree

LIMIT_BYTES = 25.0
WORKERS = 64


def memory_rows(bench: Bench) -> list[Row]:
    """What the resident memory grows by, over the entries stored."""
    plan = bench.plan
    entries = plan.large_entries or plan.entries
    samples = Samples()
    for side in bench.sides:
        samples.add(side, _in_a_child(side, entries, plan.prefixes))
    note = "growth of the process's resident memory, free memory given back"
    if plan.reference_entries:
        reference = _in_a_child(REFERENCE, plan.reference_entries, plan.prefixes)
        note += f"; our reference {number(reference)} at {size(plan.reference_entries)}"
    what = f"bytes per entry {size(entries)} W{WORKERS}"
    return [bench.row(what, "bytes", samples, LIMIT_BYTES, AT_MOST, note)]


def _in_a_child(side: str, entries: int, prefixes: int) -> float:
    command = [sys.executable, "-m", __name__, side, str(entries), str(WORKERS), str(prefixes)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def bytes_per_entry(side: str, entries: int, workers: int, prefixes: int) -> float:
    """Fills one index in this process."""
    workload = Workload(workers, entries, prefixes)
    index = _index(side)
    for run in map(workload.session, range(min(1024, workload.sessions))):
        index.stored(run.hashes, run.parent)  # what making the events leaves behind is not the index's
    before = resident_bytes()
    feed_runs({side: index}, workload.prefixes())
    feed_runs({side: index}, map(workload.session, range(workload.sessions)))
    assert index.depths(index.query(workload.prompt(workload.sessions - 1))), "the last session is not there"
    return (resident_bytes() - before) / workload.entries


def _index(side: str) -> Index:
    return PeerIndex() if side == PEER else OurIndex(ReferenceTree() if side == REFERENCE else None)


if __name__ == "__main__":
    print(bytes_per_entry(sys.argv[1], *map(int, sys.argv[2:])))
