"""The prefix cache over two tiers, against lists that say who is where and who goes next."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, tier_of
from kv_events.log import EventLog
from kv_events.view import WorkerView
from radix import make_tree
from radix.tree import Tier
from worker.cached_block import CachedBlock, hash_of, pack
from worker.host_tier import HostTier
from worker.prefix_cache import PrefixCache


def content_of(name: tuple[int, ...]) -> CachedBlock:
    """The block that holds the last of these numbers after all before it. Its hash says so."""
    parent = content_of(name[:-1]) if len(name) > 1 else None
    key = (1 + int("".join(str(1 + number) for number in name))).to_bytes(16, "little")
    return CachedBlock(key, pack([name[-1]]), parent)


def chain(name: tuple[int, ...]) -> list[CachedBlock]:
    return [content_of(name[:end]) for end in range(1, len(name) + 1)]


Name = tuple[int, ...]


class ReferenceTiers:
    """Names in lists, next to go first; what each block and slot physically holds."""

    def __init__(self, blocks: int, slots: int) -> None:
        self.slots = slots
        self.free = blocks
        self.users: dict[Name, int] = {}
        self.idle: list[Name] = []
        self.copies: list[Name] = []
        self.alone: list[Name] = []
        self.pinned: dict[Name, list[Name]] = {}  # and the list that each goes back to

    def host(self) -> set[Name]:
        return {*self.copies, *self.alone, *self.pinned}

    def device(self) -> set[Name]:
        return {*self.users, *self.idle}

    def place(self, name: Name) -> str | None:
        return "device" if name in self.device() else "host" if name in self.host() else None

    def queue(self, name: Name, queue: list[Name]) -> None:
        """The host's copy of `name` is now the last of that queue."""
        if name in self.pinned:
            self.pinned[name] = queue
            return
        for each in (self.copies, self.alone):
            if name in each:
                each.remove(name)
        queue.append(name)

    def allocate(self) -> None:
        if self.free:
            self.free -= 1
            return
        name = self.idle.pop(0)
        if name in self.host():
            self.queue(name, self.alone)
        elif len(self.host()) < self.slots:
            self.alone.append(name)
        elif self.copies or self.alone:
            (self.copies or self.alone).pop(0)
            self.alone.append(name)

    def acquire(self, found: list[Name]) -> None:
        on_host = [name for name in found if self.place(name) == "host"]
        for name in found:
            if name not in on_host:
                self.retain(name)
        for name in on_host:
            if name not in self.pinned:
                queue = self.copies if name in self.copies else self.alone
                queue.remove(name)
                self.pinned[name] = queue
        for name in on_host:
            self.allocate()
            self.users[name] = 1
            self.pinned[name] = self.copies

    def retain(self, name: Name) -> None:
        if name in self.idle:
            self.idle.remove(name)
        self.users[name] = self.users.get(name, 0) + 1

    def store(self, name: Name) -> None:
        """A block that was allocated is computed and listed."""
        self.users[name] = 1
        if name in self.host():
            self.queue(name, self.copies)

    def release(self, name: Name) -> None:
        self.users[name] -= 1
        if not self.users[name]:
            del self.users[name]
            self.idle.append(name)

    def unpin(self) -> None:
        for name, queue in self.pinned.items():
            queue.append(name)
        self.pinned.clear()


