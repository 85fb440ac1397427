"""Servers whose events a router reads and to which it routes nothing: a simulated vLLM server, over real sockets."""

from __future__ import annotations

import asyncio
import logging

import grpc
import numpy as np
import pytest

from kv_events.bus.url import publishing
from kv_events.events import BlockRemoved, BlockStored
from kv_events.log import EventLog
from rhizome.errors import InvalidRequest
from rhizome.v1 import fleet_pb2, router_pb2
from router.observed import parse_observed
from tests.support.router_cluster import PROMPT, Cluster, cluster, refusal, with_cluster
from tests.support.scripted_worker import MODEL
from tests.support.vllm_server import VllmServer, removed, stored

BLOCK_SIZE = 16


def vllm_url(server: VllmServer) -> str:
    return f"{server.url}&model={MODEL}&block_size={BLOCK_SIZE}"


def prompt_stored(hashes: list[int], block_size: int) -> dict[str, object]:
    """The blocks of PROMPT, as a server with blocks of another size tells of them."""
    return stored(hashes, block_size=block_size) | {"token_ids": PROMPT[: block_size * len(hashes)]}


@pytest.mark.parametrize("block_size", [8, 16, 24, 32])
def test_what_an_observed_server_holds_is_explained_in_our_blocks(block_size: int) -> None:
    """Whatever its block size: of a prompt's tokens those in whole blocks of ours, and no request goes there."""

    async def test(running: Cluster) -> None:
        await running.join("worker-0")
        await running.ready()
        hashes = list(range(1, 1 + 96 // block_size))
        server.publish(prompt_stored(hashes, block_size))
        await running.until(lambda entry: entry is not None and entry.indexed_blocks == 6, "vllm-0")
        decision = await running.client.explain(token_ids=PROMPT)
        assert decision.worker_id == "worker-0"
        assert [(each.worker_id, each.cached_tokens) for each in decision.observed] == [("vllm-0", 96)]
        assert len(decision.block_hashes) == 8 * (len(PROMPT) // BLOCK_SIZE)
        server.publish(removed(hashes[-1:]))
        await running.until(lambda entry: entry is not None and entry.indexed_blocks < 6, "vllm-0")
        entry = await running.entry("vllm-0")
        assert entry is not None
        assert entry.role == fleet_pb2.WORKER_ROLE_OBSERVED
        assert entry.index_synced
        decision = await running.client.explain(token_ids=PROMPT)
        assert decision.observed[0].cached_tokens == 16 * entry.indexed_blocks
        chunks = [chunk async for chunk in running.client.stub.GetIndex(router_pb2.GetIndexRequest(worker_id="vllm-0"))]
        assert sum(len(chunk.block_hashes) for chunk in chunks) == 8 * entry.indexed_blocks

    with VllmServer() as server:
        with_cluster(test, observe=[f"vllm-0={vllm_url(server)}"])


def test_an_observed_server_that_restarts_is_known_to_hold_nothing_of_before() -> None:
    """Its numbers start anew: what the former process held is gone, what the new one holds is there."""

    async def test(running: Cluster) -> None:
        first.publish(prompt_stored([1, 2, 3], 16))
        await running.until(lambda entry: entry is not None and entry.indexed_blocks == 3, "vllm-0")
        first.__exit__()
        with VllmServer(first.port, first.replay_port) as second:
            second.publish(prompt_stored([11, 12], 16))
            await running.until(lambda entry: entry is not None and entry.indexed_blocks == 2, "vllm-0")

    first = VllmServer()
    first.__enter__()
    with_cluster(test, observe=[f"vllm-0={vllm_url(first)}"])


def test_a_block_size_in_the_url_that_is_not_the_fleets_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing would match, and nobody would know why. The server's own block size may be any."""

    async def test(running: Cluster) -> None:
        with caplog.at_level(logging.WARNING, "router.observed"):
            await running.join("worker-0")
        (warning,) = [record.getMessage() for record in caplog.records if record.name == "router.observed"]
        assert "observed worker wrong" in warning
        assert "block_size=32" in warning

    urls = [
        f"{name}=zmq://127.0.0.1:9?model={MODEL}&block_size={size}" for name, size in (("right", 16), ("wrong", 32))
    ]
    with_cluster(test, observe=urls)


@pytest.mark.parametrize("scheme", ["memory", "grpc"])
def test_another_fleets_worker_may_be_observed_under_another_name(scheme: str) -> None:
    """It publishes under its own; gaps, snapshots and restarts are as with the router's own workers."""

    async def main() -> None:
        log = EventLog("their-worker", 1, 16, capacity=2)
        for number in range(1, 6):  # more than it keeps: a snapshot is needed
            log.append([BlockStored(np.array([number], np.uint64), number - 1, 16)], 0.0)
        url = {"memory": "memory://theirs", "grpc": "grpc://127.0.0.1:0"}[scheme]
        async with publishing(log, url) as read_at, cluster(observe=[f"w9={read_at}"]) as running:
            await running.until(lambda entry: entry is not None and entry.indexed_blocks == 5, "w9")
            log.append([BlockRemoved(np.array([5], np.uint64))], 0.0)
            await running.until(lambda entry: entry is not None and entry.indexed_blocks == 4, "w9")
            entry = await running.entry("w9")
            assert entry is not None
            assert entry.index_synced
            assert entry.index_digest == log.digest

    asyncio.run(main())


def test_a_worker_cannot_join_under_the_name_of_an_observed_server() -> None:
    """Nor be taken for it."""

    async def test(running: Cluster) -> None:
        request = fleet_pb2.RegisterRequest(
            worker_id="vllm-0",
            epoch=1,
            address="127.0.0.1:9",
            role=fleet_pb2.WORKER_ROLE_BOTH,
            model=fleet_pb2.ModelCard(name="m", max_model_len=9, vocab_size=9, block_size=9, tokenizer_sha256="0"),
            blocks_total=1,
            max_running=1,
            max_waiting=1,
            max_batched_tokens=1,
        )
        async with grpc.aio.insecure_channel(running.address) as channel:
            register = channel.unary_unary(
                "/rhizome.v1.Fleet/Register",
                request_serializer=fleet_pb2.RegisterRequest.SerializeToString,
                response_deserializer=fleet_pb2.RegisterResponse.FromString,
            )
            error = await refusal(register(request), grpc.StatusCode.FAILED_PRECONDITION)
            assert "observed" in (error.details() or "")

    with VllmServer() as server:
        with_cluster(test, observe=[f"vllm-0={vllm_url(server)}"])


@pytest.mark.parametrize(
    "text", ["", "vllm-0", "=zmq://127.0.0.1:1", "vllm-0=", "vllm-0=http://h:1", "vllm-0=zmq://127.0.0.1:1?model=m"]
)
def test_what_is_not_a_name_and_a_url_is_refused(text: str) -> None:
    """Naming what is wrong."""
    with pytest.raises(InvalidRequest):
        parse_observed(text)
