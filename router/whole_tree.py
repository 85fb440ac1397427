"""The router's whole tree for the tools that look into it: sent in pieces, and put together by who asked."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from kv_events.wire import WireError
from radix import make_tree, snapshot
from radix.tree import DEFAULT_MAX_BLOCKS, HotPrefix, PrefixTree
from rhizome import rpc
from rhizome.errors import InvalidRequest, Overloaded
from rhizome.v1 import router_pb2
from router.fleet import Fleet
from router.index import Index

CHUNK_BYTES = 2**20
MAX_HOTTEST = 1000
MAX_TREES_SENT = 2  # at once: each is a copy of the index as bytes, about 8 to 12 a block
MAX_TREE_BYTES = 2**31  # that are taken from a router: an index at its default caps has less
MAX_NAMES = 65_536
_TRIES = 3


class TreeSender:
    """Answers GetTree. Encoding goes on in a thread while events are applied: the tree is one moment's."""

    def __init__(self, fleet: Fleet, index: Index) -> None:
        self._fleet = fleet
        self._index = index
        self._sending = 0

    async def send(self, request: router_pb2.GetTreeRequest, context: rpc.Context) -> None:
        """Write the chunks. Raises InvalidRequest, and Overloaded while too many trees are being sent."""
        if request.hottest > MAX_HOTTEST:
            raise InvalidRequest("hottest", request.hottest, f"at most {MAX_HOTTEST}")
        if request.without_tree:
            hottest = await asyncio.to_thread(self._index.tree.hottest, request.hottest)
            await context.write(self._first(self._index.names(), hottest).SerializeToString())
            return
        if self._sending >= MAX_TREES_SENT:
            raise Overloaded(f"{self._sending} trees are being sent already", retry_after_s=1.0)
        self._sending += 1
        try:
            names, data, hottest = await self._encode(request.hottest)
            for chunk in self._chunks(names, data, hottest):
                await context.write(chunk.SerializeToString())
        finally:
            self._sending -= 1

    async def _encode(self, hottest: int) -> tuple[list[str], bytes, list[HotPrefix]]:
        """The tree, and the names that held all the while: a number that changed hands is nobody's."""
        tree = self._index.tree
        for _ in range(_TRIES):
            before = self._index.names()
            data, hot = await asyncio.to_thread(lambda: (snapshot.encode(tree), tree.hottest(hottest)))
            after = self._index.names()
            if before == after[: len(before)]:  # who came while it was encoded may be in it, with blocks
                return after, data, hot
        known = dict(enumerate(before))
        return [name if known.get(number) == name else "" for number, name in enumerate(after)], data, hot

    def _chunks(
        self, names: Sequence[str], data: bytes, hottest: Sequence[HotPrefix]
    ) -> Iterator[router_pb2.TreeChunk]:
        first = self._first(names, hottest)
        first.total_bytes = len(data)
        first.data = data[:CHUNK_BYTES]
        yield first
        for start in range(CHUNK_BYTES, len(data), CHUNK_BYTES):
            yield router_pb2.TreeChunk(data=data[start : start + CHUNK_BYTES])

    def _first(self, names: Sequence[str], hottest: Sequence[HotPrefix]) -> router_pb2.TreeChunk:
        sizes = {member.info.model.block_size for member in self._fleet.members()}
        return router_pb2.TreeChunk(
            worker_ids=names,
            hottest=[
                router_pb2.HotPrefix(block_hash=hot.block_hash, depth=hot.depth, hits=hot.hits) for hot in hottest
            ],
            block_size=sizes.pop() if len(sizes) == 1 else 0,
        )


@dataclass(frozen=True, slots=True, eq=False)
class WholeTree:
    """A router's tree as of one moment, in a tree of one's own."""

    tree: PrefixTree
    workers: list[str]  # by their number in the tree; those of no number are empty
    hottest: list[HotPrefix]
    block_size: int  # tokens; 0 where models of several are served
    left_out: int = 0  # (worker, block) entries past the cap of the tree that it was loaded into


class ChunkJoiner:
    """Puts chunks together, and takes no more than is allowed."""

    def __init__(self, max_bytes: int = MAX_TREE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._first: router_pb2.TreeChunk | None = None
        self._data = bytearray()

    def add(self, chunk: router_pb2.TreeChunk) -> None:
        """The next chunk. Raises WireError where there is more than the first one said, or than is taken."""
        if self._first is None:
            if chunk.total_bytes > self._max_bytes:
                raise WireError(f"the tree has {chunk.total_bytes} bytes: at most {self._max_bytes} are taken")
            if len(chunk.worker_ids) > MAX_NAMES or len(chunk.hottest) > MAX_HOTTEST:
                raise WireError(f"{len(chunk.worker_ids)} workers and {len(chunk.hottest)} prefixes: too many")
            self._first = chunk
        if not chunk.data and chunk is not self._first:
            raise WireError("a chunk of the tree is empty")
        self._data += chunk.data
        if len(self._data) > self._first.total_bytes:
            raise WireError(f"the tree goes on past its {self._first.total_bytes} bytes")

    def finish(self, max_blocks: int = DEFAULT_MAX_BLOCKS) -> WholeTree:
        """The tree, with room for so many (worker, block) entries; takes a while for a large one. Raises WireError."""
        if self._first is None or len(self._data) != self._first.total_bytes:
            raise WireError(f"the tree broke off after {len(self._data)} bytes")
        tree = make_tree(max_blocks, max_blocks)
        if self._data:  # none where only names and hot prefixes were asked for
            try:
                snapshot.load(tree, bytes(self._data))
            except snapshot.SnapshotError as error:
                raise WireError(str(error)) from error
        names = list(self._first.worker_ids)
        hottest = [HotPrefix(hot.block_hash, hot.depth, hot.hits) for hot in self._first.hottest]
        left_out = sum(tree.refused(number) for number in range(len(names)))
        return WholeTree(tree, names, hottest, self._first.block_size, left_out)


def joined(chunks: Iterable[router_pb2.TreeChunk]) -> WholeTree:
    """A tree from all its chunks. Raises WireError."""
    joiner = ChunkJoiner()
    for chunk in chunks:
        joiner.add(chunk)
    return joiner.finish()
