"""The engine over a runner that remembers tokens: what is answered, in which order, and that nothing leaks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from numpy.typing import ArrayLike

from kv_events.events import BlockStored
from kv_events.log import EventLog
from kv_events.view import WorkerView
from radix import make_tree
from radix.hashing import BlockHasher, derive_salt
from radix.keys import BlockKeys
from rhizome.errors import Duplicate, InvalidRequest, Overloaded
from tests.support.memory_runner import EOS, VOCAB, LetterDecoder, MemoryRunner, reference_answer
from worker.answer import FinishReason
from worker.engine import Engine, Output
from worker.plan import SamplingParams
from worker.scheduler import SchedulerConfig
from worker.sequence import EngineRequest

CONFIG = SchedulerConfig(
    num_blocks=12, block_size=4, max_model_len=40, max_batched_tokens=8, max_running=4, max_waiting=4
)
HASHER = BlockHasher(4, derive_salt("m"))
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


def make_engine(
    config: SchedulerConfig = CONFIG, clock: Callable[[], float] = lambda: 0.0, runner: MemoryRunner | None = None
) -> Engine:
    return Engine(
        config,
        runner or MemoryRunner(config.num_blocks, config.block_size, config.host_blocks),
        EventLog("w", 1, config.block_size, 10_000),
        new_decoder=LetterDecoder,
        eos_token_ids=frozenset({EOS}),
        clock=clock,
        wall_clock=lambda: 0.0,
        validate=True,
    )


class WeakHasher(BlockHasher):
    """Block keys of which there are only a few: whoever knows the hash's key could plant blocks that collide."""

    def keys(self, tokens: ArrayLike, parent: BlockKeys | None = None) -> BlockKeys:
        keys = []
        for start in range(0, len(np.asarray(tokens)) // self.block_size * self.block_size, self.block_size):
            parent = super().keys(np.asarray(tokens)[start : start + self.block_size], parent)[0] % np.uint64(3)
            parent[0] += np.uint64(1)
            keys.append(parent)
        return np.array(keys, np.uint64).reshape(-1, 2)


def request(
    name: str, tokens: list[int], params: SamplingParams = GREEDY, hasher: BlockHasher = HASHER, **fields: object
) -> EngineRequest:
    keys = hasher.keys(np.array(tokens, np.uint32))
    return EngineRequest(name, tokens, params, hasher, keys, **fields)  # type: ignore[arg-type]


def run(engine: Engine) -> dict[str, dict[int, list[int]]]:
    """Step until nothing is left; tokens by request and choice."""
    tokens: dict[str, dict[int, list[int]]] = {}
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, {}).setdefault(output.choice, []).append(output.token.token_id)
    return tokens


def idle_and_nothing_lost(engine: Engine) -> None:
    pool = engine.scheduler.cache.pool
    assert pool.in_use == 0
    assert pool.available == pool.num_blocks
    engine.scheduler.check()


