"""The event loop of a simulated fleet: routers and workers in virtual time, and what passes between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from random import Random

import numpy as np

from deploy.traces.trace import Trace
from kv_events.bus import Resync
from kv_events.events import EventBatch, Snapshot
from kv_events.log import DEFAULT_CAPACITY
from kv_events.view import WorkerView
from radix.keys import Hashes
from rhizome.errors import Overloaded, RhizomeError
from router.core import Router, RouteRequest
from router.decision import Decision
from router.fleet import ModelCard, WorkerInfo, WorkerReport
from router.holding import PATIENCE_S
from router.objective import Objective
from router.table import Floats
from router.timing import PRIOR, StepCosts
from worker.engine import EngineStatus
from worker.scheduler import SchedulerConfig
from worker.simulated import SimulatedWorker, leading
from worker.step_time import Hardware, StepTimeModel

LEASE_S = 1e9  # nobody dies in a simulation
MAX_REPLAYED = DEFAULT_CAPACITY  # batches: all that a log keeps


@dataclass(frozen=True, slots=True)
class Network:
    """What lies between routers and workers. Times in seconds."""

    delay_s: float = 0.0005  # of a request, and of an answer's token
    event_delay_s: float = 0.002  # of a batch of KV events
    event_loss: float = 0.0  # share of batches that do not come: found by the gap, and replayed
    report_interval_s: float = 0.5


@dataclass(slots=True)
class Outcome:
    """What became of a request. Times are virtual seconds from the start; NaN for what did not happen."""

    arrived_at: float
    prompt_tokens: int
    output_tokens: int
    worker: int = -1
    routed_at: float = np.nan
    first_token_at: float = np.nan
    finished_at: float = np.nan
    cached_tokens: int = 0  # by the router's tree, those to be fetched included
    fetched_tokens: int = 0  # that came from another worker
    begun_by: int = -1  # the worker that answered the first token, where another went on
    predicted_ttft_s: float = np.nan
    refused: bool = False


@dataclass(slots=True)
class _Replica:
    """One router, and whether it is to look at what it holds again."""

    router: Router
    waking: bool = False


BOUND = "bound"
"""A policy of simulations alone: predicted-ttft over one shared cache without end, fetched free, nothing held back."""


class _BoundRouter(Router):
    """Every worker holds whatever any has computed."""

    def __init__(self, computed: set[int]) -> None:
        super().__init__(lease_s=LEASE_S)
        self._computed = computed

    def submit(self, request: RouteRequest, now: float) -> Decision:
        """See Router."""
        return self.route(request, now)

    def _depths(self, request: RouteRequest) -> Floats:
        return np.full((2, len(self.index.slot_names)), float(leading(request.hashes.tolist(), self._computed)))


class Fleet:
    """Replays a trace on `workers` equal workers behind `routers` routers. The same seed gives the same outcomes."""

    def __init__(
        self,
        trace: Trace,
        hardware: Hardware,
        *,
        workers: int,
        policy: str,
        objective: Objective | None = None,
        routers: int = 1,
        network: Network | None = None,
        seed: int = 0,
        host_tier: bool = False,
        peer_fetch: bool = False,
        prior_error: float | None = None,
        max_waiting: int = 4096,
        validate: bool = False,
    ) -> None:
        """Routers begin with step times that are `prior_error` times the truth; None: with what all routers begin."""
        self.trace = trace
        self.outcomes = [Outcome(r.arrival_s, r.input_tokens, r.output_tokens) for r in trace.requests]
        self.workers: list[SimulatedWorker] = []
        self.now = 0.0
        self._network = network or Network()
        self._random = Random(seed)  # noqa: S311 - which batches are lost
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self._link_free_at = [0.0] * workers  # what is fetched comes one prompt after the other
        self._fetch_block_s = hardware.fetch_token_s * trace.block_size
        self._ends: list[int] = []  # by worker: serial of the event that ends the step under way
        self._left = len(trace.requests)
        self._begun: set[int] = set()  # requests of which a worker is to answer the first token alone
        self._replicas: list[_Replica] = []
        block_size = trace.block_size
        longest = max((r.input_tokens + r.output_tokens for r in trace.requests), default=1)
        config = SchedulerConfig(
            num_blocks=hardware.kv_tokens // block_size,
            block_size=block_size,
            max_model_len=max(1, min(longest, hardware.kv_tokens // block_size * block_size)),
            max_batched_tokens=hardware.max_batched_tokens,
            max_running=hardware.max_running,
            max_waiting=max_waiting,
            host_blocks=hardware.host_kv_tokens // block_size if host_tier else 0,
        )
        self._config = config
        card = ModelCard("simulated", config.max_model_len, 1 << 20, block_size, "")
        self._computed: set[int] | None = set() if policy == BOUND else None  # blocks, by whomever
        prior = PRIOR if prior_error is None else _step_costs(hardware.steps, prior_error)
        for index in range(routers):
            if self._computed is None:
                router = Router(
                    policy=policy,
                    objective=objective,
                    lease_s=LEASE_S,
                    prior=prior,
                    seed=seed + index,
                    validate=validate,
                )
            else:
                router = _BoundRouter(self._computed)
            self._replicas.append(_Replica(router))
        for number in range(workers):
            name = f"worker-{number}"
            self.workers.append(
                SimulatedWorker(
                    name,
                    config,
                    hardware.steps,
                    host_token_s=hardware.host_token_s,
                    computed=self._computed,
                )
            )
            self._ends.append(-1)
            info = WorkerInfo(
                name,
                1,
                f"{name}:1",
                card,
                config.num_blocks,
                config.max_running,
                max_waiting,
                config.max_batched_tokens,
                fetch_token_s=hardware.fetch_token_s if peer_fetch else 0.0,
                transfer_offers=("simulated://",) if peer_fetch else (),
            )
            info = self._registered(info)
            for replica in self._replicas:
                replica.router.register(info, 0.0)
                replica.router.set_ready(name, 1)
            self.workers[number].log.subscribe(partial(self._on_append, number))
            self._at(self._network.report_interval_s * (number + 1) / workers, partial(self._report, number))
        self._published = [0] * workers
        self._hashes = [_hashes(request.block_ids[: request.input_tokens // block_size]) for request in trace.requests]

    def run(self, until: Callable[[int], None] | None = None) -> None:
        """Until every request has ended; `until` is told now and then how many have."""
        self._arrive(0)
        told = 0
        while self._left:
            self.now, _, act = heappop(self._events)
            act()
            ended = len(self.outcomes) - self._left
            if until is not None and ended >= told + 100:
                told = ended
                until(ended)

    def _registered(self, info: WorkerInfo) -> WorkerInfo:
        """What the worker tells routers of itself."""
        return info

    def _at(self, time: float, act: Callable[[], None]) -> int:
        self._serial += 1
        heappush(self._events, (time, self._serial, act))
        return self._serial

    # Requests.

    def _arrive(self, number: int) -> None:
        if number == len(self.outcomes):
            return
        self._at(self.outcomes[number].arrived_at, lambda: self._route(number))

    def _route(self, number: int) -> None:
        self._arrive(number + 1)
        outcome = self.outcomes[number]
        if outcome.prompt_tokens + outcome.output_tokens > self._config.max_model_len:
            self._refuse(number)
            return
        replica = self._replica_of(number)
        try:
            decision = replica.router.submit(self._request(number), self.now)
        except RhizomeError:
            self._refuse(number)
            return
        if decision is not None:
            self._send(number, decision)
        else:
            self._dispatch(replica)

    def _request(self, number: int) -> RouteRequest:
        traced = self.trace.requests[number]
        return RouteRequest(
            str(number),
            "simulated",
            traced.input_tokens,
            self._hashes[number],
            session=traced.session,
            tenant=traced.tenant,
            priority=traced.priority,
        )

    def _dispatch(self, replica: _Replica) -> None:
        if not replica.router.held:
            return
        for request_id, decision in replica.router.dispatch(self.now):
            if isinstance(decision, Decision):
                self._send(int(request_id), decision)
            else:
                self._refuse(int(request_id))
        if replica.router.held and not replica.waking:
            replica.waking = True
            self._at(self.now + PATIENCE_S, lambda: self._wake(replica))

    def _wake(self, replica: _Replica) -> None:
        replica.waking = False
        self._dispatch(replica)

    def _send(self, number: int, decision: Decision) -> None:
        outcome = self.outcomes[number]
        outcome.routed_at = self.now
        outcome.cached_tokens = decision.cached_tokens
        outcome.predicted_ttft_s = decision.predicted_ttft_s + decision.held_s
        outcome.worker = number_of(decision.worker_id)
        act = partial(self._fetch, number, decision) if decision.fetched_tokens else partial(self._accept, number)
        self._at(self.now + self._network.delay_s, act)

    def _fetch(self, number: int, decision: Decision) -> None:
        """The worker pulls what another has of the prompt and it has not; then it begins with the request."""
        source = self.workers[number_of(decision.fetch_from)]
        hashes = self._hashes[number][: decision.cached_tokens // self._config.block_size].tolist()
        hashes = hashes[: source.held(hashes)]
        ends_at = self._pull(number, hashes)
        if ends_at is None:
            self._accept(number)
        else:
            self._at(ends_at, partial(self._fetched, number, hashes))

    def _pull(self, number: int, hashes: list[int]) -> float | None:
        """Put what a request's worker lacks of these blocks on its link. Returns when it is there; None: it has all."""
        outcome = self.outcomes[number]
        missing = len(hashes) - self.workers[outcome.worker].held(hashes)
        if missing <= 0:
            return None
        begins_at = max(self.now + 2 * self._network.delay_s, self._link_free_at[outcome.worker])
        self._link_free_at[outcome.worker] = begins_at + missing * self._fetch_block_s
        outcome.fetched_tokens += missing * self._config.block_size
        return self._link_free_at[outcome.worker]

    def _fetched(self, number: int, hashes: list[int]) -> None:
        self.workers[self.outcomes[number].worker].adopt(hashes, self.now)
        self._accept(number)

    def _refuse(self, number: int) -> None:
        self.outcomes[number].refused = True
        self._left -= 1

    def _accept(self, number: int) -> None:
        outcome = self.outcomes[number]
        worker = self.workers[outcome.worker]
        try:
            self._add(worker, number)
        except Overloaded:
            self._replica_of(number).router.finish(str(number), self.now)
            self._refuse(number)
            return
        if not worker.busy:
            self._begin(outcome.worker)
        elif (ends_at := worker.interrupt(self.now)) is not None:
            self._end_at(outcome.worker, ends_at)

    def _add(self, worker: SimulatedWorker, number: int) -> None:
        """Raises Overloaded."""
        outcome, priority = self.outcomes[number], self.trace.requests[number].priority
        hashes = self._hashes[number].tolist()
        worker.add(str(number), outcome.prompt_tokens, outcome.output_tokens, hashes, priority)

    def _replica_of(self, number: int) -> _Replica:
        return self._replicas[number % len(self._replicas)]

    # Steps.

    def _begin(self, number: int) -> None:
        ends_at = self.workers[number].begin(self.now)
        if ends_at is not None:
            self._end_at(number, ends_at)

    def _end_at(self, number: int, time: float) -> None:
        serial = self._serial + 1
        self._ends[number] = self._at(time, lambda: self._end(number, serial))

    def _end(self, number: int, serial: int) -> None:
        if self._ends[number] != serial:
            return  # interrupted: it ends at another time
        worker = self.workers[number]
        progress = worker.end(self.now)
        for name in progress.prefilled:
            self._first_token(int(name))
        begun = [name for name in progress.finished if int(name) in self._begun]
        finished = [name for name in progress.finished if name not in begun]
        for name in finished:
            self.outcomes[int(name)].finished_at = self.now + self._network.delay_s
            self._left -= 1
        if progress.prefilled or finished:
            self._at(self.now + self._network.delay_s, lambda: self._hear(progress.prefilled, finished))
        for name in begun:
            self._lend(int(name))
        self._begin(number)

    def _first_token(self, number: int) -> None:
        self.outcomes[number].first_token_at = self.now + self._network.delay_s
        if self._computed is not None:
            self._computed.update(self._hashes[number].tolist())

    def _lend(self, number: int) -> None:
        """Hand a request that was begun over, and its blocks."""
        raise NotImplementedError

    def _hear(self, prefilled: Sequence[str], finished: Sequence[str]) -> None:
        """Tokens pass through the router that routed the request."""
        changed: dict[int, _Replica] = {}
        for name in prefilled:
            replica = self._replica_of(int(name))
            replica.router.first_token(name, self.now)
            changed[id(replica)] = replica
        for name in finished:
            replica = self._replica_of(int(name))
            replica.router.finish(name, self.now)
            changed[id(replica)] = replica
        for replica in changed.values():
            self._dispatch(replica)

    # What workers say.

    def _report(self, number: int) -> None:
        report = _report_of(self.workers[number].status())
        self._at(self.now + self._network.delay_s, lambda: self._heartbeat(number, report))
        self._at(self.now + self._network.report_interval_s, lambda: self._report(number))

    def _heartbeat(self, number: int, report: WorkerReport) -> None:
        for replica in self._replicas:
            replica.router.heartbeat(f"worker-{number}", 1, report, self.now)
            view = replica.router.view(f"worker-{number}")
            self._resync(view, number, view.told(1, report.next_event_seq))
            self._dispatch(replica)

    def _on_append(self, number: int) -> None:
        log = self.workers[number].log
        entries = log.read(self._published[number], 1)
        self._published[number] += 1
        for replica in self._replicas:
            if self._network.event_loss and self._random.random() < self._network.event_loss:
                continue
            deliver = partial(self._deliver, replica, number, entries[0].batch)
            self._at(self.now + self._network.event_delay_s, deliver)

    def _deliver(self, replica: _Replica, number: int, batch: EventBatch) -> None:
        view = replica.router.view(f"worker-{number}")
        self._resync(view, number, view.offer(batch))

    def _resync(self, view: WorkerView, number: int, needed: Resync) -> None:
        if needed is Resync.NONE:
            return
        log, (_, from_seq) = self.workers[number].log, view.position()
        if needed is Resync.REPLAY and from_seq >= log.first_seq:
            missing = [entry.batch for entry in log.read(from_seq, MAX_REPLAYED)]
            self._at(self.now + 2 * self._network.event_delay_s, partial(_replay, view, missing))
        else:
            snapshot = log.snapshot()
            self._at(self.now + 2 * self._network.event_delay_s, partial(_restore, view, snapshot))


