"""What the event benchmark measures at which size, and what its parts share."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.index_plan import OURS, PEER, Samples
from benchmarks.report import TIMES, Row, row
from benchmarks.workload import PREFIXES

TRANSPORTS = ("memory", "grpc", "zmq", "redis")
BATCH_BLOCKS = 16
STEP_S = 0.010
STEP_SHARE = 0.01  # of a step: what publishing may cost it


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes."""

    workers: int = 64
    decode_rounds: int = 15
    decode_sessions: int = 512  # of 64 blocks, in each round
    decode_filled: int = 15_625  # sessions that are in the trees throughout
    foreign_sessions: int = 64

    transports: tuple[str, ...] = TRANSPORTS
    flood_rounds: int = 5
    flood_s: float = 1.0
    paced_s: float = 5.0

    settle_s: float = 0.3  # before a clock starts: what is under way arrives

    append_batches: int = 20_000
    stalled: tuple[int, ...] = (0, 1, 3)
    steps: int = 300

    recovery_blocks: int = 1_000_000
    recovery_prefixes: int = PREFIXES
    recovery_rounds: int = 3


FULL = Plan()
QUICK = Plan(
    decode_rounds=5,
    decode_sessions=256,
    decode_filled=2_000,
    foreign_sessions=32,
    flood_rounds=2,
    flood_s=0.4,
    paced_s=0.8,
    append_batches=5_000,
    steps=40,
    recovery_rounds=1,
)


@dataclass(frozen=True, slots=True)
class Bench:
    """A run: its plan, the peer's name ("" without one), the cores that it may use, and whether Redis is here."""

    plan: Plan
    peer_name: str
    cores: tuple[int, ...]
    has_redis: bool

    @property
    def sides(self) -> tuple[str, ...]:
        """Who is measured."""
        return (OURS, PEER) if self.peer_name else (OURS,)

    @property
    def transports(self) -> tuple[str, ...]:
        """Those that can be measured here."""
        return tuple(each for each in self.plan.transports if each != "redis" or self.has_redis)

    @property
    def other_cores(self) -> tuple[int, ...]:
        """Where publishers run: on those cores that the measuring process is not pinned to, if there are any."""
        return self.cores[:-1] or self.cores

    def row(
        self, what: str, unit: str, samples: Samples, goal: float | None = None, goal_is: str = TIMES, note: str = ""
    ) -> Row:
        ours = samples.figure(OURS)
        assert ours is not None, f"nothing was measured for {what}"
        peer = samples.figure(PEER)
        return row(what, unit, ours, peer, peer_name=self.peer_name, goal=goal, goal_is=goal_is, note=note)
