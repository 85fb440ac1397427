"""What a stream in Redis keeps of a worker's batches, so that its snapshot and its kept entries always join. No I/O."""

from __future__ import annotations

from collections import deque
from itertools import islice


class Window:
    """The entries of one stream, by position: batch `s` lies between positions s and s + 1.

    At most `max_batches` of them and `max_bytes` of payload are to be kept, but always all that follow the snapshot.
    With a snapshot at every half of that, the bounds are exceeded by what one round trip sends at most.
    """

    def __init__(self, start: int, snapshot: int, *, max_batches: int, max_bytes: int) -> None:
        """Nothing is kept yet: the stream starts at position `start`, and the snapshot is of `snapshot`."""
        self._sizes: deque[int] = deque()
        self._first = start
        self._bytes = 0
        self._snapshot = snapshot
        self._bytes_since = 0
        self._max_batches, self._max_bytes = max_batches, max_bytes

    @property
    def first(self) -> int:
        """The position from which entries are to be kept."""
        return self._first

    @property
    def next(self) -> int:
        """The position after the last entry."""
        return self._first + len(self._sizes)

    @property
    def snapshot_is_old(self) -> bool:
        """Whether another one is due."""
        return 2 * (self.next - self._snapshot) >= self._max_batches or 2 * self._bytes_since >= self._max_bytes

    @property
    def snapshot_is_behind(self) -> bool:
        """Whether entries have followed it."""
        return self.next > self._snapshot

    def add(self, size_bytes: int) -> None:
        """One more entry."""
        self._sizes.append(size_bytes)
        self._bytes += size_bytes
        if self.next > self._snapshot:
            self._bytes_since += size_bytes
        self._trim()

    def snapshot_taken(self, position: int) -> None:
        """A snapshot of a position that the stream has reached replaces the former one."""
        assert self._snapshot <= position <= self.next, f"{position} is not in {self._snapshot} to {self.next}"
        self._snapshot = position
        self._bytes_since = sum(islice(reversed(self._sizes), self.next - position))
        self._trim()

    def _trim(self) -> None:
        while self._first < self._snapshot and self._sizes and self._is_over():
            self._bytes -= self._sizes.popleft()
            self._first += 1

    def _is_over(self) -> bool:
        return len(self._sizes) > self._max_batches or self._bytes > self._max_bytes
