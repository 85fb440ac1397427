"""Workers, a hostile network and a router's views of them: schedules of trouble, each drawn from a seed.

What may happen to a batch: it is lost, doubled, overtaken, or damaged, in one hash or in any bit of its bytes. Logs
are trimmed to a few batches. Workers restart, and their former incarnations go on talking and answering. Snapshots are
asked for, made, and arrive at any time after. The router starts when workers have long been at it, and starts anew.

What is asserted, at every moment: a view that says it is in step holds what the worker held at the view's position;
what a former incarnation held is gone with the first news of a new one; the tree keeps its invariants. In the end, when
the network delivers what is under way and the workers have said something more: every view is in step, and its digest
is the worker's. What was held is known from a model that shares no code with log, tree or digest.

The digest covers which blocks are held in which tiers. It does not see a wrong parent, block size or time, which change
nothing of that. A damaged sequence number may make a batch pass for the one after it, until the next batch: where bytes
were damaged, a view in step is only asked to hold what the worker held at some position.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import fields, replace

import numpy as np

from kv_events import wire
from kv_events.bus import Resync
from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventBatch, Snapshot, tier_of
from kv_events.log import EventLog
from kv_events.view import ViewCounts, WorkerView
from radix import make_tree
from radix.keys import ROOT_HASH, Hashes
from radix.tree import DEFAULT_MAX_BLOCKS, PrefixTree
from rhizome.errors import Conflict, Trimmed

LEAST_STEPS, MOST_STEPS = 10, 80
CALM_ROUNDS = 6  # batches of each worker after the last trouble: an epoch that was only damaged takes three to disprove
LITTLE_ROOM = 64
"""Entries, where four workers hold up to 48 each: too few for all, and enough for one."""

TREES, DEPTH = 4, 12
_FOREST = [np.arange(1 + 16 * tree, 1 + 16 * tree + DEPTH, dtype=np.uint64) for tree in range(TREES)]
_MEDIUMS = (*["GPU"] * 10, *["CPU"] * 4, *["DISK"] * 3, "CPU_PINNED")

Message = bytes | Snapshot | Resync  # a batch; the answer to a request; a request on its way to the worker
REPLAYED = Resync.NONE  # the end of a replay's answer
Held = dict[int, int]  # block -> mask of its tiers


def held_in(tree: PrefixTree, worker: int) -> Held:
    """What a tree has of a worker."""
    dump = tree.dump()
    members, masks, start = dump.members.tolist(), [], 0
    for end in dump.set_ends.tolist():
        masks.append(next((member & 7 for member in members[start:end] if member >> 3 == worker), 0))
        start = end
    rows = zip(dump.hashes.tolist(), dump.holder_sets.tolist(), strict=True)
    return {block: masks[row] for block, row in rows if masks[row]}


def apply_to(held: Held, event: Event) -> None:
    """What an event means."""
    match event:
        case BlockStored():
            for block in event.block_hashes.tolist():
                held[block] = held.get(block, 0) | 1 << tier_of(event.medium)
        case BlockRemoved():
            for block in event.block_hashes.tolist():
                held[block] = held.get(block, 0) & ~(1 << tier_of(event.medium))
                if not held[block]:
                    del held[block]
        case AllBlocksCleared():
            held.clear()


class Incarnation:
    """A worker's log, and what it held after each batch."""

    def __init__(self, name: str, epoch: int, capacity: int) -> None:
        self.log = EventLog(name, epoch, 16, capacity)
        self.held: Held = {}

    def append(self, events: list[Event]) -> EventBatch:
        for event in events:
            apply_to(self.held, event)
        return self.log.append(events, 0.0)


