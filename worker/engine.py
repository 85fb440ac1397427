"""The step loop: schedule, run, commit. Synchronous and torch-free: whatever runs a StepPlan can drive it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from kv_events.log import EventLog
from rhizome.errors import Duplicate, InvalidRequest, Overloaded
from worker.answer import Answer, FinishReason, TextDecoder
from worker.block_claims import Reservation, TransferCounts
from worker.cached_block import CachedBlock
from worker.plan import ModelRunner, SampledToken
from worker.scheduler import Scheduled, Scheduler, SchedulerConfig
from worker.sequence import EngineRequest, Sequence

_log = logging.getLogger(__name__)

PROGRESS_KEPT = 4096  # first tokens and endings remembered for status reports


@dataclass(frozen=True, slots=True)
class Output:
    """What one step added to one choice of a request."""

    request_id: str
    choice: int
    token: SampledToken
    text: str
    finish_reason: FinishReason | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int  # of the request, over all choices
    request_finished: bool  # this was the last choice's last token
    ticket: bytes = b""  # for the prompt's blocks, where they were to be held and can be


@dataclass(slots=True)
class StepTimes:
    """Since the start. A step that holds any prefill counts as prefill, the others as decode.

    Attention is counted in pairs of a new token and one before it: new * (start + new / 2) for each prefill chunk;
    context in tokens that a decoded one reads, itself included.
    """

    prefill_steps: int = 0
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_steps: int = 0
    decode_tokens: int = 0
    decode_s: float = 0.0
    prefill_attention: float = 0.0
    prefill_decodes: int = 0  # tokens decoded in steps that count as prefill
    prefill_context: int = 0  # of these
    decode_context: int = 0

    def copy(self) -> StepTimes:
        """The same, apart. (dataclasses.replace takes four times as long.)"""
        return StepTimes(
            self.prefill_steps,
            self.prefill_tokens,
            self.prefill_s,
            self.decode_steps,
            self.decode_tokens,
            self.decode_s,
            self.prefill_attention,
            self.prefill_decodes,
            self.prefill_context,
            self.decode_context,
        )


class EngineStatus(NamedTuple):
    """A worker's load, as it reports it. (A named tuple is made in a third of the time that a frozen class takes.)"""

    running: int
    waiting: int
    blocks_total: int
    blocks_in_use: int
    blocks_cached: int
    prefill_tokens_outstanding: int
    times: StepTimes
    preemptions: int
    prompt_tokens: int
    cached_prompt_tokens: int
    host_cached_prompt_tokens: int  # of these, in the host tier alone
    next_event_seq: int  # of the event log
    transfers: TransferCounts = TransferCounts()


def status_of(scheduler: Scheduler, times: StepTimes, log: EventLog) -> EngineStatus:
    """The load of a worker with this scheduler and log."""
    pool = scheduler.cache.pool
    sequences = (*scheduler.running, *scheduler.waiting)
    return EngineStatus(
        running=len(scheduler.running),
        waiting=len(scheduler.waiting),
        blocks_total=pool.num_blocks,
        blocks_in_use=pool.in_use,
        blocks_cached=pool.idle,
        prefill_tokens_outstanding=sum(s.prefill_outstanding for s in sequences if s.computed < s.prompt_len),
        times=times.copy(),
        preemptions=scheduler.preemptions,
        prompt_tokens=scheduler.prompt_tokens,
        cached_prompt_tokens=scheduler.cached_prompt_tokens,
        host_cached_prompt_tokens=scheduler.host_cached_prompt_tokens,
        next_event_seq=log.next_seq,
        transfers=scheduler.claims.counts,
    )


Lend: TypeAlias = Callable[[AnySequence[bytes], AnySequence[int]], bytes]
"""Pinned blocks and their keys to a ticket for whoever goes on with a request, for all of them or the leading ones.
Raises Overloaded where there is no room; whatever it raises, none was taken over then. Called on the engine's thread;
whoever gives a ticket unpins the blocks one day, those that it leaves out, too."""


@dataclass(slots=True)
class _Request:
    """A request's choices that have not ended."""

    answers: dict[int, tuple[Sequence, Answer]] = field(default_factory=dict)
    completion_tokens: int = 0


