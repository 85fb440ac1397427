"""What decisions read of every worker, as columns: they compute with arrays over workers, not worker by worker."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum, auto
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Slots: TypeAlias = NDArray[np.intp]


class Column(IntEnum):
    """Rows of the table's array. Sizes in tokens, blocks or sequences as named; times in seconds."""

    # What the worker is.
    BLOCKS_TOTAL = 0
    MAX_SEQUENCES = auto()  # running and waiting
    BUDGET = auto()  # tokens of a step
    # What it has to do (router.load).
    QUEUED = auto()  # requests without a first token
    QUEUED_TOKENS = auto()  # prompt tokens computed before a request that comes now
    QUEUED_S = auto()  # of these tokens, steps apart
    HEAD_S = auto()  # of the request that is computed first
    HEAD_SINCE = auto()  # when that began, as far as known
    SEQUENCES = auto()
    DECODING = auto()
    CONTEXT = auto()  # tokens of the decoding sequences
    PENDING_BLOCKS = auto()  # of requests that BLOCKS_IN_USE does not count yet
    BLOCKS_IN_USE = auto()
    LAST_ROUTED = auto()  # serial of the latest decision for it; 0: never
    RESIDENCE_S = auto()  # how long a request's blocks are in use
    # How fast it is (router.timing).
    PREFILL_STEP_S = auto()
    TOKEN_S = auto()
    ATTENTION_S = auto()
    DECODE_STEP_S = auto()
    SEQUENCE_S = auto()
    CONTEXT_S = auto()
    FETCH_TOKEN_S = auto()  # to pull a token's KV from another worker; 0: it cannot


class WorkerTable:
    """A column's values by slot: the worker's number in the index. Slots that nobody has hold zeros."""

    def __init__(self) -> None:
        self.values: Floats = np.zeros((len(Column), 16))

    def add(self, slot: int) -> None:
        """Make room for a slot, all zeros."""
        while slot >= self.values.shape[1]:
            self.values = np.concatenate([self.values, np.zeros_like(self.values)], axis=1)
        self.values[:, slot] = 0

    def set(self, slot: int, first: Column, values: Sequence[float]) -> None:
        """Set neighbouring columns from `first` on."""
        self.values[first : first + len(values), slot] = values
