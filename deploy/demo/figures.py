"""What the demo has seen, and what follows: whether all was right, and the figures. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean

from deploy.conversations import TurnTokens, most_cached_tokens
from rhizome.v1 import worker_pb2


@dataclass(frozen=True, slots=True)
class Row:
    """One turn as it was served. Sessions and turns are counted from 1."""

    mode: str
    session: int
    turn: int
    worker: str  # the first that answered
    prompt_tokens: int
    cached_tokens: int
    ttft_ms: float
    answer: str
    tokens: tuple[int, ...]  # of the answer
    workers: tuple[str, ...] = ()  # all that answered, in order
    itl_ms: tuple[float, ...] = ()  # between chunks of the answer


@dataclass(frozen=True, slots=True)
class TreeCheck:
    """A worker's block set, asked of the worker itself and of the router."""

    worker_blocks: int
    router_blocks: int
    equal: bool  # block by block, and by digest


@dataclass(frozen=True, slots=True)
class Pulls:
    """What a worker took from others."""

    pulls: int = 0
    short: int = 0  # of these, brought fewer blocks than were asked for
    blocks: int = 0
    size_bytes: int = 0
    skipped_blocks: int = 0  # that were there already
    transport: str = ""  # of the last one

    @classmethod
    def of(cls, status: worker_pb2.WorkerStatus) -> Pulls:
        """Since the worker's start."""
        return cls(
            status.pulls,
            status.pulls_short,
            status.pulled_blocks,
            status.pulled_bytes,
            status.pull_skipped_blocks,
            status.pull_transport,
        )

    def since(self, before: Pulls) -> Pulls:
        """Those that were not counted before."""
        pulls = self.pulls - before.pulls
        return Pulls(
            pulls,
            self.short - before.short,
            self.blocks - before.blocks,
            self.size_bytes - before.size_bytes,
            self.skipped_blocks - before.skipped_blocks,
            self.transport if self.blocks > before.blocks else "",
        )


@dataclass(frozen=True, slots=True)
class Times:
    """As the client saw them, over all turns. `p99`: all but a hundredth took at most so long."""

    mean_ttft_ms: float
    p99_ttft_ms: float
    mean_itl_ms: float
    p99_itl_ms: float


@dataclass(frozen=True, slots=True)
class Summary:
    """One mode's figures over turns 2 and later, and its times over all turns."""

    mode: str
    hit_share: float  # cached prompt tokens / prompt tokens
    hit_share_of_maximum: float
    mean_ttft_ms: float
    all_turns: Times


@dataclass(slots=True)
class Outcome:
    """What was seen in all modes that were played. `trees` and `pulls` are by mode and worker."""

    rows: list[Row] = field(default_factory=list)
    tokens: list[TurnTokens] = field(default_factory=list)  # of the first mode; the others answer the same, or it fails
    trees: dict[str, dict[str, TreeCheck]] = field(default_factory=dict)
    pulls: dict[str, dict[str, Pulls]] = field(default_factory=dict)
    block_size: int = 0

    @property
    def modes(self) -> list[str]:
        """In the order in which they were played."""
        return list(dict.fromkeys(row.mode for row in self.rows))

    def answers_identical(self) -> bool:
        """Whether every turn was answered alike in all modes, token for token."""
        answers: dict[tuple[int, int], list[tuple[int, ...]]] = {}
        for row in self.rows:
            answers.setdefault((row.session, row.turn), []).append(row.tokens)
        modes = len(self.modes)
        return all(len(given) == modes and len(set(given)) == 1 for given in answers.values())

    def trees_equal(self) -> bool:
        """Whether every worker's block set was the router's tree of it."""
        return all(check.equal for checks in self.trees.values() for check in checks.values())

    def good(self) -> bool:
        """What the demo is to show."""
        return self.answers_identical() and self.trees_equal()

    def summaries(self) -> list[Summary]:
        """A line for each mode."""
        most = most_cached_tokens(self.tokens, self.block_size)
        result = []
        for mode in self.modes:
            every = [row for row in self.rows if row.mode == mode]
            rows = [row for row in every if row.turn > 1]
            cached = sum(row.cached_tokens for row in rows)
            best = sum(most[row.session, row.turn] for row in rows)
            share = cached / sum(row.prompt_tokens for row in rows)
            ttft = mean(row.ttft_ms for row in rows)
            result.append(Summary(mode, share, cached / best if best else 0.0, ttft, times(every)))
        return result

    def report(self) -> dict[str, object]:
        """For --json."""
        summaries = self.summaries()
        return {
            "answers_identical": self.answers_identical(),
            "hit_share": summaries[0].hit_share,
            "hit_share_of_maximum": summaries[0].hit_share_of_maximum,
            "trees_equal": self.trees_equal(),
            "modes": {line.mode: asdict(line) for line in summaries},
            "trees": _plain(self.trees),
            "pulls": _plain(self.pulls),
            "rows": [asdict(row) for row in self.rows],
        }


def times(rows: Sequence[Row]) -> Times:
    """Of some turns, at least one."""
    ttft = [row.ttft_ms for row in rows]
    itl = [gap for row in rows for gap in row.itl_ms] or [0.0]
    return Times(mean(ttft), p99(ttft), mean(itl), p99(itl))


def p99(values: Sequence[float]) -> float:
    """The smallest of them that 99% do not exceed."""
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


def _plain(tables: dict[str, dict[str, TreeCheck]] | dict[str, dict[str, Pulls]]) -> dict[str, object]:
    return {mode: {name: asdict(entry) for name, entry in table.items()} for mode, table in tables.items()}
