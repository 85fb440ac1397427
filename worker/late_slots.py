"""Slots of a pool that a transport may still write after its pull was given up: free once it no longer does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence

LOOK_S = 0.02  # how late it may be noticed that a slot is free


class LateSlots:
    """Watches a memory's `in_flight` while any are kept, on a thread of its own."""

    def __init__(self, in_flight: Collection[int], give_back: Callable[[Sequence[int]], None]) -> None:
        """`give_back` gets the slots that left `in_flight`, each once."""
        self._in_flight = in_flight
        self._give_back = give_back
        self._changed = threading.Condition()
        self._kept: set[int] = set()  # no more than are claimed of the pool
        self._watching = False
        self._closed = False

    def keep(self, slots: Collection[int]) -> None:
        """They are given back later."""
        with self._changed:
            self._kept.update(slots)
            if self._kept and not self._watching and not self._closed:
                self._watching = True
                threading.Thread(target=self._watch, name="rhizome-late-slots", daemon=True).start()

    def close(self) -> None:
        """What is still kept is never given back: its pool goes away."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while self._kept and not self._closed:
                free = [slot for slot in self._kept if slot not in self._in_flight]
                if free:
                    self._kept.difference_update(free)
                    self._give_back(free)
                else:
                    self._changed.wait(LOOK_S)
            self._watching = False
