"""The workers that could serve a request, and what is predicted for it on each: columns over workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from router.prediction import Predicted, predict
from router.table import Column, Floats, Slots


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker as a candidate. Predicted times in seconds; see router.prediction."""

    worker_id: str
    cached_tokens: int
    fetched_tokens: int
    prefill_tokens: int
    queued_prefill_tokens: int
    running: int
    in_flight: int
    max_in_flight: int
    free_blocks: int
    last_routed: int
    queue_s: float
    memory_s: float
    fetch_s: float
    prefill_s: float
    decode_s: float
    score: float
    predicted_ttft_s: float


class _Row:
    """A row of `Candidates.rows` as an attribute: shape (workers,)."""

    def __init__(self, number: int) -> None:
        self._number = int(number)

    def __get__(self, candidates: Candidates, _: type) -> Floats:
        row: Floats = candidates.rows[self._number]
        return row


class Candidates:
    """A column a worker; see router.prediction for the rows."""

    blocks_total = _Row(Column.BLOCKS_TOTAL)
    max_in_flight = _Row(Column.MAX_SEQUENCES)
    budget = _Row(Column.BUDGET)
    queued_tokens = _Row(Column.QUEUED_TOKENS)
    in_flight = _Row(Column.SEQUENCES)
    decoding = _Row(Column.DECODING)
    last_routed = _Row(Column.LAST_ROUTED)
    token_s = _Row(Column.TOKEN_S)
    cached_tokens = _Row(Predicted.CACHED_TOKENS)
    fetched_tokens = _Row(Predicted.FETCHED_TOKENS)
    prefill_tokens = _Row(Predicted.PREFILL_TOKENS)
    used_blocks = _Row(Predicted.USED_BLOCKS)
    free_blocks = _Row(Predicted.FREE_BLOCKS)
    waiting = _Row(Predicted.WAITING)
    queue_s = _Row(Predicted.QUEUE_S)
    memory_s = _Row(Predicted.MEMORY_S)
    prefill_s = _Row(Predicted.PREFILL_S)
    decode_s = _Row(Predicted.DECODE_S)
    ttft_s = _Row(Predicted.TTFT_S)

    def __init__(
        self,
        slots: Slots,
        values: Floats,
        prompt_tokens: int,
        block_size: int,
        held_blocks: Floats,
        now: float,
        sources: Slots | None = None,
    ) -> None:
        """See router.prediction.predict."""
        self.slots = slots
        self.prompt_tokens = prompt_tokens
        self.block_size = block_size
        self.rows = predict(values, slots, held_blocks, prompt_tokens, block_size, now, sources)
        self._sources = slots if sources is None else sources
        self._held_blocks = held_blocks
        self._values = values
        self._source: int | None = None

    @property
    def prompt_blocks(self) -> int:
        """Blocks that the prompt fills, the last one in part."""
        return -(-self.prompt_tokens // self.block_size)

    def __len__(self) -> int:
        return len(self.slots)

    def source(self) -> int:
        """The slot of the one to fetch from: of the sources that hold most of the prompt the least busy, when first
        asked for."""
        if self._source is None:
            held = np.minimum(self._held_blocks[1, self._sources], (self.prompt_tokens - 1) // self.block_size)
            most = self._sources[held == held.max()]
            self._source = int(most[self._values[Column.SEQUENCES, most].argmin()])
        return self._source

    def at(self, index: int) -> list[float]:
        """One of them: its value in each row."""
        values: list[float] = self.rows[:, index].tolist()
        return values

    def row(self, index: int, names: Sequence[str], scores: Floats) -> Candidate:
        """One of them for people; `names` by slot."""
        at = self.at(index)
        return Candidate(
            worker_id=names[self.slots[index]],
            cached_tokens=int(at[Predicted.CACHED_TOKENS]),
            fetched_tokens=int(at[Predicted.FETCHED_TOKENS]),
            prefill_tokens=int(at[Predicted.PREFILL_TOKENS]),
            queued_prefill_tokens=int(at[Column.QUEUED_TOKENS]),
            running=int(at[Column.DECODING]),
            in_flight=int(at[Column.SEQUENCES]),
            max_in_flight=int(at[Column.MAX_SEQUENCES]),
            free_blocks=int(at[Predicted.FREE_BLOCKS]),
            last_routed=int(at[Column.LAST_ROUTED]),
            queue_s=at[Predicted.QUEUE_S],
            memory_s=at[Predicted.MEMORY_S],
            fetch_s=at[Predicted.FETCH_S],
            prefill_s=at[Predicted.PREFILL_S],
            decode_s=at[Predicted.DECODE_S],
            score=float(scores[index]),
            predicted_ttft_s=at[Predicted.TTFT_S],
        )
