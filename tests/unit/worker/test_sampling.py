"""Each sampling feature against a plain reference; draws that depend on seed, choice and length only."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from worker.plan import SampledToken, SamplingInput, SamplingParams
from worker.sampling import sample

torch.set_num_threads(1)
VOCAB = 50


def logits(rows: int = 1, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def wanted(**fields: Any) -> SamplingInput:
    """A prompt of three tokens and no output yet, unless said otherwise."""
    inputs = {name: fields.pop(name) for name in ("token_ids", "prompt_len", "choice", "banned") if name in fields}
    return SamplingInput(**({"token_ids": [1, 2, 3], "prompt_len": 3} | inputs), params=SamplingParams(1, **fields))


def one(row: Tensor, **fields: Any) -> SampledToken:
    return sample(row.reshape(1, -1), [wanted(**fields)])[0]


def draws(row: Tensor, count: int, **fields: Any) -> np.ndarray[Any, Any]:
    """How often each token is drawn with seeds 0, 1, 2, ..."""
    inputs = [wanted(seed=seed, **fields) for seed in range(count)]
    tokens = [token.token_id for token in sample(row.reshape(1, -1).expand(count, -1), inputs)]
    return np.bincount(tokens, minlength=row.numel())


def fits(observed: np.ndarray[Any, Any], probabilities: Tensor) -> bool:
    """Pearson's chi-square at six standard deviations, cells of at least 5 expected; nothing where nothing may be."""
    p = probabilities.double().numpy()
    expected = p / p.sum() * observed.sum()
    if observed[p == 0].any():
        return False
    large = expected >= 5
    seen = np.append(observed[large], observed[~large].sum())
    due = np.append(expected[large], expected[~large].sum())
    statistic = ((seen - due) ** 2 / np.maximum(due, 1e-9)).sum()
    freedom = len(due) - 1
    return bool(statistic < freedom + 6 * math.sqrt(2 * max(freedom, 1)))


def test_greedy_takes_the_most_likely_token_and_the_lowest_of_equals() -> None:
    """Temperature 0 is argmax, alone and among rows that ask for more."""
    rows = logits(5)
    rows[2, 7] = rows[2, 30] = 99.0
    greedy = wanted(temperature=0.0)
    tokens = [token.token_id for token in sample(rows, [greedy] * 5)]
    assert tokens == rows.argmax(-1).tolist()
    assert tokens[2] == 7
    mixed = sample(rows, [greedy, wanted(seed=1), greedy, wanted(temperature=0.0, logprobs=2), greedy])
    assert [mixed[n].token_id for n in (0, 2, 3, 4)] == [tokens[n] for n in (0, 2, 3, 4)]


FILTERS: dict[str, tuple[dict[str, Any], list[LogitsProcessor]]] = {
    "plain": ({}, []),
    "temperature": ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
    "hot": ({"temperature": 3.0}, [TemperatureLogitsWarper(3.0)]),
    "top_k": ({"top_k": 5}, [TopKLogitsWarper(5)]),
    "top_k of all": ({"top_k": VOCAB}, []),
    "top_p": ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
    "tiny top_p": ({"top_p": 1e-6}, [TopKLogitsWarper(1)]),
    "min_p": ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
    "min_p of 1": ({"min_p": 1.0}, [TopKLogitsWarper(1)]),
    "all": (
        {"temperature": 1.5, "min_p": 0.02, "top_k": 20, "top_p": 0.9},
        [TemperatureLogitsWarper(1.5), MinPLogitsWarper(0.02), TopKLogitsWarper(20), TopPLogitsWarper(0.9)],
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_draws_follow_the_distribution_that_transformers_filters(name: str) -> None:
    """Chi-square over 4,000 draws with fixed seeds; tokens that are filtered out never come."""
    fields, warpers = FILTERS[name]
    row = logits(seed=3)
    scores = row.clone()
    for warper in warpers:
        scores = warper(torch.tensor([[1]]), scores)  # type: ignore[arg-type]
    assert fits(draws(row[0], 4000, **fields), scores.softmax(-1)[0])


def test_a_nucleus_wider_than_a_thousand_tokens_is_found_whole() -> None:
    """Half of 4,000 equal tokens: those with the lowest ids."""
    tokens = {one(torch.zeros(4000), top_p=0.5, seed=seed).token_id for seed in range(500)}
    assert max(tokens) < 2000
    assert max(tokens) > 1900


def test_the_chi_square_check_notices_a_wrong_distribution() -> None:
    """Draws at temperature 1 do not pass for draws at 0.8."""
    row = logits(seed=3)[0]
    assert not fits(draws(row, 4000), (row / 0.8).softmax(-1))


def test_repetition_penalty_is_that_of_transformers() -> None:
    """Prompt and output tokens: positive logits divided, negative multiplied."""
    row = logits(seed=5)
    tokens = [3, 3, 8, 20, 21]
    penalised = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([tokens]), row.clone())  # type: ignore[arg-type]
    observed = draws(row[0], 4000, token_ids=tokens, prompt_len=2, repetition_penalty=1.7)
    assert fits(observed, penalised.softmax(-1)[0])
    greedy = one(row, temperature=0.0, repetition_penalty=1.7, token_ids=tokens)
    assert greedy.token_id == int(penalised.argmax())


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    """Presence once, frequency for each occurrence; the prompt does not count."""
    row = torch.zeros(VOCAB)
    tokens = [4, 4, 5, 6, 6, 6]  # the prompt is 4, 4
    expected = row.clone()
    expected[5] -= 0.5 + 0.3
    expected[6] -= 0.5 + 3 * 0.3
    fields = {"token_ids": tokens, "prompt_len": 2, "presence_penalty": 0.5, "frequency_penalty": 0.3}
    assert fits(draws(row, 6000, **fields), expected.softmax(-1))
    favoured = one(row, temperature=0.0, token_ids=tokens, prompt_len=2, presence_penalty=-1.0)
    assert favoured.token_id == 5


def test_banned_tokens_are_never_chosen() -> None:
    """Greedy and drawn; with all but one banned, that one."""
    row = logits(seed=9)[0]
    best = int(row.argmax())
    assert one(row, temperature=0.0, banned=frozenset({best})).token_id == int(row.topk(2).indices[1])
    assert draws(row, 300, banned=frozenset({best}))[best] == 0
    all_but = frozenset(range(VOCAB)) - {17}
    for fields in ({"temperature": 0.0}, {"temperature": 1.0}, {"top_p": 0.1, "min_p": 0.5}, {"top_k": 3}):
        assert one(row, banned=all_but, **fields).token_id == 17


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-5])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    """No overflow, no NaN."""
    row = logits(seed=11)[0]
    assert one(row, temperature=temperature, seed=5).token_id == int(row.argmax())