class TwoTierMachine(RuleBasedStateMachine):
    """Prefixes come and go; at every step both tiers hold exactly what the reference says."""

    blocks, slots = 6, 4

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(self.blocks, 1, host_blocks=self.slots)
        self.reference = ReferenceTiers(self.blocks, self.slots)
        self.memory: dict[int, Name] = {}  # of the device, as of the transfers made so far
        self.host_memory: dict[int, Name] = {}
        self.pending: list[tuple[str, int, object]] = []  # loads and computed blocks of the step being scheduled
        self.sequences: list[tuple[Name, list[int]]] = []
        self.log = EventLog("w", 1, 1)
        self.view = WorkerView("w", 0, make_tree())
        self.told: dict[Tier, set[int]] = {Tier.DEVICE: set(), Tier.HOST: set()}

    @rule(name=st.lists(st.integers(0, 1), min_size=1, max_size=4).map(tuple))
    def start(self, name: Name) -> None:
        """A sequence takes what is cached of its prefix, and computes the rest."""
        names = [name[:end] for end in range(1, len(name) + 1)]
        contents = chain(name)
        places = self.cache.lookup(contents)
        kinds = ["device" if place >= 0 else "host" for place in places]
        expected = [self.reference.place(each) for each in names]
        assert kinds == expected[: len(kinds)]
        assert len(kinds) == len(names) or expected[len(kinds)] is None, "a longer prefix is held"
        idle = sum(self.cache.pool.ref_count(place) == 0 for place in places if place >= 0)
        if len(names) - kinds.count("device") > self.cache.pool.available - idle:
            return
        blocks, loads = self.cache.acquire(places)
        self.reference.acquire(names[: len(places)])
        assert [~place for place in places if place < 0] == [slot for slot, _ in loads]
        self.pending += [("load", block, slot) for slot, block in loads]
        for each in names[len(places) :]:
            blocks.append(self.cache.pool.allocate())
            self.pending.append(("compute", blocks[-1], each))
            self.reference.allocate()
        if len(places) < len(names):
            self.transfer()
        for at in range(len(places), len(names)):
            self.cache.insert(blocks[at], contents[at])
            self.reference.store(names[at])
        self.sequences.append((name, blocks))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        name, blocks = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        self.cache.pool.release(reversed(blocks))
        for end in range(len(name), 0, -1):
            self.reference.release(name[:end])

    @rule()
    def transfer(self) -> None:
        """A step is scheduled and computed: saves, then loads, then new blocks."""
        for block, slot in self.cache.take_saves():
            self.host_memory[slot] = self.memory[block]
        for kind, block, what in self.pending:
            self.memory[block] = self.host_memory[what] if kind == "load" else what  # type: ignore[index, assignment]
        self.pending.clear()
        self.reference.unpin()

    @precondition(lambda self: not self.sequences)
    @rule()
    def clear(self) -> None:
        """(With sequences at work they would keep unlisted blocks: tests of the engine have that.)"""
        self.transfer()
        assert self.cache.clear() == len(self.reference.device() | self.reference.host())
        self.reference = ReferenceTiers(self.blocks, self.slots)

    @invariant()
    def both_tiers_hold_what_the_reference_says(self) -> None:
        self.cache.check()
        assert self.cache.host is not None
        device, host = self.reference.device(), self.reference.host()
        listed = {self.cache._by_hash[content_of(name).block_hash] for name in device}
        assert len(listed) == len(device) == len(self.cache._contents)
        assert all(self.cache.host.find(content_of(name).block_hash) is not None for name in host)
        assert len(self.cache.host) == len(host)
        assert len(self.cache) == len(device | host)

    @invariant()
    def what_is_listed_is_there(self) -> None:
        """Once the transfers are made; before, once they would be."""
        assert self.cache.host is not None
        memory, host_memory = dict(self.memory), dict(self.host_memory)
        host_memory.update({slot: memory[block] for slot, block in self.cache._saves.items()})
        memory.update({block: host_memory[slot] for _, block, slot in self.pending})  # type: ignore[index]
        for name in self.reference.device():
            assert memory[self.cache._by_hash[content_of(name).block_hash]] == name
        for name in self.reference.host():
            slot = self.cache.host.find(content_of(name).block_hash)
            assert slot is not None
            assert host_memory[slot] == name

    @invariant()
    def events_tell_each_block_in_its_tiers(self) -> None:
        events = self.cache.take_events()
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self.told = {tier: set() for tier in self.told}
            elif isinstance(event, BlockStored):
                self.told[tier_of(event.medium)] |= set(event.block_hashes.tolist())
            elif isinstance(event, BlockRemoved):
                gone = set(event.block_hashes.tolist())
                assert gone <= self.told[tier_of(event.medium)], "a block is removed that was not told"
                self.told[tier_of(event.medium)] -= gone
        for tier, names in ((Tier.DEVICE, self.reference.device()), (Tier.HOST, self.reference.host())):
            assert self.told[tier] == {hash_of(content_of(name).key) for name in names}
        self.view.offer(self.log.append(events, 0.0))
        assert self.view.synced
        assert self.view.digest == self.log.digest
        assert len(self.log) == len(self.cache)


class ScarceSlotsMachine(TwoTierMachine):
    """The same where pinned slots are often all there are."""

    slots = 2


TestTwoTiers = TwoTierMachine.TestCase
TestTwoTiers.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestScarceSlots = ScarceSlotsMachine.TestCase
TestScarceSlots.settings = TestTwoTiers.settings


def fill(cache: PrefixCache, name: Name) -> list[int]:
    blocks = []
    for content in chain(name):
        blocks.append(cache.pool.allocate())
        cache.insert(blocks[-1], content)
    return blocks


