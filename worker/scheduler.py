"""Decides what each step computes.

Continuous batching with chunked prefill and preemption by recomputation, as in
vLLM (Kwon et al., SOSP 2023) and Sarathi (Agrawal et al., OSDI 2024). Torch-free.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass

from rhizome.errors import InvalidRequest, Overloaded
from worker.block_claims import BlockClaims, Reservation
from worker.cached_block import CachedBlock
from worker.plan import Chunk, SamplingInput, StepPlan
from worker.prefix_cache import PrefixCache
from worker.sequence import Sequence


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Bounds of one worker."""

    num_blocks: int
    block_size: int = 16  # tokens
    max_model_len: int = 8192  # tokens of one sequence
    max_batched_tokens: int = 512  # of a step: bounds how long a prefill holds up the others' next token
    max_running: int = 64  # sequences
    max_waiting: int = 256  # requests
    event_token_ids: bool = False  # events tell the prompts' tokens, which consumers of other makes want
    host_blocks: int = 0  # of the tier in host memory, which keeps what the device has to give up; 0: none

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "max_model_len", "max_batched_tokens", "max_running", "max_waiting"):
            if getattr(self, name) < 1:
                raise InvalidRequest(name, getattr(self, name), "at least 1")
        if self.host_blocks < 0:
            raise InvalidRequest("host_blocks", self.host_blocks, "at least 0")
        if self.max_batched_tokens < self.max_running:
            limit = f"at least max_running ({self.max_running}): every running sequence gets a token a step"
            raise InvalidRequest("max_batched_tokens", self.max_batched_tokens, limit)
        if self.max_model_len > self.num_blocks * self.block_size:
            held = self.num_blocks * self.block_size
            limit = f"at most the {held} tokens that {self.num_blocks} blocks of {self.block_size} hold"
            raise InvalidRequest("max_model_len", self.max_model_len, limit)


@dataclass(slots=True)
class Scheduled:
    """One sequence's share of a step."""

    sequence: Sequence
    num_tokens: int
    copies: AnySequence[tuple[int, int]] = ()
    loads: AnySequence[tuple[int, int]] = ()  # of its cached prefix: (host slot, device block)
    saves: AnySequence[tuple[int, int]] = ()  # (device block, host slot); the first entry has all


