"""Runs a step plan by sleeping as long as given hardware would take; its tokens mean nothing. Torch-free.

Load tests of routers need neither GPUs nor weights: scheduling, prefix cache, events and gRPC are the real ones.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from struct import pack

from worker.plan import Chunk, SampledToken, SamplingInput, StepPlan
from worker.step_time import StepTimeModel

VOCAB_SIZE = 2**18  # takes the token ids of any published tokenizer
MAX_OVERHEAD_S = 0.1  # a gap between steps that is longer than this was not the engine's work
LETTERS = tuple(b"eeeetttaaooiinnsshhrrddluucmfywgpbvk" + b" " * 8)  # token ids: the bytes of the byte tokenizer


class SimulatedRunner:
    """A `ModelRunner` of modelled duration and made-up tokens, never an end-of-sequence one."""

    def __init__(
        self,
        steps: StepTimeModel,
        *,
        block_load_s: float = 0.0,
        time_scale: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`block_load_s`: of each block that comes back from the host tier. All times are divided by `time_scale`."""
        self._steps = steps
        self._block_load_s = block_load_s
        self._scale = time_scale
        self._clock = clock
        self._sleep = sleep
        self._due = 0.0  # when the last step should have ended; later if it was late
        self._busy_s = 0.0
        self._goes_on = False  # the last step left a prompt half-way, so the next one follows at once

    def run(self, plan: StepPlan) -> list[list[SampledToken]]:
        """For each chunk, one token for each of its samples, when the step's time is over.

        What Python takes for the step, and between it and the one before while the engine is busy, is part of the time
        and not added to it. A step that takes more than its time delays all others; nothing is caught up.
        """
        began = self._clock()
        goes_on = self._goes_on or any(_decodes(chunk) for chunk in plan.chunks)
        busy = goes_on and began - self._due < MAX_OVERHEAD_S
        self._goes_on = any(not chunk.samples for chunk in plan.chunks)
        tokens = [[_token(wanted) for wanted in chunk.samples] for chunk in plan.chunks]
        seconds = step_seconds(self._steps, plan) + self._block_load_s * len(plan.loads)
        start = self._due if busy else began
        due = start + seconds / self._scale
        left = due - self._clock()
        if left > 0:
            self._sleep(left)
        self._due = due if left > 0 else self._clock()
        self._busy_s += self._due - start
        return tokens

    def busy_s(self) -> float:
        """Seconds of all steps so far, from end to end where they follow each other: the engine's clock.

        So a step is reported to take what the model says, or what it took where that is more.
        """
        return self._busy_s


def step_seconds(steps: StepTimeModel, plan: StepPlan) -> float:
    """How long the plan takes by the model. A chunk of one token is a decode, as the engine counts it."""
    context = [chunk.start for chunk in plan.chunks if len(chunk.token_ids) == 1]
    prefill = [(chunk.start, len(chunk.token_ids)) for chunk in plan.chunks if len(chunk.token_ids) > 1]
    return steps.step_s(len(context), sum(context), prefill)


def _decodes(chunk: Chunk) -> bool:
    """Whether it goes on with an answer: its sequence ran in the step before."""
    return any(len(wanted.token_ids) > wanted.prompt_len for wanted in chunk.samples)


def _token(wanted: SamplingInput) -> SampledToken:
    """A letter by prompt length, position, choice and, unless greedy, seed: the same each time."""
    params = wanted.params
    position = len(wanted.token_ids)
    seed = params.seed % 2**64 if params.temperature else 0
    choice = wanted.choice if params.temperature else 0
    at = zlib.crc32(pack("<QIII", seed, choice, wanted.prompt_len, position))
    token = LETTERS[at % len(LETTERS)]
    if token in wanted.banned:  # at most some 64 stop tokens, so that some byte is left
        token = next(other for other in (*LETTERS, *range(256)) if other not in wanted.banned)
    if params.logprobs is None:
        return SampledToken(token)
    return SampledToken(token, 0.0, ((token, 0.0),) if params.logprobs else ())  # it is certain of itself
