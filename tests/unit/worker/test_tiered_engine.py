"""The engine with a host tier, over a runner that knows which prefix each cell of each tier was computed after."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import invariant

from kv_events.view import WorkerView
from radix import make_tree
from radix.hashing import derive_salt
from radix.tree import Tier
from rhizome.errors import InvalidRequest
from tests.support.memory_runner import MemoryRunner, reference_answer
from tests.unit.worker.test_engine import (
    CONFIG,
    GREEDY,
    EngineMachine,
    WeakHasher,
    idle_and_nothing_lost,
    make_engine,
    request,
    run,
)
from worker.cached_block import CachedBlock, hash_of
from worker.engine import Engine
from worker.plan import SampledToken, StepPlan
from worker.prefix_cache import PrefixCache
from worker.scheduler import SchedulerConfig

TIERED = replace(CONFIG, host_blocks=7)


class MarkingRunner(MemoryRunner):
    """Beside each token it keeps a mark, made of that token and the mark before it, read through the block table: what
    attention would have made of the whole prefix. Saves, copies and loads move marks as they move tokens."""

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config.num_blocks, config.block_size, config.host_blocks)
        self.marks = np.zeros_like(self.memory)
        self.host_marks = np.zeros_like(self.host)
        self.plans: list[StepPlan] = []

    def run(self, plan: StepPlan) -> list[list[SampledToken]]:
        self.plans.append(plan)
        assert len({slot for _, slot in plan.saves}) == len(plan.saves), "two saves go to one slot"
        assert len({block for _, block in plan.loads}) == len(plan.loads), "two loads go to one block"
        for block, slot in plan.saves:
            self.host_marks[slot] = self.marks[block]
        for source, target in plan.copies:
            self.marks[target] = self.marks[source]
        for slot, block in plan.loads:
            self.marks[block] = self.host_marks[slot]
        for chunk in plan.chunks:
            for position, token in enumerate(chunk.token_ids, chunk.start):
                before = self.marks[self._cell(chunk.block_ids, position - 1)] if position else 0
                self.marks[self._cell(chunk.block_ids, position)] = mark(token, int(before))
        return super().run(plan)

    def _cell(self, block_ids: object, position: int) -> tuple[int, int]:
        return block_ids[position // self.block_size], position % self.block_size  # type: ignore[index]


def mark(token: int, before: int) -> int:
    return zlib.crc32(int(token).to_bytes(4, "little"), before)


def marks_of(content: CachedBlock) -> list[int]:
    """What a cell for each token of this block holds, by the cache's own account of the block and all before it."""
    before = marks_of(content.parent)[-1] if content.parent is not None else 0
    marks = []
    for token in np.frombuffer(content.tokens, np.uint32).tolist():
        before = mark(token, before)
        marks.append(before)
    return marks


class TieredEngineMachine(EngineMachine):
    """What the cache says is in a block or a slot is there, the log tells it, and no answer depends on any of it."""

    host_blocks = 7

    def new_engine(self) -> Engine:
        config = replace(CONFIG, host_blocks=self.host_blocks)
        self.runner = MarkingRunner(config)
        self.view = WorkerView("w", 0, make_tree())
        self.seen = 0
        self.held: set[bytes] = set()
        self.clears = 0
        return make_engine(config, runner=self.runner)

    @invariant()
    def contents_are_where_the_cache_says(self) -> None:
        cache = self.engine.scheduler.cache
        assert cache.host is not None
        for block, content in cache._contents.items():
            assert self.runner.marks[block].tolist() == marks_of(content)
        for slot, content in cache.host._contents.items():
            assert self.runner.host_marks[slot].tolist() == marks_of(content)

    @invariant()
    def followers_know_every_block_in_its_tiers(self) -> None:
        log, cache = self.engine.event_log, self.engine.scheduler.cache
        assert cache.host is not None
        for batch in log.since(self.seen):
            self.view.offer(batch)
        self.seen = log.next_seq
        assert self.view.digest == log.digest
        assert self.view.synced or not self.seen
        told = log.snapshot()
        for tier, contents in ((Tier.DEVICE, cache._contents), (Tier.HOST, cache.host._contents)):
            assert set(told.block_hashes[told.held_in(tier)].tolist()) == {hash_of(c.key) for c in contents.values()}

    @invariant()
    def blocks_are_lost_only_where_the_host_tier_is_full(self) -> None:
        cache = self.engine.scheduler.cache
        assert cache.host is not None
        held = {content.key[:8] for content in (*cache._contents.values(), *cache.host._contents.values())}
        if self.held - held and held:
            assert len(cache.host) == cache.host.num_slots
        self.held = held


class ScarceHostEngineMachine(TieredEngineMachine):
    """The same with fewer slots than a prompt has blocks: pinned slots, and blocks that find no slot."""

    host_blocks = 2


class CollidingTieredEngineMachine(TieredEngineMachine):
    """The same where most blocks share their key with others."""

    hasher = WeakHasher(4, derive_salt("m"))


TestTieredEngine = TieredEngineMachine.TestCase
TestTieredEngine.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestScarceHost = ScarceHostEngineMachine.TestCase
TestScarceHost.settings = TestTieredEngine.settings
TestTieredEngineWithCollisions = CollidingTieredEngineMachine.TestCase
TestTieredEngineWithCollisions.settings = TestTieredEngine.settings


def tiered_engine(config: SchedulerConfig = TIERED) -> tuple[Engine, MarkingRunner]:
    runner = MarkingRunner(config)
    return make_engine(config, runner=runner), runner


def fill_device(engine: Engine, name: str, first: int) -> None:
    """A request that needs nearly the whole device."""
    engine.add(request(name, [first + at % 7 for at in range(34)]))
    run(engine)