class EngineMachine(RuleBasedStateMachine):
    """Requests come, fork, are cancelled, preempted and cached in any order; every answer is the model's own."""

    hasher = HASHER

    def __init__(self) -> None:
        super().__init__()
        self.engine = self.new_engine()
        self.expected: dict[str, EngineRequest] = {}
        self.got: dict[tuple[str, int], list[int]] = {}
        self.count = 0

    def new_engine(self) -> Engine:
        return make_engine()

    @rule(
        prefix=st.integers(0, 3),
        shared=st.integers(0, 24),
        tail=st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=8),
        params=st.builds(
            SamplingParams,
            max_tokens=st.integers(1, 14),
            temperature=st.sampled_from([0.0, 1.0]),
            seed=st.integers(0, 3),
            min_tokens=st.integers(0, 2),
            ignore_eos=st.booleans(),
            n=st.sampled_from([1, 1, 1, 2, 3]),
        ),
        priority=st.integers(0, 1),
        bypass=st.sampled_from([False, False, False, True]),
    )
    def add(
        self, prefix: int, shared: int, tail: list[int], params: SamplingParams, priority: int, bypass: bool
    ) -> None:
        params = dataclasses.replace(params, min_tokens=min(params.min_tokens, params.max_tokens))
        tokens = [1 + (prefix * 7 + at) % (VOCAB - 1) for at in range(shared)] + tail
        self.count += 1
        new = request(f"r{self.count}", tokens, params, self.hasher, priority=priority, bypass_prefix_cache=bypass)
        try:
            self.engine.add(new)
        except Overloaded:
            assert len(self.engine.scheduler.waiting) >= CONFIG.max_waiting
        else:
            self.expected[new.request_id] = new

    @precondition(lambda self: self.engine.has_work)
    @rule(steps=st.integers(1, 5))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.take(self.engine.step())

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.expected)))
        self.engine.cancel(name)
        del self.expected[name]

    @rule()
    def clear(self) -> None:
        self.engine.clear_cache()

    @invariant()
    def nothing_leaks(self) -> None:
        self.engine.scheduler.check()

    def take(self, outputs: list[Output]) -> None:
        for output in outputs:
            assert output.request_id in self.expected, "an output of a request that is gone"
            self.got.setdefault((output.request_id, output.choice), []).append(output.token.token_id)

    def teardown(self) -> None:
        while self.engine.has_work:
            self.take(self.engine.step())
        for name, asked in self.expected.items():
            for choice in range(asked.params.n):
                expected = reference_answer(asked.token_ids, asked.params, choice, CONFIG.max_model_len)
                assert self.got[name, choice] == expected
        idle_and_nothing_lost(self.engine)
        follow_and_compare(self.engine)


def follow_and_compare(engine: Engine) -> None:
    """A router that follows the events knows exactly what the cache holds."""
    view = WorkerView("w", 0, make_tree())
    for batch in engine.event_log.since(0):
        view.offer(batch)
    held = len(engine.scheduler.cache)
    assert len(engine.event_log.snapshot().block_hashes) == held
    assert view.digest == engine.event_log.digest
    if engine.event_log.next_seq:
        assert view.synced


class CollidingEngineMachine(EngineMachine):
    """The same where most blocks share their key with others: contents never mix, and log and cache stay in step."""

    hasher = WeakHasher(4, derive_salt("m"))


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestEngineWithCollisions = CollidingEngineMachine.TestCase
TestEngineWithCollisions.settings = TestEngine.settings


def test_colliding_prompts_get_their_own_answers() -> None:
    """A second prompt whose blocks all have the keys of the first: counted, computed anew, answered right."""
    engine = make_engine()
    first, second = list(range(1, 14)), list(range(14, 27))
    engine.add(request("first", first))
    run(engine)
    keys = HASHER.keys(np.array(first, np.uint32))
    engine.add(EngineRequest("second", second, GREEDY, HASHER, keys))
    answers = run(engine)
    assert answers["second"][0] == reference_answer(second, GREEDY, 0, CONFIG.max_model_len)
    assert engine.scheduler.cache.collisions == 3
    idle_and_nothing_lost(engine)
    follow_and_compare(engine)


def test_a_warm_request_computes_only_what_is_not_cached() -> None:
    """The second time all full blocks but the last token come from the cache, and the answer is the same."""
    engine = make_engine()
    prompt = list(range(1, 17))
    engine.add(request("cold", prompt))
    cold = run(engine)["cold"]
    engine.add(request("warm", prompt))
    outputs = engine.step()
    assert outputs[0].cached_tokens == 12, "16 tokens are 4 full blocks, but the last token is always computed"
    warm = {0: [outputs[0].token.token_id, *run(engine)["warm"][0]]}
    assert warm == cold
    assert engine.status().cached_prompt_tokens == 12
    idle_and_nothing_lost(engine)


def test_a_bypassing_request_neither_reads_nor_fills_the_cache() -> None:
    """Nothing of it is found later, and it finds nothing."""
    engine = make_engine()
    prompt = list(range(1, 17))
    engine.add(request("hidden", prompt, bypass_prefix_cache=True))
    run(engine)
    assert len(engine.scheduler.cache) == 0
    engine.add(request("open", prompt))
    run(engine)
    engine.add(request("again", prompt, bypass_prefix_cache=True))
    assert engine.step()[0:1] == []
    assert engine.step()[0].cached_tokens == 0


