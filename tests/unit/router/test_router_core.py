"""Router: everything together, against a plain model of what must be so."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored
from kv_events.log import EventLog
from radix.keys import Hashes
from rhizome.errors import Conflict, Duplicate, InvalidRequest, NotServed, Overloaded, Unavailable
from router.core import Router, RouteRequest
from router.fleet import ModelCard, Role, WorkerInfo, WorkerReport
from router.load import SILENCE_LIMIT_S
from router.policies import POLICIES
from router.table import Column

BLOCK_SIZE = 16
CARD = ModelCard("m", max_model_len=4096, vocab_size=100, block_size=BLOCK_SIZE, tokenizer_sha256="abc")
WORKERS = ("w0", "w1", "w2")
PROMPT = np.arange(1, 7, dtype=np.uint64)  # six blocks


def info(worker_id: str, epoch: int = 1, **changes: object) -> WorkerInfo:
    made = WorkerInfo(worker_id, epoch, f"{worker_id}:{epoch}", CARD, 100, 2, 1, 64)
    return replace(made, **changes)  # type: ignore[arg-type]


def request(name: str = "r", prompt_tokens: int = 100, hashes: Hashes = PROMPT, **fields: object) -> RouteRequest:
    return RouteRequest(name, "m", prompt_tokens, hashes, **fields)  # type: ignore[arg-type]


def router_with(*infos: WorkerInfo) -> Router:
    router = Router(validate=True)
    for worker in infos:
        router.register(worker, 0.0)
        router.set_ready(worker.worker_id, worker.epoch)
    return router


def hold(router: Router, worker_id: str, hashes: Hashes, epoch: int = 1) -> EventLog:
    log = EventLog(worker_id, epoch, BLOCK_SIZE)
    router.view(worker_id).offer(log.append([BlockStored(hashes, 0, BLOCK_SIZE)], 0.0))
    return log


def test_the_holder_is_chosen_and_every_term_is_shown() -> None:
    """The decision names worker, reason, and all candidates with their sums, the chosen one first."""
    router = router_with(info("w0"), info("w1"))
    hold(router, "w1", PROMPT[:4])
    decision = router.route(request(), 1.0)
    chosen, other = decision.candidates
    assert (decision.worker_id, decision.epoch, decision.address, decision.policy) == (
        "w1",
        1,
        "w1:1",
        "predicted-ttft",
    )
    assert (chosen.worker_id, chosen.cached_tokens, chosen.prefill_tokens) == ("w1", 64, 36)
    assert (other.worker_id, other.cached_tokens, other.prefill_tokens) == ("w0", 0, 100)
    assert chosen.predicted_ttft_s == chosen.queue_s + chosen.prefill_s + chosen.decode_s
    assert decision.reason == (
        f"w1: {chosen.predicted_ttft_s:.3f} s predicted, 64 of 100 prompt tokens cached; "
        f"score {chosen.score:.4g} s, next best w0: {other.score:.4g} s"
    )


def test_observed_workers_are_explained_and_get_no_requests() -> None:
    """However much they hold; without the cache they count for nothing. A decision to route does not depend on them."""
    router = router_with(info("w0"))
    router.observe("vllm-0", "zmq://h:1")
    router.observe("vllm-1", "zmq://h:3")
    hold(router, "vllm-0", PROMPT)
    decision = router.explain(request(prompt_tokens=96), 1.0)
    assert [candidate.worker_id for candidate in decision.candidates] == ["w0"]
    assert [(each.worker_id, each.cached_tokens) for each in decision.observed] == [("vllm-0", 80), ("vllm-1", 0)]
    bypassed = router.explain(request(bypass_prefix_cache=True), 1.0)
    assert [each.cached_tokens for each in bypassed.observed] == [0, 0]
    assert router.route(request(), 0.0).worker_id == "w0"


def test_a_name_is_observed_or_registered_and_not_both() -> None:
    """Nor observed twice: its blocks would be another's."""
    router = router_with(info("w0"))
    router.observe("vllm-0", "zmq://h:1")
    with pytest.raises(Conflict, match="observed"):
        router.register(info("vllm-0"), 0.0)
    for taken in ("vllm-0", "w0"):
        with pytest.raises(InvalidRequest, match="observe"):
            router.observe(taken, "zmq://h:1")
    assert list(router.observed) == ["vllm-0"]


