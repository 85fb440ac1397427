"""How long an engine step takes on given hardware: the model of time behind simulated workers. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepTimeModel:
    """Seconds of one step of continuous batching with chunked prefill.

    A step costs `prefill_step_s` where it holds a prefill chunk, else `decode_step_s`; `sequence_s` for each decoding
    sequence; `context_token_s` for each token of their context, less `context_square_s` for each squared (attention
    kernels become more efficient as they grow; past the peak of that parabola nothing is added); and for each prefill
    chunk `token_s` a new token and `attention_s` for each pair of a new token and one before it (half of the chunk's
    own on the average).
    """

    prefill_step_s: float
    decode_step_s: float
    sequence_s: float
    context_token_s: float
    token_s: float
    attention_s: float
    context_square_s: float = 0.0

    def step_s(self, decoding: int, context_tokens: int, chunks: Sequence[tuple[int, int]] = ()) -> float:
        """Seconds of a step: `decoding` sequences with `context_tokens` in all, and chunks (start, new tokens)."""
        seconds = (self.prefill_step_s if chunks else self.decode_step_s) + self.sequence_s * decoding
        seconds += self._context_s(context_tokens)
        for start, new in chunks:
            seconds += self.token_s * new + self.attention_s * new * (start + new / 2)
        return seconds

    def decode_s(self, decoding: int, context_tokens: int, steps: int) -> float:
        """Seconds of `steps` decode steps one after the other: each adds a token to every sequence's context."""
        per_step = self.decode_step_s + self.sequence_s * decoding
        rising = steps
        if self.context_square_s and decoding:
            rising = min(steps, max(0, int((self._peak_tokens() - context_tokens) // decoding) + 1))
        last = context_tokens + (rising - 1) * decoding
        linear = self.context_token_s * (context_tokens + last) / 2
        # The mean of the squares of steps evenly spaced numbers: that of their mean, and their variance.
        mean = (context_tokens + last) / 2
        square = mean * mean + decoding * decoding * (rising * rising - 1) / 12
        seconds = steps * per_step + rising * (linear - self.context_square_s * square)
        return seconds if rising == steps else seconds + (steps - rising) * self._context_s(self._peak_tokens())

    def _context_s(self, tokens: float) -> float:
        if self.context_square_s:  # sequences that share blocks have more context together than the device holds
            tokens = min(tokens, self._peak_tokens())
        return self.context_token_s * tokens - self.context_square_s * tokens * tokens

    def _peak_tokens(self) -> float:
        """Where more context would begin to cost less."""
        return self.context_token_s / (2 * self.context_square_s)


@dataclass(frozen=True, slots=True)
class Hardware:
    """A model on an accelerator, as a simulated worker: how fast, and how much KV memory. Sizes in tokens."""

    name: str
    source: str  # where the figures come from
    steps: StepTimeModel
    kv_tokens: int  # on the device
    host_kv_tokens: int = 0  # besides, where a host tier is on
    host_token_s: float = 0.0  # to bring a token's KV from the host tier back
    fetch_token_s: float = 0.0  # to pull a token's KV from a peer: its bytes over the network's pace; 0: it cannot
    max_batched_tokens: int = 8192  # of a step
    max_running: int = 256  # sequences


_H100_TOKENS = 16384 * 64  # T of the polynomials of Dynamo's mocker, whose active-KV share this normalises

HARDWARE: dict[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        Hardware(
            name="70b-4xh100",
            source="computed: 2 * 70e9 FLOP a token at half of 4 x 990 TFLOP/s, 141 GB of weights and 320 KiB of KV a "
            "token at 3.35 TB/s a GPU; host tier over PCIe 5 at 50 GB/s a GPU, peers at 50 GB/s (one port of 400 Gb/s)",
            steps=StepTimeModel(24.0e-3, 16.0e-3, 0.05e-3, 3.06e-8, 0.071e-3, 1.66e-9),
            kv_tokens=805 * 512,
            host_kv_tokens=4 * 805 * 512,
            host_token_s=327_680 / 200e9,
            fetch_token_s=3.3e-3 / 512,
        ),
        Hardware(
            name="8b-1xh100",
            source="the polynomials of Dynamo's mocker (github.com/ai-dynamo/dynamo, lib/mocker), fitted to our terms; "
            "128 KiB of KV a token; host tier over PCIe 5 at 50 GB/s, peers at 25 GB/s (one port of 200 Gb/s)",
            steps=StepTimeModel(
                16.5e-3,
                5.74e-3,
                0.02e-3,
                54.01e-3 / _H100_TOKENS,
                1.518e-5,
                8.42e-10,
                context_square_s=25.74e-3 / _H100_TOKENS**2,
            ),
            kv_tokens=790 * 512,
            host_kv_tokens=4 * 790 * 512,
            host_token_s=131_072 / 50e9,
            fetch_token_s=2.7e-3 / 512,
        ),
    )
}
"""Presets by name."""