def test_a_long_prompt_is_computed_in_chunks_while_others_go_on_decoding() -> None:
    """Each step gives a decoding sequence its token; the prefill takes what is left of the budget."""
    engine = make_engine()
    engine.add(request("short", [1, 2], dataclasses.replace(GREEDY, max_tokens=12)))
    engine.step()
    engine.add(request("long", list(range(1, 25))))
    for _ in range(3):
        outputs = engine.step()
        assert [output.request_id for output in outputs] == ["short"]
    assert [output.request_id for output in engine.step()] == ["short", "long"]


def test_when_blocks_run_out_the_worst_ranked_is_preempted_and_still_answers_the_same() -> None:
    """Priority first, then arrival; preemption costs time, not correctness."""
    engine = make_engine()
    params = dataclasses.replace(GREEDY, max_tokens=20)
    prompts = {name: [at + 1] * 12 for at, name in enumerate(("low", "a", "b"))}
    engine.add(request("low", prompts["low"], params, priority=5))
    engine.add(request("a", prompts["a"], params))
    engine.add(request("b", prompts["b"], params))
    finished: list[str] = []
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).append(output.token.token_id)
            if output.request_finished:
                finished.append(output.request_id)
    assert engine.status().preemptions > 0
    assert finished == ["a", "b", "low"]
    for name, prompt in prompts.items():
        assert tokens[name] == reference_answer(prompt, params, 0, 40)
    idle_and_nothing_lost(engine)


def test_choices_share_the_prompts_blocks_until_they_write() -> None:
    """Three choices of a 10-token prompt hold its two full blocks once, and a partial block each."""
    engine = make_engine()
    params = SamplingParams(max_tokens=5, temperature=1.0, seed=3, n=3, ignore_eos=True)
    engine.add(request("r", list(range(1, 11)), params))
    engine.step()
    assert len(engine.step()) == 3
    assert engine.status().blocks_in_use == 3
    outputs = engine.step()
    assert engine.status().blocks_in_use == 2 + 3
    assert sorted(output.choice for output in outputs) == [0, 1, 2]
    tokens = run(engine)
    assert len({tuple(choice) for choice in tokens["r"].values()}) == 3
    idle_and_nothing_lost(engine)


@pytest.mark.parametrize("steps", range(5))
def test_cancelling_frees_the_blocks_at_once(steps: int) -> None:
    """Waiting, half-way through the prompt, decoding: the blocks are free when cancel returns."""
    engine = make_engine()
    engine.add(request("gone", list(range(1, 21)), dataclasses.replace(GREEDY, n=2)))
    for _ in range(steps):
        engine.step()
    engine.cancel("gone")
    idle_and_nothing_lost(engine)
    assert not engine.has_work
    assert engine.step() == []


def test_bounds_are_told_with_their_limit() -> None:
    """A full queue, a request id in flight, more choices than run at once: refused, and nothing remains of it."""
    engine = make_engine()
    for at in range(4):
        engine.add(request(f"r{at}", [1, 2, 3]))
    with pytest.raises(Overloaded, match="4 is the limit"):
        engine.add(request("one-more", [1]))
    with pytest.raises(Duplicate, match="r0"):
        engine.add(request("r0", [1]))
    engine.cancel("r3")
    with pytest.raises(InvalidRequest, match=r"sampling.n is 5: at most the 4"):
        engine.add(request("wide", [1], dataclasses.replace(GREEDY, n=5)))
    assert set(run(engine)) == {"r0", "r1", "r2"}
    idle_and_nothing_lost(engine)


def test_stop_strings_end_the_answer_and_are_not_part_of_it() -> None:
    """The text stops before the stop string, even when it spans several tokens."""
    free = reference_answer([3, 4, 5], dataclasses.replace(GREEDY, max_tokens=12), 0, 40)
    text = LetterDecoder().push(free)
    stop = text[4:7]
    engine = make_engine()
    engine.add(request("r", [3, 4, 5], dataclasses.replace(GREEDY, max_tokens=12, stop=(stop,))))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert "".join(output.text for output in outputs) == text[: text.index(stop)]
    assert outputs[-1].finish_reason is FinishReason.STOP


