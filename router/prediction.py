"""What is predicted for a prompt on each worker, as rows over workers; the native core does the same in one pass."""

from __future__ import annotations

from enum import IntEnum, auto

import numpy as np

from radix.backend import native
from router.table import Column, Floats, Slots

HOST_SHARE = 0.1
"""What a token that comes back from the host tier costs, in those that are computed: 320 KiB of KV over PCIe 5 beside
140 GFLOP, for 70B on 4 H100; a tenth is on the safe side."""
FETCH_START_S = 0.005  # of a pull from another worker, besides its tokens: a few round trips
HEAD_LEFT = 0.1  # of the head's time is left at least while its first token has not come


class Predicted(IntEnum):
    """Rows after the table's columns. Sizes in tokens, blocks or requests as named; times in seconds."""

    CACHED_TOKENS = len(Column)  # there, or at another worker from which it pays to fetch them
    FETCHED_TOKENS = auto()  # the latter ones
    PREFILL_TOKENS = auto()  # not cached
    USED_BLOCKS = auto()  # in use, or needed by requests on the way there
    FREE_BLOCKS = auto()
    WAITING = auto()  # requests whose first step has not begun
    QUEUE_S = auto()
    MEMORY_S = auto()  # until the pool has room for the prompt
    FETCH_S = auto()
    TOKENS_S = auto()  # of the prefill, steps apart
    PREFILL_S = auto()
    DECODE_S = auto()  # until the decode step under way ends
    TTFT_S = auto()


ROWS = len(Column) + len(Predicted)


def queues_s_reference(values: Floats, slots: Slots, now: float) -> Floats:
    """See queues_s."""
    return _queues_s(values[:, slots], now)


def _queues_s(values: Floats, now: float) -> Floats:
    step_s = values[Column.PREFILL_STEP_S] + _beside_s(values)
    queue_s: Floats = values[Column.QUEUED_S] + step_s * np.ceil(values[Column.QUEUED_TOKENS] / values[Column.BUDGET])
    queue_s -= np.minimum(now - values[Column.HEAD_SINCE], (1 - HEAD_LEFT) * values[Column.HEAD_S])
    return np.maximum(queue_s, 0.0)


def _beside_s(values: Floats) -> Floats:
    """What the decoding sequences add to a step."""
    per_sequence: Floats = values[Column.SEQUENCE_S] * values[Column.DECODING]
    per_context: Floats = values[Column.CONTEXT_S] * values[Column.CONTEXT]
    return per_sequence + per_context


