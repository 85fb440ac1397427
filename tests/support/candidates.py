"""Candidates of a decision, generated, and what must be predicted for each of them, in plain words of Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import ceil

import numpy as np
from hypothesis import strategies as st

from router.candidates import Candidates
from router.prediction import FETCH_START_S, HEAD_LEFT, HOST_SHARE
from router.table import Column, Floats, Slots


@dataclass(frozen=True)
class PlainWorker:
    """One worker, its columns in the order of `Column`."""

    blocks_total: int = 1000
    max_sequences: int = 64
    budget: int = 512
    queued: int = 0
    queued_tokens: int = 0
    queued_s: float = 0.0
    head_s: float = 0.0
    head_since: float = 0.0
    sequences: int = 0
    decoding: int = 0
    context: int = 0
    pending_blocks: int = 0
    blocks_in_use: int = 0
    last_routed: int = 0
    residence_s: float = 10.0
    prefill_step_s: float = 0.02
    token_s: float = 1e-4
    attention_s: float = 1e-9
    decode_step_s: float = 0.02
    sequence_s: float = 1e-4
    context_s: float = 1e-7
    fetch_token_s: float = 0.0
    slot: int = 0
    device_blocks: int = 0  # leading ones of the prompt
    held_blocks: int = 0  # the same in any tier


@dataclass(frozen=True)
class PlainQuestion:
    """A prompt of so many tokens in blocks, and the workers that could serve it."""

    workers: tuple[PlainWorker, ...]
    prompt_tokens: int = 1000
    block_size: int = 16
    now: float = 100.0

    def table(self) -> tuple[Floats, Floats, Slots]:
        """The workers' columns, the blocks that they hold, and their slots; other slots hold nothing of meaning."""
        names = [field.name for field in fields(PlainWorker)][: len(Column)]
        assert names == [column.name.lower() for column in Column]
        slots = np.array([worker.slot for worker in self.workers], np.intp)
        values, held = np.full((len(Column), slots.max() + 1), np.nan), np.full((2, slots.max() + 1), np.nan)
        values[:, slots] = np.array([[float(getattr(worker, name)) for name in names] for worker in self.workers]).T
        held[:, slots] = [[w.device_blocks for w in self.workers], [w.held_blocks for w in self.workers]]
        return values, held, slots

    def candidates(self) -> Candidates:
        """The question as policies see it."""
        values, held, slots = self.table()
        return Candidates(slots, values, self.prompt_tokens, self.block_size, held, self.now)

    def most_blocks(self) -> int:
        """That can be reused: the last token is computed in any case."""
        return (self.prompt_tokens - 1) // self.block_size

    def prompt_blocks(self) -> int:
        """Blocks that the prompt fills, the last one in part."""
        return ceil(self.prompt_tokens / self.block_size)

    def held(self, worker: PlainWorker) -> int:
        """Tokens that it has."""
        return min(worker.held_blocks, self.most_blocks()) * self.block_size

    def missing(self, worker: PlainWorker) -> int:
        """Tokens that another one has, and it has not."""
        return max(map(self.held, self.workers)) - self.held(worker)

    def fetch_s(self, worker: PlainWorker) -> float:
        """To get these."""
        return FETCH_START_S + self.missing(worker) * worker.fetch_token_s

    def fetched(self, worker: PlainWorker) -> int:
        """The same where it pays to fetch them."""
        missing = self.missing(worker)
        if not worker.fetch_token_s or not missing:
            return 0
        have = self.held(worker)
        pays = self.computing_s(worker, have + missing) + self.fetch_s(worker) < self.computing_s(worker, have)
        return missing if pays else 0

    def cached(self, worker: PlainWorker) -> int:
        """Tokens that need not be computed."""
        return self.held(worker) + self.fetched(worker)

    def new(self, worker: PlainWorker) -> int:
        """Tokens to compute."""
        return self.prompt_tokens - self.cached(worker)

    def queue_s(self, worker: PlainWorker) -> float:
        """What comes before, less what of the first must be done."""
        step_s = self.step_s(worker, worker.prefill_step_s)
        begun_s = min(self.now - worker.head_since, (1 - HEAD_LEFT) * worker.head_s)
        return max(0.0, worker.queued_s + step_s * ceil(worker.queued_tokens / worker.budget) - begun_s)

    def prefill_s(self, worker: PlainWorker) -> float:
        """After what need not be computed."""
        return self.computing_s(worker, self.cached(worker))

    def computing_s(self, worker: PlainWorker, cached: int) -> float:
        """Each new token, each pair of one and one before it, each step; what comes back from the host tier."""
        new = self.prompt_tokens - cached
        pairs = new * (cached + new / 2)
        steps = ceil(new / worker.budget)
        back = self.held(worker) - min(worker.device_blocks, self.most_blocks()) * self.block_size
        computed_s = new * worker.token_s + pairs * worker.attention_s
        return computed_s + steps * self.step_s(worker, worker.prefill_step_s) + back * HOST_SHARE * worker.token_s

    def waiting(self, worker: PlainWorker) -> int:
        """Requests whose first step has not begun: the first of them has once a decode step's time has gone by."""
        begun = self.now - worker.head_since > self.step_s(worker, worker.decode_step_s)
        return worker.queued - (begun and worker.queued > 0)

    def decode_s(self, worker: PlainWorker) -> float:
        """Half of the decode step under way, where no prefill is."""
        if worker.queued_tokens or not worker.decoding:
            return 0.0
        return self.step_s(worker, worker.decode_step_s) / 2

    def step_s(self, worker: PlainWorker, alone_s: float) -> float:
        """A step with the sequences that decode in it."""
        return alone_s + worker.sequence_s * worker.decoding + worker.context_s * worker.context

    def in_use(self, worker: PlainWorker) -> int:
        """Blocks that cannot be evicted."""
        return worker.blocks_in_use + worker.pending_blocks

    def memory_s(self, worker: PlainWorker) -> float:
        """Until as many blocks have come back as the prompt lacks."""
        free = max(0, worker.blocks_total - self.in_use(worker))
        missing = self.prompt_blocks() - min(worker.device_blocks, self.most_blocks()) - free
        return max(0, missing) * worker.residence_s / max(self.in_use(worker), 1)

    def ttft_s(self, worker: PlainWorker) -> float:
        """The sum; queue, memory and what is fetched are waited for at the same time."""
        fetch_s = self.fetch_s(worker) if self.fetched(worker) else 0.0
        waiting_s = max(self.queue_s(worker), self.memory_s(worker), fetch_s)
        return waiting_s + self.prefill_s(worker) + self.decode_s(worker)


