"""Cuts of a tree: what is shown is so, what is left out is counted, whatever the tree."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_events.inspect.tree_cut import CutNode, TreeCut, cut_tree
from kv_events.inspect.tree_text import dot, text_lines
from kv_events.inspect.words import KeyRange, parse_key
from radix import make_tree
from radix.keys import Hashes
from radix.tree import HotPrefix, PrefixTree, Tier
from rhizome.errors import InvalidRequest

NAMES = ["worker-0", "worker-1", "worker-2"]


def hashes(*values: int) -> Hashes:
    return np.array(values, dtype=np.uint64)


def at(block: int) -> KeyRange:
    return KeyRange(block, block)


def two_sessions() -> PrefixTree:
    """A prompt of four blocks that two workers hold, and behind it a session of three and one of two."""
    tree = make_tree()
    tree.store(0, hashes(1, 2, 3, 4))
    tree.store(1, hashes(1, 2, 3, 4))
    tree.store(0, hashes(5, 6, 7), parent=4)
    tree.store(1, hashes(8), parent=4)
    tree.store(1, hashes(8, 9), parent=4, tier=Tier.HOST)
    return tree


def lines(cut: TreeCut, whose: str = "") -> list[str]:
    return ["".join(segment.text for segment in line) for line in text_lines(cut, whose)]


def shape(node: CutNode) -> tuple[object, ...]:
    return (node.first, node.blocks, *(shape(child) for child in node.children))


def test_chains_are_joined_and_branches_stand_below_each_other() -> None:
    """One node for blocks with the same holders in the same tiers; the larger branch first."""
    cut = cut_tree(two_sessions().dump(), NAMES)
    assert shape(cut.top) == (0, 0, (1, 4, (5, 3), (8, 1, (9, 1))))
    assert (cut.blocks, cut.entries, cut.workers, cut.circling) == (9, 13, 2, 0)
    assert lines(cut, "w\x1b[31m") == [
        "w?[31m: 9 blocks, 13 entries, 2 workers",
        "└─ 4 blocks 0000000000000001…0000000000000004  worker-0, worker-1",
        "   ├─ 3 blocks 0000000000000005…0000000000000007  worker-0",
        "   └─ 1 block 0000000000000008  worker-1 (device+host)",
        "      └─ 1 block 0000000000000009  worker-1 (host)",
    ]


def test_hits_come_first() -> None:
    """A branch with more matches stands before a larger one; the blocks above it have them too."""
    tree = two_sessions()
    for _ in range(3):
        tree.match(hashes(1, 2, 3, 4, 8))
    cut = cut_tree(tree.dump(), NAMES, hottest=tree.hottest(10))
    assert [(node.first, node.hits) for node, _ in cut.nodes()] == [(1, 3), (8, 3), (9, 0), (5, 0)]
    assert lines(cut)[1].endswith("worker-0, worker-1  3 hits")


def test_a_cut_says_what_it_leaves_out() -> None:
    """By depth, by the number of nodes, and at the top."""
    assert lines(cut_tree(two_sessions().dump(), NAMES, depth=1))[1:] == [
        "└─ 4 blocks 0000000000000001…0000000000000004  worker-0, worker-1",
        "   └─ … 2 branches, 5 blocks",
    ]
    assert lines(cut_tree(two_sessions().dump(), NAMES, max_nodes=2))[1:] == [
        "└─ 4 blocks 0000000000000001…0000000000000004  worker-0, worker-1",
        "   ├─ 3 blocks 0000000000000005…0000000000000007  worker-0",
        "   └─ … 1 more branch, 2 blocks",
    ]
    assert lines(cut_tree(two_sessions().dump(), NAMES, depth=0))[1:] == ["└─ … 1 branch, 9 blocks"]


def test_a_cut_begins_in_the_middle_of_a_chain() -> None:
    """Below a key: the chain's rest from that block on, and what hangs on it."""
    cut = cut_tree(two_sessions().dump(), NAMES, below=at(3))
    assert shape(cut.top) == (3, 2, (5, 3), (8, 1, (9, 1)))
    assert (cut.top.depth, cut.top.parent_hash, cut.top.below) == (2, 2, 5)
    assert lines(cut)[1:3] == [
        "2 blocks 0000000000000003…0000000000000004  worker-0, worker-1",
        "├─ 3 blocks 0000000000000005…0000000000000007  worker-0",
    ]
    for digits, said in (("00000000000000ff", "no block"), ("0", "9 blocks begin"), ("0x7", "no block")):
        with pytest.raises(InvalidRequest, match=said):
            cut_tree(two_sessions().dump(), NAMES, below=parse_key("below", digits))


