"""A worker in virtual time: the real scheduler, block pool, prefix cache and event log, and a model of step times."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as AnySequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np

from kv_events.log import EventLog
from radix.hashing import SALT_BYTES, BlockHasher
from radix.keys import BlockKeys
from worker.cached_block import CachedBlock
from worker.engine import EngineStatus, StepTimes, status_of
from worker.plan import SamplingParams
from worker.scheduler import Scheduled, Scheduler, SchedulerConfig
from worker.sequence import EngineRequest, Sequence
from worker.step_time import StepTimeModel

_NO_KEYS: BlockKeys = np.empty((0, 2), np.uint64)
_PARAMS = SamplingParams(max_tokens=1)


@dataclass(slots=True, eq=False)
class SimulatedSequence(Sequence):
    """A sequence whose prompt's blocks are known by their hashes alone. What it generates is found by nobody: a later
    turn's prompt names it anew. Its tokens are only counted."""

    last: int = 1  # tokens of prompt and answer: with them it ends

    def __post_init__(self) -> None:
        self.prompt_len = self.length = len(self.request.token_ids)
        self.rank = (self.request.priority, self.arrival, self.choice)

    def contents(self, count: int) -> list[CachedBlock]:
        """See Sequence."""
        return self._contents[:count]


class SharedCacheScheduler(Scheduler):
    """A bound for what routing can reach: what any worker has computed is in a cache without end, at hand for all."""

    def __init__(self, config: SchedulerConfig, computed: AbstractSet[int]) -> None:
        """`computed`: block hashes, which others add to."""
        super().__init__(config)
        self._computed = computed

    def _start(self, sequence: Sequence, cached: list[int]) -> list[tuple[int, int]]:
        loads = super()._start(sequence, cached)
        given = self.config.block_size * leading(
            (content.block_hash for content in sequence.reusable()), self._computed
        )
        if given > sequence.computed:
            if sequence.cached_tokens == sequence.computed:
                self.cached_prompt_tokens += given - sequence.computed
                sequence.cached_tokens = given
            sequence.computed = given
        return loads


def _contents(block_hashes: AnySequence[int]) -> list[CachedBlock]:
    contents: list[CachedBlock] = []
    for block_hash in block_hashes:
        contents.append(CachedBlock(block_hash.to_bytes(8, "little"), b"", contents[-1] if contents else None))
    return contents


