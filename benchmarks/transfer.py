"""The speed of moving KV blocks: `python -m benchmarks.transfer [--quick] [--json FILE]`, or `make bench-transfer`.

256 MiB in blocks of three sizes, in an order of chance on both ends, from a holder's process into this one, each
process on a core of its own. All ways take turns, round by round: ours over each transport, with digests and without,
and beside them a per-block memcpy in this process, a bare TCP socket, bare gRPC, and bare NIXL over UCX. A pull begins
with showing a ticket and ends when all blocks lie verified in their slots. Leasing them is not in it: the holder takes
their digests then, while a ticket is on its way ("limit seal" tells what that takes).
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.events_processes import answer, process
from benchmarks.measure import cores, in_turn, pin
from benchmarks.report import AT_MOST, Figure, Row, figure, machine, print_table, row, write_json
from benchmarks.transfer_holder import Doors, filled, hold, shuffled
from benchmarks.transfer_ways import BareGrpc, BareNixl, BareSocket, Lease, Memcpy, Ours, Way
from radix import BACKEND
from worker.transfer.memory import BlockLayout, BlockMemory
from worker.transfer.transports.grpc import GrpcTransport
from worker.transfer.transports.nixl import INSTALL, NixlEndpoint, NixlTransport, has_nixl
from worker.transfer.transports.shm import ShmTransport
from worker.transfer.transports.tcp import TcpTransport

KIB = 1024

# ours, the other one, and how many times faster ours is to be
GOALS = (
    ("shm", "memcpy", 0.85),
    ("shm", "bare nixl", 1.3),
    ("tcp", "bare grpc", 2.0),
    ("tcp", "bare socket", 0.9),
    ("grpc", "bare grpc", None),
    ("nixl", "bare nixl", None),
)
SHORT = {"bare nixl": "nixl", "bare grpc": "grpc", "bare socket": "socket"}
DIGESTED = ("shm", "tcp")
MAX_DIGEST_COST = 15.0  # percent


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes."""

    total_bytes: int = 256 << 20
    block_bytes: tuple[int, ...] = (64 * KIB, 256 * KIB, 1024 * KIB)
    rounds: int = 15
    single_rounds: int = 20  # of single blocks, for their latency
    singles: int = 25  # in a round


FULL = Plan()
QUICK = Plan(total_bytes=64 << 20, rounds=5, single_rounds=4, singles=15)


def measure(plan: Plan, block_bytes: int, say: Callable[[str], None]) -> list[Row]:
    """All rows of one block size."""
    num_blocks = plan.total_bytes // block_bytes
    layout, name = BlockLayout(block_bytes), size_name(block_bytes)
    memory, source = filled(layout, num_blocks), filled(layout, num_blocks)
    sealing: list[float] = []
    with ExitStack() as stack:
        others = cores()[:-1] or cores()
        _, connection = stack.enter_context(process(hold, block_bytes, num_blocks, cores=others))
        doors, _ = answer(connection)

        def lease(count: int, digests: bool) -> bytes:
            connection.send((count, digests))
            ticket, taken_s = answer(connection)
            if digests:
                sealing.append(taken_s)
            return bytes(ticket)

        ways = _ways(stack, memory, source, doors, lease)
        _check(ways, memory, source)
        connection.send(None)
        seconds = _timed(ways, plan.rounds, 1, shuffled(num_blocks, 3))
        say(f"{name}: {', '.join(f'{way} {plan.total_bytes / np.median(s) / 1e9:.2f}' for way, s in seconds.items())}")
        single = {way: ways[way] for way in ways if not way.endswith("undigested")}
        latency = _timed(single, plan.single_rounds, plan.singles, shuffled(num_blocks, 4)[:1])
    sealed = figure(plan.total_bytes / each / 1e9 for each in sealing[: plan.rounds])
    note = "leasing all blocks and taking their digests, in the holder, before a pull"
    return [
        *_rates(plan, name, seconds),
        *_digest_costs(name, seconds),
        row(f"limit seal {name}", "GB/s", sealed, note=note),
        *_latencies(name, latency),
    ]


def size_name(block_bytes: int) -> str:
    """As rows have it."""
    return f"{block_bytes >> 20}M" if block_bytes >= 1 << 20 else f"{block_bytes >> 10}K"


def _ways(stack: ExitStack, memory: BlockMemory, source: BlockMemory, doors: Doors, lease: Lease) -> dict[str, Way]:
    grpc_transport = GrpcTransport()
    stack.callback(grpc_transport.close)
    ways: dict[str, Way] = {
        "memcpy": Memcpy(memory, source),
        "bare socket": BareSocket(stack, memory, doors),
        "bare grpc": BareGrpc(stack, memory, doors),
        "shm": Ours(stack, memory, ShmTransport(), lease),
        "tcp": Ours(stack, memory, TcpTransport(), lease),
        "grpc": Ours(stack, memory, grpc_transport, lease),
        "shm undigested": Ours(stack, memory, ShmTransport(verify=False), lease, digests=False),
        "tcp undigested": Ours(stack, memory, TcpTransport(verify=False), lease, digests=False),
    }
    if doors.nixl is not None:
        endpoint = NixlEndpoint(memory)
        stack.callback(endpoint.close)
        ways["nixl"] = Ours(stack, memory, NixlTransport(endpoint), lease)
        bare = NixlEndpoint(memory)  # an agent of its own, which nobody else calls
        bare.close()
        ways["bare nixl"] = BareNixl(bare.agent, memory, doors)
    return ways


