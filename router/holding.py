"""Requests that wait in the router until their best worker is nearly free: who goes before whom."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import TypeAlias

from router.candidates import Candidates
from router.objective import LATE_S, Objective
from router.request import RouteRequest
from router.table import Floats

HOLD_S = 0.15
"""A worker with less than that to compute before a request is nearly free: enough not to run dry on the way."""
AGE_WEIGHT = 0.4
"""A request goes before another that has so much less work, in seconds, for each second that it has waited longer."""
STALE_S = 0.5
"""Terms of a held request are predicted again after that, and when it goes."""
MAX_HELD = 4096
"""Requests; further ones go to workers at once."""
MAX_CONSIDERED = 64
"""Of these, the first in order, at a time: the others cannot go before them."""
STALL_S = 5.0
"""Where none has gone for so long, the first goes to its best worker, free or not: others may keep all of them busy."""
PATIENCE_S = 0.05
"""Held requests are looked at again after that, whatever is heard."""
MAX_IDLE_TENANTS = 1024
"""Tenants with nothing held whose shares are remembered while others wait, in each line."""


@dataclass(slots=True, eq=False)
class Held:
    """A request that waits, and what it means on each worker."""

    request: RouteRequest
    since: float
    rows: Candidates
    own: Floats  # (workers,): its score on each, queues apart
    work_s: float  # its own prefill where that is least
    compared_at: float
    late: bool = False  # cannot keep the objective any more
    place: _Place = field(init=False)  # in its tenant's queue; Holding's own


_Place: TypeAlias = tuple[float, int]
"""Rank and serial: the least goes first. Ages count as arrivals, so that a rank stays as it is while time passes."""


@dataclass(slots=True, eq=False)
class _Tenant:
    """What one of those that wait has got, in prefill seconds, and its requests in order."""

    got_s: float
    queue: list[tuple[_Place, Held]] = field(default_factory=list)


class _Line:
    """The held requests of one model and priority.

    Each tenant that waits gets the same share of prefill seconds: whoever has got the least goes next. One that begins
    to wait starts with what the least of the others has got, or with its own if that is more, so that nobody saves up a
    share, and nobody gets another by coming anew (the counters of Sheng et al., OSDI 2024; start-time fair queueing).
    """

    def __init__(self) -> None:
        self._waiting: dict[str, _Tenant] = {}
        self._idle: OrderedDict[str, float] = OrderedDict()  # what they have got, in order of their ends

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, held: Held) -> None:
        tenant = self._waiting.get(held.request.tenant)
        if tenant is None:
            least_s = min((other.got_s for other in self._waiting.values()), default=0.0)
            tenant = _Tenant(max(least_s, self._idle.pop(held.request.tenant, 0.0)))
            self._waiting[held.request.tenant] = tenant
        insort(tenant.queue, (held.place, held))

    def remove(self, held: Held, *, served: bool) -> None:
        name = held.request.tenant
        tenant = self._waiting[name]
        self._take(tenant, held)
        tenant.got_s += served * held.work_s
        if not tenant.queue:
            del self._waiting[name]
            self._idle[name] = tenant.got_s
            if len(self._idle) > MAX_IDLE_TENANTS:
                self._idle.popitem(last=False)

    def move(self, held: Held, place: _Place) -> None:
        """Within its tenant's queue."""
        tenant = self._waiting[held.request.tenant]
        self._take(tenant, held)
        held.place = place
        insort(tenant.queue, (place, held))

    def _take(self, tenant: _Tenant, held: Held) -> None:
        at = bisect_left(tenant.queue, (held.place,))
        assert tenant.queue[at][1] is held
        del tenant.queue[at]

    def first(self, most: int) -> list[Held]:
        """Those that go first, in order, as if each were served."""
        if len(self._waiting) == 1:
            (tenant,) = self._waiting.values()
            return [held for _, held in tenant.queue[:most]]
        order: list[Held] = []
        heads = [(tenant.got_s, tenant.queue[0][0], 0, tenant) for tenant in self._waiting.values()]
        heapify(heads)  # places are unique: tenants are never compared
        while heads and len(order) < most:
            got_s, _, at, tenant = heappop(heads)
            held = tenant.queue[at][1]
            order.append(held)
            if at + 1 < len(tenant.queue):
                heappush(heads, (got_s + held.work_s, tenant.queue[at + 1][0], at + 1, tenant))
        return order


class Holding:
    """Held requests by id.

    The least priority number goes first, always: others wait as long as there are such. Of one priority, tenants get
    equal shares. Of one tenant, the shortest work goes first, and age makes up for length; those that cannot keep the
    objective any more count as LATE_S longer.
    """

    def __init__(self, objective: Objective | None = None) -> None:
        self._objective = objective or Objective()
        self._held: dict[str, Held] = {}
        self._lines: dict[str, dict[int, _Line]] = {}  # by model and priority; none is empty
        self._serial = 0
        self.moved_at = 0.0  # when one went last, or the first of those here came

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._held

    @property
    def is_full(self) -> bool:
        """Whether no more are held."""
        return len(self._held) >= MAX_HELD

    def add(self, held: Held) -> None:
        """Hold one that is not held yet."""
        if not self._held:
            self.moved_at = held.since
        self._serial += 1
        held.place = self._rank(held), self._serial
        self._held[held.request.request_id] = held
        lines = self._lines.setdefault(held.request.model, {})
        lines.setdefault(held.request.priority, _Line()).add(held)

    def remove(self, request_id: str) -> bool:
        """It is given up; false for one that is not held."""
        if request_id not in self._held:
            return False
        self._remove(request_id, served=False)
        return True

    def let_go(self, request_id: str, now: float) -> None:
        """It goes."""
        self._remove(request_id, served=True)
        self.moved_at = now

    def compared(self, held: Held) -> None:
        """Its work was predicted again."""
        place = self._rank(held), held.place[1]
        if place != held.place:
            self._lines[held.request.model][held.request.priority].move(held, place)

    def models(self) -> list[str]:
        """The models that requests are held for, as they name them."""
        return list(self._lines)

    def in_order(self, model: str, now: float) -> list[Held]:
        """Those of a model that may go first."""
        order: list[Held] = []
        for _, line in sorted(self._lines[model].items()):
            order += self._first(line, MAX_CONSIDERED - len(order), now)
            if len(order) == MAX_CONSIDERED:
                break
        return order

    def _first(self, line: _Line, most: int, now: float) -> list[Held]:
        while True:
            first = line.first(most)
            newly_late = [
                held for held in first if not held.late and self._objective.is_late(now - held.since, held.work_s)
            ]
            if not newly_late:
                return first
            for held in newly_late:
                held.late = True
                self.compared(held)

    def _rank(self, held: Held) -> float:
        return held.work_s + held.late * LATE_S + AGE_WEIGHT * held.since

    def _remove(self, request_id: str, *, served: bool) -> None:
        held = self._held.pop(request_id)
        lines = self._lines[held.request.model]
        line = lines[held.request.priority]
        line.remove(held, served=served)
        if not line:
            del lines[held.request.priority]
        if not lines:
            del self._lines[held.request.model]
