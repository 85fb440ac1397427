"""The engine over a real model: the answer to a request never depends on what else happened (float32, bit for bit)."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from kv_events.log import EventLog
from radix.hashing import BlockHasher, derive_salt
from rhizome.errors import InvalidRequest
from worker.checkpoint import load_model
from worker.engine import Engine
from worker.models.decoder import Decoder
from worker.plan import SampledToken, SamplingParams
from worker.runner import TorchRunner
from worker.scheduler import SchedulerConfig
from worker.sequence import EngineRequest
from worker.tiny_model import make_tiny_model
from worker.tokenizer import Tokenizer

LONGEST = 400
REQUESTS = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")
    return make_tiny_model(folder, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Decoder:
    return load_model(checkpoint)


def make_engine(model: Decoder, checkpoint: Path, config: SchedulerConfig) -> Engine:
    return Engine(
        config,
        TorchRunner(model, config.num_blocks, config.block_size),
        EventLog("w", 1, config.block_size, 1000),
        new_decoder=Tokenizer.load(checkpoint).detokenizer,
        eos_token_ids=model.config.eos_token_ids,
        clock=lambda: 0.0,
        wall_clock=lambda: 0.0,
        validate=True,
    )


def make_requests(block_size: int) -> list[EngineRequest]:
    """Greedy and sampled requests; most share a prefix of 150 tokens, the longest crosses a tile of attention."""
    rng = random.Random(5)
    shared = [rng.randrange(256) for _ in range(150)]
    hasher = BlockHasher(block_size, derive_salt("m"))
    requests = []
    for number in range(REQUESTS):
        tokens = shared[: rng.choice([150, 150, 96, 0])] + [rng.randrange(256) for _ in range(rng.choice([3, 40, 160]))]
        params = SamplingParams(
            max_tokens=rng.randrange(5, 40),
            temperature=rng.choice([0.0, 0.0, 1.0]),
            top_p=0.95,
            seed=number,
            repetition_penalty=rng.choice([1.0, 1.1]),
            logprobs=2,
            n=rng.choice([1, 1, 2]),
            ignore_eos=True,
        )
        keys = hasher.keys(np.array(tokens, np.uint32))
        requests.append(EngineRequest(f"r{number}", tokens, params, hasher, keys, priority=rng.randrange(2)))
    return requests


def drain(engine: Engine, answers: dict[tuple[str, int], list[SampledToken]]) -> None:
    for output in engine.step():
        answers.setdefault((output.request_id, output.choice), []).append(output.token)


@pytest.fixture(scope="module")
def alone(model: Decoder, checkpoint: Path) -> dict[tuple[str, int], list[SampledToken]]:
    """Each request by itself on a cold engine, its prompt in one chunk."""
    answers: dict[tuple[str, int], list[SampledToken]] = {}
    for request in make_requests(16):
        config = SchedulerConfig(num_blocks=64, block_size=16, max_model_len=LONGEST, max_batched_tokens=LONGEST)
        engine = make_engine(model, checkpoint, config)
        engine.add(request)
        while engine.has_work:
            drain(engine, answers)
    return answers


def test_broken_numbers_of_one_request_reach_no_other(checkpoint: Path) -> None:
    """A token whose embedding is NaN: whoever uses its blocks next, or sits beside it, answers as if alone."""
    model = load_model(checkpoint)
    model.embedding[7] = float("nan")
    config = SchedulerConfig(num_blocks=32, block_size=16, max_model_len=400, max_batched_tokens=100)
    hasher = BlockHasher(16, derive_salt("m"))

    def request(name: str, tokens: list[int]) -> EngineRequest:
        params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
        return EngineRequest(name, tokens, params, hasher, hasher.keys(np.array(tokens, np.uint32)))

    def answers(*requests: EngineRequest) -> list[SampledToken]:
        engine = make_engine(model, checkpoint, config)
        got: dict[tuple[str, int], list[SampledToken]] = {}
        for each in requests:
            engine.add(each)
            if each is not requests[-2:][0]:  # the last two run side by side, the others before them
                continue
            while len(requests) > 2 and engine.has_work:
                drain(engine, got)
        while engine.has_work:
            drain(engine, got)
        return got["good", 0]

    good, bad = request("good", list(range(20, 60))), [7] * 40
    alone = answers(good)
    assert answers(request("bad1", bad), request("bad2", bad), good) == alone
    assert answers(request("bad1", bad), good) == alone


@pytest.mark.parametrize("seed", range(8))
def test_answers_and_logprobs_are_equal_in_any_interleaving(
    model: Decoder, checkpoint: Path, alone: dict[tuple[str, int], list[SampledToken]], seed: int
) -> None:
    """Cold or warm, alone or batched, whole or in chunks, preempted, after clears and cancellations."""
    rng = random.Random(seed)
    block_size = rng.choice([8, 16, 32])
    fewest = -(-LONGEST // block_size)
    budget = rng.choice([17, 64, 300])
    config = SchedulerConfig(
        num_blocks=rng.choice([fewest, fewest + 5, 4 * fewest]),
        block_size=block_size,
        max_model_len=LONGEST,
        max_batched_tokens=budget,
        max_running=rng.choice([3, 8]),
    )
    engine = make_engine(model, checkpoint, config)
    answers: dict[tuple[str, int], list[SampledToken]] = {}
    requests = make_requests(block_size)
    disturbance = make_requests(block_size)[0]
    rng.shuffle(requests)
    for round_ in range(2):  # cold, then warm
        waiting = [*requests]
        while waiting or engine.has_work:
            if waiting and rng.random() < 0.3:
                engine.add(waiting.pop())
            if rng.random() < 0.02:
                engine.clear_cache()
            drain(engine, answers)
        for key, tokens in alone.items():
            assert answers[key] == tokens, f"seed {seed}, round {round_}, request {key}"
        answers.clear()
        # A request that goes away half-way leaves nothing that could disturb the next round.
        engine.add(disturbance)
        engine.step()
        engine.cancel(disturbance.request_id)
    if config.num_blocks == fewest:
        assert engine.status().preemptions > 0, "this seed was meant to preempt"
    pool = engine.scheduler.cache.pool
    assert (pool.in_use, pool.available) == (0, pool.num_blocks)


def test_a_host_tier_is_refused_until_tensors_are_moved(model: Decoder) -> None:
    """At the start, by name, and not by wrong answers later."""
    with pytest.raises(InvalidRequest, match="host_blocks"):
        TorchRunner(model, 8, 16, host_blocks=4)