def test_the_last_token_is_always_to_be_computed() -> None:
    """A prompt that is held whole still computes its last block: blocks are reused whole."""
    router = router_with(info("w0"))
    hold(router, "w0", PROMPT)
    (candidate,) = router.explain(request(prompt_tokens=96), 1.0).candidates
    assert (candidate.cached_tokens, candidate.prefill_tokens) == (80, 16)


def test_a_long_queue_outweighs_a_cached_prefix() -> None:
    """The holder is not chosen while what waits there costs more than the prefix saves."""
    router = router_with(info("w0"), info("w1"))
    hold(router, "w1", PROMPT)
    router.heartbeat("w1", 1, WorkerReport(running=1, prefill_tokens_outstanding=5000), 1.0)
    decision = router.route(request(), 1.0)
    assert decision.worker_id == "w0"
    assert decision.candidates[1].queue_s > decision.candidates[0].prefill_s


def test_equal_requests_spread_over_equal_workers() -> None:
    """Forty cold requests at once: nobody gets more than a few above its share."""
    router = router_with(*(info(name, max_running=64, max_waiting=64) for name in WORKERS))
    chosen = [router.route(request(f"r{n}", hashes=PROMPT + np.uint64(100 * n)), 0.0).worker_id for n in range(40)]
    counts = [chosen.count(name) for name in WORKERS]
    assert max(counts) - min(counts) <= 1


def test_a_reservation_counts_at_once() -> None:
    """The next decision already sees it: in queue, in flight and in blocks."""
    router = router_with(info("w0"))
    router.route(request("a"), 0.0)
    (candidate,) = router.explain(request("b"), 1.0).candidates
    assert (candidate.queued_prefill_tokens, candidate.in_flight, candidate.free_blocks) == (100, 1, 93)
    router.first_token("a", 0.5)
    (candidate,) = router.explain(request("b"), 1.0).candidates
    assert (candidate.queued_prefill_tokens, candidate.running) == (0, 1)
    assert candidate.decode_s > 0
    assert router.timing.errors.summary()[::2][:2] == (1, 0.5)
    router.finish("a", 1.0)
    (candidate,) = router.explain(request("b"), 1.0).candidates
    assert (candidate.in_flight, candidate.running, candidate.free_blocks) == (0, 0, 100)


def test_who_may_not_serve_is_left_out() -> None:
    """Draining, starting, and of role prefill without a way to its blocks; when that is all, the error counts them."""
    router = router_with(info("w0"), info("w1", role=Role.PREFILL))
    router.register(info("w2"), 0.0)
    assert [c.worker_id for c in router.explain(request(), 1.0).candidates] == ["w0"]
    router.set_draining("w0", True)
    with pytest.raises(Unavailable, match="of 3 registered, 1 draining, 1 starting, 0 unreachable, 1 of role"):
        router.explain(request(), 1.0)
    router.set_draining("w0", False)
    with pytest.raises(NotServed, match="served: m"):
        router.explain(replace(request(), model="other"), 1.0)
    with pytest.raises(InvalidRequest, match="policy"):
        router.explain(request(policy="best"), 1.0)


def test_the_pace_of_pulls_is_what_a_worker_measured() -> None:
    """From its first report of it on; one that has nothing to pull with stays without, whatever it reports."""
    offers = ("tcp://h:1",)
    pulls, does_not = info("w0", fetch_token_s=1e-3, transfer_offers=offers), info("w1")
    router = router_with(pulls, does_not)

    def pace(worker_id: str, measured: float) -> float:
        router.heartbeat(worker_id, 1, WorkerReport(fetch_token_s=measured), 1.0)
        return float(router._table.values[Column.FETCH_TOKEN_S, router.index.slot(worker_id)])

    assert [pace("w0", measured) for measured in (0.0, 2e-6, 0.0, 1e9)] == [1e-3, 2e-6, 2e-6, 2e-6]
    assert pace("w1", 2e-6) == 0


