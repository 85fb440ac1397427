"""Prefill apart from decode: who begins an answer, who goes on with it, and that load is counted where it is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_events.events import BlockStored
from kv_events.log import EventLog
from radix.keys import Hashes
from rhizome.errors import Overloaded, Unavailable
from router.core import Router, RouteRequest
from router.fleet import ModelCard, Role, WorkerInfo
from router.policies import POLICIES

SIZE = 16
CARD = ModelCard("m", 100_000, 1000, SIZE, "")
BLOCKS = np.arange(1, 513, dtype=np.uint64)
OFFERS = ("tcp://127.0.0.1:9",)


def info(name: str, role: Role, **changed: object) -> WorkerInfo:
    made = WorkerInfo(name, 1, f"{name}:1", CARD, 10_000, 4, 4, 8192, role, "", 1e-6, OFFERS)
    return replace(made, **changed)  # type: ignore[arg-type]


def router_with(*workers: WorkerInfo, local_prefill_s: float = 0.05, policy: str = "predicted-ttft") -> Router:
    router = Router(validate=True, seed=1, local_prefill_s=local_prefill_s, policy=policy)
    for worker in workers:
        router.register(worker, 0.0)
        router.set_ready(worker.worker_id, 1)
    return router


def fleet(**options: float) -> Router:
    return router_with(info("p", Role.PREFILL), info("d0", Role.DECODE), info("d1", Role.DECODE), **options)


def hold(router: Router, worker_id: str, hashes: Hashes) -> None:
    log = EventLog(worker_id, 1, SIZE)
    router.view(worker_id).offer(log.append([BlockStored(hashes, 0, SIZE)], 0.0))


def request(name: str = "r", blocks: int = 512, tail: int = 5, **fields: object) -> RouteRequest:
    return RouteRequest(name, "m", blocks * SIZE + tail, BLOCKS[:blocks], **fields)  # type: ignore[arg-type]


def test_a_long_prompt_begins_at_a_prefill_worker_and_goes_on_at_a_decode_worker() -> None:
    """The one that holds most of it; its load moves with it, and is gone at the end."""
    router = fleet()
    hold(router, "d1", BLOCKS[:100])
    asked = request()
    begun = router.route(asked, 1.0)
    assert (begun.worker_id, begun.begins) == ("p", True)
    assert router.load.of("p").own_prefill_tokens > 0
    router.first_token("r", 2.0)
    going_on = router.hand_over(asked, 2.0, "p")
    assert (going_on.worker_id, going_on.begins, going_on.fetched_tokens) == ("d1", False, 412 * SIZE)
    assert going_on.cached_tokens == 512 * SIZE
    assert router.load.of("p").sequences == 0
    load = router.load.of("d1")
    assert (load.sequences, load.own_prefill_tokens) == (1, 6)  # what fills no block, and the first token
    router.finish("r", 3.0)
    assert not len(router.load)


def test_answers_are_spread_over_decode_workers() -> None:
    """Nobody holds anything: the next answer goes on where fewer run."""
    router = fleet()
    chosen = []
    for number in range(4):
        asked = request(f"r{number}")
        assert router.route(asked, 1.0).begins
        chosen.append(router.hand_over(asked, 1.0, "p").worker_id)
    assert sorted(chosen) == ["d0", "d0", "d1", "d1"]


@pytest.mark.parametrize(("blocks", "held"), [(2, 0), (512, 511)], ids=["short", "held"])
def test_what_is_short_or_held_is_computed_by_the_decode_worker(blocks: int, held: int) -> None:
    """One worker for both."""
    router = fleet(local_prefill_s=10.0 if not held else 0.05)
    hold(router, "d1", BLOCKS[:held])
    decision = router.route(request(blocks=blocks), 1.0)
    assert decision.worker_id == "d1" if held else decision.worker_id in ("d0", "d1")
    assert not decision.begins


def test_nothing_is_short_where_no_time_is_allowed() -> None:
    """--local-prefill-ms=0."""
    assert fleet(local_prefill_s=0.0).route(request(blocks=1), 1.0).worker_id == "p"


WHOLE = {"direct": {"streamed": False}, "choices": {"sequences": 2}, "no cache": {"bypass_prefix_cache": True}}


@pytest.mark.parametrize("fields", WHOLE.values(), ids=WHOLE)
def test_what_cannot_move_is_not_begun_elsewhere(fields: dict[str, object]) -> None:
    """A decode worker answers the whole of it."""
    assert fleet().route(request(**fields), 1.0).worker_id in ("d0", "d1")


def test_without_room_to_prefill_decode_workers_do_it_and_the_other_way_nobody() -> None:
    """Decode workers compute while the prefill workers are full; full decode workers are a full fleet."""
    router = fleet(local_prefill_s=0.0)
    for number in range(8):
        assert router.route(request(f"p{number}"), 1.0).worker_id == "p"
    for number in range(16):
        assert router.route(request(f"d{number}"), 1.0).worker_id in ("d0", "d1")
    with pytest.raises(Overloaded, match="all 3 workers are full"):
        router.route(request("more"), 1.0)
    for number in range(8):
        router.finish(f"p{number}", 2.0)
    with pytest.raises(Overloaded):  # a prefill worker alone answers nothing
        router.route(request("more"), 1.0)


def test_no_more_is_begun_than_there_are_places_to_go_on() -> None:
    """Two decode workers have three places left: three answers begin at the prefill worker, each of which gets one."""
    router = fleet(local_prefill_s=0.0)
    whole = [request(f"w{number}", streamed=False) for number in range(13)]
    for asked in whole:
        assert router.route(asked, 1.0).worker_id in ("d0", "d1")
    begun = [request(f"r{number}") for number in range(3)]
    for asked in begun:
        assert router.route(asked, 1.0).begins
    fourth = request("fourth")
    assert not router.route(fourth, 1.0).begins  # it takes a place
    router.finish("fourth", 1.0)
    for asked in begun:
        router.hand_over(asked, 1.0, "p")


def test_decode_workers_help_where_the_prefill_workers_are_behind() -> None:
    """To wait would take longer than to hold up some answers; without --local-prefill-ms they never do."""
    for local_prefill_s, helped in ((0.05, True), (0.0, False)):
        router = fleet(local_prefill_s=local_prefill_s)
        chosen = [router.route(request(f"r{number}"), 1.0).worker_id for number in range(8)]
        assert chosen[0] == "p"
        assert (set(chosen) > {"p"}) == helped


def test_held_requests_do_not_wait_beside_idle_decode_workers() -> None:
    """Late binding: of many long prompts at once some go to decode workers, though the queue there is in the router."""
    router = fleet()
    placed = [router.submit(request(f"r{number}"), 1.0) for number in range(40)]
    went = [decision.worker_id for decision in placed if decision]
    for _, decision in router.dispatch(1.01):
        assert not isinstance(decision, Exception)
        went.append(decision.worker_id)
    assert {"d0", "d1"} < set(went)
    assert router.held
    for number in range(40):
        router.finish(f"r{number}", 2.0)


WAYS = {
    "transports": (("shm://host-a/1", "tcp://h:1"), ("shm://host-a/2",), ("tcp://h:2",), ("d0", "d1")),
    "hosts": (("shm://host-a/1",), ("shm://host-a/2",), ("shm://host-b/2",), ("d0",)),
    "none": (("local://a/1",), ("local://b/1",), ("shm://a/1", "grpc://h:1"), ()),
}


@pytest.mark.parametrize(("begins", "first", "second", "able"), WAYS.values(), ids=WAYS)
def test_only_who_has_a_way_to_the_blocks_counts_on_them(
    begins: tuple[str, ...], first: tuple[str, ...], second: tuple[str, ...], able: tuple[str, ...]
) -> None:
    """A transport that both have, on the same host where that is needed; without any nothing is begun."""
    router = router_with(
        info("p", Role.PREFILL, transfer_offers=begins),
        info("d0", Role.DECODE, transfer_offers=first),
        info("d1", Role.DECODE, transfer_offers=second),
        local_prefill_s=0.0,
    )
    asked = request()
    assert router.route(asked, 1.0).begins == bool(able)
    for decoder in able:
        others = {"d0", "d1"} - {decoder}
        decision = router.hand_over(asked, 1.0, "p", without=others)
        assert (decision.worker_id, decision.fetched_tokens, decision.fetch_from) == (decoder, 512 * SIZE, "p")
    if len(able) < 2:
        assert router.hand_over(asked, 1.0, "p", without=able).fetched_tokens == 0
    with pytest.raises(Overloaded):
        router.hand_over(asked, 1.0, "p", without=("d0", "d1"))
    router.finish("r", 2.0)


def test_a_prefill_worker_whose_blocks_nobody_could_pull_begins_nothing() -> None:
    """Without offers, or without a decode worker that pulls."""
    decode = info("d", Role.DECODE)
    for workers in (
        (info("p", Role.PREFILL, transfer_offers=()), decode),
        (info("p", Role.PREFILL), replace(decode, fetch_token_s=0.0)),
    ):
        assert router_with(*workers).route(request(), 1.0).worker_id == "d"
    with pytest.raises(Unavailable, match="1 of role prefill, which only begin answers"):
        router_with(info("p", Role.PREFILL)).route(request(), 1.0)


def test_a_worker_of_both_roles_takes_part_in_both() -> None:
    """It begins what it may keep, and goes on with what others began."""
    router = router_with(info("p", Role.PREFILL), info("b", Role.BOTH))
    hold(router, "b", BLOCKS[:500])
    decision = router.route(request(), 1.0)
    assert (decision.worker_id, decision.begins) == ("b", False)
    other = request("other", blocks=512)
    other = replace(other, hashes=BLOCKS + np.uint64(10_000))
    assert router.route(other, 1.0).worker_id == "p"  # the other one has the first request to compute
    assert router.hand_over(other, 1.0, "p").worker_id == "b"


def test_who_began_is_gone_and_nothing_is_lent() -> None:
    """Whoever goes on has all of it to compute, and is told to be late."""
    router = fleet()
    asked = request()
    router.route(asked, 1.0)
    router.deregister("p", 1)
    decision = router.hand_over(asked, 1.0)
    assert (decision.cached_tokens, decision.fetched_tokens) == (0, 0)
    lent = fleet()
    lent.route(asked, 1.0)
    assert decision.predicted_ttft_s > lent.hand_over(asked, 1.0, "p").predicted_ttft_s
    assert router.load.of(decision.worker_id).own_prefill_tokens == asked.prompt_tokens


def test_explain_names_both() -> None:
    """Who begins, and who would go on now; nothing is reserved."""
    router = fleet()
    decision = router.explain(request(), 1.0)
    assert (decision.worker_id, decision.goes_on) == ("p", "d0")
    assert not len(router.load)


ROLES = st.lists(st.sampled_from(Role), min_size=1, max_size=5)


@given(ROLES, st.sampled_from(sorted(POLICIES)), st.integers(1, 512), st.booleans(), st.booleans(), st.data())
def test_whatever_the_fleet_each_part_goes_where_it_may(
    roles: list[Role], policy: str, blocks: int, streamed: bool, allowed: bool, data: st.DataObject
) -> None:
    """By every policy: only what moves begins at a prefill worker, nobody goes on there, and no load is left."""
    workers = {f"w{at}": info(f"w{at}", role) for at, role in enumerate(roles)}
    router = router_with(*workers.values(), policy=policy, local_prefill_s=10.0 if allowed else 0.0)
    if all(role is Role.PREFILL for role in roles):
        with pytest.raises(Unavailable):
            router.route(request(), 1.0)
        return
    for name in workers:
        hold(router, name, BLOCKS[: data.draw(st.integers(0, blocks))])
    for number in range(6):
        asked = request(f"r{number}", blocks, streamed=streamed)
        decision = router.route(asked, float(number))
        role = workers[decision.worker_id].role
        assert decision.begins == (role is Role.PREFILL)
        assert streamed or not decision.begins
        if decision.begins:
            router.first_token(asked.request_id, float(number))
            on = router.hand_over(asked, float(number), data.draw(st.sampled_from(["", decision.worker_id])))
            assert workers[on.worker_id].role is not Role.PREFILL
        elif streamed and not allowed and Role.PREFILL in roles:
            assert role is Role.BOTH  # prefill workers have room for all
    for number in range(6):
        router.finish(f"r{number}", 10.0)
    assert not len(router.load)