class Scheduler:
    """Queues and blocks. Decode steps go first, then prefill chunks in rank order while the token budget lasts."""

    def __init__(self, config: SchedulerConfig, stop_tokens: frozenset[int] = frozenset()) -> None:
        """`stop_tokens`: the model's end-of-sequence tokens, which `min_tokens` holds off."""
        self.config = config
        self.cache = PrefixCache(
            config.num_blocks,
            config.block_size,
            host_blocks=config.host_blocks,
            include_token_ids=config.event_token_ids,
        )
        self.claims = BlockClaims(self.cache)  # of transfers
        self.waiting: list[Sequence] = []  # by rank
        self.running: list[Sequence] = []  # by rank
        self.preemptions = 0
        self.prompt_tokens = 0  # of requests that no other worker counted before
        self.cached_prompt_tokens = 0  # in either tier
        self.host_cached_prompt_tokens = 0  # of these, in the host tier alone
        self._stop_tokens = stop_tokens

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises Overloaded when the queue is full, InvalidRequest when it could never run."""
        if sequence.forks + 1 > self.config.max_running:
            limit = f"at most the {self.config.max_running} sequences that run at once"
            raise InvalidRequest("sampling.n", sequence.forks + 1, limit)
        if len(self.waiting) >= self.config.max_waiting:
            raise Overloaded(f"{len(self.waiting)} requests wait, and {self.config.max_waiting} is the limit")
        sequence.expected_cached = len(self._lookup(sequence)) * self.config.block_size
        insort(self.waiting, sequence, key=_rank)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its blocks. One that has ended already is ignored."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._free_blocks(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Scheduled]:
        """What the next step computes; blocks for it are allocated. Empty when there is nothing to do."""
        # Most of what runs decodes into blocks that it has.
        step = [Scheduled(s, 1) for s in self.running if s.computed + 1 == s.length <= s.writable]
        if len(step) == len(self.running) or self._go_on(step):
            self._admit(step)
        if step and self.cache.host is not None:
            step[0].saves = self.cache.take_saves()  # not by entry: whose blocks they made room for may be preempted
        return step

    def plan(self, step: list[Scheduled]) -> StepPlan:
        """The step in the words of the model runner."""
        chunks = tuple(self._chunk(entry.sequence, entry.num_tokens) for entry in step)
        return StepPlan(
            chunks,
            copies=tuple(copy for entry in step for copy in entry.copies),
            loads=tuple(load for entry in step for load in entry.loads),
            saves=tuple(save for entry in step for save in entry.saves),
        )

    def computed(self, entry: Scheduled) -> None:
        """A chunk's KV is in its blocks: list those that became full."""
        sequence = entry.sequence
        sequence.computed += entry.num_tokens
        if sequence.request.bypass_prefix_cache:
            return
        full = sequence.computed // self.config.block_size
        if full > sequence.listed:
            for index, content in enumerate(sequence.contents(full)[sequence.listed :], sequence.listed):
                self.cache.insert(sequence.blocks[index], content)
            sequence.listed = full

    def adopt(self, contents: AnySequence[CachedBlock]) -> int:
        """Take in blocks that were computed elsewhere, each after the one before it: they become idle ones, as many as
        there is room for. Returns how many leading ones are here now."""
        pool = self.cache.pool
        places = self.cache.lookup(contents)
        blocks = [place for place in places if place >= 0]
        for block in blocks:
            pool.retain(block)  # so that none makes room for those that follow it
        room = self._room()
        for content in contents[len(places) : len(places) + room]:
            blocks.append(pool.allocate())
            self.cache.insert(blocks[-1], content)
        pool.release(reversed(blocks))
        return min(len(contents), len(places) + room)

    def reserve(self, contents: AnySequence[CachedBlock]) -> Reservation | None:
        """Slots for what is lacking of a chain of blocks, which somebody else will fill; see BlockClaims."""
        return self.claims.reserve(contents, self._room())

    def pin(self, keys: AnySequence[bytes]) -> list[int]:
        """The blocks of the longest held beginning of `keys`, to stay as they are until `claims.unpin`."""
        return self.claims.pin(keys, self._room())

    def _room(self) -> int:
        """Blocks that are left over when all that was admitted gets its own."""
        return max(0, self.cache.pool.available - self._blocks_promised())

    def fork(self, sequence: Sequence, choice: int) -> Sequence:
        """A running copy that shares every block; the first to write into a shared one copies it."""
        fork = sequence.fork(choice)
        for block in fork.blocks:
            self.cache.pool.retain(block)
        sequence.writable = fork.writable = 0
        insort(self.running, fork, key=_rank)
        return fork

    def check(self) -> None:
        """Assert that every reference to a block is some running sequence's or a transfer's: nobody else holds any."""
        self.cache.check()
        held: dict[int, int] = {}
        for sequence in self.running:
            for block in sequence.blocks:
                held[block] = held.get(block, 0) + 1
        pool, size = self.cache.pool, self.config.block_size
        for sequence in self.running:
            if sequence.writable:
                assert sequence.writable == len(sequence.blocks) * size
                assert all(held[block] == 1 for block in sequence.blocks[sequence.computed // size :]), "written by two"
        assert self.running == sorted(self.running, key=_rank)
        claimed = self.claims.held
        for block in range(pool.num_blocks):
            assert pool.ref_count(block) == held.get(block, 0) + claimed[block], f"block {block} leaked"
        assert not any(sequence.blocks for sequence in self.waiting)
        assert len(self.running) <= self.config.max_running

    def _lookup(self, sequence: Sequence) -> list[int]:
        return self.cache.lookup(sequence.reusable())

    def _go_on(self, step: list[Scheduled]) -> bool:
        """Add what else runs, both by rank: decodes that need blocks, then prefill chunks while the token budget lasts.
        False where there is no room for all of them, so none for more."""
        others = [s for s in self.running if not s.computed + 1 == s.length <= s.writable]
        others.sort(key=_prefills)
        fits = True
        for sequence in others:
            if sequence not in self.running:
                continue  # preempted for a better-ranked one
            num_tokens = min(sequence.remaining, self._budget(step))
            if num_tokens == 0:
                break
            if sequence.computed + num_tokens <= sequence.writable:
                step.append(Scheduled(sequence, num_tokens))
            elif self._make_room(sequence, num_tokens, step):
                step.append(self._take_blocks(sequence, num_tokens))
            else:
                fits = False
        if not _prefills(others[0]):
            step.sort(key=lambda entry: (_prefills(entry.sequence), entry.sequence.rank))
        return fits

    def _budget(self, step: list[Scheduled]) -> int:
        """Tokens that a step can still take."""
        return self.config.max_batched_tokens - sum([entry.num_tokens for entry in step])

    def _admit(self, step: list[Scheduled]) -> None:
        """Move sequences from waiting to running, best rank first, while one fits as a whole."""
        while self.waiting and (budget := self._budget(step)) > 0:
            sequence = self.waiting[0]
            running = len(self.running) + sum([other.forks for other in self.running])
            if running + 1 + sequence.forks > self.config.max_running:
                return
            cached = self._lookup(sequence)
            on_device = cached if self.cache.host is None else [place for place in cached if place >= 0]
            # Blocks for all of it, not for the first chunk alone: else it is preempted half-way through its prompt.
            missing = self._blocks_for(sequence.length) - len(on_device)
            pool = self.cache.pool
            if missing > pool.available - pool.unused(on_device) - self._blocks_promised():
                return
            del self.waiting[0]
            loads = self._start(sequence, cached)
            num_tokens = min(sequence.remaining, budget)
            step.append(self._take_blocks(sequence, num_tokens))
            step[-1].loads = loads

    def _start(self, sequence: Sequence, cached: list[int]) -> list[tuple[int, int]]:
        sequence.blocks, loads = self.cache.acquire(cached)
        sequence.computed = len(cached) * self.config.block_size
        sequence.listed = len(cached)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = min(sequence.computed, sequence.prompt_len)  # answered tokens may be cached, too
            if sequence.request.answered_cached_tokens is None:
                self.prompt_tokens += sequence.prompt_len
                self.cached_prompt_tokens += sequence.cached_tokens
                self.host_cached_prompt_tokens += len(loads) * self.config.block_size
        insort(self.running, sequence, key=_rank)
        return loads

    def _blocks_promised(self) -> int:
        """Blocks that running sequences still need for prompts that were admitted as a whole."""
        unfinished = (s for s in self.running if s.length > s.writable)
        return sum(max(0, self._blocks_for(s.length) - len(s.blocks)) for s in unfinished)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)

    def _needed(self, sequence: Sequence, num_tokens: int) -> int:
        new = self._blocks_for(sequence.computed + num_tokens) - len(sequence.blocks)
        return new + (self._shared_tail(sequence) is not None)

    def _shared_tail(self, sequence: Sequence) -> int | None:
        """The index of a partly filled block that others hold too, and that would be written next."""
        index = sequence.computed // self.config.block_size
        if index < len(sequence.blocks) and self.cache.pool.ref_count(sequence.blocks[index]) > 1:
            return index
        return None

    def _make_room(self, sequence: Sequence, num_tokens: int, step: list[Scheduled]) -> bool:
        """Preempt the worst-ranked until the chunk's blocks are available; False when that was `sequence` itself."""
        while self._needed(sequence, num_tokens) > self.cache.pool.available:
            victim = self.running[-1]
            self._preempt(victim)
            step[:] = [entry for entry in step if entry.sequence is not victim]
            if victim is sequence:
                return False
        return True

    def _preempt(self, victim: Sequence) -> None:
        """Back to the queue; its blocks go, and it is computed again from what the prefix cache then still holds."""
        self.running.remove(victim)
        self._free_blocks(victim)
        victim.computed = victim.listed = 0
        insort(self.waiting, victim, key=_rank)
        self.preemptions += 1

    def _take_blocks(self, sequence: Sequence, num_tokens: int) -> Scheduled:
        pool = self.cache.pool
        copies: list[tuple[int, int]] = []
        shared = self._shared_tail(sequence)
        if shared is not None:
            source = sequence.blocks[shared]
            sequence.blocks[shared] = pool.allocate()
            copies.append((source, sequence.blocks[shared]))
            pool.release([source])
        missing = self._blocks_for(sequence.computed + num_tokens) - len(sequence.blocks)
        sequence.blocks += [pool.allocate() for _ in range(missing)]
        sequence.writable = len(sequence.blocks) * self.config.block_size
        return Scheduled(sequence, num_tokens, copies)

    def _free_blocks(self, sequence: Sequence) -> None:
        self.cache.pool.release(reversed(sequence.blocks))
        sequence.blocks = []
        sequence.writable = 0

    def _chunk(self, sequence: Sequence, num_tokens: int) -> Chunk:
        start = sequence.computed
        samples: Iterable[SamplingInput] = ()
        if num_tokens == sequence.remaining:
            params = sequence.request.params
            banned = frozenset[int]()
            if sequence.output_len < params.min_tokens:
                banned = params.stop_token_ids | self._stop_tokens
            choices = range(sequence.choice, sequence.choice + 1 + sequence.forks)
            samples = (
                SamplingInput(params, sequence.tokens, sequence.prompt_len, choice, banned) for choice in choices
            )
        return Chunk(sequence.tokens[start : start + num_tokens], start, list(sequence.blocks), tuple(samples))


def _rank(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.rank


def _prefills(sequence: Sequence) -> bool:
    return sequence.remaining > 1
