"""What a synthetic workload is made of: sessions, shared prompts and documents, tool calls, arrivals; presets."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import NormalDist, fmean
from typing import Self

from rhizome.errors import InvalidRequest

POINTS = 200  # of a fitted distribution: percentiles by halves


@dataclass(frozen=True, slots=True)
class Distribution:
    """Values that are equally likely, in order. Of many samples the means of equal shares: so the mean is kept."""

    points: tuple[float, ...]

    def sample(self, rng: random.Random) -> float:
        """One of the points."""
        return self.at(rng.random())

    def at(self, share: float) -> float:
        """The point below which so great a share of the points lies; share is below 1."""
        return self.points[int(share * len(self.points))]

    def count(self, rng: random.Random) -> int:
        """One of the points as a number of things, at least 1."""
        return max(1, round(self.sample(rng)))

    @property
    def mean(self) -> float:
        """Of the points."""
        return fmean(self.points)

    @classmethod
    def of(cls, values: Iterable[float], default: float = 1.0) -> Self:
        """Fitted to samples; the default alone where there are none."""
        ordered = sorted(values) or [default]
        if len(ordered) <= POINTS:
            return cls(tuple(ordered))
        cuts = [len(ordered) * share // POINTS for share in range(POINTS + 1)]
        return cls(tuple(fmean(ordered[low:high]) for low, high in pairwise(cuts)))

    @classmethod
    def lognormal(cls, median: float, sigma: float) -> Self:
        """Lengths and times of people: a median, and a spread by a factor of e^sigma."""
        normal = NormalDist(math.log(median), sigma)
        return cls(tuple(math.exp(normal.inv_cdf((place + 0.5) / POINTS)) for place in range(POINTS)))

    @classmethod
    def geometric(cls, mean: float) -> Self:
        """Numbers of turns that end by chance after each; at least 1."""
        if mean <= 1:
            return cls((1.0,))
        going_on = math.log(1 - 1 / mean)
        return cls(tuple(math.ceil(math.log(1 - (place + 0.5) / POINTS) / going_on) for place in range(POINTS)))


_lengths, _turns = Distribution.lognormal, Distribution.geometric


@dataclass(frozen=True, slots=True)
class Zipf:
    """A choice among `count` things, the i-th as likely as 1 / i^exponent; 0 makes all equal."""

    count: int
    exponent: float = 1.0

    def weights(self) -> list[float]:
        """By rank, not normalized."""
        return [rank**-self.exponent for rank in range(1, self.count + 1)]


@dataclass(frozen=True, slots=True)
class Workload:
    """The parameters of a synthetic trace. Defaults are a plain chat; lengths in tokens, times in seconds.

    A session's first prompt is a system prompt (with the chance system_share, one of system_prompts), then a document
    (with document_share, one of documents) and question_tokens, else own_tokens. After document_life_s another
    document takes a place in the documents' ranking: what many ask about changes. Each later prompt is the one before,
    its answer, and what came next: after tool_gap_s what a tool said (with tool_share), else after think_s what a
    person wrote. Gaps are from arrival to arrival. A prompt that would pass max_input_tokens starts over, as agents
    compact theirs.
    """

    name: str = "chat"
    block_size: int = 64
    # Arrivals. burstiness is the spread of the sessions' rate (standard deviation over mean) among spans of 30 s, and
    # 0 is a Poisson process; over a day the rate swings by +-diurnal.
    requests_per_s: float = 4.0
    burstiness: float = 0.3
    diurnal: float = 0.0
    day_s: float = 86_400.0
    # What sessions share. A document always follows the same system prompt.
    system_prompts: Zipf = Zipf(20, 1.1)
    system_share: float = 1.0
    system_tokens: Distribution = _lengths(800, 0.6)  # noqa: RUF009
    documents: Zipf = Zipf(1, 1.0)
    document_share: float = 0.0
    document_life_s: float = math.inf
    document_tokens: Distribution = _lengths(4000, 0.8)  # noqa: RUF009
    question_tokens: Distribution = _lengths(60, 0.8)  # noqa: RUF009
    # A session.
    turns: Distribution = _turns(4)  # noqa: RUF009
    own_tokens: Distribution = _lengths(150, 1.2)  # noqa: RUF009
    message_tokens: Distribution = _lengths(80, 1.0)  # noqa: RUF009
    output_tokens: Distribution = _lengths(300, 0.8)  # noqa: RUF009
    think_s: Distribution = _lengths(45, 1.0)  # noqa: RUF009
    # Tool calls.
    tool_share: float = 0.0
    tool_tokens: Distribution = _lengths(600, 1.2)  # noqa: RUF009
    tool_gap_s: Distribution = _lengths(4, 0.7)  # noqa: RUF009
    max_input_tokens: int = 131_072
    tenants: Zipf = Zipf(0, 1.0)  # 0: requests name none

    def __post_init__(self) -> None:
        """Refuse what no trace can be made of. Raises InvalidRequest."""
        for field in ("system_share", "document_share", "tool_share", "diurnal"):
            if not 0 <= getattr(self, field) <= 1:
                raise InvalidRequest(field, getattr(self, field), "0 to 1")
        for field, least in (("requests_per_s", 0.0), ("day_s", 0.0), ("burstiness", -1e-9)):
            if not least < getattr(self, field) < math.inf:
                raise InvalidRequest(field, getattr(self, field), "a positive number")
        for field in ("block_size", "max_input_tokens"):
            if getattr(self, field) < 1:
                raise InvalidRequest(field, getattr(self, field), "at least 1")


CHAT = Workload()

# Coding and research agents: long sessions that mostly call tools. What runs out is memory for their KV.
AGENT = replace(
    CHAT,
    name="agent",
    block_size=512,
    requests_per_s=2.0,
    system_prompts=Zipf(4, 1.0),
    system_tokens=_lengths(6000, 0.4),
    turns=_turns(40),
    own_tokens=_lengths(2500, 1.0),
    message_tokens=_lengths(200, 1.0),
    output_tokens=_lengths(180, 0.9),
    tool_share=0.85,
    tool_tokens=_lengths(700, 1.1),
)

# Questions about shared documents, one each: reuse without sessions.
RAG = replace(
    CHAT,
    name="rag",
    block_size=256,
    system_prompts=Zipf(2, 1.0),
    system_tokens=_lengths(400, 0.3),
    documents=Zipf(2000, 0.9),
    document_share=1.0,
    document_tokens=_lengths(6000, 0.8),
    turns=_turns(1),
    output_tokens=_lengths(150, 0.8),
)

# Single prompts that have nothing in common, in bursts.
BATCH = replace(
    CHAT,
    name="batch",
    block_size=512,
    burstiness=1.0,
    system_share=0.0,
    turns=_turns(1),
    own_tokens=_lengths(3000, 1.0),
    output_tokens=_lengths(250, 0.9),
)

PRESETS = {workload.name: workload for workload in (CHAT, AGENT, RAG, BATCH)}
