"""An answer that another worker began: prefix and continuation are the whole answer, wherever it is split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from rhizome.errors import InvalidRequest, Overloaded
from tests.support.memory_runner import LetterDecoder
from tests.unit.worker.test_engine import GREEDY, follow_and_compare, idle_and_nothing_lost, make_engine, request
from worker.answer import FinishReason
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


def test_a_request_to_hold_ends_with_its_first_token_and_lends_its_prompt() -> None:
    """The ticket comes with the token; the full blocks stay pinned for it, and are free once they are unpinned."""
    engine = make_engine()
    lent: list[tuple[list[bytes], list[int]]] = []

    def lend(keys: Sequence[bytes], blocks: Sequence[int]) -> bytes:
        lent.append((list(keys), list(blocks)))
        return b"ticket"

    engine.lend = lend
    asked = request("r", PROMPT, GREEDY, hold=True)
    engine.add(asked)
    outputs: list[Output] = []
    while engine.has_work:
        outputs += engine.step()
    (only,) = outputs
    assert (only.ticket, only.finish_reason, only.request_finished) == (b"ticket", None, True)
    assert told(outputs) == told(outputs_of(make_engine(), GREEDY))[:1]
    ((keys, blocks),) = lent
    full = len(PROMPT) // engine.config.block_size
    assert b"".join(keys) == asked.keys.tobytes()
    assert len(blocks) == full == engine.status().blocks_in_use
    engine.unpin(blocks)
    idle_and_nothing_lost(engine)


def test_an_answer_that_ends_at_once_lends_nothing() -> None:
    """Nor does one whose blocks nobody takes over: neither keeps anything."""
    engine = make_engine()
    engine.lend = lambda keys, blocks: b"ticket"
    (only,) = outputs_of(engine, replace(GREEDY, max_tokens=1), hold=True)
    assert (only.ticket, only.finish_reason) == (b"", FinishReason.LENGTH)

    def refuse(keys: Sequence[bytes], blocks: Sequence[int]) -> bytes:
        raise Overloaded("too much is leased")

    engine.lend = refuse
    (only,) = outputs_of(engine, GREEDY, hold=True)
    assert (only.ticket, only.finish_reason) == (b"", None)
    engine.lend = None
    assert outputs_of(engine, GREEDY, hold=True)[0].ticket == b""
    with pytest.raises(InvalidRequest, match="hold"):
        engine.add(request("r", PROMPT, replace(GREEDY, n=2), hold=True))


def test_a_lender_that_fails_is_told_of_and_fails_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """The request is answered, without a ticket, and so are the others of its step; nothing is kept."""
    engine = make_engine()

    def break_down(keys: Sequence[bytes], blocks: Sequence[int]) -> bytes:
        raise RuntimeError("can't start new thread")

    engine.lend = break_down
    engine.add(request("other", PROMPT, GREEDY))
    engine.add(request("r", PROMPT, GREEDY, hold=True))
    outputs: list[Output] = []
    while engine.has_work:
        outputs += engine.step()
    assert [output.ticket for output in outputs if output.request_id == "r"] == [b""]
    assert told([output for output in outputs if output.request_id == "other"]) == told(
        outputs_of(make_engine(), GREEDY)
    )
    assert "request r could not be lent" in caplog.text
    idle_and_nothing_lost(engine)


def test_who_goes_on_tells_what_the_first_part_found_cached() -> None:
    """Usage is the request's, not that of its second worker, which found everything."""
    whole = outputs_of(make_engine(), GREEDY)
    rest = outputs_of(make_engine(), GREEDY, (whole[0].token.token_id,), answered_cached_tokens=8)
    assert {out.cached_tokens for out in rest} == {8}


def test_a_prompt_that_two_workers_share_is_counted_once() -> None:
    """By the first, as it found it; what the second finds cached was pulled or computed again, and is no hit."""
    first, second = make_engine(), make_engine()
    (begun,) = outputs_of(first, GREEDY, hold=True)
    outputs_of(second, GREEDY)
    before = second.status()
    outputs_of(second, GREEDY, (begun.token.token_id,), answered_cached_tokens=begun.cached_tokens)
    after = second.status()
    assert (first.status().prompt_tokens, first.status().cached_prompt_tokens) == (len(PROMPT), 0)
    assert after.prompt_tokens == before.prompt_tokens == len(PROMPT)
    assert after.cached_prompt_tokens == before.cached_prompt_tokens == 0
    outputs_of(second, GREEDY, (begun.token.token_id,))  # of whom nobody told what was found before
    assert second.status().prompt_tokens == 2 * len(PROMPT)