def test_logprobs_are_of_the_untouched_distribution() -> None:
    """Whatever temperature, penalties and bans; the top ones come in order, equals by lowest id."""
    row = logits(seed=13)[0]
    row[40] = row[10] = row.max() + 1
    log_probs = row.double().log_softmax(-1)
    fields = {"temperature": 0.3, "repetition_penalty": 1.5, "banned": frozenset({10}), "top_k": 2, "seed": 4}
    token = one(row, logprobs=4, **fields)
    assert token.token_id != 10
    assert token.logprob == pytest.approx(float(log_probs[token.token_id]), abs=1e-9)
    order = sorted(range(VOCAB), key=lambda n: (-float(row[n]), n))[:4]
    assert [other for other, _ in token.top] == order
    assert [value for _, value in token.top] == pytest.approx(log_probs[order].tolist(), abs=1e-9)
    chosen_only = one(row, logprobs=0, **fields)
    assert (chosen_only.token_id, chosen_only.logprob, chosen_only.top) == (token.token_id, token.logprob, ())


params = st.builds(
    SamplingParams,
    max_tokens=st.just(1),
    temperature=st.sampled_from([0.0, 0.2, 1.0, 2.0]),
    top_k=st.integers(0, VOCAB),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**64 - 1),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logprobs=st.none() | st.integers(0, 20),
)
inputs_strategy = st.builds(
    SamplingInput,
    params=params,
    token_ids=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30),
    prompt_len=st.just(1),
    choice=st.integers(0, 15),
    banned=st.frozensets(st.integers(0, VOCAB - 1), max_size=5),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(inputs_strategy, min_size=1, max_size=6), st.integers(0, 1000))
def test_a_row_gives_the_same_token_alone_and_in_any_batch(inputs: list[SamplingInput], seed: int) -> None:
    """Also with the rows in reverse order; the chosen token is never banned."""
    rows = logits(len(inputs), seed)
    batch = sample(rows, inputs)
    assert batch == [sample(rows[n : n + 1], [given_input])[0] for n, given_input in enumerate(inputs)]
    assert batch == sample(rows.flip(0), inputs[::-1])[::-1]
    for token, given_input in zip(batch, inputs, strict=True):
        assert token.token_id not in given_input.banned


def test_seed_choice_and_length_each_change_the_draw() -> None:
    """And nothing else does: other tokens of the same number give the same draw."""
    row = torch.zeros(100_000)
    base = wanted(seed=1)
    others = [
        wanted(seed=2),
        wanted(seed=1, choice=1),
        wanted(seed=1, token_ids=[1, 2, 3, 4]),
        wanted(seed=2**64 - 1),
    ]
    tokens = [sample(row.reshape(1, -1), [given_input])[0].token_id for given_input in [base, *others]]
    assert len(set(tokens)) == len(tokens)
    assert sample(row.reshape(1, -1), [replace(base, token_ids=[7, 8, 9])])[0].token_id == tokens[0]


def test_draws_over_a_sequence_are_independent() -> None:
    """One seed, growing length: uniform over the vocabulary, consecutive pairs too."""
    row = torch.zeros(1, 8)
    tokens = [sample(row, [wanted(seed=42, token_ids=range(n))])[0].token_id for n in range(4000)]
    assert fits(np.bincount(tokens, minlength=8), torch.ones(8))
    pairs = [8 * a + b for a, b in zip(tokens[::2], tokens[1::2], strict=True)]
    assert fits(np.bincount(pairs, minlength=64), torch.ones(64))


def test_the_first_draws_of_a_seed_are_pinned() -> None:
    """Same seed, same text, across releases: these values must not change."""
    row = torch.zeros(1, 1000)
    tokens = [sample(row, [wanted(seed=seed, token_ids=range(5))])[0].token_id for seed in range(4)]
    assert tokens == [164, 971, 220, 810]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_do_not_break_the_step(temperature: float) -> None:
    """NaN and infinities give some token of the vocabulary, and the other rows theirs."""
    rows = logits(4)
    rows[0] = torch.nan
    rows[1, 5] = torch.nan
    rows[2, 6] = torch.inf
    tokens = sample(rows, [wanted(temperature=temperature, seed=1, logprobs=n) for n in range(4)])
    assert all(0 <= token.token_id < VOCAB for token in tokens)
    assert tokens[1].token_id != 5
    assert tokens[2].token_id == 6
    assert tokens[3] == one(rows[3], temperature=temperature, seed=1, logprobs=3)
