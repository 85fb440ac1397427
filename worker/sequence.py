"""One answer in the making: its tokens, its blocks, how far it is computed. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence as AnySequence
from dataclasses import dataclass, field

import numpy as np

from radix.hashing import BlockHasher
from radix.keys import KEY_BYTES, BlockKeys
from worker.plan import SamplingParams
from worker.prefix_cache import CachedBlock, pack


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A validated request: what the engine accepts."""

    request_id: str
    token_ids: AnySequence[int]
    params: SamplingParams
    hasher: BlockHasher
    keys: BlockKeys  # of the prompt's full blocks
    priority: int = 0
    bypass_prefix_cache: bool = False
    answered: tuple[int, ...] = ()  # tokens of the answer that were delivered before: what follows them is wanted
    answered_cached_tokens: int | None = None  # of the prompt, by whoever delivered them; None: what is found here
    hold: bool = False  # ends with the first token; the prompt's full blocks are then lent to who goes on


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence waits, runs or has ended; only the scheduler moves it and touches its blocks."""

    request: EngineRequest
    arrival: int
    choice: int = 0
    forks: int = 0  # choices still to be split off when the prompt is through
    tokens: list[int] = field(default_factory=list)  # prompt and output
    computed: int = 0  # leading tokens whose KV is in the blocks
    blocks: list[int] = field(default_factory=list)
    writable: int = 0  # leading tokens that its blocks hold, or 0 where another may hold those to be written, too
    listed: int = 0  # leading full blocks already offered to the prefix cache
    cached_tokens: int | None = None  # prompt tokens found in the cache at first admission
    expected_cached: int = 0  # the same, estimated while waiting
    prompt_len: int = field(init=False)
    length: int = field(init=False)  # of prompt and output, in tokens
    rank: tuple[int, int, int] = field(init=False)  # smaller goes first: priority, then arrival, then choice

    _keys: list[bytes] = field(default_factory=list)
    _contents: list[CachedBlock] = field(default_factory=list)  # of leading full blocks, as far as asked for

    def __post_init__(self) -> None:
        self.prompt_len = len(self.request.token_ids)
        self.rank = (self.request.priority, self.arrival, self.choice)
        if not self.tokens:
            self.tokens = [*self.request.token_ids, *self.request.answered]
            self._keys = _split(self.request.keys)
        self.length = len(self.tokens)

    def append(self, token_id: int) -> None:
        """One more token of output."""
        self.tokens.append(token_id)
        self.length += 1

    @property
    def output_len(self) -> int:
        return self.length - self.prompt_len

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return self.length - self.computed

    @property
    def prefill_outstanding(self) -> int:
        """Prompt tokens still to be computed, as far as known."""
        done = self.computed if self.blocks else max(self.computed, self.expected_cached)
        return max(0, self.prompt_len - done)

    def reusable(self) -> list[CachedBlock]:
        """The blocks to look for in the prefix cache. The last token is always computed: its logits are needed."""
        if self.request.bypass_prefix_cache:
            return []
        return self.contents((self.length - 1) // self.request.hasher.block_size)

    def contents(self, count: int) -> list[CachedBlock]:
        """What the first `count` full blocks of this sequence hold, each after the one before it."""
        made, size = len(self._contents), self.request.hasher.block_size
        if made < count:
            self._extend_keys(count)
            data = pack(self.tokens[made * size : count * size])
            width = len(data) // (count - made)
            for at in range(made, count):
                start = (at - made) * width
                parent = self._contents[-1] if at else None
                self._contents.append(CachedBlock(self._keys[at], data[start : start + width], parent))
        return self._contents[:count]

    def fork(self, choice: int) -> Sequence:
        """Another choice over the same computed tokens and blocks (whose references the scheduler takes)."""
        return Sequence(
            request=self.request,
            arrival=self.arrival,
            choice=choice,
            tokens=list(self.tokens),
            computed=self.computed,
            blocks=list(self.blocks),
            listed=self.listed,
            cached_tokens=self.cached_tokens,
            _keys=list(self._keys),
            _contents=list(self._contents),
        )

    def _extend_keys(self, blocks: int) -> None:
        known = len(self._keys)
        if blocks <= known:
            return
        hasher = self.request.hasher
        parent = np.frombuffer(self._keys[-1], np.uint64) if self._keys else None
        tokens = np.array(self.tokens[known * hasher.block_size : blocks * hasher.block_size], np.uint32)
        self._keys += _split(hasher.keys(tokens, parent))


def _split(keys: BlockKeys) -> list[bytes]:
    """Each key as the bytes under which the prefix cache knows it."""
    data = keys.tobytes()
    return [data[at : at + KEY_BYTES] for at in range(0, len(data), KEY_BYTES)]
