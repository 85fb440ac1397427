"""How things are timed: on one core, in turn, with what the process holds known."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")


def cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def pin(to: Iterable[int]) -> None:
    """Keep every thread of this process on these cores; threads that are started later inherit it."""
    wanted = set(to)
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # one that has just ended
            os.sched_setaffinity(int(thread.name), wanted)


def in_turn(items: Sequence[Item], repeat: int) -> list[Item]:
    """The items in the order for this repeat: who goes first changes, so no side always meets the other's caches."""
    return list(items) if repeat % 2 == 0 else list(reversed(items))


def resident_bytes() -> int:
    """The process's resident memory, after garbage and freed memory went back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
