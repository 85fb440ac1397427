"""A worker in virtual time: leaps change nothing, requests end, memory stays within bounds, events tell the cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_events.log import EventLog
from kv_events.view import WorkerView
from radix import make_tree
from rhizome.errors import Overloaded
from worker.scheduler import SchedulerConfig
from worker.simulated import SimulatedWorker
from worker.step_time import StepTimeModel

BLOCK = 4
STEPS = StepTimeModel(24e-3, 16e-3, 0.05e-3, 3e-6, 0.7e-3, 2e-6)
CURVED = StepTimeModel(24e-3, 16e-3, 0.05e-3, 3e-6, 0.7e-3, 2e-6, context_square_s=1e-8)


def config(num_blocks: int = 40, host_blocks: int = 0, max_waiting: int = 256) -> SchedulerConfig:
    """A small worker: four sequences at once, sixteen tokens a step."""
    return SchedulerConfig(
        num_blocks=num_blocks,
        block_size=BLOCK,
        max_model_len=num_blocks * BLOCK,
        max_batched_tokens=16,
        max_running=4,
        max_waiting=max_waiting,
        host_blocks=host_blocks,
    )


@dataclass(frozen=True)
class Arrival:
    """A request, with the hashes of its prompt's full blocks."""

    at: float
    name: str
    prompt: int
    output: int
    hashes: tuple[int, ...]
    priority: int = 0


@dataclass
class Seen:
    """What a run did."""

    first_token: dict[str, float] = field(default_factory=dict)
    finished: dict[str, float] = field(default_factory=dict)
    events: list[tuple[float, str]] = field(default_factory=list)
    ends: int = 0  # calls of `end`


def drive(worker: SimulatedWorker, arrivals: list[Arrival], *, leaps: bool = True) -> Seen:
    """Play requests on a worker, with every invariant checked; without `leaps` each step is one of its own."""
    seen = Seen()
    left = sorted(arrivals, key=lambda arrival: arrival.at)
    ends_at: float | None = None

    def begin(now: float) -> float | None:
        time = worker.begin(now)
        if time is not None and not leaps:
            first = worker.interrupt(now)
            time = time if first is None else first
        return time

    while left or ends_at is not None:
        if ends_at is not None and (not left or ends_at <= left[0].at):
            progress = worker.end(ends_at)
            for names, times in ((progress.prefilled, seen.first_token), (progress.finished, seen.finished)):
                for name in names:
                    assert name not in times, "told twice"
                    times[name] = ends_at
            seen.ends += 1
            worker.scheduler.check()
            ends_at = begin(ends_at)
        else:
            arrival = left.pop(0)
            worker.add(arrival.name, arrival.prompt, arrival.output, arrival.hashes, arrival.priority)
            if not worker.busy:
                ends_at = begin(arrival.at)
            else:
                sooner = worker.interrupt(arrival.at)
                assert sooner is None or arrival.at < sooner <= (ends_at or 0.0)
                ends_at = ends_at if sooner is None else sooner
    seen.events = [(batch.ts, repr(batch.events)) for batch in worker.log.since(0)]
    return seen


