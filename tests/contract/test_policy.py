"""What every routing policy keeps, and the rule of each against the same in plain Python."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import inf, isfinite
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radix.keys import Hashes
from rhizome.errors import InvalidRequest
from router.candidates import Candidates
from router.policies import POLICIES, Policy, Prompt, make_policy, peers, plain
from router.policies.peers import SglangCacheAware
from router.policies.plain import LOAD_FACTOR, PREFIX_BLOCKS, Sticky
from router.policies.predicted import EVEN_FULL, FULL_WEIGHT, MOST_PUSHED_S
from router.table import Floats
from tests.support.candidates import PlainQuestion, PlainWorker, plain_questions

NAMES = sorted(POLICIES)
KEEP_STATE = {"sticky", "sglang"}
FEW = settings(max_examples=30)  # for each of a dozen policies


def hashes_of(*blocks: int) -> Hashes:
    """A chain: each hash stands for its block and all before it, as real ones do."""
    chain: list[int] = []
    for block in blocks:
        chain.append(4 * chain[-1] + block if chain else block)  # blocks are 1 to 3, and few
    return np.array(chain, np.uint64)


PROMPTS = st.builds(
    Prompt,
    st.text(st.sampled_from("abcdef"), max_size=3),
    st.lists(st.integers(1, 3), max_size=6).map(lambda blocks: hashes_of(*blocks)),
    st.sampled_from(["", "s1", "s2", "s3"]),
    st.integers(-2, 2),
)
PAST = st.lists(st.tuples(PROMPTS, st.integers(0, 7)), max_size=10)
"""Requests that went to workers, by slot."""


def candidates_at(*slots: int) -> Candidates:
    return PlainQuestion(tuple(PlainWorker(slot=slot) for slot in slots)).candidates()


def with_past(name: str, past: list[tuple[Prompt, int]]) -> Policy:
    policy = make_policy(name)
    for prompt, slot in past:
        policy.placed(prompt, candidates_at(*range(8)), slot)
    return policy


# All of them.


@pytest.mark.parametrize("name", NAMES)
@FEW
@given(question=plain_questions(), prompt=PROMPTS, past=PAST)
def test_each_candidate_gets_a_score(name: str, question: PlainQuestion, prompt: Prompt, past: list[Any]) -> None:
    """One number each, and somebody wins. Asked twice it answers alike, and the candidates are left as they were."""
    policy, candidates = with_past(name, past), question.candidates()
    before = candidates.rows.copy()
    scores = policy.scores(prompt, candidates)
    assert scores.shape == (len(candidates),)
    assert scores.dtype == np.float64
    assert not np.isnan(scores).any()
    assert isfinite(scores.min())
    again = policy.scores(prompt, candidates)
    assert again.tolist() == scores.tolist()
    assert np.array_equal(candidates.rows, before)


@pytest.mark.parametrize("name", NAMES)
@FEW
@given(question=plain_questions(), prompt=PROMPTS, past=PAST)
def test_a_score_is_about_the_worker_not_its_row(
    name: str, question: PlainQuestion, prompt: Prompt, past: list[Any]
) -> None:
    """The workers in another order have the same scores: nobody wins by the place in a list."""
    if name == "power-of-two":  # picks rows
        return
    policy = with_past(name, past)
    turned = replace(question, workers=question.workers[::-1])
    scores, other_way = (policy.scores(prompt, asked.candidates()) for asked in (question, turned))
    assert other_way[::-1].tolist() == pytest.approx(scores.tolist())


@pytest.mark.parametrize("name", NAMES)
@FEW
@given(question=plain_questions(), prompt=PROMPTS, past=PAST)
def test_only_few_policies_depend_on_the_past(
    name: str, question: PlainQuestion, prompt: Prompt, past: list[Any]
) -> None:
    """The others answer as new ones do. Those that do forget it with the workers: nothing of a slot is inherited."""
    policy, candidates = with_past(name, past), question.candidates()
    if name in KEEP_STATE:
        for slot in range(8):
            policy.forget(slot)
    assert policy.scores(prompt, candidates).tolist() == make_policy(name).scores(prompt, candidates).tolist()


@pytest.mark.parametrize("name", NAMES)
@FEW
@given(least=st.floats(-1e6, 1e6), further=st.floats(0, 10))
def test_a_tie_takes_the_least_in(name: str, least: float, further: float) -> None:
    """And no tie ends before that of a smaller score."""
    policy = make_policy(name)
    assert policy.tie(least) >= least
    assert policy.tie(least + further) >= policy.tie(least) or least < 0


@pytest.mark.parametrize("name", NAMES)
def test_what_a_policy_remembers_is_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was placed, it still answers, and keeps no more than its bound."""
    monkeypatch.setattr(plain, "MAX_SESSIONS", 8)
    monkeypatch.setattr(peers, "SGLANG_TREE_BLOCKS", 16)
    policy, candidates = make_policy(name), candidates_at(0, 1, 5)
    for number in range(100):
        prompt = Prompt(f"r{number}", np.arange(5 * number + 1, 5 * number + 6, dtype=np.uint64), f"s{number}")
        policy.placed(prompt, candidates, number % 3)
        assert isfinite(policy.scores(prompt, candidates).min())
    if isinstance(policy, Sticky):
        assert len(policy._workers) == 8
    elif isinstance(policy, SglangCacheAware):
        assert len(policy._tree) <= 16
    else:
        assert not vars(policy)


