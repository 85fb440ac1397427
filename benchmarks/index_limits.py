"""Rows of the index benchmark: what this machine and this interpreter allow, and how far from it a match is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter_ns

import numpy as np

from benchmarks.index_match import pools, store_chains
from benchmarks.index_plan import OURS, Bench
from benchmarks.our_index import OurIndex
from benchmarks.report import Row, figure, number, row
from radix.keys import Hashes

REPEATS = 7
READS = 2**20
MANY = 64  # queries in one call, where the call itself is spread over them
LEAST_READS = 2  # that depend on each other: a slot of the table, and the node that it names
HOLDERS = 8


def limit_rows(bench: Bench, matches: Sequence[Row]) -> list[Row]:
    """`matches`: the rows of index_match, of which sessions and full hits on few holders are set against the limits.

    Sessions of the large tree miss the caches. Of long chains there are few, which stay in them: these may be faster
    than reads from memory allow.
    """
    plan = bench.plan
    index = OurIndex()
    chains = pools(plan, 512, HOLDERS)["full"]
    store_chains({OURS: index}, chains)
    queries = [chain.hashes for chain in chains]
    empty = np.zeros(0, dtype=np.uint64)

    independent = [_independent_reads(plan.memory_bytes) for _ in range(REPEATS)]
    near, far = _table(2**12), _table(plan.memory_bytes)
    starts = [len(far) // REPEATS * repeat for repeat in range(REPEATS)]  # not where it went before
    dependent = [_chase_ns(far, start) - _chase_ns(near, 0) for start in starts]
    call = [_call_ns(len, index.tree) for _ in range(REPEATS)]
    count = [_call_ns(index.tree.count, 0) for _ in range(REPEATS)]
    nothing = [float(np.median(index.match_times([empty] * 2000))) for _ in range(REPEATS)]
    many = [_many_us(index, queries) for _ in range(REPEATS)]

    over = f"8-byte reads all over {plan.memory_bytes >> 20} MB"
    floor_us = (figure(nothing).median + LEAST_READS * figure(dependent).median) / 1e3
    rows = [
        row("limit independent random reads", "M reads/s", figure(independent), note=f"NumPy take, {over}"),
        row("limit dependent random read", "ns", figure(dependent), note=f"over a read from the cache, {over}"),
        row("limit empty call len(tree)", "ns", figure(call), note="a call into the index that does nothing"),
        row("limit empty call tree.count(0)", "ns", figure(count), note="the same with an argument"),
        row("limit match of no blocks", "ns", figure(nothing), note="call, result object and its two arrays, timer"),
        row(f"limit match_many 512 full H{HOLDERS}", "us", figure(many), note=f"a query, {MANY} in one call"),
    ]
    told = f"ratio to the limit of {number(floor_us)} us: a match of no blocks, {LEAST_READS} dependent random reads"
    for each in matches:
        words = each.what.split()
        if words[:2] == ["match", "p50"] and (words[2] == "96" or words[3:] == ["full", f"H{HOLDERS}"]):
            rows.append(row(f"limit {each.what}", "us", figure([each.ours]), limit=floor_us, note=told))
    return rows


def _independent_reads(size_bytes: int) -> float:
    """Reads a us that do not wait for each other."""
    table = np.zeros(size_bytes // 8, dtype=np.uint64)
    table += 1  # pages that are only zeros may be one page
    at = np.random.default_rng(4).integers(len(table), size=READS)
    found = np.zeros_like(at, dtype=np.uint64)
    found += 1
    start = perf_counter_ns()
    np.take(table, at, out=found, mode="clip")
    return READS * 1e3 / (perf_counter_ns() - start)


def _table(size_bytes: int) -> memoryview:
    """A walk through all of a table, whose every step tells where the next one goes."""
    length = size_bytes // 8  # a power of two: x -> ax + c goes through all, a = 1 (mod 4), c odd (Hull, Dobell 1962)
    steps = np.arange(length, dtype=np.uint64)
    steps *= np.uint64(0x5851F42D4C957F2D & (length - 1))
    steps += np.uint64(0x14057B7EF767814F & (length - 1))
    steps &= np.uint64(length - 1)
    return memoryview(steps.data)


def _chase_ns(table: memoryview, at: int) -> float:
    start = perf_counter_ns()
    for _ in range(READS // 4):
        at = table[at]
    return (perf_counter_ns() - start) / (READS // 4)


def _call_ns(call: Callable[..., object], *arguments: object) -> float:
    """Of a call, less the loop around it."""
    steps = range(READS // 4)
    start = perf_counter_ns()
    for _ in steps:
        call(*arguments)
    middle = perf_counter_ns()
    for _ in steps:
        pass
    return (2 * middle - start - perf_counter_ns()) / len(steps)


def _many_us(index: OurIndex, queries: Sequence[Hashes]) -> float:
    calls = 50
    start = perf_counter_ns()
    for call in range(calls):
        index.lookup([queries[(call * MANY + at) % len(queries)] for at in range(MANY)])
    return (perf_counter_ns() - start) / 1e3 / calls / MANY
