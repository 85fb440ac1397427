"""The tiny checkpoint: loads everywhere, chats, answers readably, and the same each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from worker.byte_tokenizer import BOS, END, EOS
from worker.checkpoint import load_model
from worker.config import CheckpointError, ModelConfig
from worker.plan import Chunk, SamplingInput, SamplingParams, StepPlan
from worker.runner import TorchRunner
from worker.tiny_model import make_tiny_model
from worker.tokenizer import Tokenizer

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

CHATS = ["Hello!", "Tell me about trees. " * 8, "x" * 200, "Why?", "日本語 🙂"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def hf_tokenizer(checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(checkpoint)


def chat_ids(hf_tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    ids: list[int] = hf_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return ids


def greedy(runner: TorchRunner, prompt: list[int], count: int) -> list[int]:
    """Up to `count` tokens, ending after an end token."""
    tokens = list(prompt)
    params = SamplingParams(max_tokens=count, temperature=0.0)
    done = 0
    while len(tokens) < len(prompt) + count and tokens[-1] not in (EOS, END):
        blocks = list(range(-(-len(tokens) // 16)))
        chunk = Chunk(tokens[done:], done, blocks, (SamplingInput(params, tokens, len(prompt)),))
        done = len(tokens)
        tokens.append(runner.run(StepPlan((chunk,)))[0][0].token_id)
    return tokens[len(prompt) :]


def test_transformers_loads_it_and_gives_the_same_answer(checkpoint: Path, hf_tokenizer: Any) -> None:
    """Model, tokenizer and chat template; greedy output token for token."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    runner = TorchRunner(load_model(checkpoint), 64, 16)
    tokenizer = Tokenizer.load(checkpoint)
    for text in CHATS:
        ids = chat_ids(hf_tokenizer, [{"role": "user", "content": text}])
        assert ids[0] == BOS
        output = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=40,
        )[0, len(ids) :].tolist()
        answer = greedy(runner, ids, 40)
        assert answer == output
        assert tokenizer.decode(answer) == hf_tokenizer.decode(output, skip_special_tokens=True)


def test_an_earlier_prompt_and_answer_are_a_prefix_of_the_next_prompt(checkpoint: Path, hf_tokenizer: Any) -> None:
    """Text and token ids alike: what the cache holds of turn n is what turn n + 1 begins with."""
    runner = TorchRunner(load_model(checkpoint), 128, 16)
    tokenizer = Tokenizer.load(checkpoint)
    messages = [{"role": "system", "content": "Be brief."}]
    held: list[int] = []
    for text in CHATS:
        messages.append({"role": "user", "content": text})
        ids = chat_ids(hf_tokenizer, messages)
        assert ids[: len(held)] == held
        answer = greedy(runner, ids, 30)
        held = ids + [token for token in answer if token not in (EOS, END)]
        messages.append({"role": "assistant", "content": tokenizer.decode(answer)})


def test_answers_are_printable_varied_and_far_from_ties(checkpoint: Path, hf_tokenizer: Any) -> None:
    """Different prompts, different answers; no answer is one token over and over; the best token leads clearly."""
    model = load_model(checkpoint)
    runner = TorchRunner(model, 64, 16)
    answers = []
    for text in CHATS:
        ids = chat_ids(hf_tokenizer, [{"role": "user", "content": text}])
        answer = greedy(runner, ids, 64)
        assert all(token in (10, EOS, END) or 32 <= token < 127 for token in answer)
        assert len(set(answer)) > min(10, len(answer) // 2)
        tokens = ids + answer
        with torch.inference_mode():
            chunk = Chunk(tokens, 0, list(range(-(-len(tokens) // 16))))
            top = model.logits(runner.hidden_states(StepPlan((chunk,)))).topk(2).values
        assert (top[:, 0] - top[:, 1]).min() > 1e-4
        answers.append(tuple(answer))
    assert len(set(answers)) == len(CHATS)


def test_same_seed_same_files_other_seed_other_weights(tmp_path: Path) -> None:
    """Byte for byte."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2}
    first, again, other = (make_tiny_model(tmp_path / str(n), seed=n % 2, **sizes) for n in (0, 2, 1))  # type: ignore[arg-type]
    for file in first.iterdir():
        same = file.read_bytes() == (other / file.name).read_bytes()
        assert file.read_bytes() == (again / file.name).read_bytes()
        assert same == (file.name != "model.safetensors")


def test_the_config_says_what_it_should(checkpoint: Path) -> None:
    """Two ways to end, a beginning, and grouped heads."""
    config = ModelConfig.load(checkpoint)
    assert config.eos_token_ids == {EOS, END}
    assert config.bos_token_id == BOS
    assert (config.num_heads, config.num_kv_heads, config.max_position_embeddings) == (8, 2, 8192)


def test_sizes_that_make_no_model_are_refused(tmp_path: Path) -> None:
    """By the field's name, before anything is written."""
    with pytest.raises(CheckpointError, match="num_key_value_heads is 3"):
        make_tiny_model(tmp_path / "none", num_kv_heads=3)
    assert not (tmp_path / "none").exists()
