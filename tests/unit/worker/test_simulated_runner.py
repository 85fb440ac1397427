"""The runner that only takes time: how long a step lasts on a clock of the test's own, and which tokens come."""

from __future__ import annotations

from dataclasses import replace

import pytest

from worker.byte_tokenizer import byte_tokenizer_files
from worker.plan import Chunk, SampledToken, SamplingInput, SamplingParams, StepPlan
from worker.simulated_runner import LETTERS, MAX_OVERHEAD_S, SimulatedRunner, step_seconds
from worker.step_time import StepTimeModel
from worker.tokenizer import Tokenizer

STEPS = StepTimeModel(2.0, 1.0, 0.1, 0.01, 0.5, 0.001)
PARAMS = SamplingParams(max_tokens=100, temperature=1.0, seed=3)


class Clock:
    """Time that passes by sleeping, and where the test lets it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def prompt(tokens: int, start: int = 0, *, last: bool = True) -> Chunk:
    """A chunk of a prompt that ends with it, or goes on."""
    total = start + tokens
    samples = (SamplingInput(PARAMS, [7] * total, total),) if last else ()
    return Chunk([7] * tokens, start, [], samples)


def decode(position: int, params: SamplingParams = PARAMS, prompt_len: int = 4) -> Chunk:
    """The last token of an answer so far."""
    return Chunk([7], position, [], (SamplingInput(params, [7] * (position + 1), prompt_len),))


def runner(clock: Clock, scale: float = 1.0) -> SimulatedRunner:
    return SimulatedRunner(STEPS, time_scale=scale, clock=clock, sleep=clock.sleep)


def test_a_step_takes_its_modelled_time() -> None:
    """Chunks, decodes and their contexts; a chunk of one token is a decode, as it is for the engine."""
    mixed = StepPlan((prompt(10, 20), decode(8), decode(12)))
    assert step_seconds(STEPS, mixed) == pytest.approx(2.0 + 0.5 * 10 + 0.001 * 10 * 25 + 0.1 * 2 + 0.01 * 20)
    assert step_seconds(STEPS, StepPlan((decode(8),))) == pytest.approx(1.0 + 0.1 + 0.08)
    clock = Clock()
    runner(clock, scale=10.0).run(mixed)
    assert clock.now == pytest.approx(100 + step_seconds(STEPS, mixed) / 10)


def test_blocks_from_the_host_tier_have_their_price() -> None:
    """Each that is loaded, beside the step's own time; what is saved or copied has none."""
    clock = Clock()
    plan = StepPlan((prompt(10),), copies=((1, 2),), loads=((1, 2), (3, 4)), saves=((5, 6),))
    SimulatedRunner(STEPS, block_load_s=0.25, clock=clock, sleep=clock.sleep).run(plan)
    assert clock.now == pytest.approx(100 + step_seconds(STEPS, plan) + 0.5)


def test_what_python_takes_between_busy_steps_is_not_added() -> None:
    """Steps that follow each other end as if the engine's own work took no time."""
    clock = Clock()
    simulated = runner(clock)
    plans = [StepPlan((prompt(10, last=False),)), StepPlan((prompt(4, 10),))]
    plans += [StepPlan((decode(14 + at),)) for at in range(5)]
    for plan in plans:
        simulated.run(plan)
        clock.now += 0.03  # commits, events, scheduling
    modelled = sum(step_seconds(STEPS, plan) for plan in plans)
    assert clock.now == pytest.approx(100 + modelled + 0.03)
    assert simulated.busy_s() == pytest.approx(modelled)


def test_idle_time_is_no_credit() -> None:
    """A request that comes to an idle worker takes its whole time, though it was a prompt half-way when cancelled."""
    for last in (True, False):
        clock = Clock()
        simulated = runner(clock)
        simulated.run(StepPlan((prompt(10, last=last),)))
        clock.now = began = 200.0
        simulated.run(StepPlan((prompt(10),)))
        assert clock.now == pytest.approx(began + step_seconds(STEPS, StepPlan((prompt(10),))))


def test_a_late_step_is_not_caught_up() -> None:
    """A machine too slow for the time scale runs late, and then no faster than the model again."""
    clock = Clock()
    simulated = runner(clock, scale=1000.0)
    seconds = step_seconds(STEPS, StepPlan((decode(10),))) / 1000
    simulated.run(StepPlan((decode(10),)))
    for _ in range(10):
        clock.now += MAX_OVERHEAD_S / 2
        simulated.run(StepPlan((decode(10),)))
    assert len(clock.slept) == 1, "each step was late already"
    late = clock.now
    simulated.run(StepPlan((decode(10),)))
    assert clock.now == pytest.approx(late + seconds)
    assert simulated.busy_s() == pytest.approx(clock.now - 100), "all the time that it took"


def test_tokens_are_letters_and_the_same_each_time() -> None:
    """By seed, position and choice; greedy ones by position alone; never one that is banned."""

    def answer(params: SamplingParams, choice: int = 0) -> list[SampledToken]:
        clock = Clock()
        tokens = []
        for position in range(40):
            chunk = decode(4 + position, params)
            wanted = replace(chunk.samples[0], choice=choice)
            tokens += runner(clock).run(StepPlan((replace(chunk, samples=(wanted,)),)))[0]
        return tokens

    seeded = answer(PARAMS)
    assert answer(PARAMS) == seeded
    assert answer(replace(PARAMS, seed=4)) != seeded != answer(PARAMS, choice=1)
    greedy = replace(PARAMS, temperature=0.0)
    assert answer(greedy) == answer(replace(greedy, seed=4)) == answer(greedy, choice=1)
    text = Tokenizer(byte_tokenizer_files(100)).decode([token.token_id for token in seeded])
    assert len(text) == 40
    assert all(char.islower() or char == " " for char in text)


def test_banned_tokens_do_not_come() -> None:
    """min_tokens bans stop tokens; where all letters are banned something else comes."""
    for banned in (frozenset(LETTERS[:20]), frozenset(LETTERS) | frozenset(range(40))):
        for position in range(30):
            chunk = decode(4 + position)
            plan = StepPlan((replace(chunk, samples=(replace(chunk.samples[0], banned=banned),)),))
            assert runner(Clock()).run(plan)[0][0].token_id not in banned


def test_log_probabilities_come_where_asked_for() -> None:
    """It is certain of every token."""
    (token,) = runner(Clock()).run(StepPlan((decode(5, replace(PARAMS, logprobs=2)),)))[0]
    assert (token.logprob, token.top) == (0.0, ((token.token_id, 0.0),))