def test_one_workers_part_alone() -> None:
    """Its blocks, with all who hold them."""
    cut = cut_tree(two_sessions().dump(), NAMES, worker=0)
    assert shape(cut.top) == (0, 0, (1, 4, (5, 3)))
    assert (cut.blocks, cut.entries, cut.workers) == (7, 7, 1)
    assert [holder.worker for holder in cut.top.children[0].holders] == ["worker-0", "worker-1"]
    assert cut_tree(two_sessions().dump(), NAMES, worker=2).blocks == 0


def test_blocks_after_a_gap_and_in_circles() -> None:
    """The first stand at the top and say so; the others are counted, and cannot be asked for."""
    tree = make_tree()
    tree.store(0, hashes(5, 6), parent=4)
    tree.store(0, hashes(20), parent=21)
    tree.store(0, hashes(21), parent=20)
    tree.store(0, hashes(22, 23), parent=20)
    cut = cut_tree(tree.dump(), NAMES)
    assert shape(cut.top) == (0, 0, (5, 2))
    assert cut.circling == 4
    assert lines(cut)[1:] == [
        "└─ 2 blocks 0000000000000005…0000000000000006  worker-0  after 0000000000000004, which nobody holds",
        "4 blocks whose parents go in a circle are left out",
    ]
    assert cut_tree(tree.dump(), NAMES, below=at(22)).top.blocks == 2
    tree.remove(0, hashes(22, 23))
    with pytest.raises(InvalidRequest, match="do not go in a circle"):
        cut_tree(tree.dump(), NAMES, below=at(20))


def test_plain_values_hold_the_same() -> None:
    """As JSON: hashes in hexadecimal, nodes by the place of the one above."""
    cut = cut_tree(two_sessions().dump(), NAMES, depth=2)
    told = json.loads(json.dumps(cut.as_json()))
    assert [(node["parent"], node["first"], node["blocks"]) for node in told["nodes"]] == [
        (None, "0000000000000001", 4),
        (0, "0000000000000005", 3),
        (0, "0000000000000008", 1),
    ]
    assert told["nodes"][2]["holders"] == [{"worker": "worker-1", "tiers": ["device", "host"]}]
    assert (told["nodes"][2]["hidden"], told["nodes"][2]["hidden_blocks"], told["blocks"]) == (1, 1, 9)


def test_the_graph_names_every_node_and_quotes_names() -> None:
    """Graphviz's language; a worker's name cannot break out of its label."""
    graph = dot(cut_tree(two_sessions().dump(), ['a"]; evil [label="', "b\\"], depth=1))
    assert 'a\\"]; evil [label=\\"' in graph
    assert "b\\\\" in graph
    assert "root -> n0;" in graph
    assert "n0 -> n0_more" in graph
    assert graph.count("{") == graph.count("}") == 1


def test_a_number_without_a_name_is_shown_as_such() -> None:
    """A worker that came or went while the tree was read."""
    assert "#0, b" in lines(cut_tree(two_sessions().dump(), ["", "b"]))[1]


# Any tree, against a model in plain Python.

blocks = st.integers(1, 24)
stores = st.tuples(
    st.integers(0, 2), st.lists(blocks, min_size=1, max_size=6, unique=True), st.integers(0, 24), st.sampled_from(Tier)
)
removals = st.tuples(st.integers(0, 2), st.lists(blocks, max_size=3))
matched = st.lists(st.lists(blocks, min_size=1, max_size=4, unique=True), max_size=4)