def leading(hashes: Iterable[int], known: AbstractSet[int]) -> int:
    """How many of them, from the first on, are known."""
    depth = 0
    for block_hash in hashes:
        if block_hash not in known:
            break
        depth += 1
    return depth


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step brought, by request id."""

    prefilled: tuple[str, ...] = ()  # the first token came
    finished: tuple[str, ...] = ()


class SimulatedWorker:
    """Requests in, progress out, in virtual time; cache changes go to the event log as in an engine.

    A step starts with `begin` and is over with `end`, at the time that `begin` told. Decode steps that differ in
    nothing but the length of their contexts are taken in one leap; when a request comes, `interrupt` ends it with the
    step that is being computed then.
    """

    def __init__(
        self,
        worker_id: str,
        config: SchedulerConfig,
        model: StepTimeModel,
        *,
        host_token_s: float = 0.0,
        computed: AbstractSet[int] | None = None,
    ) -> None:
        """`host_token_s`: to bring a token's KV back from the host tier. `computed`: see SharedCacheScheduler."""
        self.scheduler = Scheduler(config) if computed is None else SharedCacheScheduler(config, computed)
        self.log = EventLog(worker_id, 1, config.block_size)
        self._host_block_s = host_token_s * config.block_size
        self._model = model
        self._hasher = BlockHasher(config.block_size, bytes(SALT_BYTES))
        self._arrivals = 0
        self._times = StepTimes()
        self._step: list[Scheduled] = []  # under way; empty between steps
        self._began_at = 0.0
        self._leap = 1  # steps under way at once
        self._chunks: list[tuple[int, int]] = []  # of the step under way: (start, new tokens)
        self._decoding = 0  # sequences of the step under way, and tokens of their contexts before it
        self._context = 0

    @property
    def busy(self) -> bool:
        """Whether a step is under way."""
        return bool(self._step)

    def add(
        self,
        request_id: str,
        prompt_tokens: int,
        output_tokens: int,
        block_hashes: AnySequence[int],
        priority: int = 0,
        *,
        counted: bool = True,
    ) -> None:
        """Queue a request. `block_hashes` of its prompt's full blocks name each block with all before it. `counted`:
        its prompt's tokens, among those of prompts; not where another worker has counted them.

        Raises like Scheduler.add.
        """
        contents = _contents(block_hashes)
        request = EngineRequest(request_id, range(prompt_tokens), _PARAMS, self._hasher, _NO_KEYS, priority)
        sequence = SimulatedSequence(request, self._arrivals, _contents=contents, last=prompt_tokens + output_tokens)
        sequence.cached_tokens = None if counted else 0
        self.scheduler.add(sequence)
        self._arrivals += 1

    def held(self, block_hashes: AnySequence[int]) -> int:
        """Leading blocks of a prompt that are here, in any tier."""
        return len(self.scheduler.cache.lookup(_contents(block_hashes)))

    def adopt(self, block_hashes: AnySequence[int], now: float) -> None:
        """Leading blocks of a prompt have come from another worker."""
        self.scheduler.adopt(_contents(block_hashes))
        self._publish(now)

    def pin(self, block_hashes: AnySequence[int]) -> list[int]:
        """Keep the longest held beginning of a prompt's blocks, until `unpin`. Returns where they lie."""
        return self.scheduler.pin([content.key for content in _contents(block_hashes)])

    def unpin(self, blocks: AnySequence[int]) -> None:
        """Another worker has them, or needs them no more."""
        self.scheduler.claims.unpin(blocks)

    def begin(self, now: float) -> float | None:
        """Start the next step; returns when it is over, None where there is nothing to do."""
        assert not self._step, "a step is under way"
        preemptions = self.scheduler.preemptions
        self._step = self.scheduler.schedule()
        self._publish(now)
        if not self._step:
            return None
        self._began_at = now
        self._chunks = [(entry.sequence.computed, entry.num_tokens) for entry in self._step if entry.num_tokens > 1]
        contexts = [entry.sequence.computed for entry in self._step if entry.num_tokens == 1]
        self._decoding, self._context = len(contexts), sum(contexts)
        steady = not self._chunks and preemptions == self.scheduler.preemptions
        self._leap = self._steps_alike() if steady else 1
        return self._ends_at()

    def interrupt(self, now: float) -> float | None:
        """A request came: a leap ends with the step that is computed now. Returns when that is, None for no change."""
        if self._leap == 1:
            return None
        low, high = 0, self._leap - 1  # steps that are over by now: the largest number that fits
        while low < high:
            middle = (low + high + 1) // 2
            if self._began_at + self._model.decode_s(self._decoding, self._context, middle) <= now:
                low = middle
            else:
                high = middle - 1
        if low + 1 == self._leap:
            return None
        self._leap = low + 1
        return self._ends_at()

    def end(self, now: float) -> Progress:
        """The step, or leap, under way is over."""
        step, self._step = self._step, []
        prefilled: list[str] = []
        finished: list[str] = []
        leap = self._leap
        for entry in step:
            sequence: SimulatedSequence = entry.sequence  # type: ignore[assignment]
            if sequence.computed < sequence.prompt_len:
                self.scheduler.computed(entry)
                if sequence.computed == sequence.length == sequence.prompt_len:
                    prefilled.append(sequence.request.request_id)
            else:
                sequence.computed += entry.num_tokens + leap - 1
            if sequence.computed < sequence.length:
                continue  # not through its prompt, or computed again after a preemption
            sequence.length += leap
            if sequence.length >= sequence.last:
                self.scheduler.remove(sequence)
                finished.append(sequence.request.request_id)
        self._count(now - self._began_at)
        self._publish(now)
        return Progress(tuple(prefilled), tuple(finished))

    def status(self) -> EngineStatus:
        """As of the end of the last step, as an engine reports it."""
        return status_of(self.scheduler, self._times, self.log)

    def _steps_alike(self) -> int:
        """Decode steps until a sequence ends or needs a block."""
        steps = self.scheduler.config.max_model_len
        for entry in self._step:
            sequence: SimulatedSequence = entry.sequence  # type: ignore[assignment]
            computed = sequence.computed
            if computed < sequence.prompt_len or computed + 1 < sequence.length:
                return 1
            until = sequence.writable if sequence.writable < sequence.last else sequence.last - 1
            if until - computed < steps:
                steps = until - computed
        return max(1, steps)

    def _ends_at(self) -> float:
        if self._chunks:
            loads = sum(len(entry.loads) for entry in self._step)
            loaded_s = self._host_block_s * loads
            return self._began_at + loaded_s + self._model.step_s(self._decoding, self._context, self._chunks)
        return self._began_at + self._model.decode_s(self._decoding, self._context, self._leap)

    def _publish(self, now: float) -> None:
        events = self.scheduler.cache.take_events()
        if events:
            self.log.append(events, now)

    def _count(self, seconds: float) -> None:
        times, steps, decoding = self._times, self._leap, self._decoding
        context = steps * self._context + decoding * steps * (steps + 1) // 2
        if self._chunks:
            times.prefill_steps += 1
            times.prefill_tokens += sum(new for _, new in self._chunks)
            times.prefill_attention += sum(new * (start + new / 2) for start, new in self._chunks)
            times.prefill_decodes += decoding
            times.prefill_context += context
            times.prefill_s += seconds
        else:
            times.decode_steps += steps
            times.decode_tokens += steps * decoding
            times.decode_context += context
            times.decode_s += seconds