def number_of(worker_id: str) -> int:
    """Of a fleet's worker."""
    return int(worker_id.removeprefix("worker-"))


def _replay(view: WorkerView, missing: Sequence[EventBatch]) -> None:
    for batch in missing:
        view.offer(batch)


def _restore(view: WorkerView, snapshot: Snapshot) -> None:
    view.restore(snapshot)


def _step_costs(steps: StepTimeModel, factor: float) -> StepCosts:
    """A model of step times in a router's words, so many times as slow; what it has no word for is left out."""
    prefill = steps.prefill_step_s, steps.token_s, steps.attention_s
    decode = steps.decode_step_s, steps.sequence_s, steps.context_token_s
    return StepCosts(*(factor * cost for cost in prefill + decode))


def _hashes(block_ids: Sequence[int]) -> Hashes:
    """Block hashes of a trace's ids: as spread out as real ones (splitmix64), and never 0."""
    values = np.array(block_ids, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _report_of(status: EngineStatus) -> WorkerReport:
    times = status.times
    return WorkerReport(
        running=status.running,
        waiting=status.waiting,
        blocks_total=status.blocks_total,
        blocks_in_use=status.blocks_in_use,
        blocks_cached=status.blocks_cached,
        prefill_tokens_outstanding=status.prefill_tokens_outstanding,
        prefill_steps=times.prefill_steps,
        prefill_tokens=times.prefill_tokens,
        prefill_s=times.prefill_s,
        decode_steps=times.decode_steps,
        decode_tokens=times.decode_tokens,
        decode_s=times.decode_s,
        preemptions=status.preemptions,
        prompt_tokens=status.prompt_tokens,
        cached_prompt_tokens=status.cached_prompt_tokens,
        host_cached_prompt_tokens=status.host_cached_prompt_tokens,
        next_event_seq=status.next_event_seq,
        prefill_attention=times.prefill_attention,
        prefill_decodes=times.prefill_decodes,
        prefill_context=times.prefill_context,
        decode_context=times.decode_context,
    )
