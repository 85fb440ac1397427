"""Held requests against a plain model: each is decided once, nothing leaks, and nobody waits while workers idle."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rhizome.errors import Duplicate, Overloaded, Unavailable
from router.core import Router, RouteRequest
from router.decision import Decision
from router.fleet import ModelCard, WorkerInfo, WorkerReport
from router.holding import STALE_S
from router.objective import Objective

CARD = ModelCard("m", max_model_len=100_000, vocab_size=100, block_size=16, tokenizer_sha256="abc")
WORKERS = ("w0", "w1", "w2")
LEASE_S = 1e9
POLICY_NAMES = ("", "", "", "", "lmetric", "power-of-two")  # some ask for one that holds nothing back


@dataclass
class ModelWorker:
    """What was placed on a worker that is registered, and has no first token, or has one."""

    epoch: int
    draining: bool = False
    queue: list[str] = field(default_factory=list)
    running: list[str] = field(default_factory=list)


class HoldingMachine(RuleBasedStateMachine):
    """After each change the router is asked who may go, as the service does."""

    @initialize(workers=st.integers(1, 3), objective=st.sampled_from([None, None, Objective(1.0, 0.1)]))
    def start(self, workers: int, objective: Objective | None) -> None:
        self.objective = objective
        self.router = Router(objective=objective, lease_s=LEASE_S, validate=True)
        self.now = 0.0
        self.serial = 0
        self.epochs = dict.fromkeys(WORKERS, 0)
        self.workers: dict[str, ModelWorker] = {}
        self.held: dict[str, RouteRequest] = {}
        self.lost: set[str] = set()  # streams whose worker has gone, until they end
        self.decided: set[str] = set()
        for name in WORKERS[:workers]:
            self.join(name)

    @property
    def able(self) -> set[str]:
        return {name for name, worker in self.workers.items() if not worker.draining}

    def dispatch(self) -> list[str]:
        """Who went, or was refused; each was held, and is not any more."""
        told = self.router.dispatch(self.now)
        for name, found in told:
            assert name in self.held
            if isinstance(found, Decision):
                assert found.worker_id in self.able
                self.place(name, found)
            else:
                assert isinstance(found, Unavailable)
                assert not self.able
            del self.held[name]
        return [name for name, _ in told]

    def place(self, name: str, decision: Decision) -> None:
        assert name not in self.decided
        self.decided.add(name)
        assert decision.request_id == name
        worker = self.workers[decision.worker_id]
        assert decision.epoch == worker.epoch
        assert len(worker.queue) + len(worker.running) < 8
        worker.queue.append(name)

    # Workers.

    @rule(name=st.sampled_from(WORKERS), again=st.sampled_from([False, False, True]))
    def join(self, name: str, again: bool = True) -> None:
        if name in self.workers and not again:
            return
        self.leave(name)
        self.epochs[name] += 1
        epoch = self.epochs[name]
        self.router.register(WorkerInfo(name, epoch, f"{name}:1", CARD, 3000, 4, 4, 2048), self.now)
        self.router.set_ready(name, epoch)
        self.workers[name] = ModelWorker(epoch)
        self.dispatch()

    @rule(name=st.sampled_from(WORKERS[:1]))
    def leave(self, name: str) -> None:
        if worker := self.workers.pop(name, None):
            self.router.deregister(name, worker.epoch)
            self.lost |= {*worker.queue, *worker.running}
            self.dispatch()

    @rule(name=st.sampled_from(WORKERS), draining=st.booleans())
    def drain(self, name: str, draining: bool) -> None:
        if worker := self.workers.get(name):
            self.router.set_draining(name, draining)
            worker.draining = draining
            self.dispatch()

    @rule(name=st.sampled_from(WORKERS), blocks=st.integers(0, 3000))
    def report(self, name: str, blocks: int) -> None:
        if worker := self.workers.get(name):
            status = WorkerReport(
                running=len(worker.running),
                waiting=len(worker.queue),
                blocks_in_use=blocks if worker.running else 0,
                prefilled_request_ids=tuple(worker.running),
            )
            self.router.heartbeat(name, worker.epoch, status, self.now)
            self.dispatch()

    # Requests.

    @rule(
        tokens=st.sampled_from([10, 400, 5000, 30_000, 30_000]),
        prefix=st.integers(1, 4),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        tenant=st.sampled_from(["", "", "a", "b"]),
        policy=st.sampled_from(POLICY_NAMES),
    )
    def submit(self, tokens: int, prefix: int, priority: int, tenant: str, policy: str) -> None:
        self.serial += 1
        name = f"r{self.serial}"
        hashes = np.arange(prefix * 10_000, prefix * 10_000 + tokens // 16, dtype=np.uint64)
        asked = RouteRequest(name, "m", tokens, hashes, policy=policy, priority=priority, tenant=tenant)
        try:
            decision = self.router.submit(asked, self.now)
        except Overloaded:
            assert self.able
            assert all(
                len(worker.queue) + len(worker.running) == 8 for worker in self.workers.values() if not worker.draining
            )
        except Unavailable:
            assert not self.able
        else:
            if decision is None:
                assert policy == ""
                self.held[name] = asked
                self.dispatch()
            else:
                self.place(name, decision)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def submit_again(self, data: st.DataObject) -> None:
        asked = self.held[data.draw(st.sampled_from(sorted(self.held)))]
        for attempt in (self.router.submit, self.router.route):
            with pytest.raises(Duplicate):
                attempt(asked, self.now)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[name]
        self.router.finish(name, self.now)
        self.dispatch()

    @rule(name=st.sampled_from(WORKERS))
    def first_token(self, name: str) -> None:
        worker = self.workers.get(name)
        if worker and worker.queue:
            self.router.first_token(worker.queue[0], self.now)
            worker.running.append(worker.queue.pop(0))
            self.dispatch()

    @rule(name=st.sampled_from(WORKERS), queued=st.booleans())
    def finish(self, name: str, queued: bool) -> None:
        worker = self.workers.get(name)
        of = (worker.queue if queued else worker.running) if worker else []
        if of:
            self.router.finish(of.pop(), self.now)
            self.dispatch()

    @precondition(lambda self: self.lost)
    @rule()
    def stream_breaks(self) -> None:
        self.router.finish(self.lost.pop(), self.now)
        self.dispatch()

    @rule(step_s=st.sampled_from([0.01, 0.05, 0.3, 0.3, 2.0]))
    def time_passes(self, step_s: float) -> None:
        self.now += step_s
        self.dispatch()

    @rule()
    def nobody_waits_for_an_idle_worker(self) -> None:
        """Once all predictions are new: whoever would be served best by an idle worker has gone there."""
        self.now += STALE_S + 0.01
        self.dispatch()
        idle = {name for name in self.able if not self.workers[name].queue and not self.workers[name].running}
        if not idle:
            return
        assert idle != self.able or not self.held
        if self.objective:  # what is best for a request depends on how long it has waited then
            return
        for asked in self.held.values():
            best = min(self.router.explain(asked, self.now).candidates, key=lambda candidate: candidate.score)
            assert best.worker_id not in idle

    @invariant()
    def the_router_holds_what_the_model_holds(self) -> None:
        placed = {name for worker in self.workers.values() for name in (*worker.queue, *worker.running)}
        assert self.router.held == len(self.held)
        assert not placed & self.held.keys()
        assert len(self.router.load) == len(placed | self.lost)
        assert all(name in self.router.load for name in placed | self.lost)
        assert self.able or not self.held

    def teardown(self) -> None:
        """Workers that serve what they have serve all that are held, and then nothing is left."""
        if not hasattr(self, "router"):
            return
        while self.held:
            for name, worker in self.workers.items():
                for request_id in worker.queue:
                    self.router.first_token(request_id, self.now)
                for request_id in (*worker.queue, *worker.running):
                    self.router.finish(request_id, self.now)
                worker.queue, worker.running = [], []
                self.router.heartbeat(name, worker.epoch, WorkerReport(), self.now)
            assert self.dispatch()
            self.now += 0.05
        for name, worker in self.workers.items():
            for request_id in (*worker.queue, *worker.running):
                self.router.finish(request_id, self.now)
            self.router.deregister(name, worker.epoch)
        for request_id in self.lost:
            self.router.finish(request_id, self.now)
        assert (self.router.held, len(self.router.load), self.router.dispatch(self.now)) == (0, 0, [])


TestHoldingMachine = HoldingMachine.TestCase
TestHoldingMachine.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
