"""Our batches in the hands of others: the classes of each vLLM and SGLang release read them."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import pytest

from kv_events import wire
from kv_events.bus.url import parse_bus_url, publishing
from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventBatch
from kv_events.foreign.dialects import decode_foreign
from kv_events.log import EventLog
from radix.keys import Hashes
from tests.support.releases import RELEASES, Release


def blocks(*hashes: int) -> Hashes:
    return np.array(hashes, dtype=np.uint64)


TOKENS = np.array([10, 11, 12, 2**32 - 1], dtype=np.uint32)
BATCH = EventBatch(
    worker="w0",
    epoch=3,
    seq=9,
    events=(
        BlockStored(blocks(1, 2**64 - 1), 7, 2, TOKENS),
        BlockStored(blocks(5), 0, 2, medium="CPU"),
        BlockRemoved(blocks(1, 2**63), "CPU"),
        AllBlocksCleared(),
    ),
    digest=bytes(range(16)),
    ts=1.5,
)


def check(read: Any, rank: str, has_medium: bool) -> None:
    """That a consumer's objects say what BATCH says."""
    assert read.ts == 1.5
    assert not rank or getattr(read, rank) == 0
    stored, first, removed, cleared = read.events
    assert type(stored).__name__ == type(first).__name__ == "BlockStored"
    assert (type(removed).__name__, type(cleared).__name__) == ("BlockRemoved", "AllBlocksCleared")
    assert (stored.block_hashes, stored.parent_block_hash) == ([1, 2**64 - 1], 7)
    assert (stored.token_ids, stored.block_size, stored.lora_id) == (TOKENS.tolist(), 2, None)
    assert (first.block_hashes, first.parent_block_hash) == ([5], None)
    assert first.token_ids == [], "prompt tokens stay with the worker unless it is told to publish them"
    assert removed.block_hashes == [1, 2**63]
    if has_medium:
        assert [event.medium for event in (stored, first, removed)] == ["GPU", "CPU", "CPU"]
    for event in (stored, first, removed):
        for name in set(event.__struct_fields__) - {
            *("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium")
        }:
            assert getattr(event, name) is None, "what we do not say has its default"


@pytest.mark.parametrize("release", RELEASES.values(), ids=RELEASES.keys())
def test_each_releases_classes_read_our_batches(release: Release) -> None:
    """In their encoding, strictly, to equal content: none of their fields is missing, and ours at the tail of the batch
    disturb nobody."""
    payload = wire.encode(BATCH, positional=release.positional)
    check(msgspec.msgpack.decode(payload, type=release.batch()), release.rank, "medium" in release.stored)


@pytest.mark.parametrize("positional", [False, True])
def test_vllms_own_classes_read_our_batches(positional: bool) -> None:
    """Where it is installed, in the encoding of that release."""
    kv_events = pytest.importorskip("vllm.distributed.kv_events", reason="vllm is not installed")
    if kv_events.BlockStored.__struct_config__.array_like is not positional:
        pytest.skip("this release has the other encoding")
    read = msgspec.msgpack.decode(wire.encode(BATCH, positional=positional), type=kv_events.KVEventBatch)
    check(read, "data_parallel_rank", has_medium=True)


@pytest.mark.parametrize("positional", [False, True])
def test_our_own_reader_of_foreign_batches_reads_ours(positional: bool) -> None:
    """What a consumer sees is what decode_foreign sees; and our reader takes it for ours, whole."""
    payload = wire.encode(BATCH, positional=positional)
    stored, first, removed, _ = decode_foreign(payload).events
    assert stored[:5] == ((1, 2**64 - 1), 7, stored[2], 2, "GPU")
    assert (first[0], first[1], first[4]) == ((5,), None, "CPU")
    assert removed[:2] == ((1, 2**63), "CPU")
    ours = wire.decode(payload)
    assert (ours.worker, ours.epoch, ours.seq, ours.digest) == (BATCH.worker, BATCH.epoch, BATCH.seq, BATCH.digest)


@contextmanager
def dynamo_indexer(events: str) -> Iterator[Callable[[list[int]], dict[str, Any]]]:
    """Dynamo's own indexer, following a PUB socket as worker 1; asks it how many of a prompt's tokens workers hold."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dynamo.indexer", "--block-size", "4", "--port", str(port), "--threads", "1"]
    process = subprocess.Popen(
        [*command, "--workers", f"1={events}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def scores(tokens: list[int]) -> dict[str, Any]:
        asked = json.dumps({"token_ids": tokens, "model_name": "default"}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/query", asked, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return json.load(answer)["scores"]  # type: ignore[no-any-return]
        except urllib.error.HTTPError as error:
            error.close()
            return {}
        except OSError:  # it is not up yet
            return {}

    try:
        yield scores
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(importlib.util.find_spec("dynamo") is None, reason="needs Dynamo: pip install '.[bench]'")
def test_dynamos_own_indexer_follows_a_worker() -> None:
    """It takes batches of exactly three elements, as they are published with dialect=vllm, and finds prompts by the
    tokens in them; what is removed is gone."""
    tokens = list(range(100, 112))

    async def test() -> None:
        log = EventLog("w0", 1, 4)
        async with publishing(log, "zmq://127.0.0.1:0?dialect=vllm") as url:
            with dynamo_indexer(f"tcp://{parse_bus_url(url).address}") as scores:

                async def until(wanted: dict[str, Any], *events: Event) -> None:
                    async with asyncio.timeout(60):
                        while (found := await asyncio.to_thread(scores, tokens)) != wanted:
                            log.append(events, 0.0)  # what is sent before it listens is lost
                            await asyncio.sleep(0.1)
                    assert found == wanted

                await until({"1": {"0": 12}}, BlockStored(blocks(11, 12, 13), 0, 4, np.array(tokens, np.uint32)))
                await until({"1": {"0": 8}}, BlockRemoved(blocks(13)))

    asyncio.run(test())


@pytest.mark.parametrize("positional", [False, True])
def test_our_own_fields_can_be_left_out(positional: bool) -> None:
    """For readers that refuse longer batches: Dynamo's, for one. The rest is the same."""
    short = wire.encode(BATCH, positional=positional, own_fields=False)
    whole = wire.encode(BATCH, positional=positional)
    assert msgspec.msgpack.decode(short) == msgspec.msgpack.decode(whole)[:3]
    with pytest.raises(wire.WireError):
        wire.decode(short)


def test_a_reader_that_lacks_a_field_refuses() -> None:
    """The classes above are as strict as theirs: vLLM's reader wants the adapter's name, be it nil."""
    release = RELEASES["vllm-0.32.0"]
    stored = {"type": "BlockStored", "block_hashes": [1], "parent_block_hash": None, "token_ids": [], "block_size": 2}
    payload = msgspec.msgpack.encode([1.5, [{**stored, "lora_id": None, "medium": "GPU"}], 0])
    with pytest.raises(msgspec.ValidationError, match="lora_name"):
        msgspec.msgpack.decode(payload, type=release.batch())