def test_an_unreachable_worker_gets_nothing_until_it_is_heard_of() -> None:
    """Dead workers look idle: without this they would draw every request. A former incarnation changes nothing."""
    router = router_with(info("w0", epoch=2))
    router.set_unreachable("w0", 1)
    router.explain(request(), 1.0)
    router.set_unreachable("w0", 2)
    with pytest.raises(Unavailable, match="1 unreachable"):
        router.explain(request(), 1.0)
    router.heartbeat("w0", 2, WorkerReport(), 1.0)
    router.explain(request(), 1.0)


def test_full_workers_refuse_and_say_when_to_come_back() -> None:
    """Sequences count, not requests; a full worker is no candidate while another has room."""
    router = router_with(info("w0"), info("w1"))
    hold(router, "w0", PROMPT)
    router.route(request("a", sequences=3), 0.0)
    assert router.route(request("b", sequences=3), 0.0).worker_id == "w1"
    with pytest.raises(Overloaded, match="w0 3 of 3, w1 3 of 3") as caught:
        router.route(request("c"), 0.0)
    assert 0.1 <= caught.value.retry_after_s <= 10
    router.finish("a", 1.0)
    assert router.route(request("c"), 0.0).worker_id == "w0"


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_no_policy_sends_to_a_full_worker(policy: str) -> None:
    """While another has room, however busy that one is: also where the rule looks at two workers only."""
    router = Router(policy=policy, validate=True)
    for worker in (info("w0"), info("w1"), info("w2", max_running=100)):
        router.register(worker, 0.0)
        router.set_ready(worker.worker_id, 1)
    for name, running in (("w0", 3), ("w1", 3), ("w2", 7)):
        router.heartbeat(name, 1, WorkerReport(running=running), 0.0)
    assert {router.route(request(f"r{number}"), 0.0).worker_id for number in range(30)} == {"w2"}


def test_round_robin_takes_turns_whatever_is_cached() -> None:
    """By name in the request, or as the router's own policy."""
    router = Router(policy="round-robin", validate=True)
    for name in WORKERS:
        router.register(info(name), 0.0)
        router.set_ready(name, 1)
    hold(router, "w1", PROMPT)
    chosen = [router.route(request(str(n)), 0.0).worker_id for n in range(6)]
    assert chosen == [*WORKERS, *WORKERS]
    assert router.explain(request(policy="predicted-ttft"), 1.0).candidates[0].worker_id == "w1"


def test_the_learned_pace_of_a_worker_decides() -> None:
    """Of two equally loaded workers the faster one is taken, and a new one is taken to be like its peers."""
    router = router_with(info("w0"), info("w1"), info("w2"))
    for number in range(1, 20):
        for name, token_s in (("w0", 1e-3), ("w1", 1e-4)):
            seen = WorkerReport(prefill_steps=number, prefill_tokens=400 * number, prefill_s=400 * number * token_s)
            router.heartbeat(name, 1, seen, 0.5 * number)
    router.expire(2.0)
    terms = {candidate.worker_id: candidate for candidate in router.explain(request(), 1.0).candidates}
    assert terms["w1"].prefill_s < terms["w2"].prefill_s < terms["w0"].prefill_s
    assert router.explain(request(), 1.0).worker_id == "w1"


HASHES = st.lists(st.integers(1, 8), min_size=1, max_size=4).map(lambda found: np.array(found, np.uint64))


@dataclass
class ModelWorker:
    """What the model knows of a registered worker."""

    epoch: int
    lease_until: float
    log: EventLog
    ready: bool = False
    draining: bool = False
    held: set[int] = field(default_factory=set)


@dataclass
class ModelRequest:
    worker_id: str
    streamed: bool
    heard_at: float
    prefilled: bool = False
    lost: bool = False  # its worker was dropped


