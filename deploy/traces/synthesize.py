"""A synthetic trace from a workload: sessions played side by side in virtual time. Equal seeds, equal traces."""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate

from deploy.traces.trace import MAX_REQUESTS, Trace, TraceRequest
from deploy.traces.workload import Distribution, Workload, Zipf
from rhizome.errors import InvalidRequest

RATE_SPAN_S = 30.0  # for which the rate of sessions stays the same
WARM_UP_SESSIONS = 5  # times their mean length: of those that end by chance, 1% are longer
LONGEST_WARM_UP_S = 4 * 3600.0
NO_DOCUMENT = (-1, 0)
GOLDEN = (math.sqrt(5) - 1) / 2


def synthesize(workload: Workload, requests: int, seed: int, *, name: str = "") -> Trace:
    """So many requests of a workload that is under way already: sessions that began before the trace go on in it.

    The rate is the workload's in the mean, whatever the number of requests. Raises InvalidRequest.
    """
    if not 1 <= requests <= MAX_REQUESTS:
        raise InvalidRequest("requests", requests, f"1 to {MAX_REQUESTS}")
    made = _Synthesizer(workload, random.Random(seed)).requests(requests)  # noqa: S311
    numbers: dict[int, int] = {}  # blocks in order of first sight
    renamed: dict[str, str] = {}
    first = made[0].arrival_s
    return Trace(
        name or workload.name,
        workload.block_size,
        tuple(
            replace(
                request,
                arrival_s=request.arrival_s - first,
                block_ids=tuple(numbers.setdefault(block, len(numbers)) for block in request.block_ids),
                session=renamed.setdefault(request.session, str(len(renamed))),
            )
            for request in made
        ),
    )


@dataclass(slots=True)
class _Session:
    name: str
    tenant: str
    turns_left: int
    blocks: list[int] = field(default_factory=list)  # the full ones of the latest prompt
    input_tokens: int = 0


class _Choice:
    """Draws from a Zipf by its cumulated weights."""

    def __init__(self, zipf: Zipf, rng: random.Random) -> None:
        self._sums = list(accumulate(zipf.weights()))
        self._rng = rng

    def draw(self) -> int:
        return min(bisect(self._sums, self._rng.random() * self._sums[-1]), len(self._sums) - 1)