class Engine:
    """Requests in, outputs out, one step at a time; cache changes go to the event log as they happen."""

    def __init__(
        self,
        config: SchedulerConfig,
        runner: ModelRunner,
        event_log: EventLog,
        *,
        new_decoder: Callable[[], TextDecoder],
        eos_token_ids: frozenset[int],
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
        validate: bool = False,
    ) -> None:
        """`clock` measures steps, `wall_clock` dates event batches for display. `validate` checks every invariant
        after each step.
        """
        self.config = config
        self.scheduler = Scheduler(config, eos_token_ids)
        self.event_log = event_log
        self._runner = runner
        self._new_decoder = new_decoder
        self._eos_token_ids = eos_token_ids
        self._clock = clock
        self._wall_clock = wall_clock
        self._validate = validate
        self.lend: Lend | None = None
        self._requests: dict[str, _Request] = {}
        self._arrivals = 0
        self.stalled = False
        self._times = StepTimes()
        self._progress: deque[tuple[int, str, bool]] = deque(maxlen=PROGRESS_KEPT)  # (position, request id, ended)

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def add(self, request: EngineRequest) -> None:
        """Accept a request. Raises Duplicate, Overloaded or InvalidRequest; then nothing of it remains."""
        if request.request_id in self._requests:
            raise Duplicate(f"request {request.request_id} is in flight already")
        if request.answered and request.params.n != 1:
            raise InvalidRequest("answered", f"{len(request.answered)} tokens", "none where sampling.n is above 1")
        if request.hold and request.params.n != 1:
            raise InvalidRequest("hold", True, "false where sampling.n is above 1")
        answers = [self._new_answer(request) for _ in range(request.params.n)]
        sequence = Sequence(request, self._arrivals, forks=request.params.n - 1)
        self.scheduler.add(sequence)
        self._arrivals += 1
        state = _Request(completion_tokens=len(request.answered))
        for choice, answer in enumerate(answers):
            state.answers[choice] = (sequence, answer)
        self._requests[request.request_id] = state

    def cancel(self, request_id: str) -> None:
        """Forget a request, wherever it stands, and free its blocks. An unknown one is ignored."""
        state = self._requests.pop(request_id, None)
        if state is None:
            return
        for sequence, _ in state.answers.values():
            self.scheduler.remove(sequence)
        self._note(request_id, ended=True)
        self._check()

    def clear_cache(self) -> int:
        """Forget every cached block; running requests keep theirs, unlisted. Returns how many were forgotten."""
        forgotten = self.scheduler.cache.clear()
        self._publish()
        return forgotten

    def reserve(self, contents: AnySequence[CachedBlock]) -> Reservation | None:
        """Slots for what is lacking of a chain of blocks, to be given back with `adopt`. See BlockClaims."""
        reservation = self.scheduler.reserve(contents)
        self._publish()  # before the slots are overwritten
        self._check()
        return reservation

    def adopt(self, reservation: Reservation, arrived: int, size_bytes: int, transport: str) -> None:
        """A pull into reserved slots ended: its first `arrived` blocks are in the prefix cache from now on."""
        self.scheduler.claims.adopt(reservation, arrived)
        self.scheduler.claims.count_pull(len(reservation.contents), arrived, size_bytes, transport)
        self._publish()
        self._check()

    def pin(self, keys: AnySequence[bytes]) -> list[int]:
        """Blocks for others to read, until `unpin`: the longest held beginning of `keys`."""
        return self.scheduler.pin(keys)

    def unpin(self, blocks: AnySequence[int]) -> None:
        """They are read no more."""
        self.scheduler.claims.unpin(blocks)
        self._check()

    def step(self) -> list[Output]:
        """One step: schedule, run, commit. Empty when there was nothing to do, or when all that wait need blocks that
        transfers hold: then it is `stalled`."""
        started = self._clock()
        step = self.scheduler.schedule()
        # Published before the step overwrites evicted blocks: nobody is sent here for what is about to go.
        self._publish()
        self.stalled = not step and self.has_work
        if not step:
            return []
        sampled = self._runner.run(self.scheduler.plan(step))
        outputs = self._commit(step, sampled)
        self._publish()
        self._count(step, self._clock() - started)
        self._check()
        return outputs

    def abort_all(self) -> None:
        """After a failed step nothing computed can be trusted: forget all requests and all cached blocks."""
        for sequence in (*self.scheduler.running, *self.scheduler.waiting):
            self.scheduler.remove(sequence)
        for request_id in self._requests:
            self._note(request_id, ended=True)
        self._requests.clear()
        self.clear_cache()

    def status(self) -> EngineStatus:
        return status_of(self.scheduler, self._times, self.event_log)

    def progress_since(self, position: int) -> tuple[int, list[str], list[str]]:
        """Request ids that got their first token, and that ended, from `position` on; and the next position.

        May be called from another thread than `step`: the copy below is one operation.
        """
        entries = [entry for entry in list(self._progress) if entry[0] >= position]
        prefilled = [request_id for _, request_id, ended in entries if not ended]
        finished = [request_id for _, request_id, ended in entries if ended]
        return (entries[-1][0] + 1 if entries else position), prefilled, finished

    def _new_answer(self, request: EngineRequest) -> Answer:
        room = self.config.max_model_len - len(request.token_ids)
        max_tokens = min(request.params.max_tokens, room)
        answer = Answer(request.params, self._new_decoder(), self._eos_token_ids, max_tokens)
        for count, token_id in enumerate(request.answered, 1):  # their text was delivered, too
            if answer.push(token_id)[1] is not None:
                limit = f"an answer that goes on: this one ended with token {count}"
                raise InvalidRequest("answered", f"{len(request.answered)} tokens", limit)
        return answer

    def _commit(self, step: list[Scheduled], sampled: list[list[SampledToken]]) -> list[Output]:
        outputs: list[Output] = []
        for entry, tokens in zip(step, sampled, strict=True):
            self.scheduler.computed(entry)
            if tokens:
                sequence = entry.sequence
                if sequence.output_len == len(sequence.request.answered):
                    self._note(sequence.request.request_id, ended=False)
                for branch, token in zip(self._branches(sequence), tokens, strict=True):
                    outputs.append(self._append(branch, token))
        return outputs

    def _branches(self, sequence: Sequence) -> list[Sequence]:
        """The sequence itself, and its forks where the prompt has just come through."""
        forks = [self.scheduler.fork(sequence, sequence.choice + 1 + i) for i in range(sequence.forks)]
        sequence.forks = 0
        state = self._requests[sequence.request.request_id]
        for fork in forks:
            state.answers[fork.choice] = (fork, state.answers[fork.choice][1])
        return [sequence, *forks]

    def _append(self, sequence: Sequence, token: SampledToken) -> Output:
        request_id = sequence.request.request_id
        state = self._requests[request_id]
        sequence.append(token.token_id)
        state.completion_tokens += 1
        text, finish_reason = state.answers[sequence.choice][1].push(token.token_id)
        handed_over = sequence.request.hold and finish_reason is None
        ticket = self._hand_over(sequence) if handed_over else b""
        if finish_reason is not None or handed_over:
            self.scheduler.remove(sequence)
            del state.answers[sequence.choice]
            if not state.answers:
                del self._requests[request_id]
                self._note(request_id, ended=True)
        return Output(
            request_id=request_id,
            choice=sequence.choice,
            token=token,
            text=text,
            finish_reason=finish_reason,
            prompt_tokens=sequence.prompt_len,
            cached_tokens=_cached_tokens(sequence),
            completion_tokens=state.completion_tokens,
            request_finished=not state.answers,
            ticket=ticket,
        )

    def _hand_over(self, sequence: Sequence) -> bytes:
        """Keep the prompt's full blocks for whoever goes on; empty where they cannot be kept, and are computed."""
        if self.lend is None:
            return b""
        keys = [content.key for content in sequence.contents(sequence.prompt_len // self.config.block_size)]
        blocks = self.pin(keys)
        try:
            return self.lend(keys[: len(blocks)], blocks) if blocks else b""
        except Exception as error:
            if not isinstance(error, Overloaded):  # a defect, which is no reason to fail the step, and all in it
                _log.exception("the blocks of request %s could not be lent", sequence.request.request_id)
            self.scheduler.claims.unpin(blocks)
            return b""

    def _publish(self) -> None:
        events = self.scheduler.cache.take_events()
        if events:
            self.event_log.append(events, self._wall_clock())

    def _count(self, step: list[Scheduled], seconds: float) -> None:
        # The token that a decode computes is the last of its sequence and an output token.
        times = self._times
        chunks = [(entry.sequence.computed, entry.num_tokens) for entry in step if entry.num_tokens > 1]
        decodes = len(step) - len(chunks)
        context = sum(entry.sequence.computed for entry in step if entry.num_tokens == 1)
        if chunks:
            times.prefill_steps += 1
            times.prefill_tokens += sum(new for _, new in chunks)
            times.prefill_attention += sum(new * (end - new / 2) for end, new in chunks)
            times.prefill_decodes += decodes
            times.prefill_context += context
            times.prefill_s += seconds
        else:
            times.decode_steps += 1
            times.decode_tokens += decodes
            times.decode_context += context
            times.decode_s += seconds

    def _note(self, request_id: str, *, ended: bool) -> None:
        position = self._progress[-1][0] + 1 if self._progress else 0
        self._progress.append((position, request_id, ended))

    def _check(self) -> None:
        if self._validate:
            self.scheduler.check()
            assert len(self.scheduler.cache) == len(self.event_log), "the log does not hold what the cache holds"


def _cached_tokens(sequence: Sequence) -> int:
    """Prompt tokens that nobody had to compute for this request."""
    elsewhere = sequence.request.answered_cached_tokens
    return elsewhere if elsewhere is not None else sequence.cached_tokens or 0