class RouterMachine(RuleBasedStateMachine):
    """Random lives of workers and requests; the router checks its own invariants after each step."""

    @initialize()
    def start(self) -> None:
        self.router = Router(lease_s=3.0, validate=True)
        self.now = 0.0
        self.workers: dict[str, ModelWorker] = {}
        self.requests: dict[str, ModelRequest] = {}
        self.epochs = dict.fromkeys(WORKERS, 0)
        self.serial = 0

    def drop(self, worker_id: str) -> None:
        self.workers.pop(worker_id, None)
        for name, known in list(self.requests.items()):
            if known.worker_id == worker_id and not known.lost:
                if known.streamed:
                    known.lost = True
                else:
                    del self.requests[name]

    @rule(worker_id=st.sampled_from(WORKERS))
    def restart(self, worker_id: str) -> None:
        self.epochs[worker_id] += 1
        epoch = self.epochs[worker_id]
        assert self.router.register(info(worker_id, epoch), self.now)
        self.drop(worker_id)
        self.workers[worker_id] = ModelWorker(epoch, self.now + 3.0, EventLog(worker_id, epoch, BLOCK_SIZE))

    @rule(worker_id=st.sampled_from(WORKERS), back=st.integers(0, 2))
    def register_again(self, worker_id: str, back: int) -> None:
        known = self.workers.get(worker_id)
        epoch = self.epochs[worker_id] - back
        if known is None or epoch < 1:
            return
        if epoch < known.epoch:
            with pytest.raises(Conflict):
                self.router.register(info(worker_id, epoch), self.now)
        else:
            assert not self.router.register(info(worker_id, epoch), self.now)
            known.lease_until = self.now + 3.0

    @rule(worker_id=st.sampled_from(WORKERS))
    def become_ready(self, worker_id: str) -> None:
        if known := self.workers.get(worker_id):
            self.router.set_ready(worker_id, known.epoch)
            known.ready = True

    @rule(worker_id=st.sampled_from(WORKERS), draining=st.booleans())
    def drain(self, worker_id: str, draining: bool) -> None:
        if known := self.workers.get(worker_id):
            self.router.set_draining(worker_id, draining)
            known.draining = draining

    @rule(
        worker_id=st.sampled_from(WORKERS),
        counts=st.tuples(*[st.integers(0, 5)] * 3, st.integers(0, 2000)),
        words=st.lists(st.tuples(st.integers(1, 30), st.booleans()), max_size=4),
    )
    def report(self, worker_id: str, counts: tuple[int, ...], words: list[tuple[int, bool]]) -> None:
        running, waiting, blocks, outstanding = counts
        prefilled = tuple(f"r{number}" for number, _ in words)
        finished = tuple(f"r{number}" for number, ended in words if ended)
        known = self.workers.get(worker_id)
        status = WorkerReport(
            running=running,
            waiting=waiting,
            blocks_in_use=blocks,
            prefill_tokens_outstanding=outstanding,
            prefilled_request_ids=prefilled,
            finished_request_ids=finished,
        )
        if known is None:
            with pytest.raises(NotServed):
                self.router.heartbeat(worker_id, 1, status, self.now)
            return
        assert self.router.heartbeat(worker_id, known.epoch, status, self.now) == known.draining
        known.lease_until = self.now + 3.0
        for name in prefilled:
            asked = self.requests.get(name)
            if asked and asked.worker_id == worker_id and not asked.lost and not asked.prefilled:
                asked.prefilled, asked.heard_at = True, self.now
        for name in finished:
            asked = self.requests.get(name)
            if asked and asked.worker_id == worker_id and not asked.lost and not asked.streamed:
                del self.requests[name]

    @rule(worker_id=st.sampled_from(WORKERS), hashes=HASHES, kind=st.integers(0, 5))
    def cache_changes(self, worker_id: str, hashes: Hashes, kind: int) -> None:
        known = self.workers.get(worker_id)
        if known is None:
            return
        if kind < 3:
            known.held |= set(hashes.tolist())
            batch = known.log.append([BlockStored(hashes, 0, BLOCK_SIZE)], 0.0)
        elif kind < 5:
            known.held -= set(hashes.tolist())
            batch = known.log.append([BlockRemoved(hashes)], 0.0)
        else:
            known.held.clear()
            batch = known.log.append([AllBlocksCleared()], 0.0)
        self.router.view(worker_id).offer(batch)

    @rule(hashes=HASHES, streamed=st.booleans(), again=st.booleans(), sequences=st.integers(1, 2), bypass=st.booleans())
    def route(self, hashes: Hashes, streamed: bool, again: bool, sequences: int, bypass: bool) -> None:
        if again and self.requests:
            name = next(iter(self.requests))
        else:
            self.serial += 1
            name = f"r{self.serial}"
        tokens = len(hashes) * BLOCK_SIZE + 3
        asked = request(name, tokens, hashes, streamed=streamed, sequences=sequences, bypass_prefix_cache=bypass)
        able = {name for name, known in self.workers.items() if known.ready and not known.draining}
        try:
            decision = self.router.route(asked, self.now)
        except Duplicate:
            assert name in self.requests
        except Unavailable:
            assert not able
        except Overloaded:
            assert able
        else:
            assert name not in self.requests
            assert {candidate.worker_id for candidate in decision.candidates} == able
            for candidate in decision.candidates:
                held = self.workers[candidate.worker_id].held
                depth = next((at for at, block in enumerate(hashes.tolist()) if block not in held), len(hashes))
                assert candidate.cached_tokens == (0 if bypass else depth * BLOCK_SIZE)
            assert decision.epoch == self.workers[decision.worker_id].epoch
            self.requests[name] = ModelRequest(decision.worker_id, streamed, self.now)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def first_token(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        self.router.first_token(name, self.now)
        asked = self.requests[name]
        if not asked.prefilled:
            asked.prefilled, asked.heard_at = True, self.now

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.requests)))
        self.router.finish(name, self.now)
        self.router.finish(name, self.now)
        del self.requests[name]

    @rule(step_s=st.sampled_from([0.1, 1.0, 4.0, SILENCE_LIMIT_S]))
    def time_passes(self, step_s: float) -> None:
        self.now += step_s
        gone = {worker.worker_id for worker in self.router.expire(self.now)}
        assert gone == {name for name, known in self.workers.items() if known.lease_until <= self.now}
        for worker_id in gone:
            self.drop(worker_id)
        for name, asked in list(self.requests.items()):
            if not asked.streamed and asked.heard_at + SILENCE_LIMIT_S <= self.now:
                del self.requests[name]

    @rule(worker_id=st.sampled_from(WORKERS))
    def leave(self, worker_id: str) -> None:
        known = self.workers.get(worker_id)
        if known is None:
            with pytest.raises(NotServed):
                self.router.deregister(worker_id, 1)
            return
        with pytest.raises(NotServed):
            self.router.deregister(worker_id, known.epoch + 1)
        self.router.deregister(worker_id, known.epoch)
        self.drop(worker_id)

    @invariant()
    def the_router_is_what_the_model_is(self) -> None:
        self.router.validate()
        assert len(self.router.load) == len(self.requests)
        assert all(name in self.router.load for name in self.requests)
        assert {member.info.worker_id for member in self.router.fleet.members()} == set(self.workers)
        for worker_id, known in self.workers.items():
            view = self.router.view(worker_id)
            assert set(self.router.index.tree.blocks(view.worker_index).tolist()) == known.held

    def teardown(self) -> None:
        """Once all streams have ended and all leases have run out, nothing is left of anybody."""
        if not hasattr(self, "router"):
            return
        for name, asked in self.requests.items():
            if asked.streamed:
                self.router.finish(name, self.now)
        self.router.expire(self.now + 2 * SILENCE_LIMIT_S)
        assert len(self.router.load) == 0
        assert len(self.router.index.tree) == 0
        assert len(self.router.fleet) == 0


TestRouterMachine = RouterMachine.TestCase
TestRouterMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
