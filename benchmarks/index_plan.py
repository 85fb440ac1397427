"""What the index benchmark measures at which size, and what its parts share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from benchmarks.measure import in_turn
from benchmarks.our_index import Index, OurIndex
from benchmarks.peer_index import PeerIndex
from benchmarks.report import TIMES, Figure, Row, figure, row
from benchmarks.workload import PREFIXES

OURS, PEER, REFERENCE = "ours", "peer", "reference"

ORDERS = {
    "tail": "session after session, leaf first",
    "mixed": "leaf first in each session, events of sessions from anywhere in the tree shuffled",
    "random": "events of sessions from anywhere in the tree in any order",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes. Entries are (worker, block) pairs."""

    hash_tokens: tuple[int, ...] = (8_192, 131_072)
    hashed_tokens: int = 4_000_000  # by each side, in all repeats of a row

    prefixes: int = PREFIXES
    event_workers: tuple[int, ...] = (8, 64, 256)
    event_blocks: tuple[int, ...] = (1, 16, 64)
    entries: int = 1_000_000
    large_entries: int = 10_000_000
    large_sessions: int = 9_000  # measured at the large size; what is before only fills the tree
    chunk_sessions: int = 128  # sessions of one repeat
    view_chunks: int = 8  # for each event size

    match_workers: int = 256
    match_blocks: tuple[int, ...] = (32, 128, 512, 4_096)
    match_holders: tuple[int, ...] = (8, 64, 256)
    match_rounds: int = 9
    match_samples: int = 400  # a round
    pool_chains: int = 1_024  # distinct queries, at most
    pool_blocks: int = 2**18  # distinct blocks of one kind of query, at most
    pool_entries: int = 2**22  # entries of one kind of query, at most, but for the least number of chains
    pool_least: int = 4

    drops: int = 5
    reference_entries: int = 1_000_000  # for its bytes an entry
    thread_rounds: int = 3
    thread_seconds: float = 1.0
    thread_batches: tuple[int, ...] = (1, 4, 16, 64)
    memory_bytes: int = 256 * 2**20  # what the machine's random reads go over


FULL = Plan()
QUICK = Plan(
    hashed_tokens=1_500_000,
    event_workers=(64,),
    large_entries=0,
    view_chunks=3,
    match_workers=64,
    match_holders=(8, 64),
    match_rounds=5,
    match_samples=200,
    pool_chains=256,
    pool_blocks=2**16,
    pool_entries=2**18,
    pool_least=2,
    drops=3,
    reference_entries=0,
    thread_rounds=1,
    thread_seconds=0.7,
    thread_batches=(),
)


@dataclass(slots=True)
class Samples:
    """Repeats of one row, by side; a third side is our reference, told in the note."""

    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, side: str, value: float) -> None:
        self.values[side].append(value)

    def figure(self, side: str) -> Figure | None:
        return figure(self.values[side]) if self.values.get(side) else None


@dataclass(frozen=True, slots=True)
class Bench:
    """A run: its plan, the peer's name ("" without one), and the cores that it may use."""

    plan: Plan
    peer_name: str
    cores: tuple[int, ...]

    @property
    def sides(self) -> tuple[str, ...]:
        """Who is measured."""
        return (OURS, PEER) if self.peer_name else (OURS,)

    def indexes(self) -> dict[str, Index]:
        """An empty index of each side."""
        return {side: PeerIndex() if side == PEER else OurIndex() for side in self.sides}

    def row(
        self,
        what: str,
        unit: str,
        samples: Samples,
        goal: float | None = None,
        goal_is: str = TIMES,
        note: str = "",
    ) -> Row:
        ours = samples.figure(OURS)
        assert ours is not None, f"nothing was measured for {what}"
        peer = samples.figure(PEER)
        return row(what, unit, ours, peer, peer_name=self.peer_name, goal=goal, goal_is=goal_is, note=note)


def turns(indexes: Mapping[str, Index], repeat: int) -> Iterator[tuple[str, Index]]:
    """The sides in the order for this repeat."""
    yield from in_turn(list(indexes.items()), repeat)


def size(entries: int) -> str:
    """1M, 20k."""
    return f"{entries // 10**6}M" if entries >= 10**6 else f"{entries // 1000}k"
