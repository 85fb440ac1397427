"""Models against transformers, and the promise that a token's bits do not depend on how it was computed."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from worker.checkpoint import load_model
from worker.models.decoder import Decoder, rms_norm, silu
from worker.plan import Chunk, SamplingInput, SamplingParams, StepPlan
from worker.runner import TorchRunner

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
logging.getLogger("transformers").setLevel(logging.ERROR)

GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
BLOCK_SIZE = 16
NEW_TOKENS = 24

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
BASE: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMAS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "mha": {"num_key_value_heads": 8},
    "three-heads": {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide-heads": {"head_dim": 32},
    "llama3-rope": {"rope_parameters": LLAMA3_ROPE},
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
}
QWENS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 24},
    "qwen3-tied-mha": {"head_dim": 8, "num_key_value_heads": 8, "tie_word_embeddings": True},
}


def reference_model(name: str) -> Any:
    """A randomly initialised transformers model; biases and norms random too, where they start at 0 or 1."""
    torch.manual_seed(7)
    model: Any
    if name in QWENS:
        model = Qwen3ForCausalLM(Qwen3Config(**(BASE | QWENS[name])))
    else:
        model = LlamaForCausalLM(LlamaConfig(**(BASE | LLAMAS[name])))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.1 + (1.0 if "norm" in key else 0.0))
    return model.eval()


def prompt(length: int, seed: int = 0) -> list[int]:
    tokens: list[int] = torch.randint(211, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tokens


class Session:
    """One sequence on a runner: computes its tokens in whatever pieces it is told to."""

    def __init__(self, runner: TorchRunner, tokens: list[int], table: list[int]) -> None:
        self.runner, self.tokens, self.table = runner, tokens, table
        self.prompt_len = len(tokens)
        self.done = 0

    def chunk(self, count: int, *, sample: bool = False) -> Chunk:
        """The next `count` tokens."""
        part = self.tokens[self.done : self.done + count]
        used = -(-(self.done + len(part)) // self.runner.cache.block_size)
        wanted = (SamplingInput(GREEDY, self.tokens, self.prompt_len),) if sample else ()
        made = Chunk(part, self.done, self.table[:used], wanted)
        self.done += len(part)
        return made

    def greedy(self, new_tokens: int) -> list[int]:
        """Prefill in one go, then token by token."""
        for _ in range(new_tokens):
            plan = StepPlan((self.chunk(len(self.tokens) - self.done, sample=True),))
            self.tokens.append(self.runner.run(plan)[0][0].token_id)
        return self.tokens[self.prompt_len :]


def all_logits(model: Decoder, tokens: list[int]) -> Tensor:
    """[tokens, vocab_size], from one prefill."""
    blocks = math.ceil(len(tokens) / BLOCK_SIZE)
    runner = TorchRunner(model, blocks, BLOCK_SIZE)
    with torch.inference_mode():
        plan = StepPlan((Session(runner, tokens, list(range(blocks))).chunk(len(tokens)),))
        return model.logits(runner.hidden_states(plan))


@pytest.mark.parametrize("name", [*LLAMAS, *QWENS])
def test_greedy_output_equals_transformers(name: str, tmp_path: Path) -> None:
    """Token for token, for short prompts and ones over several attention tiles; logits agree to 1e-4."""
    reference = reference_model(name)
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    generated_tokens: set[int] = set()
    for length in (1, 5, 300, 601):
        tokens = prompt(length, seed=length)
        with torch.no_grad():
            wanted_logits = reference(torch.tensor([tokens])).logits[0]
            generated = reference.generate(
                torch.tensor([tokens]),
                attention_mask=torch.ones(1, length, dtype=torch.long),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                pad_token_id=0,
            )[0, length:].tolist()
        assert wanted_logits.std() > 0.5, "the weights must be wide enough for the comparison to mean something"
        torch.testing.assert_close(all_logits(model, tokens), wanted_logits, atol=1e-4, rtol=0)
        runner = TorchRunner(model, 48, BLOCK_SIZE)
        assert Session(runner, tokens, list(range(47, -1, -1))).greedy(NEW_TOKENS) == generated
        generated_tokens.update(generated)
    assert len(generated_tokens) > 12, "one token over and over would prove little"


def test_llama3_rope_scaling_matters_to_the_test_above(tmp_path: Path) -> None:
    """The prompts are long enough for scaled and unscaled positions to differ."""
    results = []
    for name in ("gqa", "llama3-rope"):
        reference_model(name).save_pretrained(tmp_path / name)
        results.append(all_logits(load_model(tmp_path / name), prompt(300)))
    assert (results[0] - results[1]).abs().max() > 0.1


def test_half_precision_comes_close(tmp_path: Path) -> None:
    """bfloat16 weights, cache and products: the logits of float32 but for its eight bits."""
    reference_model("gqa").save_pretrained(tmp_path)
    exact = all_logits(load_model(tmp_path), prompt(300))
    rough = all_logits(load_model(tmp_path, dtype=torch.bfloat16), prompt(300))
    assert (exact - rough).std() < 0.1 * exact.std()


def test_sharded_checkpoint_equals_a_single_file(tmp_path: Path) -> None:
    """The same weights over several files give the same bits."""
    reference = reference_model("gqa")
    reference.save_pretrained(tmp_path / "one")
    reference.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (all_logits(load_model(tmp_path / name), prompt(40)) for name in ("one", "many"))
    assert torch.equal(one, many)


@pytest.fixture(scope="module", params=["gqa", "three-heads", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    directory = tmp_path_factory.mktemp("checkpoint")
    reference_model(request.param).save_pretrained(directory)
    return load_model(directory)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("scattered", [False, True])
@torch.inference_mode()
def test_bits_do_not_depend_on_batch_chunks_or_blocks(
    model: Decoder, block_size: int, scattered: bool, threads: int
) -> None:
    """Logits of every token: alone in one chunk, and among others in random chunks and single tokens."""
    prompts = [prompt(length, seed=length) for length in (530, 270, 33, 1)]
    alone = [all_logits(model, tokens) for tokens in prompts]
    generator = torch.Generator().manual_seed(block_size)
    runner = TorchRunner(model, 900 // block_size + 8, block_size)
    order = torch.randperm(runner.cache.num_blocks, generator=generator).tolist()
    free = iter(order if scattered else sorted(order))
    sessions = [Session(runner, t, [next(free) for _ in range(math.ceil(len(t) / block_size))]) for t in prompts]
    collected: list[list[Tensor]] = [[] for _ in sessions]
    while left := [s for s in sessions if s.done < len(s.tokens)]:
        sizes = torch.randint(1, 100, (len(left),), generator=generator).tolist()
        single = torch.rand(len(left), generator=generator) < 0.5
        chunks = [s.chunk(1 if one else size) for s, size, one in zip(left, sizes, single, strict=True)]
        logits = model.logits(runner.hidden_states(StepPlan(tuple(chunks))))
        parts = logits.split([len(chunk.token_ids) for chunk in chunks])
        for session, part in zip(left, parts, strict=True):
            collected[sessions.index(session)].append(part)
    for wanted, parts_of_one in zip(alone, collected, strict=True):
        assert torch.equal(torch.cat(parts_of_one), wanted)


@torch.inference_mode()
def test_bits_of_one_token_do_not_depend_on_how_many_decode_beside_it(model: Decoder, threads: int) -> None:
    """Every batch size from 1 to 33, logits of the sampled rows only."""
    runner = TorchRunner(model, 34 * 3, BLOCK_SIZE)
    sessions = [Session(runner, prompt(40, seed=n), [3 * n, 3 * n + 1, 3 * n + 2]) for n in range(34)]
    runner.run(StepPlan(tuple(session.chunk(39) for session in sessions)))
    last = [session.chunk(1, sample=True) for session in sessions]
    wanted = model.logits(runner.hidden_states(StepPlan(tuple(last))))
    for count in range(1, 34):
        hidden = runner.hidden_states(StepPlan(tuple(last[:count])))
        assert torch.equal(model.logits(hidden), wanted[:count]), count


@pytest.mark.parametrize("columns", [2816, 1000, 33])
def test_bits_of_a_row_do_not_depend_on_the_rows_beside_it(columns: int, threads: int) -> None:
    """Activation and norm at sizes where threads share the work, at whatever place they divide it."""
    rows = torch.randn(401, 2 * columns, generator=torch.Generator().manual_seed(columns)) * 4
    weight = torch.ones(columns)
    gate = rows.chunk(2, dim=-1)[0]
    for function in (silu, lambda x: rms_norm(x, weight, 1e-6)):
        whole = function(gate)
        for count in (4, 40, 100, 300):
            assert torch.equal(function(gate[:count]), whole[:count])
            assert torch.equal(function(gate[-count:]), whole[-count:])


def test_samples_of_a_fork_come_from_one_row_and_steps_without_samples_are_empty(model: Decoder) -> None:
    """A chunk may sample several choices; a chunk in mid-prompt none."""
    runner = TorchRunner(model, 8, BLOCK_SIZE)
    tokens = prompt(20)
    wanted = tuple(SamplingInput(SamplingParams(1, seed=3), tokens, 20, choice) for choice in range(3))
    first, second = Session(runner, tokens, [0, 1]), Session(runner, prompt(9), [2])
    both = runner.run(StepPlan((second.chunk(9), Chunk(tokens, 0, [0, 1], wanted))))
    assert [len(tokens) for tokens in both] == [0, 3]
    alone = runner.run(StepPlan((Chunk(tokens, 0, [4, 5], wanted[1:2]),)))
    assert alone[0][0] == both[1][1]
    assert runner.run(StepPlan((first.chunk(5),))) == [[]]


def test_copies_come_before_computation(model: Decoder) -> None:
    """A forked block continues as its source would have."""
    runner = TorchRunner(model, 8, BLOCK_SIZE)
    session = Session(runner, prompt(20), [0, 1])
    runner.run(StepPlan((session.chunk(19),)))
    last = session.chunk(1, sample=True)
    original = runner.run(StepPlan((last,)))
    forked = Chunk(last.token_ids, last.start, [5, 6], last.samples)
    assert runner.run(StepPlan((forked,), copies=((0, 5), (1, 6)))) == original
