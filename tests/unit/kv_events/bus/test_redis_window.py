"""What a stream keeps, against the whole history."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kv_events.bus.redis_window import Window

MAX_BATCHES, MAX_BYTES = 8, 100

steps = st.lists(st.tuples(st.lists(st.integers(0, 60), max_size=5), st.booleans()), max_size=60)


@given(st.integers(0, 20), st.integers(0, 10), steps)
def test_what_is_kept_joins_the_snapshot_and_is_bounded(
    start: int, ahead: int, pages: list[tuple[list[int], bool]]
) -> None:
    """After every page of entries, where a snapshot is written once one is due, or sooner: nothing that follows it is
    let go, nothing is let go needlessly, and no more is kept than the bounds allow but what the snapshot needs."""
    sizes: list[int] = []
    snapshot = start + ahead
    window = Window(start, snapshot, max_batches=MAX_BATCHES, max_bytes=MAX_BYTES)
    for page, wanted in pages:
        for size in page:
            window.add(size)
            sizes.append(size)
        assert window.next == start + len(sizes)
        if window.next >= snapshot and (wanted or window.snapshot_is_old):
            snapshot = window.next
            window.snapshot_taken(snapshot)
            assert not window.snapshot_is_behind
        since = sizes[max(0, snapshot - start) :]
        assert window.snapshot_is_behind == bool(since)
        assert window.snapshot_is_old == (2 * (window.next - snapshot) >= MAX_BATCHES or 2 * sum(since) >= MAX_BYTES)
        kept = sizes[window.first - start :]
        assert start <= window.first <= max(start, snapshot)
        fits = len(kept) <= MAX_BATCHES and sum(kept) <= MAX_BYTES
        assert fits or window.first >= min(snapshot, window.next)
        if window.first > start:
            more = sizes[window.first - start - 1 :]
            assert len(more) > MAX_BATCHES or sum(more) > MAX_BYTES


def test_a_snapshot_of_an_earlier_position_leaves_what_follows_it() -> None:
    """One that was taken while entries went on: they are still to be kept, and count towards the next."""
    window = Window(0, 0, max_batches=4, max_bytes=1000)
    for _ in range(6):
        window.add(10)
    assert (window.first, window.next, window.snapshot_is_old) == (0, 6, True)
    window.snapshot_taken(3)
    assert (window.first, window.snapshot_is_behind, window.snapshot_is_old) == (2, True, True)
    window.snapshot_taken(6)
    assert (window.first, window.snapshot_is_behind, window.snapshot_is_old) == (2, False, False)
    for _ in range(10):
        window.add(10)
    assert window.first == 6
