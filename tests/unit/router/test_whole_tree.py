"""The whole tree in chunks: what is sent is what is put together; nothing more is taken."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from kv_events.events import BlockStored
from kv_events.log import EventLog
from kv_events.wire import WireError
from radix import snapshot
from radix.tree import MAX_WORKERS, PrefixTree
from rhizome.errors import InvalidRequest, Overloaded
from rhizome.v1 import router_pb2
from router import whole_tree
from router.fleet import Fleet
from router.index import Index
from router.whole_tree import ChunkJoiner, TreeSender, joined


class Written:
    """A call's context that keeps what is written."""

    def __init__(self, wait: asyncio.Event | None = None) -> None:
        self.chunks: list[router_pb2.TreeChunk] = []
        self._wait = wait

    async def write(self, data: bytes) -> None:
        self.chunks.append(router_pb2.TreeChunk.FromString(data))
        if self._wait:
            await self._wait.wait()


def filled(workers: int = 3, blocks: int = 50) -> Index:
    index = Index()
    for number in range(workers):
        name = f"worker-{number}"
        index.add(name)
        hashes = np.arange(1, blocks + 1 + number, dtype=np.uint64)
        index.view(name).offer(EventLog(name, 1, 16).append([BlockStored(hashes, 0, 16)], 0.0))
    return index


def sent(index: Index, **asked: Any) -> list[router_pb2.TreeChunk]:
    context: Any = Written()
    asyncio.run(TreeSender(Fleet(), index).send(router_pb2.GetTreeRequest(**asked), context))
    chunks: list[router_pb2.TreeChunk] = context.chunks
    return chunks


def digests(tree: PrefixTree, workers: int) -> list[bytes]:
    return [tree.digest(number) for number in range(workers)]


def test_the_tree_arrives_whole_with_names_and_hot_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of any size; a number that nobody has has no name."""
    monkeypatch.setattr(whole_tree, "CHUNK_BYTES", 100)
    index = filled()
    index.drop("worker-1")
    index.match(np.arange(1, 21, dtype=np.uint64))
    chunks = sent(index, hottest=5)
    assert len(chunks) > 3
    whole = joined(chunks)
    assert whole.workers == ["worker-0", "", "worker-2"]
    assert digests(whole.tree, 3) == digests(index.tree, 3)
    assert whole.hottest == index.tree.hottest(5) != []
    assert whole.left_out == 0


def test_an_empty_index_is_a_tree_too() -> None:
    """No worker, no block, no error."""
    whole = joined(sent(Index()))
    assert (len(whole.tree), whole.workers, whole.hottest) == (0, [], [])


def test_hot_prefixes_come_without_the_tree() -> None:
    """What a live view asks for each second costs no encoding."""
    index = filled()
    index.match(np.arange(1, 21, dtype=np.uint64))
    (chunk,) = sent(index, hottest=5, without_tree=True)
    assert not chunk.total_bytes
    assert joined([chunk]).hottest == index.tree.hottest(5) != []


def test_too_much_is_refused() -> None:
    """Hot prefixes past the limit; more trees at once than memory is meant for."""

    async def main() -> None:
        go_on = asyncio.Event()
        sender = TreeSender(Fleet(), filled())
        request = router_pb2.GetTreeRequest()
        contexts: list[Any] = [Written(go_on) for _ in range(whole_tree.MAX_TREES_SENT)]
        sending = [asyncio.create_task(sender.send(request, context)) for context in contexts]
        while not all(context.chunks for context in contexts):
            await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="2 trees are being sent"):
            await sender.send(request, contexts[0])
        go_on.set()
        await asyncio.gather(*sending)
        await sender.send(request, contexts[0])

    with pytest.raises(InvalidRequest, match="hottest is 1001: at most 1000"):
        sent(Index(), hottest=1001)
    asyncio.run(main())


def test_a_number_that_changes_hands_while_the_tree_is_encoded_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a worker that left are never shown under another's name."""
    index = filled(2)
    encode = snapshot.encode
    names = iter("abcdefgh")

    def while_it_is_encoded(tree: PrefixTree) -> bytes:
        data = encode(tree)
        index.drop(index.names()[0])
        index.add(next(names))
        return data

    monkeypatch.setattr(snapshot, "encode", while_it_is_encoded)
    assert joined(sent(index)).workers == ["", "worker-1"]


def test_bytes_from_afar_are_bounded_and_checked() -> None:
    """More than was said, less, none, damaged ones: WireError."""
    data = snapshot.encode(filled().tree)

    def chunk(**fields: Any) -> router_pb2.TreeChunk:
        return router_pb2.TreeChunk(**fields)

    for wrong, said in (
        ([], "broke off"),
        ([chunk(total_bytes=len(data), data=data[:-1])], "broke off"),
        ([chunk(total_bytes=len(data), data=data), chunk(data=b"x")], "goes on past"),
        ([chunk(total_bytes=len(data), data=data[:5]), chunk()], "empty"),
        ([chunk(total_bytes=2**32)], "at most 2147483648 are taken"),
        ([chunk(worker_ids=[""] * (MAX_WORKERS + 1))], "too many"),
        ([chunk(total_bytes=len(data), data=data[:-1] + bytes([data[-1] ^ 1]))], "damaged"),
    ):
        with pytest.raises(WireError, match=said):
            joined(wrong)


def test_a_tree_past_the_cap_says_how_much_is_left_out() -> None:
    """The tool goes on with what fits."""
    joiner = ChunkJoiner()
    for chunk in sent(filled()):
        joiner.add(chunk)
    whole = joiner.finish(max_blocks=60)
    assert (len(whole.tree), whole.left_out) == (60, 50 + 51 + 52 - 60)