class Link:
    """One worker, its former incarnations, the network, and the router's view of it."""

    def __init__(self, world: World, name: str, index: int) -> None:
        self.world = world
        self.chance = world.chance
        self.name, self.index = name, index
        self.capacity = self.chance.choice([1, 3, 10, 100])
        self.incarnations: list[Incarnation] = []  # by epoch; the last one lives, others may still talk
        self.truth: dict[tuple[int, int], Held] = {}  # what was held at (epoch, next_seq)
        self.network: list[Message] = []
        self.view = WorkerView(name, index, world.tree)
        self.checked: object = None
        self.restart()

    @property
    def now(self) -> Incarnation:
        return self.incarnations[-1]

    def restart(self) -> None:
        self.incarnations.append(Incarnation(self.name, len(self.incarnations) + 1, self.capacity))
        self.truth[len(self.incarnations), 0] = {}

    def work(self, incarnation: Incarnation) -> None:
        """One step of an engine: its batch goes onto the network."""
        batch = incarnation.append([self.event() for _ in range(self.chance.randrange(4))])
        self.truth[batch.epoch, batch.seq + 1] = incarnation.held.copy()
        self.network.append(wire.encode(batch, positional=self.chance.random() < 0.2))

    def event(self) -> Event:
        """Mostly chains of one small forest, so that workers share blocks and removals hit, now and then in another
        tier."""
        chance = self.chance
        start = chance.randrange(8)
        chain = _FOREST[chance.randrange(TREES)][start : start + chance.randrange(2, 7)]
        medium = chance.choice(_MEDIUMS)
        match chance.random():
            case roll if roll < 0.55:
                return BlockStored(chain, int(chain[0]) - 1 if start else ROOT_HASH, 16, medium=medium)
            case roll if roll < 0.97:
                return BlockRemoved(chain[chance.randrange(len(chain)) :: chance.choice((1, 1, 2, -1))], medium)
            case _:
                return AllBlocksCleared()

    def start_router(self) -> None:
        """A router that knows nothing takes over: it asks for a snapshot, or hears of batches first."""
        self.world.add(vars_of(self.view.counts))
        self.view = WorkerView(self.name, self.index, self.world.tree)
        if self.chance.random() < 0.5:
            self.network.clear()
        if self.chance.random() < 0.8:
            self.network.append(Resync.SNAPSHOT)

    def deliver(self, hostile: bool) -> None:
        """Some message arrives: any, perhaps damaged, perhaps not at all; or the next one, whole."""
        at = self.chance.randrange(len(self.network)) if hostile else 0
        message = self.network.pop(at)
        fate = self.chance.random() if hostile else 1.0
        self.world.count("overtaken", at > 0)
        if fate < 0.15:
            self.world.count("lost")
            return
        if fate < 0.25:
            self.world.count("doubled")
            self.network.append(message)
        if message is REPLAYED:
            if not self.view.synced:  # as in bus.follow: a replay that does not do leads to a snapshot
                self.network.append(Resync.SNAPSHOT)
        elif isinstance(message, Resync):
            self.answer(message, self.chance.choice(self.incarnations) if fate < 0.5 else self.now)
        elif isinstance(message, Snapshot):
            self.take(replace(message, digest=bytes(15) + b"x") if fate < 0.5 else message)
        elif self.world.garbles and fate < 0.35:
            self.hear(garbled(message, self.chance))
        elif fate < 0.4:
            self.offer(damaged(wire.decode(message), self.chance))
        else:
            self.hear(message)

    def hear(self, payload: bytes) -> None:
        """Bytes arrive. What is not a batch leads to a snapshot, as in bus.follow."""
        try:
            batch = wire.decode(payload)
        except wire.WireError:
            self.world.count("not a batch")
            self.network.append(Resync.SNAPSHOT)
        else:
            self.offer(batch)

    def offer(self, batch: EventBatch) -> None:
        needed = self.view.offer(batch)
        if needed is not Resync.NONE:
            self.network.append(needed)

    def take(self, snapshot: Snapshot) -> None:
        log = self.now.log
        self.world.count("raced snapshots", snapshot.epoch == log.epoch and snapshot.next_seq < log.next_seq)
        self.view.restore(snapshot)

    def answer(self, request: Resync, incarnation: Incarnation) -> None:
        """What a worker, or a former incarnation that still listens, sends back."""
        self.world.count("zombie answers", incarnation is not self.now)
        epoch, next_seq = self.view.position()
        try:
            if request is Resync.SNAPSHOT:
                self.network.append(incarnation.log.snapshot())
                return
            incarnation.log.check_epoch(epoch)
            self.network.extend(wire.encode(batch) for batch in incarnation.log.since(next_seq))
            self.network.append(REPLAYED)
        except Trimmed:
            self.world.count("trimmed")
            self.network.append(incarnation.log.snapshot())
        except Conflict:
            self.network.append(incarnation.log.snapshot())

    def check(self) -> None:
        """At every moment; see the module."""
        position, counts = self.view.position(), self.view.counts
        state = (self.view, position, counts.applied, counts.resyncs)
        if state == self.checked:
            return
        self.checked = state
        if self.view.synced:
            held = held_in(self.world.tree, self.index)
            if self.world.garbles:
                assert any(held == state for state in self.truth.values())
            else:
                assert held == self.truth[position]
        if position[1] == 0:
            assert self.world.tree.count(self.index) == 0

    def check_right(self) -> None:
        """All that the worker has said is known, and nothing else."""
        log = self.now.log
        assert self.view.synced
        assert self.view.digest == log.digest
        assert self.view.position() == (log.epoch, log.next_seq)
        assert held_in(self.world.tree, self.index) == self.now.held

    def calm_down(self) -> None:
        """The network delivers what is under way, the worker goes on for some steps, and whatever that leads to."""
        for _ in range(CALM_ROUNDS):
            self.drain()
            self.work(self.now)
        self.drain()

    def drain(self) -> None:
        while self.network:
            self.deliver(hostile=False)
            self.check()


