"""The tools on a stream of a vLLM server, which knows nothing of us: the same questions, the same answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from deploy.events.tail import TailOptions, run_tail
from deploy.events.top_model import watching
from deploy.events.tree import TreeOptions, run_tree
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