def test_an_unknown_policy_is_refused_with_those_that_are() -> None:
    """All by name, which is each one's own."""
    with pytest.raises(InvalidRequest) as caught:
        make_policy("best")
    assert caught.value.field == "policy"
    assert all(name in str(caught.value) for name in NAMES)
    assert all(type(make_policy(name)) is POLICIES[name] and POLICIES[name].name == name for name in NAMES)


# Each by itself.

Rule = Callable[[PlainQuestion, PlainWorker], float]


def dynamo(weight: float) -> Rule:
    def rule(question: PlainQuestion, worker: PlainWorker) -> float:
        prefill_blocks = (worker.queued_tokens + question.prompt_tokens - question.cached(worker)) / question.block_size
        own_blocks = question.prompt_blocks() - question.cached(worker) / question.block_size
        return weight * prefill_blocks + question.in_use(worker) + own_blocks

    return rule


def llm_d(question: PlainQuestion, worker: PlainWorker) -> float:
    waiting = [each.sequences - each.decoding for each in question.workers]
    own = worker.sequences - worker.decoding
    longest, shortest = max(waiting), min(waiting)
    rank = (longest - own) / (longest - shortest) if longest > shortest else 1.0
    overlap = question.cached(worker) / question.prompt_tokens
    return -(2 * overlap + 1 - question.in_use(worker) / worker.blocks_total + rank)


def predicted_ttft(question: PlainQuestion, worker: PlainWorker) -> float:
    """Its own prefill counts again as the pool is full, and it adds to the first step of each that waits there."""
    own_s = question.prefill_s(worker)
    joined_s = question.waiting(worker) * min(own_s, worker.budget * worker.token_s)
    full = [question.in_use(each) / each.blocks_total for each in question.workers]
    here = question.in_use(worker) / worker.blocks_total
    return question.ttft_s(worker) + joined_s + FULL_WEIGHT * (here - EVEN_FULL * min(full)) * min(own_s, MOST_PUSHED_S)


RULES: dict[str, Rule] = {
    "round-robin": lambda question, worker: worker.last_routed,
    "least-loaded": lambda question, worker: worker.sequences,
    "dynamo": dynamo(1.0),
    "dynamo-p16": dynamo(16.0),
    "llm-d": llm_d,
    "lmetric": lambda question, worker: (worker.queued_tokens + question.new(worker)) * (worker.decoding + 1),
    "predicted-ttft": predicted_ttft,
}


def scores_of(name: str, question: PlainQuestion, prompt: Prompt | None = None) -> list[float]:
    found: list[float] = make_policy(name).scores(prompt or Prompt("r", hashes_of()), question.candidates()).tolist()
    return found


