"""When a pull is given up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from worker.transfer.errors import OutOfTime


class Deadline:
    """A point in time, which may be moved to now from another thread."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._end = clock() + seconds
        self._lock = threading.Lock()
        self._cancelled = False
        self._on_cancel: Callable[[], object] | None = None

    def cancel(self) -> None:
        """Give up now. Whoever waits is told so within transports.POLL_S."""
        with self._lock:
            self._cancelled, wake = True, self._on_cancel
        if wake is not None:
            wake()

    def on_cancel(self, wake: Callable[[], object]) -> None:
        """Call this when cancelled, in place of what was to be called before: it ends the one call that waits."""
        with self._lock:
            self._on_cancel = wake
            cancelled = self._cancelled
        if cancelled:
            wake()

    @property
    def over(self) -> bool:
        """Whether `left` would raise."""
        return self._cancelled or self._end <= self._clock()

    def left(self) -> float:
        """Seconds, more than 0. Raises OutOfTime."""
        if self._cancelled:
            raise OutOfTime("given up")
        left = self._end - self._clock()
        if left <= 0:
            raise OutOfTime(f"not done within {self.seconds:g} s")
        return left
