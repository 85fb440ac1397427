"""How two accounts of the same workers differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_events.events import BlockStored, EventBatch
from kv_events.inspect.diff import (
    NOTHING_HELD,
    Account,
    HeldState,
    StreamDiff,
    describe,
    diff_accounts,
    diff_states,
    diff_trees,
    states_of,
)
from kv_events.inspect.recording import RecordingReader, RecordingWriter
from radix import make_tree
from radix.digest import SetDigest
from tests.support.recordings import Fleet, blocks, recorded

Held = dict[int, int]  # block -> mask of tiers


def state(held: Held) -> HeldState:
    digest = SetDigest()
    for tier in range(3):
        digest.add(blocks(*(block for block, mask in held.items() if mask >> tier & 1)), tier)
    ordered = sorted(held)
    return HeldState(digest.value, blocks(*ordered), np.array([held[block] for block in ordered], dtype=np.uint8))


held = st.dictionaries(st.integers(1, 30), st.integers(1, 7), max_size=20)


@given(held, held, st.integers(0, 30))
def test_states_differ_as_sets_do(a: Held, b: Held, listed: int) -> None:
    """Missing, extra and moved blocks, all counted, the first listed, by hash."""
    diff = diff_states(state(a), state(b), listed)
    missing, extra = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
    moved = sorted((block, a[block], b[block]) for block in a.keys() & b.keys() if a[block] != b[block])
    assert diff.equal == (a == b)
    assert (diff.blocks_a, diff.blocks_b) == (len(a), len(b))
    assert (diff.missing, diff.extra, diff.moved) == (len(missing), len(extra), len(moved))
    assert diff.missing_blocks == missing[:listed]
    assert diff.extra_blocks == extra[:listed]
    assert diff.moved_blocks == moved[:listed]
    assert json.dumps(diff.as_json())


@given(st.dictionaries(st.integers(0, 5), held, max_size=4))
def test_a_tree_tells_what_each_worker_holds(workers: dict[int, Held]) -> None:
    """Every worker that has a name, in every tier, with its digest."""
    tree = make_tree()
    for number, blocks_held in workers.items():
        for block, mask in blocks_held.items():
            for tier in range(3):
                if mask >> tier & 1:
                    tree.store(number, blocks(block), 0, tier)
    names = ["a", "", "c", "d", "e", "f"]
    states = states_of(tree, names)
    assert states.keys() == set(names) - {""}
    for number, name in enumerate(names):
        if name:
            expected = state(workers.get(number, {}))
            assert states[name].digest == expected.digest
            assert states[name].hashes.tolist() == expected.hashes.tolist()
            assert states[name].masks.tolist() == expected.masks.tolist()


def test_workers_that_one_account_does_not_know_hold_nothing_by_it() -> None:
    """And are listed nevertheless."""
    one = state({5: 1})
    diffs = diff_trees({"a": one, "b": one}, {"b": one, "c": NOTHING_HELD})
    assert {name: (diff.equal, diff.missing) for name, diff in diffs.items()} == {
        "a": (False, 1),
        "b": (True, 0),
        "c": (True, 0),
    }


def diffs_of(a: Path, b: Path) -> list[StreamDiff]:
    with RecordingReader(a) as first, RecordingReader(b) as second:
        return diff_accounts(Account(first), Account(second))


def rewritten(path: Path, copy: Path, change: Callable[[EventBatch], EventBatch | None]) -> None:
    """The same recording, but for its batches."""
    with RecordingReader(path) as reader, RecordingWriter(copy.open("wb")) as writer:
        for record in reader.records():
            if record.kind.name == "SNAPSHOT":
                writer.snapshot(record.worker, record.snapshot(), record.time_ns)
            elif (batch := change(record.batch())) is not None:
                writer.batch(record.worker, batch, record.time_ns)


def test_recordings_of_the_same_are_equal(tmp_path: Path) -> None:
    """Whatever their chunks and times."""
    recorded(tmp_path / "a")
    rewritten(tmp_path / "a", tmp_path / "b", lambda batch: batch)
    diffs = diffs_of(tmp_path / "a", tmp_path / "b")
    assert [diff.name for diff in diffs] == ["worker-0", "worker-1", "worker-2"]
    assert all(diff.equal for diff in diffs)
    assert sum(diff.compared for diff in diffs) == 200
    assert json.dumps([diff.as_json() for diff in diffs])


def test_the_first_batch_that_differs_is_named_and_told(tmp_path: Path) -> None:
    """Of each worker; and which blocks that makes."""
    recorded(tmp_path / "a", workers=2)

    def change(batch: EventBatch) -> EventBatch:
        if batch.worker != "worker-1" or batch.seq < 50:
            return batch
        more = (*batch.events, BlockStored(blocks(2**50 + batch.seq), 0, 16))
        return batch._replace(events=more)

    rewritten(tmp_path / "a", tmp_path / "b", change)
    same, different = diffs_of(tmp_path / "a", tmp_path / "b")
    assert same.equal
    assert not different.equal
    assert different.first is not None
    assert (different.first.epoch, different.first.seq) == (1, 50)
    assert different.first.a != different.first.b
    assert "digest" in different.first.a
    count = different.position_a[1] - 50
    assert different.differing == count
    assert different.state.missing == 0
    assert 0 < different.state.extra <= count, "since the worker was cleared last"
    assert all(block >= 2**50 + 50 for block in different.state.extra_blocks)


def test_a_batch_that_one_recording_lacks_is_a_difference(tmp_path: Path) -> None:
    """The side that lacks it is empty."""
    recorded(tmp_path / "a", workers=1)
    rewritten(tmp_path / "a", tmp_path / "b", lambda batch: None if batch.seq == 100 else batch)
    (diff,) = diffs_of(tmp_path / "a", tmp_path / "b")
    assert diff.differing == 1
    assert diff.first is not None
    assert (diff.first.seq, diff.first.b) == (100, "")
    assert diff.position_b == (1, 100)
    (diff,) = diffs_of(tmp_path / "b", tmp_path / "a")
    assert diff.first is not None
    assert diff.first.a == ""


def test_recordings_that_overlap_are_compared_where_they_do(tmp_path: Path) -> None:
    """One that began later and one that ended sooner; none at all; and batches that came twice, or out of order."""
    fleet = Fleet(workers=1)
    with RecordingWriter((tmp_path / "a").open("wb")) as a, RecordingWriter((tmp_path / "b").open("wb")) as b:
        fleet.begin(a)
        fleet.record(a, 10)
        fleet.begin(b)
        batches = [batch for _, batch in fleet.steps(30)]
        for batch in batches:
            b.batch("worker-0", batch, 0)
        for batch in [*batches[:5], batches[7], *batches[3:20]]:
            a.batch("worker-0", batch, 0)
    (diff,) = diffs_of(tmp_path / "a", tmp_path / "b")
    assert (diff.compared, diff.differing, diff.first) == (20, 0, None)
    assert (diff.position_a, diff.position_b) == ((1, 30), (1, 40))
    fleet.restart("worker-0")
    with RecordingWriter((tmp_path / "c").open("wb")) as c:
        fleet.record(c, 5)
    (diff,) = diffs_of(tmp_path / "a", tmp_path / "c")
    assert (diff.compared, diff.position_b) == (0, (2, 5))


def test_a_stream_that_one_recording_lacks_is_a_difference(tmp_path: Path) -> None:
    """Even where it holds nothing."""
    with RecordingWriter((tmp_path / "a").open("wb")) as writer:
        Fleet(workers=2).begin(writer)
    with RecordingWriter((tmp_path / "b").open("wb")) as writer:
        Fleet(workers=1).begin(writer)
    same, missing = diffs_of(tmp_path / "a", tmp_path / "b")
    assert same.equal
    assert (missing.name, missing.in_a, missing.in_b, missing.equal) == ("worker-1", True, False, False)


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_in_words(seed: int) -> None:
    """Events, blocks and digest."""
    _, batch = Fleet(seed=seed).step()
    assert describe(batch).startswith(f"{len(batch.events)} events, ")
    assert batch.digest.hex() in describe(batch)
