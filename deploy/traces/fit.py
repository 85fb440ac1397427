"""A workload fitted to a trace, so that more like it can be made."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from deploy.traces.sessions import sessions_of
from deploy.traces.synthesize import RATE_SPAN_S
from deploy.traces.trace import Trace
from deploy.traces.workload import Distribution, Workload, Zipf

TOOL_GAP_S = 10.0  # who goes on sooner is taken for a tool
SYSTEM_SHARE = 0.1  # of sessions: what so many begin with is a system prompt, what fewer share a document
MOST_SHARED = 100_000  # prompts or documents
LASTING = 0.8  # of the trace: who is used through so much of it is used for good
EXPONENTS = np.linspace(0, 2.5, 26)


def fit_workload(trace: Trace) -> Workload:
    """The parameters that the trace shows.

    Sessions are those that it names, else inferred. What the first prompts of several sessions begin with is a system
    prompt, and a document after it. Lengths and times keep their means and percentiles, but not how they depend on
    each other. Sessions that go on beyond the trace's ends look shorter than they are. The length of the day is not
    fitted.
    """
    requests, sessions = trace.requests, sessions_of(trace)
    firsts = [requests[session[0]] for session in sessions]
    system_blocks, shared_blocks = _shared_depths([request.block_ids for request in firsts])
    systems = Counter(r.block_ids[depth - 1] for r, depth in zip(firsts, system_blocks, strict=True) if depth)
    document_uses: dict[int, list[float]] = {}
    for request, system, shared in zip(firsts, system_blocks, shared_blocks, strict=True):
        if shared > system:
            document_uses.setdefault(request.block_ids[system], []).append(request.arrival_s)
    life = _life(document_uses, trace.duration_s)
    documents = Counter({document: len(uses) for document, uses in document_uses.items()})
    size = trace.block_size
    own = [
        (request.input_tokens - shared * size, shared > system)
        for request, system, shared in zip(firsts, system_blocks, shared_blocks, strict=True)
    ]
    steps = [(requests[a], requests[b]) for session in sessions for a, b in pairwise(session)]
    timed = [
        (later.arrival_s - earlier.arrival_s, later.input_tokens - earlier.input_tokens - earlier.output_tokens)
        for earlier, later in steps
    ]
    by_tools = [step for step in timed if step[0] <= TOOL_GAP_S]
    by_people = [step for step in timed if step[0] > TOOL_GAP_S]
    rate = len(requests) / trace.duration_s if trace.duration_s else Workload().requests_per_s
    tenants = Counter(request.tenant for request in firsts if request.tenant)
    return Workload(
        name=f"like-{trace.name}",
        block_size=size,
        requests_per_s=rate,
        burstiness=_burstiness([request.arrival_s for request in firsts]),
        system_prompts=_zipf(systems),
        system_share=systems.total() / len(firsts),
        system_tokens=Distribution.of(depth * size for depth in system_blocks if depth),
        documents=_zipf(documents, max(1.0, trace.duration_s / life)),
        document_share=documents.total() / len(firsts),
        document_life_s=life,
        document_tokens=Distribution.of(
            (shared - system) * size
            for system, shared in zip(system_blocks, shared_blocks, strict=True)
            if shared > system
        ),
        turns=Distribution.of(len(session) for session in sessions),
        own_tokens=Distribution.of(tokens for tokens, shows in own if not shows),
        question_tokens=Distribution.of(tokens for tokens, shows in own if shows),
        message_tokens=Distribution.of(tokens for _, tokens in by_people),
        output_tokens=Distribution.of(request.output_tokens for request in requests),
        think_s=Distribution.of((gap for gap, _ in by_people), TOOL_GAP_S),
        tool_share=len(by_tools) / len(timed) if timed else 0.0,
        tool_tokens=Distribution.of(tokens for _, tokens in by_tools),
        tool_gap_s=Distribution.of((gap for gap, _ in by_tools), TOOL_GAP_S / 2),
        max_input_tokens=max(request.input_tokens for request in requests),
        tenants=_zipf(tenants) if tenants else Zipf(0),
    )


def _shared_depths(prompts: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """How many leading blocks of each prompt are of a system prompt, and how many are shared with any other."""
    holders = Counter(block for prompt in prompts for block in prompt)
    of_system = max(2, SYSTEM_SHARE * len(prompts))
    systems, shared = [], []
    for prompt in prompts:
        depth = system = 0
        for block in prompt:
            if holders[block] < 2:
                break
            depth += 1
            system += holders[block] >= of_system and system == depth - 1
        systems.append(system)
        shared.append(depth)
    return systems, shared


def _burstiness(starts: Sequence[float]) -> float:
    """How far the rate spreads beyond what chance does to a constant one."""
    counts = np.bincount((np.asarray(starts) / RATE_SPAN_S).astype(np.int64))[:-1]  # the last span may be cut
    if len(counts) < 2 or not counts.any():
        return 0.0
    excess = float(counts.var(ddof=1) - counts.mean())
    return float(np.sqrt(max(0.0, excess)) / counts.mean())


def _life(uses: Mapping[int, Sequence[float]], duration_s: float) -> float:
    """How long a document is asked for: uses by chance, n of them, span (n - 1) / (n + 1) of the time."""
    spans = [(max(at) - min(at), len(at)) for at in uses.values() if len(at) > 2]
    total = sum(count for _, count in spans)
    if not total:
        return math.inf
    life = sum(count * span * (count + 1) / (count - 1) for span, count in spans) / total
    return life if 0 < life < LASTING * duration_s else math.inf


def _zipf(uses: Counter[str] | Counter[int], lives: float = 1.0) -> Zipf:
    """The one that makes as many distinct things of so many draws, and as often the same one twice.

    With lives > 1 each place of the ranking was had by so many things, one after the other.
    """
    draws, distinct = uses.total() / lives, max(1, round(len(uses) / lives))
    if distinct < 2 or draws < 2:
        return Zipf(distinct)
    twice = sum(count * (count - 1) for count in uses.values()) / lives / (draws * (draws - 1))
    fitted = [(_things(distinct, draws, float(exponent)), float(exponent)) for exponent in EXPONENTS]

    def misses(candidate: tuple[int, float]) -> float:
        share = _shares(*candidate)
        return abs(float(np.log(np.square(share).sum() / max(twice, 1e-9))))

    return Zipf(*min(fitted, key=misses))


def _things(distinct: int, draws: float, exponent: float) -> int:
    """How many things there are where so many draws show so many distinct ones."""
    low, high = distinct, MOST_SHARED
    while low < high:
        middle = (low + high) // 2
        seen = float((1 - (1 - _shares(middle, exponent)) ** draws).sum())
        low, high = (middle + 1, high) if seen < distinct else (low, middle)
    return low


def _shares(things: int, exponent: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    weights = np.arange(1, things + 1, dtype=np.float64) ** -exponent
    shares: np.ndarray[tuple[int], np.dtype[np.float64]] = weights / weights.sum()
    return shares
