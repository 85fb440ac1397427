"""An answer that another worker began: prefix and continuation are the whole answer, wherever it is split."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rhizome.errors import InvalidRequest
from tests.support.memory_runner import LetterDecoder
from tests.unit.worker.test_engine import GREEDY, follow_and_compare, idle_and_nothing_lost, make_engine, request
from worker.engine import Engine, Output
from worker.plan import SamplingParams

PROMPT = list(range(1, 15))


def outputs_of(engine: Engine, params: SamplingParams, answered: tuple[int, ...] = (), **fields: Any) -> list[Output]:
    engine.add(request("r", PROMPT, params, answered=answered, **fields))
    outputs: list[Output] = []
    while engine.has_work:
        outputs += engine.step()
    idle_and_nothing_lost(engine)
    return outputs


def told(outputs: list[Output]) -> list[tuple[Any, ...]]:
    return [
        (out.token.token_id, out.text, out.finish_reason, out.completion_tokens, out.prompt_tokens) for out in outputs
    ]


def letters(outputs: list[Output]) -> str:
    return LetterDecoder().push([out.token.token_id for out in outputs])


PARAMS = {
    "greedy": replace(GREEDY, max_tokens=20),
    "sampled": replace(GREEDY, max_tokens=20, temperature=1.0, seed=7),
    "until the end token": replace(GREEDY, max_tokens=24, temperature=1.0, seed=3, ignore_eos=False),
    "not before ten tokens": replace(GREEDY, max_tokens=24, temperature=1.0, seed=3, ignore_eos=False, min_tokens=10),
    "as long as the model can": replace(GREEDY, max_tokens=1000),
}


def check_every_split(params: SamplingParams) -> None:
    whole = outputs_of(make_engine(), params)
    tokens = tuple(out.token.token_id for out in whole)
    warm = make_engine()
    outputs_of(warm, params)
    for engine in (None, warm):
        for split in range(len(whole)):
            used = engine or make_engine()
            rest = outputs_of(used, params, tokens[:split])
            assert told(rest) == told(whole[split:]), f"split after {split} tokens"
            assert (rest[0].cached_tokens > 0) == (engine is not None)
            assert rest[0].cached_tokens <= len(PROMPT)
            follow_and_compare(used)
    with pytest.raises(InvalidRequest, match=f"answered.*ended with token {len(tokens)}"):
        make_engine().add(request("r", PROMPT, params, answered=tokens))


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_wherever_an_answer_is_split_the_rest_is_the_same(params: SamplingParams) -> None:
    """Tokens, text, counts and the reason, on a cold and on a warm worker."""
    check_every_split(params)


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("at", [0, 4, 9])
def test_a_stop_string_across_the_split_is_found(length: int, at: int) -> None:
    """Text that was held back before the split is still held back after it, and comes or is cut as in one go."""
    params = replace(GREEDY, max_tokens=20, temperature=1.0, seed=11)
    text = letters(outputs_of(make_engine(), params))
    check_every_split(replace(params, stop=(text[at : at + length],)))
    check_every_split(replace(params, stop=(text[at : at + length] + "#",)))  # looks like one, and is none


def test_a_continuation_has_one_choice_and_one_first_token() -> None:
    """Its first token is reported once; several choices are refused before anything is kept."""
    engine = make_engine()
    outputs_of(engine, GREEDY, (3, 4))
    assert engine.progress_since(0)[1:] == (["r"], ["r"])
    with pytest.raises(InvalidRequest, match="answered"):
        engine.add(request("n", PROMPT, replace(GREEDY, n=2), answered=(3,)))
    assert not engine.has_work
    idle_and_nothing_lost(engine)