def _check(ways: dict[str, Way], memory: BlockMemory, source: BlockMemory) -> None:
    """Each way once, untimed: what it must connect and map is there, and what it brings is right."""
    blocks, slots = shuffled(source.num_blocks, 2), shuffled(memory.num_blocks, 3)
    for name, way in ways.items():
        memory.pieces[:] = 0
        way.ready(len(slots))
        way.move(slots)
        assert (memory.pieces[0, slots] == source.pieces[0, blocks]).all(), f"{name} brings something else"


def _timed(ways: dict[str, Way], rounds: int, repeats: int, slots: Sequence[int]) -> dict[str, list[float]]:
    """Seconds of each way's moves, in every round each way as often as `repeats`, taking turns in who is first."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for at in range(rounds):
        for name in in_turn(list(ways), at):
            for _ in range(repeats):
                ways[name].ready(len(slots))
                start = time.perf_counter()
                ways[name].move(slots)
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _rates(plan: Plan, name: str, seconds: dict[str, list[float]]) -> list[Row]:
    rates = {way: figure(plan.total_bytes / each / 1e9 for each in times) for way, times in seconds.items()}
    rows = []
    for ours, other, goal in GOALS:
        if other in rates:
            what = f"{ours} vs {SHORT.get(other, other)} {name}"
            rows.append(
                row(what, "GB/s", rates[ours], rates[other], peer_name=_named(other), goal=goal, note=NOTES[other])
            )
    return rows


def _digest_costs(name: str, seconds: dict[str, list[float]]) -> list[Row]:
    rows = []
    for way in DIGESTED:
        pairs = zip(seconds[way], seconds[f"{way} undigested"], strict=True)
        cost = figure(100 * (with_digests / without - 1) for with_digests, without in pairs)
        note = "more time than without, round by round"
        rows.append(row(f"digests {way} {name}", "%", cost, goal=MAX_DIGEST_COST, goal_is=AT_MOST, note=note))
    return rows


def _latencies(name: str, seconds: dict[str, list[float]]) -> list[Row]:
    rows = []
    for ours, other in (("shm", "bare nixl"), ("tcp", "bare socket"), ("grpc", "bare grpc"), ("nixl", "bare nixl")):
        if ours not in seconds:
            continue
        for quantile in (50, 90):
            peer = _quantile(seconds[other], quantile) if other in seconds else None
            what = f"one block p{quantile} {ours} {name}"
            rows.append(row(what, "us", _quantile(seconds[ours], quantile), peer, peer_name=_named(other)))
    memcpy = _quantile(seconds["memcpy"], 50)
    return [*rows, row(f"limit one block p50 memcpy {name}", "us", memcpy, note="the copy alone")]


def _quantile(seconds: Sequence[float], quantile: int) -> Figure:
    return Figure(float(np.percentile(seconds, quantile)) * 1e6)


NOTES = {
    "memcpy": "per block, in one process, no digest",
    "bare nixl": "one READ over UCX, no digest, no lease",
    "bare grpc": "stream of 1 MiB messages, no digest",
    "bare socket": "sendmsg, recvmsg_into of 1 MiB, no digest",
}


def _named(other: str) -> str:
    package = {"bare nixl": "nixl-cu13", "bare grpc": "grpcio"}.get(other)
    try:
        return f"{package} {version(package)}" if package else other
    except PackageNotFoundError:
        return other


def main(arguments: list[str] | None = None, plan: Plan | None = None) -> int:
    """The command. Ends with 2 on bad usage, else 0, whether or not the goals are met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description="The speed of moving KV blocks.")
    parser.add_argument("--quick", action="store_true", help="less of it, within a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        parser.error("this benchmark needs Linux: it shares memory")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")
    say = partial(print, file=sys.stderr, flush=True)
    if not has_nixl():
        say(f"NIXL is not installed: its rows are left out. To have them: {INSTALL}")
    plan = plan or (QUICK if options.quick else FULL)
    everywhere = cores()
    facts: dict[str, Any] = {**machine(), "index": BACKEND, "quick": options.quick, "total_bytes": plan.total_bytes}
    rows: list[Row] = []
    gc.disable()
    pin(everywhere[-1:])
    try:
        for block_bytes in plan.block_bytes:
            rows += measure(plan, block_bytes, say)
            gc.collect()
    finally:
        pin(everywhere)
        gc.enable()
    print_table("transfer" + (" (quick)" if options.quick else ""), rows)
    if options.json:
        write_json(options.json, "transfer", facts, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
