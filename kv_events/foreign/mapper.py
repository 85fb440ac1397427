"""Foreign block hashes become ours: KeyMapper gives a server's blocks the keys that the fleet's routers look for,
IdentityMapper takes the server's own hashes as they are.

A foreign hash says nothing of our keys, so KeyMapper hashes the tokens that events tell, block after block, each from
its parent's key. The two sides' block sizes may differ in any way: a block of ours is held iff every foreign block that
overlaps it is held in that tier.

Whatever is not sure is left out, and counted: a view may know too little of a server, never too much.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Protocol

import numpy as np

from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, tier_of
from kv_events.foreign.counts import MapCounts
from kv_events.foreign.events import REMOTE, BlockHash, ForeignCleared, ForeignEvent, ForeignRemoved, ForeignStored
from kv_events.foreign.identity import MEDIUMS, IdentityMapper
from kv_events.foreign.labels import Groups, Label, Realm, Realms, label_of
from kv_events.foreign.nodes import Forest, Node, Orphan
from kv_events.wire import MAX_BLOCK_SIZE
from radix.keys import ROOT_HASH, BlockKeys, Tokens, hashes_of
from radix.tree import Tier

__all__ = ["IdentityMapper", "KeyMapper", "Mapper", "with_joined_removals"]

MAX_ENTRIES = 2**21
"""Foreign blocks and blocks of ours together: 16.8 million tokens in blocks of 16 on both sides, which is 1 TiB of KV
at 64 KiB a token; about 450 MB here. Stores beyond it are refused."""

MAX_TOMBSTONES = 2**17
"""Blocks that are known and not held, the latest ones: about the pool of a large GPU."""

MAX_WAITING = 2**16
MAX_WAITING_TOKENS = 2**22
"""Blocks, and their tokens (16 MiB), that wait for their parents or tokens to be told. The oldest go first."""


class Mapper(Protocol):
    """What makes events of ours from foreign ones. Never raises for an event that dialects.decode_foreign gives."""

    counts: MapCounts

    @property
    def block_size(self) -> int:
        """Of our events, tokens."""
        ...

    def map(self, event: ForeignEvent) -> list[Event]:
        """What `event`, the server's next one, means in our words."""
        ...

    def forget(self) -> None:
        """Events were missed: what is held is not known any more. What hashes mean is kept."""
        ...

    def reset(self) -> None:
        """Another process serves: nothing that was said counts."""
        ...


def with_joined_removals(events: Sequence[ForeignEvent]) -> Sequence[ForeignEvent]:
    """Removals that follow each other as one: vLLM tells of each evicted block by itself."""
    if len(events) < 2:
        return events
    joined: list[ForeignEvent] = []
    removals: list[ForeignRemoved] = []
    for event in events:
        if removals and not (isinstance(event, ForeignRemoved) and event[1:] == removals[0][1:]):
            joined.append(_as_one(removals))
            removals = []
        if isinstance(event, ForeignRemoved):
            removals.append(event)
        else:
            joined.append(event)
    if removals:
        joined.append(_as_one(removals))
    return joined


def _as_one(removals: Sequence[ForeignRemoved]) -> ForeignRemoved:
    return removals[0]._replace(block_hashes=tuple(chain.from_iterable(each.block_hashes for each in removals)))


