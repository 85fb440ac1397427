"""How fast a worker is right now beside what was learned of it: lower clocks, a neighbour on its GPU, and back."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TypeAlias

LATEST = 5  # reports that tell the pace: 2.5 s of a busy worker; stalls in two of them change nothing
LEAST = 3  # reports before there is any
LEAST_S = 0.02  # of expected work in a report: less tells too little
MOST_AGE = 20  # reports: a worker without work for that long, avoided for its pace perhaps, is tried again
MOST = 8.0  # times slower, or faster, than was learned
START, KEEP = 1.2, 1.05  # a pace nearer to 1 is taken for none, one that is there only when it is much nearer

Terms: TypeAlias = Sequence[float]  # work or costs, term by term


def expected_s(work: Terms, costs: Terms) -> float:
    """What work takes, term by term. Written out, as it is asked for at every report."""
    a, b, c, d, e, f = work
    g, h, i, j, k, m = costs
    return a * g + b * h + c * i + d * j + e * k + f * m


class Pace:
    """Observed by expected seconds: the median over the latest reports that held work worth the name."""

    def __init__(self) -> None:
        self.value = 1.0
        self._latest: deque[tuple[int, Terms, float, float]] = deque(maxlen=LATEST)  # (report, work, seconds, expected)
        self._changed = False

    def add(self, report: int, terms: Terms, seconds: float, expected: float) -> None:
        """The work in the report of that number, what it took and what was expected."""
        if expected >= LEAST_S:
            self._latest.append((report, terms, seconds, expected))
            self._changed = True

    def fitted(self, costs: Terms) -> None:
        """Other costs were learned: something else is expected."""
        for _ in range(len(self._latest)):
            report, terms, seconds, _ = self._latest.popleft()
            self._latest.append((report, terms, seconds, max(expected_s(terms, costs), 1e-6)))
        self._changed = True

    def update(self, report: int) -> bool:
        """The pace as of a report. True where it changed."""
        while self._latest and self._latest[0][0] <= report - MOST_AGE:
            self._latest.popleft()
            self._changed = True
        if not self._changed:
            return False
        self._changed = False
        before, self.value = self.value, self._found()
        return self.value != before

    def _found(self) -> float:
        if len(self._latest) < LEAST:
            return 1.0
        ratios = sorted(seconds / expected for _, _, seconds, expected in self._latest)
        low, high = ratios[(len(ratios) - 1) // 2], ratios[len(ratios) // 2]
        ratio = low if low > 1 else min(high, 1.0)
        limit = START if self.value == 1.0 else KEEP
        return 1.0 if 1 / limit < ratio < limit else min(max(ratio, 1 / MOST), MOST)
