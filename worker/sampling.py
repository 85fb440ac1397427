"""Logits to tokens. Each row is worked on by itself in float64, so that a token depends on its own request only.

Order and meaning of the steps are vLLM's: log-probabilities are of the model's own distribution; then banned tokens,
penalties, temperature, min-p, top-k, top-p. Among equals the lowest token id comes first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker.plan import SampledToken, SamplingInput

Row = NDArray[np.float64]
LOWEST = torch.finfo(torch.float32).min


def sample(logits: Tensor, inputs: Sequence[SamplingInput]) -> list[SampledToken]:
    """One token for each row of `logits`, float32 [rows, vocab_size]."""
    assert logits.shape[0] == len(inputs)
    logits = logits.nan_to_num(nan=LOWEST)  # all finite: a broken model's row must not break the others
    if all(map(_is_plain_greedy, inputs)):
        return [SampledToken(token) for token in logits.argmax(-1).tolist()]
    rows = logits.cpu().numpy()
    return [_sample_row(row.astype(np.float64), wanted) for row, wanted in zip(rows, inputs, strict=True)]


def _is_plain_greedy(wanted: SamplingInput) -> bool:
    params = wanted.params
    return params.temperature == 0 and params.logprobs is None and not wanted.banned and not _has_penalties(wanted)


def _has_penalties(wanted: SamplingInput) -> bool:
    params = wanted.params
    return bool(params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty)


def _sample_row(raw: Row, wanted: SamplingInput) -> SampledToken:
    logits = raw.copy()
    if wanted.banned:
        logits[list(wanted.banned)] = -np.inf
    if _has_penalties(wanted):
        _penalise(logits, wanted)
    token = int(logits.argmax()) if wanted.params.temperature == 0 else _draw(logits, wanted)
    if wanted.params.logprobs is None:
        return SampledToken(token)
    log_probs = _log_softmax(raw)
    top = tuple((int(other), float(log_probs[other])) for other in _largest(log_probs, wanted.params.logprobs))
    return SampledToken(token, float(log_probs[token]), top)


def _penalise(logits: Row, wanted: SamplingInput) -> None:
    """Repetition (CTRL, arXiv:1909.05858) over prompt and output; presence and frequency (OpenAI) over the output."""
    params = wanted.params
    tokens = np.asarray(wanted.token_ids, dtype=np.int64)
    if params.repetition_penalty != 1:
        seen = np.unique(tokens)
        factor = np.where(logits[seen] > 0, 1 / params.repetition_penalty, params.repetition_penalty)
        logits[seen] *= factor
    output, counts = np.unique(tokens[wanted.prompt_len :], return_counts=True)
    logits[output] -= params.presence_penalty + params.frequency_penalty * counts


def _draw(logits: Row, wanted: SamplingInput) -> int:
    """One draw by inverse transform from what temperature and filters leave."""
    params = wanted.params
    highest = logits.max()
    if highest == -np.inf:  # nothing is allowed
        return 0
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the highest to -inf
        weights = np.exp((logits - highest) / params.temperature)  # 1 for the most likely token
    left = np.flatnonzero(weights >= params.min_p if params.min_p > 0 else weights)
    if params.top_k:
        left = left[np.sort(_largest(weights[left], params.top_k))]
    if params.top_p < 1:
        left = left[np.sort(_nucleus(weights[left], params.top_p))]
    cumulative = np.cumsum(weights[left])
    place = np.searchsorted(cumulative, _uniform(wanted) * cumulative[-1], side="right")
    return int(left[min(place, len(left) - 1)])  # rounding must not lead past the last


def _nucleus(weights: Row, top_p: float) -> NDArray[np.int64]:
    """The most likely tokens before each of which less than `top_p` of the weight lies (arXiv:1904.09751)."""
    limit = top_p * weights.sum()
    count = 1024  # a full sort only where the best thousand fall short
    while True:
        order = _largest(weights, count)
        kept: NDArray[np.int64] = order[np.cumsum(weights[order]) - weights[order] < limit]
        if len(kept) < len(order) or len(order) == len(weights):
            return kept
        count = len(weights)


def _uniform(wanted: SamplingInput) -> float:
    """In [0, 1): Philox4x64 (Salmon et al., SC 2011) of seed, choice and the number of tokens so far, nothing else."""
    counter = [len(wanted.token_ids), wanted.choice, 0, 0]
    philox = np.random.Philox(key=wanted.params.seed, counter=counter)
    return float(int(philox.random_raw()) >> 11) * 2.0**-53


def _largest(values: Row, count: int) -> NDArray[np.int64]:
    """Indices of the `count` largest values (at most all), largest first, ties by index."""
    count = min(count, len(values))
    if not count:
        return np.empty(0, dtype=np.int64)
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    candidates = np.flatnonzero(values >= threshold)
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]


def _log_softmax(logits: Row) -> Row:
    shifted = logits - logits.max()
    normalised: Row = shifted - np.log(np.exp(shifted).sum())
    return normalised