def hashes_of(family: int, prompt: int) -> tuple[int, ...]:
    """Blocks that all prompts of a family share."""
    return tuple(1 + family * 1000 + depth for depth in range(prompt // BLOCK))


@st.composite
def schedules(draw: st.DrawFn, longest: int) -> list[Arrival]:
    """Requests of few families, some at once, no prompt and answer longer than `longest`."""
    arrivals = []
    at = 0.0
    for number in range(draw(st.integers(1, 12))):
        at += draw(st.sampled_from([0.0, 0.001, 0.0173, 0.11, 1.7]))
        prompt = draw(st.integers(1, longest - 1))
        output = draw(st.integers(1, longest - prompt))
        family, priority = draw(st.integers(0, 2)), draw(st.integers(0, 1))
        arrivals.append(Arrival(at, str(number), prompt, output, hashes_of(family, prompt), priority))
    return arrivals


@settings(max_examples=150, deadline=None)
@given(data=st.data(), blocks=st.sampled_from([10, 14, 40]), host=st.sampled_from([0, 12]), curved=st.booleans())
def test_leaps_change_nothing(data: st.DataObject, blocks: int, host: int, curved: bool) -> None:
    """Steps taken at once and one by one: the same times, the same events, the same counters."""
    arrivals = data.draw(schedules(min(blocks * BLOCK, 60)))
    model = CURVED if curved else STEPS
    leaping = SimulatedWorker("w", config(blocks, host), model, host_token_s=1e-5)
    stepping = SimulatedWorker("w", config(blocks, host), model, host_token_s=1e-5)
    fast, slow = drive(leaping, arrivals), drive(stepping, arrivals, leaps=False)
    assert fast.first_token == pytest.approx(slow.first_token, abs=1e-9)
    assert fast.finished == pytest.approx(slow.finished, abs=1e-9)
    assert [events for _, events in fast.events] == [events for _, events in slow.events]
    assert [at for at, _ in fast.events] == pytest.approx([at for at, _ in slow.events], abs=1e-9)
    assert fast.ends <= slow.ends
    one, other = leaping.status(), stepping.status()
    assert one.preemptions == other.preemptions
    assert one.cached_prompt_tokens == other.cached_prompt_tokens
    for name in ("prefill_steps", "prefill_tokens", "decode_steps", "decode_tokens", "prefill_context"):
        assert getattr(one.times, name) == getattr(other.times, name), name
    for name in ("prefill_s", "decode_s", "prefill_attention", "decode_context"):
        assert getattr(one.times, name) == pytest.approx(getattr(other.times, name), abs=1e-9), name


@settings(max_examples=50, deadline=None)
@given(data=st.data(), blocks=st.sampled_from([10, 14, 40]), host=st.sampled_from([0, 12]))
def test_a_run_is_repeatable_to_the_bit(data: st.DataObject, blocks: int, host: int) -> None:
    """The same requests at the same times: equal times, events and counters, compared without tolerance."""
    arrivals = data.draw(schedules(min(blocks * BLOCK, 60)))
    workers = [SimulatedWorker("w", config(blocks, host), CURVED, host_token_s=1e-5) for _ in range(2)]
    one, other = (drive(worker, arrivals) for worker in workers)
    assert one == other
    assert workers[0].status() == workers[1].status()
    assert workers[0].log.digest == workers[1].log.digest


@settings(max_examples=150, deadline=None)
@given(data=st.data(), blocks=st.sampled_from([10, 14, 40]), host=st.sampled_from([0, 12]))
def test_every_request_ends_once_and_no_sooner_than_its_own_work_takes(
    data: st.DataObject, blocks: int, host: int
) -> None:
    """All get a first token and then an end, with at least the steps between that its tokens need; nothing is left."""
    arrivals = data.draw(schedules(min(blocks * BLOCK, 60)))
    worker = SimulatedWorker("w", config(blocks, host), STEPS)
    seen = drive(worker, arrivals)
    names = {arrival.name for arrival in arrivals}
    assert seen.first_token.keys() == seen.finished.keys() == names
    for arrival in arrivals:
        first, last = seen.first_token[arrival.name], seen.finished[arrival.name]
        assert first >= arrival.at + STEPS.decode_step_s
        assert last >= first + (arrival.output - 1) * STEPS.decode_step_s - 1e-9
    status = worker.status()
    assert (status.running, status.waiting, status.blocks_in_use, status.prefill_tokens_outstanding) == (0, 0, 0, 0)
    assert status.prompt_tokens == sum(arrival.prompt for arrival in arrivals)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), blocks=st.sampled_from([10, 40]), host=st.sampled_from([0, 12]))
def test_events_tell_the_whole_cache(data: st.DataObject, blocks: int, host: int) -> None:
    """A view that was fed every batch has the log's digest, and holds no more than there is memory for."""
    worker = SimulatedWorker("w", config(blocks, host), STEPS)
    drive(worker, data.draw(schedules(40)))
    view = WorkerView("w", 0, make_tree())
    for batch in worker.log.since(0):
        view.offer(batch)
    if worker.log.next_seq:
        assert view.synced
        assert view.digest == worker.log.digest
    assert len(worker.log) <= blocks + host


def test_work_is_conserved() -> None:
    """What is neither cached nor computed again is computed once: prompt tokens are cached ones and prefilled ones."""
    arrivals = [Arrival(0.3 * n, str(n), 30 + n, 5, hashes_of(n % 3, 30 + n)) for n in range(30)]
    worker = SimulatedWorker("w", config(400), STEPS)
    drive(worker, arrivals)
    status = worker.status()
    assert status.preemptions == 0
    assert status.cached_prompt_tokens > 0
    computed = status.prompt_tokens - status.cached_prompt_tokens
    decoded = sum(a.output - 1 for a in arrivals)
    # A chunk of a single token counts as a decode step's.
    assert computed - len(arrivals) <= status.times.prefill_tokens <= computed
    assert status.times.prefill_tokens + status.times.prefill_decodes + status.times.decode_tokens == computed + decoded


