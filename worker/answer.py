"""Turns a sequence's tokens into text, and finds where the answer ends. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Protocol

from worker.plan import SamplingParams


class FinishReason(Enum):
    """Why an answer ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


class TextDecoder(Protocol):
    """Tokens to text, incrementally; text that may still change is held back."""

    def push(self, token_ids: Sequence[int]) -> str: ...

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        ...


class Answer:
    """One choice's text as it grows. Text that could turn out to be part of a stop string is held back."""

    def __init__(
        self, params: SamplingParams, decoder: TextDecoder, eos_token_ids: frozenset[int], max_tokens: int
    ) -> None:
        """`max_tokens` is params.max_tokens or what is left of the model's length, whichever is less."""
        self._params = params
        self._decoder = decoder
        self._end_tokens = params.stop_token_ids | (frozenset() if params.ignore_eos else eos_token_ids)
        self._max_tokens = max_tokens
        self._longest_stop = max(map(len, params.stop), default=0)
        self._held = ""
        self.num_tokens = 0

    def push(self, token_id: int) -> tuple[str, FinishReason | None]:
        """Add a token. Returns the text that can be delivered now, and the reason if the answer ends here."""
        self.num_tokens += 1
        may_stop = self.num_tokens > self._params.min_tokens
        if may_stop and token_id in self._end_tokens:
            return self._flush(), FinishReason.STOP
        self._held += self._decoder.push([token_id])
        if may_stop and (cut := self._find_stop()) is not None:
            text, self._held = self._held[:cut], ""
            return text, FinishReason.STOP
        if self.num_tokens >= self._max_tokens:
            self._held += self._decoder.finish()
            cut = self._find_stop() if may_stop else None
            text, self._held = self._held[:cut], ""
            return text, FinishReason.LENGTH if cut is None else FinishReason.STOP
        return self._release(), None

    def _flush(self) -> str:
        text = self._held + self._decoder.finish()
        self._held = ""
        return text

    def _find_stop(self) -> int | None:
        found = [at for stop in self._params.stop if (at := self._held.find(stop)) >= 0]
        return min(found, default=None)

    def _release(self) -> str:
        """Deliver all but the longest tail with which a stop string may begin."""
        for length in range(min(self._longest_stop - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._params.stop):
                text, self._held = self._held[:-length], self._held[-length:]
                return text
        text, self._held = self._held, ""
        return text