class KeyMapper:
    """See above. A Mapper of one server's events to the keys of one model in one block size."""

    def __init__(
        self,
        model: str,
        block_size: int,
        *,
        adapter: str = "",
        secret: bytes = b"",
        max_entries: int = MAX_ENTRIES,
        max_tombstones: int = MAX_TOMBSTONES,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        """`block_size` is ours, in tokens; `adapter` that of stores which name none; `secret` the fleet's."""
        if not 1 <= block_size <= MAX_BLOCK_SIZE:
            raise ValueError(f"block_size is {block_size}: 1 to {MAX_BLOCK_SIZE} are allowed")
        self.counts = MapCounts()
        self._block_size = block_size
        self._adapter = adapter
        self._realms = Realms(model, block_size, secret)
        self._groups = Groups()
        self._bounds = (max_entries, max_tombstones, max_waiting, MAX_WAITING_TOKENS)
        self._forest = Forest(self.counts, *self._bounds)

    @property
    def block_size(self) -> int:
        """Of our events, tokens."""
        return self._block_size

    def map(self, event: ForeignEvent) -> list[Event]:
        """See Mapper."""
        match event:
            case ForeignStored():
                return self._store(event)
            case ForeignRemoved():
                return self._remove(event)
            case ForeignCleared():
                self.counts.cleared += 1
                self._clear()
                return [AllBlocksCleared()]
            case _:
                self.counts.unknown += 1
                return []

    def forget(self) -> None:
        """See Mapper."""
        self._forest.forget()

    def reset(self) -> None:
        """See Mapper."""
        self._clear()
        self._groups = Groups()

    def check(self) -> None:
        """Assert every invariant; for tests."""
        self._forest.check()

    def _clear(self) -> None:
        self._forest = Forest(self.counts, *self._bounds)

    # Stores.

    def _store(self, event: ForeignStored) -> list[Event]:
        self.counts.odd += event.odd
        if not self._groups.stores(event.group_idx, event.spec_kind):
            self.counts.other_groups += 1
            return []
        if event.locality == REMOTE:
            self.counts.remote += 1
            return []
        tier = tier_of(event.medium)
        hashes, tokens, size = event.block_hashes, event.token_ids, event.block_size
        if not len(tokens):
            return self._store_without_tokens(hashes, tier)
        if len(tokens) != len(hashes) * size:
            self.counts.misfits += 1
            return []
        forest = self._forest
        if not self._has_room(hashes, -(-size // self._block_size)):
            self.counts.refused += 1
            return []
        label = label_of(event, self._adapter)
        parent = self._parent(event.parent_hash)
        if parent is not None and parent.realm is not None and not parent.realm.takes(label):
            self.counts.conflicts += 1
            return []
        if parent is None or (parent.realm is not None and parent.tail is None):
            whole = not size % self._block_size and not label.marks
            if whole and forest.nodes.keys().isdisjoint(hashes) and len(set(hashes)) == len(hashes):
                return self._store_new(event, parent, label, tier)
        return self._store_each(event, parent, label, tier)

    def _has_room(self, hashes: tuple[BlockHash, ...], ours: int) -> bool:
        forest = self._forest
        if forest.has_room(len(hashes) * (1 + ours) + 1):
            return True
        new = sum(block_hash not in forest.nodes for block_hash in hashes)
        return not new or forest.has_room(new * (1 + ours) + 1)

    def _parent(self, block_hash: BlockHash | None) -> Node | None:
        """The node of a parent; one that waits where it was never told of."""
        if block_hash is None:
            return None
        parent = self._forest.nodes.get(block_hash)
        if parent is None:
            parent = self._forest.node(block_hash, None)
            assert parent is not None
            self._forest.wait(parent, None)
        return parent

    def _realm(self, parent: Node | None, label: Label) -> Realm:
        if parent is None:
            return self._realms.of(label.adapter, label.tenant)
        assert parent.realm is not None
        return parent.realm

    def _store_new(self, event: ForeignStored, parent: Node | None, label: Label, tier: Tier) -> list[Event]:
        """The common case, in few steps: blocks of which none is known, in each of which whole blocks of ours end."""
        hashes = event.block_hashes
        realm = self._realm(parent, label)
        keys = realm.hasher.keys(event.token_ids, None if parent is None else _as_key(parent.key))
        first_parent = ROOT_HASH if parent is None else parent.last_hash
        self._forest.grow(hashes, parent, realm, keys, tier)
        self.counts.stored += len(hashes)
        return [BlockStored(hashes_of(keys), first_parent, self._block_size, None, MEDIUMS[tier])]

    def _store_each(self, event: ForeignStored, parent: Node | None, label: Label, tier: Tier) -> list[Event]:
        """The general case, block after block."""
        changes = _Changes(self._block_size)
        size = event.block_size
        for index, block_hash in enumerate(event.block_hashes):
            node = self._forest.node(block_hash, parent)
            if node is None:
                self.counts.conflicts += 1
                break
            if node.realm is None:
                tokens, mark = event.token_ids[index * size : (index + 1) * size], label.marks.get(index)
                if parent is None or parent.realm is not None:
                    self._give_keys(node, self._realm(parent, label), mark, tokens, changes)
                else:
                    self.counts.orphans += self._forest.waiting.get(node) is None
                    self._forest.wait(node, Orphan(tokens.copy(), label.adapter, label.tenant, mark))
            self._hold(node, tier, changes)
            parent = node
        self._forest.trim_waiting()
        self._forest.trim_tombstones()
        return changes.events()

    def _store_without_tokens(self, hashes: Iterable[BlockHash], tier: Tier) -> list[Event]:
        """Blocks that are copied to another tier may be told by their hashes alone."""
        changes = _Changes(self._block_size)
        for block_hash in hashes:
            node = self._forest.nodes.get(block_hash)
            if node is None:
                self.counts.untold += 1
                if not self._forest.has_room(1):
                    continue
                node = self._parent(block_hash)
                assert node is not None
            self._hold(node, tier, changes)
        self._forest.trim_waiting()
        return changes.events()

    def _give_keys(self, node: Node, realm: Realm, mark: bytes | None, tokens: Tokens, changes: _Changes) -> None:
        """Key a node whose parent has a key, and whatever waited for it."""
        ready = [(node, realm, mark, tokens)]
        while ready:
            node, realm, mark, tokens = ready.pop()
            self._give_key(node, realm, mark, tokens, changes)
            for child in list(node.followers or ()):
                orphan = self._forest.waiting.get(child)
                if orphan is None:
                    continue  # it has its key
                assert node.realm is not None
                if node.realm.takes(Label(orphan.adapter, orphan.tenant, {})):
                    ready.append((child, node.realm, orphan.mark, orphan.tokens))
                    self.counts.adopted += 1
                else:
                    self.counts.conflicts += 1
                    self._forest.drop_tree(child)
            if node.tail is None:
                node.followers = None

    def _give_key(self, node: Node, realm: Realm, mark: bytes | None, tokens: Tokens, changes: _Changes) -> None:
        parent = node.parent
        if mark is not None:
            realm = self._realms.marked(realm, mark)
            self.counts.marked += 1
        open_tokens = [] if parent is None else [before.tail for before in parent.open_tails()][::-1]
        behind = np.concatenate([*open_tokens, tokens]) if open_tokens else tokens
        keys = realm.hasher.keys(behind, None if parent is None else _as_key(parent.key))
        rest = len(behind) - len(keys) * self._block_size
        node.realm = realm
        node.ours = tuple(keys[:, 0].tolist())
        node.key = keys[-1].tobytes() if len(keys) else None if parent is None else parent.key
        node.tail = tokens[max(0, len(tokens) - rest) :].copy() if rest else None
        held, node.held = node.held, 0
        self._forest.keyed(node)
        for tier in Tier:
            if held >> tier & 1:
                self._hold(node, tier, changes, counted=True)

    def _hold(self, node: Node, tier: Tier, changes: _Changes, *, counted: bool = False) -> None:
        bit = 1 << tier
        if node.held & bit:
            self.counts.repeated += 1
            return
        if not counted:
            self.counts.stored += 1
        was_held, node.held = node.held, node.held | bit
        if node.realm is not None:
            if not was_held:
                self._forest.held(node)
            changes.store(tier, self._forest.ours.hold(node, tier))

    # Removals.

    def _remove(self, event: ForeignRemoved) -> list[Event]:
        self.counts.odd += event.odd
        if event.locality == REMOTE or not self._groups.removes(event.group_idx):
            return []
        forest = self._forest
        tier = tier_of(event.medium)
        bit = 1 << tier
        lost: list[int] = []
        for block_hash in event.block_hashes:
            node = forest.nodes.get(block_hash)
            if node is None or not node.held & bit:
                continue  # however many copies there were: one that is told gone is gone
            self.counts.removed += 1
            if node.realm is not None:
                lost.extend(forest.ours.let_go(node, tier))
            node.held &= ~bit
            if not node.held:
                forest.unheld(node)
        forest.trim_tombstones()
        return [BlockRemoved(np.array(lost, dtype=np.uint64), MEDIUMS[tier])] if lost else []


class _Changes:
    """Blocks that come to be held, in order, as events: one for each chain in a tier."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._chains: list[tuple[Tier, int, list[int]]] = []  # tier, parent, blocks

    def store(self, tier: Tier, blocks: Iterable[tuple[int, int]]) -> None:
        """Blocks, each with its parent."""
        for block, parent in blocks:
            if self._chains and self._chains[-1][0] is tier and self._chains[-1][2][-1] == parent:
                self._chains[-1][2].append(block)
            else:
                self._chains.append((tier, parent, [block]))

    def events(self) -> list[Event]:
        return [
            BlockStored(np.array(blocks, dtype=np.uint64), parent, self._block_size, None, MEDIUMS[tier])
            for tier, parent, blocks in self._chains
        ]


def _as_key(key: bytes | None) -> BlockKeys | None:
    return None if key is None else np.frombuffer(key, dtype=np.uint64)