def test_with_too_little_memory_some_are_preempted_and_all_end() -> None:
    """Answers outgrow the memory: the latest go back to the queue, are computed again, and still end once."""
    arrivals = [Arrival(0.0, str(n), 9, 25, hashes_of(n, 9)) for n in range(4)]
    worker = SimulatedWorker("w", config(20), STEPS)
    seen = drive(worker, arrivals)
    assert worker.status().preemptions > 0
    assert seen.finished.keys() == {"0", "1", "2", "3"}
    assert seen.finished["0"] < seen.finished["3"]


def test_a_prompt_that_is_there_already_costs_one_short_step() -> None:
    """The second of two equal prompts computes what its last block leaves, and no more."""
    arrivals = [Arrival(0.0, "cold", 33, 1, hashes_of(0, 33)), Arrival(9.0, "warm", 33, 1, hashes_of(0, 33))]
    seen = drive(SimulatedWorker("w", config(), STEPS), arrivals)
    cold, warm = seen.first_token["cold"], seen.first_token["warm"] - 9.0
    assert warm == pytest.approx(STEPS.step_s(1, 32), abs=1e-9)  # one token left: as a decode step
    assert cold > 3 * STEPS.prefill_step_s  # three chunks of at most 16 tokens


def test_priority_goes_first() -> None:
    """Of those that wait, the one with the least priority number is served first, whenever it came."""
    arrivals = [Arrival(0.0, str(n), 120, 20, ()) for n in range(3)]
    arrivals.append(Arrival(0.01, "urgent", 120, 20, (), -1))
    seen = drive(SimulatedWorker("w", config(), STEPS), arrivals)
    assert seen.first_token["urgent"] < seen.first_token["1"] < seen.first_token["2"]


def test_a_full_queue_refuses() -> None:
    """No more than max_waiting wait; the refusal changes nothing."""
    worker = SimulatedWorker("w", config(max_waiting=2), STEPS)
    for name in ("a", "b"):
        worker.add(name, 8, 2, ())
    with pytest.raises(Overloaded):
        worker.add("c", 8, 2, ())
    assert worker.status().waiting == 2


def test_the_host_tier_saves_compute_at_its_price() -> None:
    """A prefix that was evicted comes back from host memory: sooner than computed, later than from the device."""
    arrivals = [Arrival(0.0, "first", 120, 1, hashes_of(0, 120)), Arrival(20.0, "other", 158, 1, hashes_of(1, 158))]
    arrivals.append(Arrival(40.0, "again", 120, 1, hashes_of(0, 120)))
    times = {}
    for host, host_token_s in ((0, 0.0), (60, 0.0), (60, 1e-4)):
        worker = SimulatedWorker("w", config(host_blocks=host), STEPS, host_token_s=host_token_s)
        times[host, host_token_s] = drive(worker, arrivals).first_token["again"] - 40.0
    assert times[60, 0.0] < times[60, 1e-4] < times[0, 0.0]


def test_the_log_starts_with_what_is_stored_first() -> None:
    """An idle worker has said nothing."""
    worker = SimulatedWorker("w", config(), STEPS)
    assert isinstance(worker.log, EventLog)
    assert (worker.log.next_seq, worker.busy, worker.begin(0.0)) == (0, False, None)


@given(held=st.integers(0, 6), depth=st.integers(0, 12), busy=st.integers(0, 9), host_blocks=st.sampled_from([0, 4]))
@settings(max_examples=60, deadline=None)
def test_blocks_of_another_worker_are_taken_in_as_far_as_there_is_room(
    held: int, depth: int, busy: int, host_blocks: int
) -> None:
    """Leading ones first, idle, told in events; what runs here keeps its blocks, and what was held of them stays."""
    worker = SimulatedWorker("w", config(10, host_blocks), STEPS)
    prefix = tuple(range(1, 13))
    if held:
        worker.add("first", held * BLOCK, 1, prefix[:held])
        now = worker.begin(0.0)
        while now is not None:
            worker.end(now)
            now = worker.begin(now)
    if busy:
        worker.add("busy", busy * BLOCK - 1, 1, tuple(range(100, 100 + busy - 1)))
        worker.begin(50.0)
    in_use = worker.status().blocks_in_use
    before = worker.held(prefix)
    worker.adopt(prefix[:depth], 60.0)
    assert worker.status().blocks_in_use == in_use
    worker.scheduler.check()
    room = 10 - max(in_use, busy)
    if not host_blocks:
        assert worker.held(prefix) == max(before, min(depth, room))
    assert worker.held(prefix) >= min(before, room)
    view = WorkerView("w", 0, make_tree())
    for entry in worker.log.read(0, 1000):
        view.offer(entry.batch)
    assert view.digest == worker.log.digest