def test_end_of_sequence_and_stop_tokens_end_the_answer_but_not_before_min_tokens() -> None:
    """min_tokens holds both off; ignore_eos holds off the model's own."""
    prompt = [2, 2]
    free = reference_answer(prompt, dataclasses.replace(GREEDY, max_tokens=10), 0, 40)
    engine = make_engine()
    params = dataclasses.replace(GREEDY, max_tokens=10, stop_token_ids=frozenset({free[3]}))
    engine.add(request("r", prompt, params))
    assert run(engine)["r"][0] == free[: free.index(free[3]) + 1]
    late = dataclasses.replace(params, min_tokens=6)
    engine.add(request("late", prompt, late))
    tokens = run(engine)["late"][0]
    assert tokens == reference_answer(prompt, late, 0, 40)
    assert len(tokens) >= 6


def test_the_status_counts_what_is_left_to_prefill() -> None:
    """Queued and half-computed prompts count with their uncached part."""
    engine = make_engine()
    engine.add(request("a", list(range(1, 21))))
    engine.add(request("b", list(range(1, 6))))
    assert engine.status().prefill_tokens_outstanding == 25
    engine.step()
    assert engine.status().prefill_tokens_outstanding == 17
    assert (engine.status().running, engine.status().waiting) == (1, 1)


def test_progress_names_first_tokens_and_endings_once() -> None:
    """What a status report says of requests; a later report says only what is new."""
    engine = make_engine()
    engine.add(request("a", [1, 2]))
    engine.step()
    position, prefilled, finished = engine.progress_since(0)
    assert (prefilled, finished) == (["a"], [])
    run(engine)
    assert engine.progress_since(position)[1:] == ([], ["a"])


def test_step_times_are_told_apart() -> None:
    """Steps with prefill and pure decode steps have counters of their own."""
    ticks = iter(range(1000))
    engine = make_engine(clock=lambda: float(next(ticks)))
    engine.add(request("a", [1, 2, 3], dataclasses.replace(GREEDY, max_tokens=3)))
    run(engine)
    times = engine.status().times
    assert (times.prefill_steps, times.prefill_tokens, times.decode_steps, times.decode_tokens) == (1, 3, 2, 2)
    assert times.prefill_s == 1.0
    assert times.decode_s == 2.0


def test_the_work_of_steps_is_counted() -> None:
    """Attention of chunks, and the context that decodes read, in both kinds of steps: a fit of step times needs it."""
    engine = make_engine()
    engine.add(request("a", [1, 2, 3], dataclasses.replace(GREEDY, max_tokens=4)))
    engine.step()  # a: 3 new tokens
    engine.add(request("b", list(range(1, 11)), dataclasses.replace(GREEDY, max_tokens=1)))
    engine.step()  # a decodes its 4th token, b takes the 7 tokens that are left of 8
    engine.step()  # a decodes its 5th, b takes 3 after 7
    engine.step()  # a alone, its 6th
    times = engine.status().times
    assert times.prefill_attention == 3 * 3 / 2 + 7 * 7 / 2 + 3 * (7 + 3 / 2)
    assert (times.prefill_decodes, times.prefill_context) == (2, 4 + 5)
    assert (times.decode_tokens, times.decode_context) == (1, 6)


def test_an_engine_tells_tokens_in_its_events_where_it_is_set_to() -> None:
    """Prompt and answer, as they fill blocks; by default none."""
    prompt = list(range(1, 10))
    for told in (False, True):
        engine = make_engine(dataclasses.replace(CONFIG, event_token_ids=told))
        engine.add(request("a", prompt))
        answer = run(engine)["a"][0]
        events = [event for batch in engine.event_log.since(0) for event in batch.events]
        stored = [event for event in events if isinstance(event, BlockStored)]
        assert stored
        if told:
            tokens = [token for event in stored if event.token_ids is not None for token in event.token_ids.tolist()]
            assert tokens == [*prompt, *answer][: len(tokens)]
            assert len(tokens) == 4 * sum(len(event.block_hashes) for event in stored) > len(prompt)
        else:
            assert all(event.token_ids is None for event in stored)
