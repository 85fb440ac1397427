"""`rhizome events explain`: a prompt's keys, its holders, and the decision with its terms."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import grpc
import pytest

from deploy.events import explain
from deploy.events.explain import ExplainOptions, parse_token_ids, run_explain
from radix.hashing import BlockHasher, derive_salt
from radix.keys import hashes_of
from rhizome.errors import InvalidRequest
from rhizome.v1.fleet_pb2 import WORKER_ROLE_BOTH, WORKER_ROLE_DECODE, WORKER_ROLE_OBSERVED, WORKER_ROLE_PREFILL
from rhizome.v1.router_pb2 import WorkerEntry
from tests.support.router_cluster import PROMPT, Cluster, with_cluster
from tests.support.scripted_worker import BLOCK_SIZE, MODEL
from tests.support.vllm_server import VllmServer, stored


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
    assert lines[9].split()[:4] == ["candidate", "cached", "fetched", "to"]


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


def test_a_system_prompt_goes_before_the_message(capsys: pytest.CaptureFixture[str]) -> None:
    """As clients send it; only chats have one."""
    tokens = []
    for system in (None, "Be brief."):
        explained(prompt="hello", chat=True, system=system, as_json=True)
        tokens.append(json.loads(capsys.readouterr().out)["prompt_tokens"])
    assert tokens[0] < tokens[1]


def observed_alone(*urls: str, servers: list[VllmServer], **options: Any) -> None:
    """A router without workers, which observes vllm-0, vllm-1, ...; the first of them holds 6 blocks of PROMPT."""

    async def test(running: Cluster) -> None:
        servers[0].publish(stored([1, 2, 3], block_size=32) | {"token_ids": PROMPT[:96]})
        await running.until(lambda entry: entry is not None and entry.indexed_blocks > 0, "vllm-0")
        await run_explain(ExplainOptions(f"router://{running.address}", **options))

    with_cluster(test, observe=[f"vllm-{number}={url}" for number, url in enumerate(urls)])


def test_a_router_that_only_observes_tells_keys_and_holders(capsys: pytest.CaptureFixture[str]) -> None:
    """By the observed URL's model and block size; with the note that no worker can be chosen."""
    with VllmServer() as server:
        url = f"{server.url}&model={MODEL}&block_size={BLOCK_SIZE}"
        observed_alone(url, servers=[server], token_ids=PROMPT, as_json=True)
        told = json.loads(capsys.readouterr().out)
    assert told["keys"] == KEYS
    (holder,) = told["holders"]
    assert (holder["worker"], holder["blocks"], holder["tokens"], holder["candidate"]) == ("vllm-0", 6, 96, False)
    assert (told["worker"], told["candidates"], told["notes"]) == ("", [], [])
    assert "no worker can be chosen" in told["reason"]
    with VllmServer() as server:
        url = f"{server.url}&model={MODEL}&block_size={BLOCK_SIZE}"
        observed_alone(url, servers=[server], token_ids=PROMPT)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "chosen   none"
    assert lines[-1] == f"vllm-0  6 of {len(KEYS)}      96  6 device, not a candidate"


def test_a_text_cannot_be_explained_without_a_tokenizer() -> None:
    """And it says what to do."""
    with VllmServer() as server:
        url = f"{server.url}&model={MODEL}&block_size={BLOCK_SIZE}"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            observed_alone(url, servers=[server], prompt="hello")
    assert "ask with token ids" in (caught.value.details() or "")


def test_an_observed_server_whose_url_rules_a_match_out_is_told() -> None:
    """By its model, by its block size, or as it names neither: nothing vanishes in silence."""

    def entry(name: str, url: str, role: Any = WORKER_ROLE_OBSERVED) -> WorkerEntry:
        return WorkerEntry(worker_id=name, events_url=url, role=role)

    entries = [
        entry("fits", "zmq://h:1?model=m&block_size=16"),
        entry("other", "zmq://h:1?model=n&block_size=16"),
        entry("size", "zmq://h:1?model=m&block_size=32"),
        entry("nameless", "zmq://h:1"),
        entry("holder", "zmq://h:1"),
        entry("ours", "redis://h:1/kv"),
        entry("worker", "zmq://h:1", WORKER_ROLE_BOTH),
    ]
    assert explain.mismatches(entries, "m", 16, {"holder"}) == [
        "other cannot match: its URL says model=n, the prompt's is m",
        "size cannot match: its URL says block_size=32, the prompt's blocks have 16 tokens",
        "nameless cannot match, if it is vLLM or SGLang: its URL has no model= and block_size=",
    ]


def test_what_cannot_be_asked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt, of one kind, that is text."""
    for options, said in (
        ({}, "prompt is '': .*one of them is needed"),
        ({"prompt": "x", "token_ids": [1]}, "only one of them"),
        ({"prompt": "x", "system": "y"}, "with --chat"),
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


@pytest.mark.parametrize("as_json", [False, True])
def test_both_halves_of_a_split_fleet_are_told(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Who begins and who would go on; a decode worker that does not begin it has no score."""

    async def test(running: Cluster) -> None:
        pulls: dict[str, Any] = {"transfer_offers": ["tcp://127.0.0.1:9"], "fetch_token_s": 1e-9}
        await running.join("p", role=WORKER_ROLE_PREFILL, **pulls)
        await running.join("d", role=WORKER_ROLE_DECODE, **pulls)
        await running.ready(2)
        await run_explain(ExplainOptions(f"router://{running.address}", token_ids=PROMPT, as_json=as_json))

    with_cluster(test, local_prefill_s=0.0)
    told = capsys.readouterr().out
    if as_json:
        decision = json.loads(told)
        assert (decision["worker"], decision["decode_worker"]) == ("p", "d")
        assert [(each["worker_id"], each["score"] is None) for each in decision["candidates"]] == [
            ("p", False),
            ("d", True),
        ]
    else:
        assert "chosen   p, by predicted-ttft" in told
        assert "then     d would go on" in told
        assert "p (prefill)" in told
        (line,) = [line for line in told.splitlines() if "d (decode)" in line]
        assert line.endswith("not for this")
