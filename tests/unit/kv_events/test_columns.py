"""Events and snapshots as columns."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from kv_events.columns import are_distinct, changes_of, changes_to
from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, Snapshot, UnknownEvent
from radix import make_tree
from radix.digest import EMPTY_DIGEST
from radix.keys import ROOT_HASH, Hashes
from radix.tree import CLEAR, REMOVE, STORE, Changes, Tier
from tests.support.prefix_trees import holdings


def blocks(*hashes: int) -> Hashes:
    return np.array(hashes, dtype=np.uint64)


def rows(changes: Changes) -> list[tuple[int, int, int, list[int]]]:
    columns = [column.tolist() for column in (changes.kinds, changes.tiers, changes.parents)]
    parts = [part.tolist() for part in np.split(changes.hashes, changes.ends)]
    assert parts.pop() == [], "all hashes belong to a row"
    return list(zip(*columns, parts, strict=True))


def test_each_known_event_is_a_row() -> None:
    """In order, in its tier; unknown ones are left out; no events are no rows."""
    events = (
        BlockStored(blocks(1, 2**64 - 1), 2**63, 16, medium="CPU"),
        UnknownEvent("BlockTouched"),
        BlockRemoved(blocks(7), "STORAGE"),
        AllBlocksCleared(),
        BlockStored(blocks(), ROOT_HASH, 16),
    )
    assert rows(changes_of(events)) == [
        (STORE, Tier.HOST, 2**63, [1, 2**64 - 1]),
        (REMOVE, Tier.DISK, ROOT_HASH, [7]),
        (CLEAR, Tier.DEVICE, ROOT_HASH, []),
        (STORE, Tier.DEVICE, ROOT_HASH, []),
    ]
    assert rows(changes_of(())) == []


FORESTS = st.dictionaries(st.integers(1, 40), st.tuples(st.integers(0, 39), st.integers(1, 7)), max_size=30)


@settings(deadline=None)
@given(FORESTS, st.booleans())
def test_a_tree_that_takes_over_a_snapshot_holds_all_of_it(
    forest: dict[int, tuple[int, int]], device_only: bool
) -> None:
    """Every block with its parent, in its tiers, whatever the order of the chains."""
    masks = np.array([mask for _, mask in forest.values()], dtype=np.uint8)
    snapshot = Snapshot(
        "w0", 1, 1, EMPTY_DIGEST, 16, blocks(*forest), blocks(*(parent for parent, _ in forest.values())),
        None if device_only else masks,
    )  # fmt: skip
    tree = make_tree()
    tree.apply(3, changes_to(snapshot))
    parents, members = holdings(tree)
    assert parents == {block: parent for block, (parent, _) in forest.items()}
    assert members == {block: [(3, 1 if device_only else mask)] for block, (_, mask) in forest.items()}


def test_a_chain_is_one_row_in_each_tier() -> None:
    """So that a snapshot of long prompts is applied as fast as it could be."""
    masks = np.array([1, 3, 3, 2, 1, 1], dtype=np.uint8)
    snapshot = Snapshot("w0", 1, 1, EMPTY_DIGEST, 16, blocks(1, 2, 3, 4, 8, 9), blocks(0, 1, 2, 3, 2, 8), masks)
    assert rows(changes_to(snapshot)) == [
        (STORE, Tier.DEVICE, ROOT_HASH, [1, 2, 3]),
        (STORE, Tier.DEVICE, 2, [8, 9]),
        (STORE, Tier.HOST, 1, [2, 3, 4]),
    ]


@given(st.lists(st.integers(1, 9) | st.just(2**64 - 1), max_size=9))
def test_distinct_hashes_are_told_from_repeated_ones(hashes: list[int]) -> None:
    """Wherever the second one is."""
    assert are_distinct(blocks(*hashes)) == (len(set(hashes)) == len(hashes))