def hashes(*names: Name) -> list[int]:
    return [hash_of(content_of(name).key) for name in names]


def test_a_prefix_that_is_demoted_is_told_in_three_events() -> None:
    """However many blocks: what leaves the host, one chain in its own order that enters it, and what leaves the
    device; a follower never sees a moved block held nowhere."""
    cache = PrefixCache(3, 1, host_blocks=3, include_token_ids=True)
    cache.pool.release(reversed(fill(cache, (9, 9, 9))))
    cache.pool.release(reversed(fill(cache, (1, 2, 3))))
    cache.take_events()
    for _ in range(3):
        cache.pool.allocate()
    gone, entered, left = cache.take_events()
    assert isinstance(gone, BlockRemoved)
    assert isinstance(entered, BlockStored)
    assert isinstance(left, BlockRemoved)
    assert (gone.medium, entered.medium, left.medium) == ("CPU", "CPU", "GPU")
    assert gone.block_hashes.tolist() == hashes((9, 9, 9), (9, 9), (9,))
    assert (entered.parent_hash, entered.block_hashes.tolist()) == (0, hashes((1,), (1, 2), (1, 2, 3)))
    assert entered.token_ids is not None
    assert entered.token_ids.tolist() == [1, 2, 3]
    assert left.block_hashes.tolist() == hashes((1, 2, 3), (1, 2), (1,))


def test_a_block_stored_and_removed_in_one_step_is_told_in_that_order() -> None:
    """A slot that is filled and overwritten before anybody asks for events."""
    cache = PrefixCache(1, 1, host_blocks=1)
    for number in (1, 2, 3):
        cache.pool.release(fill(cache, (number,)))
    held: dict[str, set[int]] = {"GPU": set(), "CPU": set()}
    for event in cache.take_events():
        assert isinstance(event, BlockStored | BlockRemoved)
        changed = set(event.block_hashes.tolist())
        held[event.medium] = (
            held[event.medium] | changed if isinstance(event, BlockStored) else held[event.medium] - changed
        )
    assert held == {"GPU": set(hashes((3,))), "CPU": set(hashes((2,)))}
    assert cache.take_saves() == [(0, 0)], "only what the slot is to hold in the end is saved"


def test_a_prefix_is_found_over_both_tiers() -> None:
    """Each block is told where it is, and comes back as one table of device blocks."""
    cache = PrefixCache(3, 1, host_blocks=3)
    blocks = fill(cache, (1, 2, 3))
    cache.pool.release(reversed(blocks))
    other = cache.pool.allocate()
    assert other == blocks[2]
    assert cache.lookup(chain((1, 2, 3, 4))) == [blocks[0], blocks[1], ~0]
    assert cache.take_saves() == [(other, 0)]
    cache.pool.release([other])
    table, loads = cache.acquire(cache.lookup(chain((1, 2, 3))))
    assert table == blocks
    assert loads == [(0, other)]
    cache.check()


def test_another_prefix_under_a_hash_of_the_host_stays_unlisted() -> None:
    """Of two prefixes under one hash the first is listed, in whichever tier: never one in each."""
    cache = PrefixCache(1, 1, host_blocks=2)
    cache.pool.release(fill(cache, (1,)))
    block = cache.pool.allocate()
    forged = CachedBlock(content_of((1,)).key, pack([7]), None)
    assert cache.lookup([forged]) == []
    cache.insert(block, forged)
    assert cache.collisions == 1
    assert cache.lookup(chain((1,))) == [~0]
    cache.check()


def test_copies_go_before_what_is_held_nowhere_else() -> None:
    """A slot whose content the device lists, too, is taken first, though it was used last."""
    lost: list[CachedBlock] = []
    host = HostTier(2, lost.append)
    first, second, third = (content_of((number,)) for number in (1, 2, 3))
    slots = [host.store(first), host.store(second)]
    assert slots == [0, 1]
    host.set_copy(1, True)
    assert host.store(third) == 1
    assert lost == [second]
    assert host.alone == 2


def test_pinned_slots_are_never_taken() -> None:
    """Where nothing else is left there is no slot, until they are read."""
    host = HostTier(1, lambda content: None)
    host.store(content_of((1,)))
    host.pin(0)
    host.pin(0)
    assert host.store(content_of((2,))) is None
    host.unpin_all()
    assert host.store(content_of((2,))) == 0
    assert np.array_equal([host.find(content_of((number,)).block_hash) for number in (1, 2)], [None, 0])