def predict_reference(
    values: Floats,
    slots: Slots,
    held_blocks: Floats,
    prompt_tokens: int,
    block_size: int,
    now: float,
    sources: Slots | None = None,
) -> Floats:
    """See predict."""
    table = values[:, slots]
    rows = np.concatenate([table, np.empty((len(Predicted), len(slots)))])
    # The last token is computed in any case, and blocks are reused whole.
    most = (prompt_tokens - 1) // block_size
    device, held = np.minimum(held_blocks[:, slots], most)
    used = rows[Predicted.USED_BLOCKS] = table[Column.BLOCKS_IN_USE] + table[Column.PENDING_BLOCKS]
    free = rows[Predicted.FREE_BLOCKS] = np.maximum(table[Column.BLOCKS_TOTAL] - used, 0.0)

    beside_s = _beside_s(table)
    decode_s = table[Column.DECODE_STEP_S] + beside_s
    # Who comes while others wait for their first step shares it, and makes it longer: up to a whole budget's.
    begun = (now - table[Column.HEAD_SINCE] > decode_s) & (table[Column.QUEUED] > 0)
    rows[Predicted.WAITING] = table[Column.QUEUED] - begun
    queue_s = rows[Predicted.QUEUE_S] = _queues_s(table, now)
    host_s = (held - device) * block_size * HOST_SHARE * table[Column.TOKEN_S]

    def computing(cached: Floats) -> tuple[Floats, Floats, Floats]:
        """Tokens to compute after so many cached ones; the time, steps apart, and in all."""
        tokens = prompt_tokens - cached
        tokens_s = tokens * (table[Column.TOKEN_S] + table[Column.ATTENTION_S] * (cached + tokens / 2))
        steps_s = (table[Column.PREFILL_STEP_S] + beside_s) * np.ceil(tokens / table[Column.BUDGET])
        return tokens, tokens_s, tokens_s + steps_s + host_s

    # What another worker holds can be fetched from it.
    longest = np.minimum(held_blocks[1, slots if sources is None else sources], most).max(initial=0.0)
    missing = (longest - held) * block_size
    fetch_s = FETCH_START_S + missing * table[Column.FETCH_TOKEN_S]
    alone, fetched = computing(held * block_size), computing(np.full(len(slots), longest * block_size))
    fetches = (table[Column.FETCH_TOKEN_S] > 0) & (missing > 0) & (fetched[2] + fetch_s < alone[2])
    rows[Predicted.FETCHED_TOKENS] = np.where(fetches, missing, 0.0)
    rows[Predicted.FETCH_S] = np.where(fetches, fetch_s, 0.0)
    rows[Predicted.CACHED_TOKENS] = held * block_size + rows[Predicted.FETCHED_TOKENS]
    for row, other, own in zip(
        (Predicted.PREFILL_TOKENS, Predicted.TOKENS_S, Predicted.PREFILL_S), fetched, alone, strict=True
    ):
        rows[row] = np.where(fetches, other, own)
    # An idle prefill queue still means waiting for the end of the decode step under way: half of one.
    decodes = (table[Column.QUEUED_TOKENS] == 0) & (table[Column.DECODING] > 0)
    rows[Predicted.DECODE_S] = np.where(decodes, decode_s / 2, 0.0)
    # While the pool has no room for the prompt, blocks come back as others end: in use over how long they are in use.
    lacking = -(-prompt_tokens // block_size) - device - free
    release_s = table[Column.RESIDENCE_S] / np.maximum(used, 1.0)
    memory_s = rows[Predicted.MEMORY_S] = np.where(lacking > 0, lacking * release_s, 0.0)
    ready_s = np.maximum(np.maximum(queue_s, memory_s), rows[Predicted.FETCH_S])  # all three go on at once
    rows[Predicted.TTFT_S] = ready_s + rows[Predicted.PREFILL_S] + rows[Predicted.DECODE_S]
    return rows


def predict(
    values: Floats,
    slots: Slots,
    held_blocks: Floats,
    prompt_tokens: int,
    block_size: int,
    now: float,
    sources: Slots | None = None,
) -> Floats:
    """Shape (ROWS, len(slots)): what the table says of these slots, and what is predicted for each.

    The queue is what was sent there and has no first token yet, in steps as full as they can be, less what must have
    been computed since its head began. A step with prefill costs what the decoding sequences beside it cost, too.
    `values` is the whole table; `held_blocks`, shape (2, slots of the table), are leading blocks of the prompt held on
    the device, and in any tier. `sources` are those to fetch from, by default the same slots. Raises ValueError or
    IndexError for a slot that neither has.
    """
    if native is None:
        return predict_reference(values, slots, held_blocks, prompt_tokens, block_size, now, sources)
    rows: Floats = native.predict(
        values, slots, held_blocks, prompt_tokens, block_size, now, HEAD_LEFT, HOST_SHARE, FETCH_START_S, sources
    )
    return rows


def queues_s(values: Floats, slots: Slots, now: float) -> Floats:
    """Shape (len(slots),): seconds before each of them, in the whole table, would begin with a request that comes now:
    QUEUE_S alone."""
    if native is None:
        return queues_s_reference(values, slots, now)
    queues: Floats = native.queues_s(values, slots, now, HEAD_LEFT)
    return queues