class Model:
    """The tree as maps."""

    def __init__(self, tree: PrefixTree, hottest: Iterable[HotPrefix]) -> None:
        dump = tree.dump()
        members = np.split(dump.members, dump.set_ends[:-1]) if len(dump.set_ends) else []
        self.parents = dict(zip(dump.hashes.tolist(), dump.parents.tolist(), strict=True))
        self.holders = {
            block: tuple(members[row].tolist())
            for block, row in zip(dump.hashes.tolist(), dump.holder_sets.tolist(), strict=True)
        }
        self.hot = {prefix.block_hash: prefix.hits for prefix in hottest}
        self.reached = [block for block in self.parents if self._up(block) is not None]

    def _up(self, block: int) -> list[int] | None:
        """The held blocks above, the nearest first; None in circles."""
        path: list[int] = []
        while (block := self.parents[block]) in self.parents:
            if block in path:
                return None
            path.append(block)
        return path

    def depth(self, block: int) -> int:
        return len(self._up(block) or ())

    def children(self, block: int) -> list[int]:
        return [child for child, parent in self.parents.items() if parent == block]

    def below(self, block: int) -> int:
        return sum(block in (self._up(other) or ()) for other in self.reached)

    def hits(self, block: int) -> int:
        own = [self.hot.get(block, 0)]
        return max(own + [self.hot.get(other, 0) for other in self.reached if block in (self._up(other) or ())])

    def chain(self, first: int) -> Iterator[int]:
        """The blocks that belong to one node with `first`."""
        yield first
        while len(below := self.children(first)) == 1 and self.holders[below[0]] == self.holders[first]:
            (first,) = below
            yield first


def built(operations: list[tuple[object, ...]], matches: list[list[int]]) -> tuple[PrefixTree, Model]:
    tree = make_tree()
    for operation in operations:
        if len(operation) == 4:
            worker, chain, parent, tier = operation
            tree.store(worker, hashes(*chain), parent, tier)  # type: ignore[arg-type, misc]
        else:
            worker, gone = operation
            tree.remove(worker, hashes(*gone))  # type: ignore[arg-type, misc]
    for query in matches:
        tree.match(hashes(*query))
    return tree, Model(tree, tree.hottest(100))


@settings(max_examples=300, deadline=None)
@given(st.lists(stores | removals, max_size=12), matched)
def test_a_cut_of_everything_is_the_tree(operations: list[tuple[object, ...]], matches: list[list[int]]) -> None:
    """Every reachable block is in one node; nodes are whole chains, with their holders, hits, depths and totals."""
    tree, model = built(operations, matches)
    cut = cut_tree(tree.dump(), NAMES, hottest=tree.hottest(100), depth=10_000, max_nodes=10_000)
    seen: list[int] = []
    for node, upper in cut.nodes():
        chain = list(model.chain(node.first))
        seen += chain
        assert (node.last, node.blocks) == (chain[-1], len(chain))
        assert node.parent_hash == model.parents[node.first]
        assert (node.parent_hash in model.parents) == (upper is not None)
        assert upper is None or upper.last == node.parent_hash
        assert (
            tuple(NAMES.index(holder.worker) << 3 | holder.tiers for holder in node.holders)
            == model.holders[node.first]
        )
        assert node.depth == model.depth(node.first)
        assert node.below == model.below(node.last)
        assert node.hits == model.hits(node.first)
        assert node.hidden == node.hidden_blocks == 0
    assert sorted(seen) == sorted(model.reached)
    assert cut.circling == len(model.parents) - len(seen)
    assert (cut.blocks, cut.entries) == (len(model.parents), len(tree))
    assert cut.workers == len({member >> 3 for holders in model.holders.values() for member in holders})


@settings(max_examples=200, deadline=None)
@given(st.lists(stores | removals, max_size=12), st.integers(0, 4), st.integers(0, 6), blocks, st.integers(0, 2))
def test_what_a_cut_leaves_out_is_counted(
    operations: list[tuple[object, ...]], depth: int, max_nodes: int, below: int, worker: int
) -> None:
    """Whatever the limits: they hold, and what is shown and what is left out add up to what is there."""
    tree, model = built(operations, [])
    whole = cut_tree(tree.dump(), NAMES, depth=depth, max_nodes=max_nodes)
    mine = cut_tree(tree.dump(), NAMES, depth=depth, max_nodes=max_nodes, worker=worker)
    assert mine.blocks == mine.entries == tree.count(worker)
    cuts = [whole, mine]
    if below in model.reached:
        part = cut_tree(tree.dump(), NAMES, depth=depth, max_nodes=max_nodes, below=at(below))
        assert part.top.first == below
        assert part.top.blocks + part.top.below == 1 + model.below(below)
        cuts.append(part)
    for cut in cuts:
        nodes = [node for node, _ in cut.nodes()]
        assert len(nodes) <= max_nodes + bool(cut.top.blocks)
        shown = sum(node.blocks for node in nodes)
        left_out = sum(node.hidden_blocks for node in {id(node): node for node in [cut.top, *nodes]}.values())
        assert shown + left_out == cut.top.blocks + cut.top.below
        assert all((node.hidden == 0) == (node.hidden_blocks == 0) for node in nodes)
        assert list(text_lines(cut))
        assert dot(cut)
