"""`rhizome events explain`: a prompt's keys, its holders, and the decision with its terms."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import pytest

from deploy.events import explain
from deploy.events.explain import ExplainOptions, parse_token_ids, run_explain
from radix.hashing import BlockHasher, derive_salt
from radix.keys import hashes_of
from rhizome.errors import InvalidRequest
from tests.support.router_cluster import PROMPT, Cluster, with_cluster
from tests.support.scripted_worker import BLOCK_SIZE, MODEL


def explained(**options: Any) -> None:
    """Two workers, of which one holds half of PROMPT, and a third of it in host memory, and does not take requests."""

    async def test(running: Cluster) -> None:
        first, second = [await running.join(name) for name in ("worker-0", "worker-1")]
        await running.ready(2)
        held = {"worker-0": first.hold(PROMPT[:192]), "worker-1": second.hold(PROMPT[:96])}
        for name, blocks in held.items():
            await running.until(lambda e, blocks=blocks: e is not None and e.indexed_blocks == blocks, name)
        await running.client.set_draining("worker-1", True)
        await run_explain(ExplainOptions(f"router://{running.address}", **options))

    with_cluster(test)


KEYS = [f"{block:016x}" for block in hashes_of(BlockHasher(BLOCK_SIZE, derive_salt(MODEL)).keys(PROMPT)).tolist()]


def test_json_names_keys_holders_and_terms(capsys: pytest.CaptureFixture[str]) -> None:
    """Every key of the prompt; who holds how much of it, candidates or not; each candidate's terms."""
    explained(token_ids=PROMPT, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["prompt_tokens"] == len(PROMPT)
    assert told["keys"] == KEYS
    tiers = {"device": 12, "host": 12, "disk": 12}
    assert told["holders"] == [
        {"worker": "worker-0", "blocks": 12, "tokens": 192, "tier_blocks": tiers, "candidate": True},
        {
            "worker": "worker-1",
            "blocks": 6,
            "tokens": 96,
            "tier_blocks": {"device": 6, "host": 6, "disk": 6},
            "candidate": False,
        },
    ]
    assert told["worker"] == "worker-0"
    assert "worker-0" in told["reason"]
    (candidate,) = told["candidates"]
    assert (candidate["cached_tokens"], candidate["prefill_tokens"]) == (192, len(PROMPT) - 192)
    assert candidate["predicted_ttft_s"] > 0


def test_text_is_the_same_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    """A line for the prompt, its keys, the choice and why, then two tables."""
    explained(token_ids=PROMPT)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"prompt   {len(PROMPT)} tokens, {len(KEYS)} full blocks of 16"
    assert lines[1] == f"keys     {' '.join(KEYS[:3])} … {KEYS[-1]}"
    assert lines[2].startswith("chosen   worker-0, by predicted-ttft")
    assert lines[5] == "holds       blocks  tokens  where"
    assert lines[6] == f"worker-0  12 of {len(KEYS)}     192  12 device"
    assert lines[7] == f"worker-1   6 of {len(KEYS)}      96  6 device, not a candidate"
    assert lines[9].split()[:3] == ["candidate", "cached", "to"]


def test_a_large_index_is_not_fetched(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Then tiers are not known, and only candidates are told; what they hold comes from the decision."""
    monkeypatch.setattr(explain, "MAX_TREE_ENTRIES", 5)
    explained(token_ids=PROMPT, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["holders"] == [
        {"worker": "worker-0", "blocks": 12, "tokens": 192, "tier_blocks": None, "candidate": True}
    ]


def test_a_text_or_a_chat_message_can_be_asked_about(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The chat template adds tokens; - is standard input."""
    explained(prompt="hello", as_json=True)
    text = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello")))
    explained(prompt="-", chat=True, as_json=True)
    chat = json.loads(capsys.readouterr().out)
    assert text["prompt_tokens"] == 5 < chat["prompt_tokens"]


def test_what_cannot_be_asked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt, of one kind, that is text."""
    for options, said in (
        ({}, "one of them"),
        ({"prompt": "x", "token_ids": [1]}, "one of them"),
        ({"token_ids": [1], "chat": True}, "a prompt already"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            explained(**options)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    with pytest.raises(InvalidRequest, match="UTF-8"):
        explained(prompt="-")


def test_token_ids_are_numbers() -> None:
    """With commas or spaces between them."""
    assert parse_token_ids("1,2, 3 4") == [1, 2, 3, 4]
    for wrong in ("", ",", "1,x", "-1", "٣"):
        with pytest.raises(InvalidRequest, match="numbers with commas"):
            parse_token_ids(wrong)
