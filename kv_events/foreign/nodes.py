"""The blocks of one foreign server that are known here, as a forest; and the blocks of ours that follow from them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from typing import NamedTuple

from kv_events.foreign.counts import MapCounts
from kv_events.foreign.events import BlockHash
from kv_events.foreign.labels import Realm
from radix.keys import KEY_BYTES, ROOT_HASH, BlockKeys, Tokens
from radix.tree import Tier


class Orphan(NamedTuple):
    """What a block whose parent is not known will need to get a key."""

    tokens: Tokens
    adapter: str
    tenant: str
    mark: bytes | None


class Node:
    """A foreign block. It has no key while its tokens, or its parent's key, are not known."""

    __slots__ = ("children", "followers", "hash", "held", "key", "ours", "parent", "realm", "tail")

    def __init__(
        self,
        block_hash: BlockHash,
        parent: Node | None,
        realm: Realm | None = None,
        key: bytes | None = None,
        ours: tuple[int, ...] = (),
        held: int = 0,
    ) -> None:
        self.hash = block_hash
        self.parent = parent  # None: at the root, or not told
        self.realm = realm  # None: it has no key
        self.key = key  # of the last whole block of ours at or before its end; None: there is none
        self.ours = ours  # hashes of the blocks of ours that end in it
        self.tail: Tokens | None = None  # its tokens behind those; None: it ends where a block of ours ends
        self.held = held  # bit t: in Tier t
        self.children = 0
        self.followers: dict[Node, None] | None = None  # the children, where a change of this block may concern them

    @property
    def last_hash(self) -> int:
        """The hash of the last whole block of ours at or before its end; the root's where there is none."""
        return ROOT_HASH if self.key is None else int.from_bytes(self.key[:8], "little")

    def open_tails(self) -> Iterator[Node]:
        """The nodes that the block of ours overlaps which is open at this node's end, this one first."""
        node: Node | None = self
        while node is not None and node.tail is not None:
            yield node
            if node.ours:
                return
            node = node.parent

    def closers(self) -> Iterator[Node]:
        """The descendants in which the block of ours ends that is open at this node's end: their first one."""
        open_ends = [self]
        while open_ends:
            for child in open_ends.pop().followers or ():
                if child.ours:
                    yield child
                elif child.realm is not None:
                    open_ends.append(child)


class Shared:
    """A block of ours that several foreign blocks complete: held while any of them holds it."""

    __slots__ = ("holders", "nodes")

    def __init__(self) -> None:
        self.nodes = 1
        self.holders = [0] * len(Tier)