class _Synthesizer:
    def __init__(self, workload: Workload, rng: random.Random) -> None:
        self._workload = workload
        self._rng = rng
        self._blocks = 0
        self._sessions = 0
        self._systems = _Choice(workload.system_prompts, rng)
        self._documents = _Choice(workload.documents, rng)
        self._tenants = _Choice(workload.tenants, rng) if workload.tenants.count else None
        self._offset = rng.random()
        self._systems_of: dict[tuple[int, int], int] = {}  # document -> the system prompt that it is shown behind
        self._shared: dict[tuple[int, tuple[int, int]], list[int]] = {}  # (system prompt, document) -> its blocks

    def requests(self, count: int) -> list[TraceRequest]:
        """In order of arrival, those of sessions that began in the warm-up included."""
        starts = self._session_starts()
        due: list[tuple[float, int, _Session]] = []
        next_start = next(starts)
        made: list[TraceRequest] = []
        while len(made) < count:
            if not due or next_start <= due[0][0]:
                self._sessions += 1
                heapq.heappush(due, (next_start, self._sessions, self._session(next_start)))
                next_start = next(starts)
            now, order, session = heapq.heappop(due)
            request, gap_s = self._turn(session, now)
            if now >= 0:
                made.append(request)
            if session.turns_left:
                heapq.heappush(due, (now + gap_s, order, session))
        return made

    def _session_starts(self) -> Iterator[float]:
        """A Poisson process whose rate is drawn anew for each span of time."""
        work, rng = self._workload, self._rng
        gap = work.tool_share * work.tool_gap_s.mean + (1 - work.tool_share) * work.think_s.mean
        turns = work.turns.mean
        span = -math.ceil(min(LONGEST_WARM_UP_S, WARM_UP_SESSIONS * turns * gap) / RATE_SPAN_S) if turns > 1 else 0
        waiting = rng.expovariate(1.0)
        while True:
            rate = work.requests_per_s / turns
            if work.burstiness > 0:
                variance = work.burstiness**2
                rate *= rng.gammavariate(1 / variance, variance)
            rate *= 1 + work.diurnal * math.sin(2 * math.pi * (span + 0.5) * RATE_SPAN_S / work.day_s)
            start, left = span * RATE_SPAN_S, rate * RATE_SPAN_S
            while waiting < left:
                yield start + waiting / rate
                waiting += rng.expovariate(1.0)
            waiting -= left
            span += 1

    def _session(self, now: float) -> _Session:
        tenant = f"tenant-{self._tenants.draw()}" if self._tenants else ""
        session = _Session(str(self._sessions), tenant, self._workload.turns.count(self._rng))
        self._begin(session, now)
        return session

    def _begin(self, session: _Session, now: float) -> None:
        """Its first prompt: what it shares, and its own."""
        work, rng = self._workload, self._rng
        system = self._systems.draw() if rng.random() < work.system_share else -1
        document = self._document(now) if rng.random() < work.document_share else NO_DOCUMENT
        if document != NO_DOCUMENT:
            system = self._systems_of.setdefault(document, system)
        shared, tokens = self._shared_text(system, document)
        session.blocks = shared.copy()
        own = work.own_tokens if document == NO_DOCUMENT else work.question_tokens
        session.input_tokens = min(tokens + own.count(rng), work.max_input_tokens)

    def _document(self, now: float) -> tuple[int, int]:
        """A place in the ranking, and how many documents had it before. Places change hands one after the other."""
        place, life = self._documents.draw(), self._workload.document_life_s
        return place, 0 if math.isinf(life) else math.floor(now / life + place * GOLDEN)

    def _shared_text(self, system: int, document: tuple[int, int]) -> tuple[list[int], int]:
        """The full blocks of a system prompt and a document, and the tokens of both."""
        work = self._workload
        tokens = 0 if system < 0 else self._length(work.system_tokens, system)
        blocks: list[int] = []
        if document != NO_DOCUMENT:
            blocks, _ = self._shared_text(system, NO_DOCUMENT)
            tokens += self._length(work.document_tokens, document[0] + document[1] * work.documents.count)
        elif system < 0:
            return [], 0
        kept = self._shared.setdefault((system, document), blocks.copy())
        tokens = min(tokens, work.max_input_tokens - 1)
        self._fill(kept, tokens)
        return kept, tokens

    def _length(self, lengths: Distribution, which: int) -> int:
        """Of the n-th shared text. Short and long ones alternate: a few that are used much do not sway a trace."""
        return max(1, round(lengths.at((self._offset + which * GOLDEN) % 1.0)))

    def _turn(self, session: _Session, now: float) -> tuple[TraceRequest, float]:
        """The session's next request, and the time to the one after."""
        work, rng = self._workload, self._rng
        self._fill(session.blocks, session.input_tokens)
        blocks = session.blocks[: session.input_tokens // work.block_size]
        if session.input_tokens % work.block_size:
            blocks.append(self._new_block())
        output = work.output_tokens.count(rng)
        request = TraceRequest(now, session.input_tokens, output, tuple(blocks), session.name, session.tenant)
        session.turns_left -= 1
        calls_tool = rng.random() < work.tool_share
        following = work.tool_tokens if calls_tool else work.message_tokens
        session.input_tokens += output + following.count(rng)
        if session.input_tokens > work.max_input_tokens:
            self._begin(session, now)
        return request, (work.tool_gap_s if calls_tool else work.think_s).sample(rng)

    def _fill(self, blocks: list[int], tokens: int) -> None:
        """Add new blocks until there is one for each full block of so many tokens."""
        while len(blocks) < tokens // self._workload.block_size:
            blocks.append(self._new_block())

    def _new_block(self) -> int:
        self._blocks += 1
        return self._blocks
