"""The tools on a stream of a vLLM server, which knows nothing of us: the same questions, the same answers."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.events.explain import ExplainOptions, run_explain
from deploy.events.record import RecordOptions, run_record
from deploy.events.tail import TailOptions, run_tail
from deploy.events.top_model import watching
from deploy.events.tree import TreeOptions, run_tree
from deploy.events.verify import VerifyOptions, run_verify
from tests.support.router_cluster import PROMPT, Cluster, with_cluster
from tests.support.scripted_worker import MODEL
from tests.support.vllm_server import VllmServer, removed, stored


@pytest.fixture
def server() -> Iterator[VllmServer]:
    """It holds a chain of four blocks, and of one that hung on its second it has let go."""
    with VllmServer() as server:
        server.publish(stored([1, 2, 3, 4]))
        server.publish(stored([9], parent=2, first_token=100))
        server.publish(removed([9]))
        server.flush()
        yield server


def told(capsys: pytest.CaptureFixture[str], work: Awaitable[None]) -> list[Any]:
    async def main() -> None:
        async with asyncio.timeout(60):
            await work

    asyncio.run(main())
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_tail(server: VllmServer, capsys: pytest.CaptureFixture[str]) -> None:
    """What its replay socket keeps, then what comes live."""
    events = told(capsys, run_tail(TailOptions(server.url, follow=False, as_json=True)))
    assert [(line["kind"], line["keys"][0][-1]) for line in events] == [
        ("stored", "1"),
        ("stored", "9"),
        ("removed", "9"),
    ]
    assert (events[1]["parent"], events[1]["block_size"]) == ("0000000000000002", 4)

    async def live() -> None:
        following = asyncio.create_task(run_tail(TailOptions(server.url, limit=1, as_json=True)))
        while not following.done():
            server.publish(removed([4]))
            await asyncio.sleep(0.05)
        await following

    (event,) = told(capsys, live())
    assert (event["kind"], event["keys"]) == ("removed", ["0000000000000004"])


def test_tree(server: VllmServer, capsys: pytest.CaptureFixture[str]) -> None:
    """What it holds now."""
    (tree,) = told(capsys, run_tree(TreeOptions(server.url, form="json")))
    assert (tree["blocks"], tree["workers"]) == (4, 1)
    (node,) = tree["nodes"]
    assert (node["first"], node["last"]) == ("0000000000000001", "0000000000000004")


def test_verify_says_that_only_the_order_was_checked(
    server: VllmServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such a server sends no digests: those that agree are the reader's own. A recording knows it, too."""
    path = tmp_path / "a.rhz"

    async def main() -> None:
        assert await run_verify(VerifyOptions(server.url, for_s=1.5))
        await run_record(RecordOptions(path, server.url, for_s=1.5))
        assert await run_verify(VerifyOptions(str(path)))

    asyncio.run(main())
    out = capsys.readouterr().out
    assert out.count("only the sequence of batches was checked") == 2
    assert len(re.findall(r"in order$", out, re.MULTILINE)) == 2
    assert "right" not in out


def test_top(server: VllmServer) -> None:
    """Its blocks, and their growth while it works."""

    async def main() -> None:
        async with asyncio.timeout(60), watching(server.url) as model:

            async def until(holds: Callable[[Any], bool]) -> None:
                while not holds(await model.look()):
                    await asyncio.sleep(0.05)

            await until(lambda picture: picture.workers[0].blocks == 4 and picture.workers[0].state == "in step")
            server.publish(stored([5, 6], parent=4, first_token=50))
            await until(lambda picture: picture.workers[0].blocks == 6)
            await until(lambda picture: [large.depth for large in picture.prefixes] == [6])

    asyncio.run(main())


def test_an_observed_server_is_one_of_its_routers_workers(capsys: pytest.CaptureFixture[str]) -> None:
    """Its stream is followed, its blocks are in the tree under the fleet's keys, and a prompt's holders name it."""

    async def test(running: Cluster) -> None:
        await running.join("worker-0")
        await running.ready()
        observed.publish(stored([1, 2, 3], block_size=32) | {"token_ids": PROMPT[:96]})
        await running.until(lambda entry: entry is not None and entry.indexed_blocks == 6, "vllm-0")
        router = f"router://{running.address}"
        await run_explain(ExplainOptions(router, token_ids=PROMPT, as_json=True))
        await run_tree(TreeOptions(router, form="json"))
        await run_tail(TailOptions(router, follow=False, as_json=True))
        async with watching(router) as model:
            while [row.state for row in (await model.look()).workers] != ["observed", "in step"]:
                await asyncio.sleep(0.05)

    with VllmServer() as observed:
        with_cluster(test, observe=[f"vllm-0={observed.url}&model={MODEL}&block_size=16"])
    explained, tree, event = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    first = explained["holders"][0]
    assert (first["worker"], first["blocks"], first["candidate"]) == ("vllm-0", 6, False)
    assert tree["nodes"][0]["first"] == explained["keys"][0] == event["keys"][0]
    assert (event["worker"], event["blocks"], event["block_size"]) == ("vllm-0", 6, 16)