class World:
    """A router, its tree, and links to workers, all drawn from one seed; `happened` counts what befell them."""

    def __init__(self, seed: int, workers: int, max_blocks: int = DEFAULT_MAX_BLOCKS) -> None:
        self.chance = random.Random(seed)
        self.garbles = self.chance.random() < 0.5
        self.max_blocks = max_blocks
        self.tree = make_tree(max_blocks)
        self.happened: Counter[str] = Counter()
        self.links = [Link(self, f"w{index}", index) for index in range(workers)]

    def count(self, what: str, happened: bool = True) -> None:
        self.happened[what] += happened

    def add(self, counts: dict[str, int]) -> None:
        self.happened.update(counts)

    def start_router(self) -> None:
        """A new process: an empty tree."""
        self.tree = make_tree(self.max_blocks)
        for link in self.links:
            link.start_router()

    def run(self) -> None:
        """The hostile part. In every other schedule the router comes late."""
        steps = self.chance.randrange(LEAST_STEPS, MOST_STEPS)
        opens = self.chance.randrange(steps // 2) if self.chance.random() < 0.5 else 0
        for step in range(steps):
            if step == opens > 0:
                self.count("late routers")
                self.start_router()
            link = self.chance.choice(self.links)
            match self.chance.random():
                case roll if roll < 0.44:
                    link.work(link.now)
                case roll if roll < 0.46:
                    self.count("restarts")
                    link.restart()
                case roll if roll < 0.49:
                    incarnation = self.chance.choice(link.incarnations)
                    self.count("zombie batches", incarnation is not link.now)
                    link.work(incarnation)
                case roll if roll < 0.50:
                    self.count("router restarts")
                    self.start_router()
                case _ if link.network and step >= opens:
                    link.deliver(hostile=True)
                    link.check()
                    self.tree.check()

    def all_that_happened(self) -> dict[str, int]:
        """Trouble, and what the views counted."""
        for link in self.links:
            self.add(vars_of(link.view.counts))
        return dict(self.happened)


def vars_of(counts: ViewCounts) -> dict[str, int]:
    return {field.name: getattr(counts, field.name) for field in fields(counts)}


def damaged(batch: EventBatch, chance: random.Random) -> EventBatch:
    """One bit of one hash is wrong; checks of the transport did not see it."""
    events = list(batch.events)
    for position, event in enumerate(events):
        if isinstance(event, BlockStored | BlockRemoved) and len(event.block_hashes):
            hashes: Hashes = event.block_hashes.copy()
            hashes[chance.randrange(len(hashes))] ^= np.uint64(1 << chance.randrange(8, 64))
            events[position] = replace(event, block_hashes=hashes)
            break
    return batch._replace(events=tuple(events))


def garbled(payload: bytes, chance: random.Random) -> bytes:
    """One bit of the bytes is wrong: in an event, or in the name, epoch, number or digest of the batch."""
    at = chance.randrange(len(payload)) if chance.random() < 0.5 else -chance.randrange(1, min(40, len(payload)))
    wrong = bytearray(payload)
    wrong[at] ^= 1 << chance.randrange(8)
    return bytes(wrong)


def simulate(seed: int) -> dict[str, int]:
    """One schedule; returns what happened in it."""
    world = World(seed, workers=2)
    world.run()
    for link in world.links:
        link.calm_down()
        link.check_right()
    happened = world.all_that_happened()
    assert happened.pop("truncated") == happened.pop("malformed") == 0
    return happened


def simulate_with_little_room(seed: int) -> dict[str, int]:
    """One schedule in which a cap of the tree keeps blocks out, until all workers but one are gone."""
    world = World(seed, workers=4, max_blocks=LITTLE_ROOM)
    world.run()
    for link in world.links:
        link.calm_down()
        assert link.view.synced or link.view.truncated
    last = world.links[-1]
    for link in world.links[:-1]:
        link.view.forget()
    last.calm_down()
    last.check_right()
    happened = world.all_that_happened()
    assert happened.pop("malformed") == 0
    return happened
