"""Index: workers by name over a tree that knows them by number."""

from __future__ import annotations

import numpy as np
import pytest

from kv_events.events import BlockStored
from kv_events.log import EventLog
from radix.keys import Hashes
from router.index import Index


def hold(index: Index, worker_id: str, hashes: Hashes) -> None:
    index.view(worker_id).offer(EventLog(worker_id, 1, 16).append([BlockStored(hashes, 0, 16)], 0.0))


def matched(index: Index, hashes: Hashes) -> dict[str, int]:
    """Depths in any tier by name; all is held on the device here."""
    device, anywhere = index.match(hashes)
    assert device.tolist() == anywhere.tolist()
    assert len(anywhere) == len(index.slot_names)
    return {name: int(depth) for name, depth in zip(index.slot_names, anywhere, strict=True) if depth}


def test_matches_come_by_slot() -> None:
    """Each worker with its own depth; those that hold nothing have zero, and so have slots that nobody has."""
    index = Index()
    hashes = np.arange(1, 6, dtype=np.uint64)
    for name in ("a", "b", "c"):
        index.add(name)
    hold(index, "a", hashes[:2])
    hold(index, "c", hashes)
    assert matched(index, hashes) == {"a": 2, "c": 5}
    assert matched(index, hashes[:0]) == {}
    index.check(["a", "b", "c"])


def test_caps_hold_for_the_tree() -> None:
    """One worker's blocks stop at its cap, all workers' at the other; what is known is matched."""
    index = Index(max_blocks=5, max_blocks_per_worker=3)
    hashes = np.arange(1, 5, dtype=np.uint64)
    for name in ("a", "b"):
        index.add(name)
        hold(index, name, hashes)
    assert matched(index, hashes) == {"a": 3, "b": 2}
    assert [index.tree.refused(number) for number in (0, 1)] == [1, 2]
    assert index.at_cap() == {"a": 1, "b": 2}
    index.check(["a", "b"])
    with pytest.raises(ValueError, match="max_blocks_per_worker is 0"):
        Index(max_blocks_per_worker=0)


def test_numbers_are_used_again_and_nothing_is_inherited() -> None:
    """A worker that comes after a dropped one gets its number, not its blocks; numbers stay dense."""
    index = Index()
    hashes = np.arange(1, 4, dtype=np.uint64)
    for name in ("a", "b", "c"):
        index.add(name)
        hold(index, name, hashes)
    index.drop("b")
    index.drop("a")
    index.drop("unknown")
    assert matched(index, hashes) == {"c": 3}
    index.check(["c"])
    assert [index.add(name).worker_index for name in ("d", "e", "f")] == [0, 1, 3]
    assert matched(index, hashes) == {"c": 3}
    index.check(["c", "d", "e", "f"])