def test_what_the_device_gave_up_comes_back_from_the_host() -> None:
    """A prompt evicted by another is loaded, not computed: counted as cached, and apart as cached on the host."""
    engine, runner = tiered_engine(replace(TIERED, host_blocks=40))
    prompt = list(range(1, 17))
    engine.add(request("cold", prompt))
    cold = run(engine)["cold"]
    fill_device(engine, "other", 20)
    fill_device(engine, "another", 30)
    assert all(plan.loads == () for plan in runner.plans)
    engine.add(request("warm", prompt))
    (sequence,) = engine.scheduler.waiting
    assert sequence.expected_cached == 12
    outputs = engine.step()
    plan = runner.plans[-1]
    assert len(plan.loads) == 3, "16 tokens are 4 full blocks, but the last token is always computed"
    assert plan.chunks[0].start == 12
    assert list(plan.chunks[0].block_ids[:3]) == [block for _, block in plan.loads]
    assert outputs[0].cached_tokens == 12
    assert engine.scheduler.host_cached_prompt_tokens == engine.scheduler.cached_prompt_tokens == 12
    assert {0: [outputs[0].token.token_id, *run(engine)["warm"][0]]} == cold
    idle_and_nothing_lost(engine)


def test_saves_ride_on_the_step_that_overwrites_the_block() -> None:
    """Each block given up is saved in the plan of the step that takes it, before that step's chunks."""
    engine, runner = tiered_engine()
    engine.add(request("cold", list(range(1, 17))))
    run(engine)
    assert all(plan.saves == () for plan in runner.plans), "nothing had to go"
    before = len(runner.plans)
    fill_device(engine, "other", 20)
    saves = [save for plan in runner.plans[before:] for save in plan.saves]
    assert len(saves) == len({slot for _, slot in saves}) > 0
    cache = engine.scheduler.cache
    assert cache.host is not None
    assert len(cache.host) == len(saves)


def test_a_block_that_was_loaded_costs_no_second_save() -> None:
    """Its copy stays on the host: when the device gives it up again nothing is moved."""
    engine, runner = tiered_engine(replace(TIERED, host_blocks=40))
    prompt = list(range(1, 17))
    for round_, first in enumerate((20, 27, 34)):
        engine.add(request(f"turn{round_}", prompt))
        run(engine)
        fill_device(engine, f"other{round_}", first % 30)
    cache = engine.scheduler.cache
    assert cache.host is not None
    saved = [slot for plan in runner.plans for _, slot in plan.saves]
    assert len(saved) == len(set(saved)) == len(cache.host), "every block crossed to the host once"
    assert sum(len(plan.loads) for plan in runner.plans) == 2, "one block of the prompt had to go, each time"


def test_blocks_on_the_host_need_room_on_the_device() -> None:
    """A sequence whose prefix is on the host alone waits until its blocks fit beside those that run."""
    engine, runner = tiered_engine(replace(TIERED, host_blocks=40))
    prompt = list(range(1, 29))
    engine.add(request("cold", prompt))
    run(engine)
    fill_device(engine, "other", 30)
    fill_device(engine, "another", 20)
    engine.add(request("long", [2] * 30, replace(GREEDY, max_tokens=8)))
    engine.step()
    engine.add(request("warm", prompt))
    assert engine.scheduler.waiting[0].expected_cached == 24
    engine.step()
    assert [s.request.request_id for s in engine.scheduler.waiting] == ["warm"]
    assert not runner.plans[-1].loads
    answers = run(engine)
    assert answers["warm"][0] == reference_answer(prompt, GREEDY, 0, CONFIG.max_model_len)
    assert sum(len(plan.loads) for plan in runner.plans) >= 6
    idle_and_nothing_lost(engine)


def test_a_preempted_sequence_finds_its_blocks_on_the_host() -> None:
    """Two that outgrow the device: the preempted one comes back by loads, and both answers are right."""
    config = replace(CONFIG, host_blocks=20, max_model_len=48)
    engine, runner = tiered_engine(config)
    params = replace(GREEDY, max_tokens=30)
    prompts = {"first": [3] * 18, "second": [5] * 18}
    for name, prompt in prompts.items():
        engine.add(request(name, prompt, params))
    answers = run(engine)
    for name, prompt in prompts.items():
        assert answers[name][0] == reference_answer(prompt, params, 0, config.max_model_len)
    assert engine.scheduler.preemptions > 0
    assert sum(len(plan.loads) for plan in runner.plans) > 0
    assert engine.scheduler.host_cached_prompt_tokens == 0, "it was no hit: those tokens were its own"
    idle_and_nothing_lost(engine)


def test_clearing_the_cache_clears_both_tiers() -> None:
    """Nothing is found afterwards, on the device or behind it, and the log says so."""
    engine, runner = tiered_engine()
    prompt = list(range(1, 17))
    engine.add(request("cold", prompt))
    run(engine)
    fill_device(engine, "other", 20)
    held = len(engine.scheduler.cache)
    assert held == len(engine.event_log) > CONFIG.num_blocks
    assert engine.clear_cache() == held
    assert len(engine.scheduler.cache) == len(engine.event_log) == 0
    engine.add(request("again", prompt))
    run(engine)
    assert engine.scheduler.cached_prompt_tokens == 0
    assert all(plan.loads == () for plan in runner.plans)


def test_without_host_blocks_there_is_no_tier() -> None:
    """0 is the default, and below it is refused by name."""
    assert PrefixCache(4, 4).host is None
    assert make_engine().scheduler.cache.host is None
    with pytest.raises(InvalidRequest, match="host_blocks"):
        replace(CONFIG, host_blocks=-1)
