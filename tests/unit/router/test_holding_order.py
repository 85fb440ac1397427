"""The order of held requests: priorities, then equal shares for tenants, then the shortest with ageing."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router import holding
from router.holding import AGE_WEIGHT, MAX_CONSIDERED, Held, Holding
from router.objective import LATE_S, Objective
from router.request import RouteRequest

NOTHING: Any = None  # of what the order does not depend on


class Waiting(Holding):
    """Requests by name, of given work."""

    def __init__(self, objective: Objective | None = None) -> None:
        super().__init__(objective)
        self.made: dict[str, Held] = {}

    def come(self, name: str, work_s: float, since: float = 0.0, **fields: object) -> None:
        request = RouteRequest(name, "m", 1, np.empty(0, np.uint64), **cast(Any, fields))
        self.made[name] = Held(request, since, NOTHING, NOTHING, work_s, since)
        self.add(self.made[name])

    def names(self, now: float = 0.0) -> list[str]:
        return [held.request.request_id for held in self.in_order("m", now)]

    def serve(self, now: float = 0.0) -> Held:
        """The first goes."""
        first = self.in_order("m", now)[0]
        self.let_go(first.request.request_id, now)
        return first


@given(
    st.lists(
        st.tuples(st.integers(-1, 1), st.integers(0, 100), st.integers(0, 1000)), min_size=1, max_size=MAX_CONSIDERED
    ),
    st.data(),
)
def test_of_one_tenant_the_shortest_goes_first_and_age_makes_up_for_length(
    asked: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    """As all of them sorted anew would say, also after some have gone and the work of others turned out another."""
    waiting = Waiting()
    for number, (priority, work, since) in enumerate(asked):
        waiting.come(str(number), work / 64, since / 64, priority=priority)
    for name in data.draw(st.lists(st.sampled_from(sorted(waiting.made)), unique=True)):
        if data.draw(st.booleans()):
            assert waiting.remove(name)
            del waiting.made[name]
        else:
            waiting.made[name].work_s = data.draw(st.integers(0, 100)) / 64
            waiting.compared(waiting.made[name])
    assert len(waiting) == len(waiting.made)
    if not waiting.made:
        assert waiting.models() == []
        return

    def rank(held: Held) -> tuple[int, float]:
        return held.request.priority, held.work_s + AGE_WEIGHT * held.since

    order = waiting.in_order("m", 1000.0)
    assert sorted(map(id, order)) == sorted(map(id, waiting.made.values()))
    assert [rank(held) for held in order] == sorted(map(rank, order))


def test_a_tenant_that_floods_does_not_make_others_wait() -> None:
    """One short request beside a thousand shorter ones of another is next but one."""
    waiting = Waiting()
    for number in range(1000):
        waiting.come(f"flood-{number}", 0.5, tenant="flood")
    waiting.serve()
    waiting.come("single", 2.0, tenant="single")
    assert waiting.names().index("single") <= 1
    assert len(waiting.names()) == MAX_CONSIDERED


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 100)), min_size=1, max_size=60))
def test_tenants_that_wait_get_equal_shares_of_prefill_seconds(asked: list[tuple[str, int]]) -> None:
    """While two wait, what they have got differs by no more than the longest of one's requests."""
    waiting = Waiting()
    for number, (tenant, work) in enumerate(asked):
        waiting.come(str(number), work / 64, tenant=tenant)
    left = {tenant: [work / 64 for name, work in asked if name == tenant] for tenant, _ in asked}
    longest = {tenant: max(works) for tenant, works in left.items()}
    got = dict.fromkeys(left, 0.0)
    planned = waiting.names()
    served = []
    while waiting:
        held = waiting.serve()
        served.append(held.request.request_id)
        tenant = held.request.tenant
        got[tenant] += held.work_s
        left[tenant].remove(held.work_s)
        both = [name for name in got if left[name] or name == tenant]
        assert all(got[one] - got[other] <= longest[one] for one in both for other in both if left[other])
    assert served == planned


def test_nobody_saves_up_a_share() -> None:
    """Who was idle for long is not ahead of those who were served meanwhile."""
    waiting = Waiting()
    for number in range(30):
        waiting.come(f"a{number}", 1.0, tenant="a")
    for _ in range(10):
        waiting.serve()
    for number in range(10):
        waiting.come(f"b{number}", 1.0, tenant="b")
    served = [waiting.serve().request.tenant for _ in range(10)]
    assert served.count("a") == served.count("b")


def test_nobody_gets_another_share_by_coming_anew() -> None:
    """One request at a time, again as soon as it was served: still half of the seconds."""
    waiting = Waiting()
    for number in range(200):
        waiting.come(f"a{number}", 0.1, tenant="a")
    got = {"a": 0.0, "b": 0.0}
    waiting.come("b", 4.0, tenant="b")
    for number in range(60):
        held = waiting.serve()
        got[held.request.tenant] += held.work_s
        if held.request.tenant == "b":
            waiting.come(f"b{number}", 4.0, tenant="b")
    assert abs(got["a"] - got["b"]) <= 4.1


def test_shares_of_those_who_went_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond a bound, those who went first; all, once nobody waits."""
    monkeypatch.setattr(holding, "MAX_IDLE_TENANTS", 3)
    waiting = Waiting()
    waiting.come("stays", 9.0, tenant="stays")
    for number in range(10):
        waiting.come(f"{number}", 1.0, tenant=f"t{number}")
        waiting.let_go(f"{number}", 0.0)
    (line,) = waiting._lines["m"].values()
    assert list(line._idle) == ["t7", "t8", "t9"]
    waiting.remove("stays")
    assert waiting._lines == {}


def test_priority_goes_before_shares_and_for_as_long_as_it_takes() -> None:
    """Who has a larger number waits while any with a smaller one does, however old it is; tenants share within each."""
    waiting = Waiting()
    waiting.come("low", 0.1, tenant="b", priority=1)
    for number in range(20):
        waiting.come(f"a{number}", 1.0, since=1000.0 * number, tenant="a")
    assert waiting.names()[-1] == "low"
    assert [waiting.serve().request.tenant for _ in range(20)] == ["a"] * 20
    assert waiting.serve().request.request_id == "low"


def test_who_can_keep_the_objective_goes_before_who_cannot() -> None:
    """Found when it is so, not when it is predicted again."""
    waiting = Waiting(Objective(ttft_s=5.0))
    waiting.come("old", 1.0, since=0.0)
    waiting.come("new", 1.1, since=0.5)
    assert waiting.names(4.0) == ["old", "new"]
    assert waiting.names(4.2) == ["new", "old"]


def test_who_missed_the_objective_is_not_left_behind_for_ever() -> None:
    """It goes before those of as much work that come so much later."""
    waiting = Waiting(Objective(ttft_s=5.0))
    waiting.come("late", 1.0, since=0.0)
    assert waiting.names(10.0) == ["late"]
    waiting.come("before", 1.0, since=LATE_S / AGE_WEIGHT - 0.1)
    waiting.come("after", 1.0, since=LATE_S / AGE_WEIGHT + 0.1)
    assert waiting.names(LATE_S / AGE_WEIGHT + 0.1) == ["before", "late", "after"]
