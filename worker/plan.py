"""What one engine step computes: the words that scheduler, engine and model runner share. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when an answer ends; names and meanings are vLLM's."""

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None  # None: no log-probabilities; else this many top ones beside the chosen token's
    n: int = 1


@dataclass(frozen=True, slots=True)
class SamplingInput:
    """One token to sample.

    `token_ids` is the prompt (its first `prompt_len` tokens) and the output so far. The random number depends on
    (params.seed, choice, tokens so far) only, never on the batch. `banned` tokens must not be chosen (min_tokens).
    """

    params: SamplingParams
    token_ids: Sequence[int]
    prompt_len: int
    choice: int = 0
    banned: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A chosen token; `logprob` and `top` only where they were asked for (of the model's own distribution)."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence to compute: the first stands at position `start`.

    `block_ids` is the block table over positions [0, start + len(token_ids)). `samples` is empty while the prompt is
    not through; else its entries are sampled from the logits of the last token (several where a prompt forks).
    """

    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[int]
    samples: tuple[SamplingInput, ...] = ()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One engine step. Before anything is computed all `saves` are made (device block, host slot), then all `copies`
    (source block, destination block), then all `loads` (host slot, device block)."""

    chunks: tuple[Chunk, ...]
    copies: tuple[tuple[int, int], ...] = ()
    loads: tuple[tuple[int, int], ...] = ()
    saves: tuple[tuple[int, int], ...] = ()


class ModelRunner(Protocol):
    """Computes a step: torch, or a model of time in a simulation."""

    def run(self, plan: StepPlan) -> list[list[SampledToken]]:
        """For each chunk, one token for each of its samples."""
        ...