class OurBlocks:
    """The blocks of ours that the nodes complete, and which are held.

    A node holds a block of ours in a tier if each foreign block that overlaps it is held there: the node in which it
    ends and, for the first block that ends in it, perhaps some before that.
    """

    def __init__(self, counts: MapCounts) -> None:
        self._completed_by: dict[int, Node | Shared] = {}
        self._counts = counts

    def __len__(self) -> int:
        return len(self._completed_by)

    def enter(self, node: Node) -> None:
        """A node that has just got its key, and counts as not held."""
        for block in node.ours:
            entry = self._completed_by.setdefault(block, node)
            if entry is not node:
                self._share(block, entry)

    def enter_held(self, blocks: Sequence[int], nodes: Sequence[Node], tier: int) -> None:
        """Nodes that have just got their keys and are held in one tier: `blocks` are theirs, equally many of each, and
        none begins before its node."""
        each = len(blocks) // len(nodes)
        known = self._completed_by
        if known.keys().isdisjoint(blocks) and len(set(blocks)) == len(blocks):
            ends = nodes if each == 1 else chain.from_iterable(map(repeat, nodes, repeat(each)))
            known.update(zip(blocks, ends, strict=True))
            return
        for at, block in enumerate(blocks):
            node = nodes[at // each]
            entry = known.setdefault(block, node)
            if entry is not node:
                self._share(block, entry)
                self._gains(block, node, tier)

    def _share(self, block: int, entry: Node | Shared) -> None:
        """One more node completes a block."""
        self._counts.shared += 1
        if isinstance(entry, Node):
            node, entry = entry, Shared()
            self._completed_by[block] = entry
            for tier in Tier:
                bit = 1 << tier
                held = node.held & bit and (block != node.ours[0] or _held_before(node, bit))
                entry.holders[tier] = int(bool(held))
        entry.nodes += 1

    def leave(self, node: Node) -> None:
        """A node that is not held goes."""
        for block in node.ours:
            entry = self._completed_by.get(block)
            if isinstance(entry, Shared):
                entry.nodes -= 1
            if entry is node or (isinstance(entry, Shared) and not entry.nodes):
                del self._completed_by[block]

    def hold(self, node: Node, tier: int) -> Iterator[tuple[int, int]]:
        """A node's bit of `tier` was just set. Yields the blocks of ours that are held there now and were not, each
        with its parent."""
        bit = 1 << tier
        parent = node.parent.last_hash if node.parent is not None else ROOT_HASH
        for index, block in enumerate(node.ours):
            if (index or _held_before(node, bit)) and self._gains(block, node, tier):
                yield block, parent
            parent = block
        if node.tail is not None:
            for closer in node.closers():
                if closer.held & bit and _held_before(closer, bit) and self._gains(closer.ours[0], closer, tier):
                    assert closer.parent is not None
                    yield closer.ours[0], closer.parent.last_hash

    def let_go(self, node: Node, tier: int) -> Iterator[int]:
        """A node's bit of `tier` is about to be cleared. Yields the blocks of ours that will not be held there then."""
        bit = 1 << tier
        lost = iter(node.ours if _held_before(node, bit) else node.ours[1:])
        for block in lost:
            if self._loses(block, node, tier):
                yield block
        if node.tail is not None:
            for closer in node.closers():
                if closer.held & bit and _held_before(closer, bit) and self._loses(closer.ours[0], closer, tier):
                    yield closer.ours[0]

    def _gains(self, block: int, node: Node, tier: int) -> bool:
        entry = self._completed_by[block]
        if entry is node:
            return True
        assert isinstance(entry, Shared)
        entry.holders[tier] += 1
        return entry.holders[tier] == 1

    def _loses(self, block: int, node: Node, tier: int) -> bool:
        entry = self._completed_by[block]
        if entry is node:
            return True
        assert isinstance(entry, Shared)
        entry.holders[tier] -= 1
        return entry.holders[tier] == 0


def _held_before(node: Node, bit: int) -> bool:
    """Whether the nodes before `node` that its first block of ours overlaps are all held."""
    parent = node.parent
    return parent is None or parent.tail is None or all(before.held & bit for before in parent.open_tails())


class Forest:
    """The nodes by their hashes, within bounds.

    A node stays while it is held, has children, or is among the latest `max_tombstones` that were: what follows it, or
    a copy of it in another tier, is understood then. Nodes without a key go when they are of no use, or too many.
    """

    def __init__(
        self, counts: MapCounts, max_entries: int, max_tombstones: int, max_waiting: int, max_waiting_tokens: int
    ) -> None:
        self.nodes: dict[BlockHash, Node] = {}
        self.ours = OurBlocks(counts)
        self._counts = counts
        # Those without a key, oldest first (which a plain dict takes ever longer to find); None: no tokens were told.
        self.waiting: OrderedDict[Node, Orphan | None] = OrderedDict()
        self._waiting_tokens = 0
        self._unheld = 0  # nodes that have a key and are not held
        self._spent: OrderedDict[Node, None] = OrderedDict()  # those of them without children, oldest first
        self._max_entries = max_entries
        self._max_tombstones = max_tombstones
        self._max_waiting = max_waiting
        self._max_waiting_tokens = max_waiting_tokens

    def has_room(self, entries: int) -> bool:
        """Whether so many more nodes and blocks of ours may come. Tombstones go for them, oldest first."""
        room = self._max_entries - entries
        while len(self.nodes) + len(self.ours) > room and self._spent:
            self._drop(next(iter(self._spent)))
        return len(self.nodes) + len(self.ours) <= room

    def node(self, block_hash: BlockHash, parent: Node | None) -> Node | None:
        """The node of that hash, which follows `parent`: new if need be. None where it is known to follow another."""
        node = self.nodes.get(block_hash)
        if node is None:
            node = self.nodes[block_hash] = Node(block_hash, parent)
        elif node.parent is parent:
            return node
        elif node.parent is None and node.realm is None and node is not parent:
            node.parent = parent
        else:
            return None
        if parent is not None:
            if not parent.children:
                self._spent.pop(parent, None)
            parent.children += 1
            if parent.realm is None or parent.tail is not None:
                parent.followers = parent.followers or {}
                parent.followers[node] = None
        return node

    def grow(self, hashes: Sequence[BlockHash], parent: Node | None, realm: Realm, keys: BlockKeys, tier: int) -> None:
        """A chain of new nodes, held in one tier, whose blocks of ours have these keys. Each begins and ends where a
        block of ours does."""
        each = len(keys) // len(hashes)
        blocks, data, held = keys[:, 0].tolist(), keys.tobytes(), 1 << tier
        if parent is not None:
            if not parent.children:
                self._spent.pop(parent, None)
            parent.children += 1
        nodes = []
        node = parent
        for index, block_hash in enumerate(hashes, 1):
            key = data[index * each * KEY_BYTES - KEY_BYTES : index * each * KEY_BYTES]
            node = Node(block_hash, node, realm, key, tuple(blocks[index * each - each : index * each]), held)
            node.children = 1
            nodes.append(node)
        nodes[-1].children = 0
        self.nodes.update(zip(hashes, nodes, strict=True))
        self.ours.enter_held(blocks, nodes, tier)

    def wait(self, node: Node, orphan: Orphan | None) -> None:
        """`node` has no key for now."""
        if self.waiting.get(node) is None:
            self.waiting[node] = orphan
            self._waiting_tokens += len(orphan.tokens) if orphan else 0

    def trim_waiting(self) -> None:
        """Keep the bounds of what waits."""
        while len(self.waiting) > self._max_waiting or self._waiting_tokens > self._max_waiting_tokens:
            self.drop_tree(next(iter(self.waiting)))

    def keyed(self, node: Node) -> Orphan | None:
        """`node` has just got its key; it is not held. Returns what it waited with."""
        orphan = self.waiting.pop(node, None)
        self._waiting_tokens -= len(orphan.tokens) if orphan else 0
        self.ours.enter(node)
        self._bury(node)
        return orphan

    def held(self, node: Node) -> None:
        """`node` has a key and was not held, and is now."""
        self._unheld -= 1
        self._spent.pop(node, None)

    def unheld(self, node: Node) -> None:
        """`node` was held, and is not any more."""
        if node.realm is not None:
            self._bury(node)
        elif not node.children:
            self._drop(node)

    def trim_tombstones(self) -> None:
        """Keep the bound of what is known and not held."""
        while self._unheld > self._max_tombstones and self._spent:
            self._drop(next(iter(self._spent)))

    def forget(self) -> None:
        """No node is held any more; those without a key go, and all but the latest tombstones."""
        kept, shared = self._latest(self._max_tombstones), self._counts.shared
        self.nodes = {node.hash: node for node in kept}
        self.ours = OurBlocks(self._counts)
        self.waiting.clear()
        self._waiting_tokens = 0
        for node in kept:
            node.held = node.children = 0
        for node in kept:
            self.ours.enter(node)
            if node.parent is not None:
                node.parent.children += 1
            if node.followers is not None:
                node.followers = {child: None for child in node.followers if self.nodes.get(child.hash) is child}
        self._unheld = len(kept)
        self._spent = OrderedDict.fromkeys(node for node in kept if not node.children)
        self._counts.shared = shared

    def _latest(self, most: int) -> list[Node]:
        """At most so many nodes that have a key, with all their ancestors, the latest last."""
        latest: dict[Node, None] = {}
        for node in reversed(self.nodes.values()):
            path: list[Node] = []
            above: Node | None = node
            while above is not None and above.realm is not None and above not in latest:
                path.append(above)
                above = above.parent
            if len(latest) + len(path) > most:
                break
            latest.update(dict.fromkeys(path))
        return list(latest)[::-1]

    def drop_tree(self, root: Node) -> None:
        """A node without a key goes, and with it those that wait for it: all that follow it."""
        doomed = [root]
        for node in doomed:  # it grows meanwhile
            if self.nodes.get(node.hash) is not node:
                continue
            doomed.extend(node.followers or ())
            node.followers = None
            self._remove(node)
            self._counts.dropped += 1
        self._orphaned(root)

    def _bury(self, node: Node) -> None:
        self._unheld += 1
        if not node.children:
            self._spent[node] = None

    def _drop(self, node: Node) -> None:
        """A node goes that is not held and has no children."""
        self._remove(node)
        self._orphaned(node)

    def _remove(self, node: Node) -> None:
        del self.nodes[node.hash]
        if node.realm is not None:
            self.ours.leave(node)
            self._unheld -= 1
            self._spent.pop(node, None)
        elif node in self.waiting:
            orphan = self.waiting.pop(node)
            self._waiting_tokens -= len(orphan.tokens) if orphan else 0

    def _orphaned(self, child: Node) -> None:
        """A child is gone: its parent may be of no use any more."""
        parent = child.parent
        while parent is not None and self.nodes.get(parent.hash) is parent:
            parent.children -= 1
            if parent.followers:
                parent.followers.pop(child, None)
            if parent.children or parent.held:
                return
            if parent.realm is not None:
                self._spent[parent] = None
                return
            self._remove(parent)
            child = parent
            parent = child.parent

    def check(self) -> None:
        """Assert every invariant; for tests."""
        children: dict[Node, int] = {}
        for node in self.nodes.values():
            if node.parent is not None:
                children[node.parent] = children.get(node.parent, 0) + 1
                listed = node.parent.realm is None or node.parent.tail is not None
                assert self.nodes[node.parent.hash] is node.parent
                assert not listed or node in (node.parent.followers or ())
                assert node.realm is None or node.parent.realm is not None
        for node in self.nodes.values():
            assert node.children == children.get(node, 0)
            assert len(node.followers or ()) <= node.children
            assert (node in self.waiting) == (node.realm is None)
        keyed = [node for node in self.nodes.values() if node.realm is not None]
        assert self._unheld == sum(not node.held for node in keyed)
        assert set(self._spent) == {node for node in keyed if not node.held and not node.children}
        assert self._waiting_tokens == sum(len(orphan.tokens) for orphan in self.waiting.values() if orphan)
        assert len(self.waiting) <= self._max_waiting
        assert set(chain.from_iterable(node.ours for node in keyed)) == set(self.ours._completed_by)