_SECONDS = st.floats(0, 30, allow_subnormal=False) | st.sampled_from([0.0, 0.01, 1.0])
_TERM = st.floats(1e-9, 1e-2)


@st.composite
def plain_workers(draw: st.DrawFn, slot: int) -> PlainWorker:
    """A worker as it may be: idle, busy or full."""
    most = draw(st.integers(1, 80))
    sequences = draw(st.integers(0, most + 2))  # other routers may have overfilled it
    total = draw(st.integers(1, 2000))
    device = draw(st.integers(0, 100))
    return PlainWorker(
        blocks_total=total,
        max_sequences=most,
        budget=draw(st.sampled_from([1, 64, 512, 8192])),
        queued=draw(st.just(0) | st.integers(0, 10)),
        queued_tokens=draw(st.just(0) | st.integers(0, 100_000)),
        queued_s=draw(_SECONDS),
        head_s=draw(_SECONDS),
        head_since=draw(st.floats(0, 100)),
        sequences=sequences,
        decoding=draw(st.integers(0, sequences)),
        context=draw(st.integers(0, 100_000)),
        pending_blocks=draw(st.just(0) | st.integers(0, 500)),
        blocks_in_use=draw(st.integers(0, total)),
        last_routed=draw(st.integers(0, 5)),
        residence_s=draw(st.floats(0, 100)),
        prefill_step_s=draw(_TERM),
        token_s=draw(_TERM),
        attention_s=draw(_TERM),
        decode_step_s=draw(_TERM),
        sequence_s=draw(_TERM),
        context_s=draw(_TERM),
        fetch_token_s=draw(st.just(0.0) | st.floats(1e-7, 1e-4)),
        slot=slot,
        device_blocks=device,
        held_blocks=device + draw(st.just(0) | st.integers(0, 50)),
    )


@st.composite
def plain_questions(draw: st.DrawFn, slots: Sequence[int] = range(8)) -> PlainQuestion:
    """One to six workers at any slots, in order of slot as the router has them."""
    chosen = draw(st.lists(st.sampled_from(list(slots)), min_size=1, max_size=6, unique=True).map(sorted))
    workers = tuple(draw(plain_workers(slot)) for slot in chosen)
    return PlainQuestion(workers, draw(st.integers(1, 2000)), draw(st.sampled_from([1, 16, 512])))
