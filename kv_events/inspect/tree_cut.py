"""A prefix tree cut to what a person can take in: to a depth, to a number of nodes, to what is below a key.

    cut = cut_tree(tree.dump(), names, hottest=tree.hottest(100))

Blocks in a chain without a branch, with the same holders all along, are one node. No I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, NamedTuple

from kv_events.inspect.forest import ABOVE_ALL, Forest
from kv_events.inspect.words import KeyRange, key_text, tiers_of
from radix.keys import ROOT_HASH
from radix.tree import Dump, HotPrefix
from rhizome.errors import InvalidRequest

DEFAULT_DEPTH = 8
DEFAULT_NODES = 60
LARGEST_DEPTH = 10_000
LARGEST_NODES = 100_000


class NodeHolder(NamedTuple):
    """A worker that holds all blocks of a node, in some tiers."""

    worker: str
    tiers: int  # bit mask


@dataclass(slots=True)
class CutNode:
    """Blocks in a chain, held by the same workers in the same tiers."""

    first: int  # hash of its first block
    last: int
    blocks: int  # 0: it stands for the root
    depth: int  # blocks before the first one: from the tree's root, or from the nearest gap
    parent_hash: int  # of the first block; 0 at the root
    holders: tuple[NodeHolder, ...]  # by name
    hits: int  # of the last 4,096 matches; 0 where nothing is known of matches
    below: int  # blocks below it, shown or not
    children: list[CutNode] = field(default_factory=list)
    hidden: int = 0  # nodes right below it that are left out
    hidden_blocks: int = 0  # blocks in them and below them

    @property
    def orphaned(self) -> bool:
        """Whether nobody holds the block before its first one."""
        return not self.depth and self.parent_hash != ROOT_HASH

    def as_json(self) -> dict[str, Any]:
        """Plain values, its children apart; hashes in hexadecimal."""
        return {
            "first": key_text(self.first),
            "last": key_text(self.last),
            "blocks": self.blocks,
            "depth": self.depth,
            "parent_block": key_text(self.parent_hash) if self.parent_hash else None,
            "holders": [{"worker": holder.worker, "tiers": tiers_of(holder.tiers)} for holder in self.holders],
            "hits": self.hits,
            "below": self.below,
            "hidden": self.hidden,
            "hidden_blocks": self.hidden_blocks,
        }


@dataclass(slots=True)
class TreeCut:
    """The nodes that are shown, and what all of it comes to."""

    blocks: int  # distinct
    entries: int  # (worker, block) pairs
    workers: int  # that hold some
    top: CutNode  # what the cut begins with: the root, or the node that was asked for
    circling: int  # blocks whose parents go in a circle: only made-up events have them

    def nodes(self) -> Iterator[tuple[CutNode, CutNode | None]]:
        """Every node that has blocks, with the one above it, which comes before it."""
        waiting: list[tuple[CutNode, CutNode | None]] = [(self.top, None)]
        while waiting:
            node, upper = waiting.pop()
            if node.blocks:
                yield node, upper
            waiting.extend((child, node if node.blocks else None) for child in reversed(node.children))

    def as_json(self) -> dict[str, Any]:
        """Plain values: the nodes in a list, each after the one above it, which `parent` names by its place."""
        places: dict[int, int] = {}
        nodes = []
        for place, (node, upper) in enumerate(self.nodes()):
            places[id(node)] = place
            nodes.append({"parent": None if upper is None else places[id(upper)]} | node.as_json())
        totals = {name: getattr(self, name) for name in ("blocks", "entries", "workers", "circling")}
        left_out = {} if self.top.blocks else {"hidden": self.top.hidden, "hidden_blocks": self.top.hidden_blocks}
        return totals | left_out | {"nodes": nodes}


def cut_tree(
    dump: Dump,
    names: Sequence[str],
    *,
    hottest: Iterable[HotPrefix] = (),
    below: KeyRange | None = None,
    depth: int = DEFAULT_DEPTH,
    max_nodes: int = DEFAULT_NODES,
    worker: int | None = None,
) -> TreeCut:
    """Cut a tree to `depth` levels of nodes and to `max_nodes`: the most matched first, then those with most below.

    `names` are the workers' by number. `below` begins with that block; `worker` keeps to what that one holds.
    Raises InvalidRequest for a `below` that names no block, or several.
    """
    return cut_forest(Forest(dump, hottest, worker), names, below=below, depth=depth, max_nodes=max_nodes)


def cut_forest(
    forest: Forest,
    names: Sequence[str],
    *,
    below: KeyRange | None = None,
    depth: int = DEFAULT_DEPTH,
    max_nodes: int = DEFAULT_NODES,
) -> TreeCut:
    """The same of a tree whose pieces are known already."""
    circling = forest.circling
    if below is None:
        start, top = ABOVE_ALL, CutNode(0, 0, 0, 0, ROOT_HASH, (), 0, len(forest) - circling)
    else:
        start, place = forest.place(forest.row_of(below))
        if start == ABOVE_ALL:
            raise InvalidRequest("below", key_text(below.low), "a block whose parents do not go in a circle")
        top = _node(forest, names, start, place)
    _grow(forest, names, start, top, depth, max_nodes)
    return TreeCut(len(forest), forest.entries, forest.workers, top, circling)


def _grow(forest: Forest, names: Sequence[str], start: int, top: CutNode, depth: int, max_nodes: int) -> None:
    """Hang nodes below the top, best first, until there are enough; then count what is left out."""
    nodes = {start: top}  # by piece
    waiting: list[tuple[int, int, int, int, int]] = []  # a heap: what comes first, then piece, upper one, levels left

    def wait_for_children(piece: int, levels: int) -> None:
        if levels:
            for child in forest.children(piece)[:max_nodes].tolist():
                heappush(waiting, (-int(forest.hits[child]), -int(forest.totals[child]), child, piece, levels - 1))

    wait_for_children(start, depth)
    while waiting and len(nodes) <= max_nodes:
        *_, piece, upper, levels = heappop(waiting)
        if piece not in nodes:  # else it is in a circle
            node = nodes[piece] = _node(forest, names, piece)
            nodes[upper].children.append(node)
            wait_for_children(piece, levels)
    for piece, node in nodes.items():
        node.hidden = forest.child_count(piece) - len(node.children)
        node.hidden_blocks = node.below - sum(child.blocks + child.below for child in node.children)


def _node(forest: Forest, names: Sequence[str], piece: int, place: int = 0) -> CutNode:
    """A piece as a node, from one of its blocks on."""
    hashes = forest.blocks(piece)
    return CutNode(
        first=int(hashes[place]),
        last=int(hashes[-1]),
        blocks=len(hashes) - place,
        depth=forest.upper_blocks(piece) + place,
        parent_hash=int(hashes[place - 1]) if place else forest.parent_hash(piece),
        holders=tuple(
            sorted(NodeHolder(name_of(names, holder.worker), holder.tiers) for holder in forest.holders(piece))
        ),
        hits=int(forest.hits[piece]),
        below=int(forest.totals[piece]) - len(hashes),
    )


def name_of(names: Sequence[str], number: int) -> str:
    """A worker's name, or its number where none is known."""
    return (names[number] if number < len(names) else "") or f"#{number}"