@pytest.mark.parametrize("name", sorted(RULES))
@given(question=plain_questions())
def test_a_formula_is_what_it_says(name: str, question: PlainQuestion) -> None:
    """Worker by worker."""
    expected = [RULES[name](question, worker) for worker in question.workers]
    assert scores_of(name, question) == pytest.approx(expected)


@given(question=plain_questions())
def test_candidates_show_what_is_predicted(question: PlainQuestion) -> None:
    """Column by column, and as rows for people."""
    candidates = question.candidates()
    names = [f"w{slot}" for slot in range(8)]
    for number, worker in enumerate(question.workers):
        row = candidates.row(number, names, np.zeros(len(candidates)))
        assert row.worker_id == names[worker.slot]
        assert (row.cached_tokens, row.prefill_tokens) == (question.cached(worker), question.new(worker))
        assert (row.in_flight, row.max_in_flight) == (worker.sequences, worker.max_sequences)
        assert row.free_blocks == max(0, worker.blocks_total - question.in_use(worker))
        told = (row.queue_s, row.memory_s, row.prefill_s, row.decode_s, row.predicted_ttft_s)
        terms = (question.queue_s, question.memory_s, question.prefill_s, question.decode_s, question.ttft_s)
        assert told == pytest.approx(tuple(term(worker) for term in terms), rel=1e-9, abs=1e-9)


def winner(scores: list[float] | Floats) -> int:
    return int(np.argmin(scores))


def spread(name: str, workers: int, prompts: int) -> Counter[int]:
    """How often each of so many equal idle workers wins."""
    policy, candidates = make_policy(name), candidates_at(*range(workers))
    asked = (Prompt(f"r{number}", hashes_of(number)) for number in range(prompts))
    return Counter(winner(policy.scores(prompt, candidates)) for prompt in asked)


@pytest.mark.parametrize("name", ["random", "prefix-hash"])
def test_names_spread_evenly(name: str) -> None:
    """Each of four workers gets its quarter, within four standard deviations."""
    assert all(abs(count - 500) < 80 for count in spread(name, 4, 2000).values())


@given(question=plain_questions())
def test_random_knows_names_only(question: PlainQuestion) -> None:
    """Whatever the load: the request's and the workers' slots."""
    idle = replace(question, workers=tuple(PlainWorker(slot=worker.slot) for worker in question.workers))
    assert scores_of("random", question) == scores_of("random", idle)


@given(question=plain_questions(), name=st.text(max_size=5))
def test_power_of_two_looks_at_two(question: PlainQuestion, name: str) -> None:
    """And takes the less loaded; alone it looks at one."""
    scores = scores_of("power-of-two", question, Prompt(name, hashes_of()))
    looked_at = [row for row, score in enumerate(scores) if score < inf]
    assert len(looked_at) == min(2, len(question.workers))
    assert all(scores[row] == question.workers[row].sequences for row in looked_at)


def test_power_of_two_looks_at_each_pair() -> None:
    """Of four workers, about as often as at any other."""
    pairs: Counter[tuple[int, ...]] = Counter()
    policy, candidates = make_policy("power-of-two"), candidates_at(0, 1, 2, 3)
    for number in range(1200):
        scores = policy.scores(Prompt(f"r{number}", hashes_of()), candidates)
        pairs[tuple(np.flatnonzero(scores < inf).tolist())] += 1
    assert len(pairs) == 6
    assert all(abs(count - 200) < 60 for count in pairs.values())


@given(question=plain_questions(), prompt=PROMPTS, past=PAST)
def test_sticky_keeps_a_session_where_it_was(question: PlainQuestion, prompt: Prompt, past: list[Any]) -> None:
    """Without a session's name its first blocks are one, and without a block it is the request. Else least loaded."""

    def session(prompt: Prompt) -> object:
        first = prompt.hashes[:PREFIX_BLOCKS].tolist()
        return prompt.session or (first[-1] if first else prompt.request_id)

    homes = {session(placed): slot for placed, slot in past}
    scores = with_past("sticky", past).scores(prompt, question.candidates()).tolist()
    home = homes.get(session(prompt))
    for worker, score in zip(question.workers, scores, strict=True):
        assert score == (-1 if worker.slot == home else worker.sequences)


@given(past=PAST, prompt=PROMPTS, gone=st.integers(0, 7))
def test_sticky_forgets_a_worker_that_is_gone_and_nobody_else(past: list[Any], prompt: Prompt, gone: int) -> None:
    """Its sessions begin anew; the others' stay."""
    policy = with_past("sticky", past)
    before = policy.scores(prompt, candidates_at(*range(8)))
    policy.forget(gone)
    after = policy.scores(prompt, candidates_at(*range(8)))
    assert after[gone] == 0
    if before.min() < 0 and winner(before) != gone:
        assert after.tolist() == before.tolist()


@given(question=plain_questions(), prompt=PROMPTS)
def test_prefix_hash_passes_over_the_overloaded(question: PlainQuestion, prompt: Prompt) -> None:
    """Each rank depends on the first blocks and the slot alone; one that has LOAD_FACTOR times the mean comes last."""
    scores = scores_of("prefix-hash", question, prompt)
    idle = replace(question, workers=tuple(PlainWorker(slot=worker.slot) for worker in question.workers))
    longer = replace(prompt, hashes=np.append(prompt.hashes, hashes_of(7, 8)), session="another")
    prefix_only = len(prompt.hashes) >= PREFIX_BLOCKS
    ranks = [score % 1 for score in scores_of("prefix-hash", idle, longer if prefix_only else prompt)]
    mean = (sum(worker.sequences for worker in question.workers) + 1) / len(question.workers)
    full = [worker.sequences + 1 > LOAD_FACTOR * mean for worker in question.workers]
    assert scores == pytest.approx([rank + is_full for rank, is_full in zip(ranks, full, strict=True)])


def test_prefix_hash_moves_few_prompts_when_a_worker_leaves() -> None:
    """Those that it had, and no others."""
    policy = make_policy("prefix-hash")
    for number in range(200):
        prompt = Prompt("r", hashes_of(number))
        with_it = winner(policy.scores(prompt, candidates_at(0, 1, 2, 3)))
        without_it = winner(policy.scores(prompt, candidates_at(0, 1, 2)))
        assert with_it in (without_it, 3)


@given(question=plain_questions(), prompt=PROMPTS, past=PAST, gone=st.integers(0, 7) | st.none())
def test_sglang_follows_its_own_decisions(
    question: PlainQuestion, prompt: Prompt, past: list[Any], gone: int | None
) -> None:
    """The longest prefix that was sent there counts, whatever is cached: if it is more than three tenths of the prompt,
    and loads are not apart by more than 64 and half as much again. Else the least load does."""
    policy = with_past("sglang", past)
    if gone is not None:
        policy.forget(gone)
    loads = [worker.sequences for worker in question.workers]
    own = prompt.hashes.tolist()

    def depth(slot: int) -> int:
        sent = {block for placed, where in past if where == slot != gone for block in placed.hashes.tolist()}
        return next((at for at, block in enumerate(own) if block not in sent), len(own))

    depths = [depth(worker.slot) for worker in question.workers]
    unbalanced = max(loads) - min(loads) > 64 and max(loads) > 1.5 * min(loads)
    good = max(depths) * question.block_size / question.prompt_tokens > 0.3
    expected = [-each for each in depths] if good and not unbalanced else loads
    assert policy.scores(prompt, question.candidates()).tolist() == expected


def test_predicted_ttft_ties_within_what_cannot_be_told_apart() -> None:
    """A millisecond, and a tenth of the least, but a tenth of a second at most."""
    policy = make_policy("predicted-ttft")
    assert policy.tie(0.0) == pytest.approx(0.001)
    assert policy.tie(0.5) == pytest.approx(0.551)
    assert policy.tie(10.0) == pytest.approx(10.101)
    assert policy.holds
    assert not any(POLICIES[name].holds for name in NAMES if name != "predicted-ttft")
