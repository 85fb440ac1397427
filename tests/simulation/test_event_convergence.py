"""Workers, a hostile network, and a router's views of them.

Whatever is lost, doubled, mixed up, damaged or late: a view that says it is in step is right, and once the network
calms down every view is. Where the tree has too little room, a view is right or knows that it was cut short, and is
right once there is room.

A schedule is drawn from a seed; the seed of one that fails is in the error.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest

from kv_events import wire
from kv_events.bus import Resync
from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventBatch, Snapshot
from kv_events.log import EventLog
from kv_events.view import ViewCounts, WorkerView
from radix import make_tree
from radix.keys import ROOT_HASH, Hashes
from radix.tree import PrefixTree, Tier
from rhizome.errors import Conflict, Trimmed
from tests.support.prefix_trees import holdings

STEPS = 120
SCHEDULES = 300
MANY_SCHEDULES = 10_000
LITTLE_ROOM = 64
"""Entries, where four workers hold up to 48 each: too few for all, and enough for one."""

Message = bytes | Snapshot | Resync  # a batch, a snapshot's answer, or a request on its way to the worker


def blocks(hashes: list[int]) -> Hashes:
    return np.array(hashes, dtype=np.uint64)


def held_by(log: EventLog) -> dict[int, int]:
    """Block -> mask of its tiers."""
    snapshot = log.snapshot()
    masks = sum(snapshot.held_in(tier).astype(int) << tier for tier in Tier)
    return dict(zip(snapshot.block_hashes.tolist(), masks.tolist(), strict=True))


class Link:
    """One worker, its former incarnations, the network, and the router's view of it."""

    def __init__(self, name: str, index: int, tree: PrefixTree, chance: random.Random) -> None:
        self.name = name
        self.chance = chance
        self.tree = tree
        self.index = index
        self.view = WorkerView(name, index, tree)
        self.capacity = chance.choice([1, 3, 10, 100])
        self.logs: list[EventLog] = []  # by epoch; the last one lives, others may still talk
        self.truth: dict[tuple[int, int], dict[int, int]] = {}  # what was held at (epoch, next_seq)
        self.network: list[Message] = []
        self.start()

    @property
    def log(self) -> EventLog:
        return self.logs[-1]

    def start(self) -> None:
        self.logs.append(EventLog(self.name, len(self.logs) + 1, 16, self.capacity))
        self.truth[len(self.logs), 0] = {}

    def work(self, log: EventLog) -> None:
        """One step of an engine: its batch goes onto the network."""
        batch = log.append([self.event(log) for _ in range(self.chance.randint(0, 3))], 0.0)
        self.truth[log.epoch, log.next_seq] = held_by(log)
        self.network.append(wire.encode(batch, positional=self.chance.random() < 0.2))

    def event(self, log: EventLog) -> Event:
        """Mostly chains of one small forest, so that workers share blocks and removals hit, now and then in another
        tier."""
        tree = self.chance.randrange(4)
        start = self.chance.randrange(8)
        chain = [1 + 16 * tree + depth for depth in range(start, min(12, start + self.chance.randint(1, 5)))]
        medium = self.chance.choice(["GPU", "GPU", "GPU", "CPU", "CPU_PINNED", "DISK"])
        match self.chance.random():
            case roll if roll < 0.55:
                return BlockStored(blocks(chain), chain[0] - 1 if start else ROOT_HASH, 16, medium=medium)
            case roll if roll < 0.97:
                return BlockRemoved(blocks(self.chance.sample(chain, self.chance.randint(1, len(chain)))), medium)
            case _:
                return AllBlocksCleared()

    def deliver(self, hostile: bool) -> None:
        """Some message arrives: any, perhaps damaged, perhaps not at all; or the next one, whole."""
        at = self.chance.randrange(len(self.network)) if hostile else 0
        message = self.network.pop(at)
        fate = self.chance.random() if hostile else 1.0
        if fate < 0.15:
            return
        if fate < 0.25:
            self.network.append(message)
        if isinstance(message, Resync):
            self.answer(message, self.chance.choice(self.logs) if fate < 0.5 else self.log)
        elif isinstance(message, Snapshot):
            self.view.restore(replace(message, digest=bytes(15) + b"x") if fate < 0.5 else message)
        else:
            batch = wire.decode(message)
            needed = self.view.offer(damaged(batch, self.chance) if fate < 0.4 else batch)
            if needed is not Resync.NONE:
                self.network.append(needed)

    def answer(self, request: Resync, log: EventLog) -> None:
        """What a worker, or a former incarnation that still listens, sends back."""
        epoch, next_seq = self.view.position()
        try:
            if request is Resync.SNAPSHOT:
                raise Trimmed("take a snapshot")
            log.check_epoch(epoch)
            self.network.extend(wire.encode(batch) for batch in log.since(next_seq))
        except (Trimmed, Conflict):
            self.network.append(log.snapshot())

    def check(self) -> None:
        """At every moment: in step means right, and nothing of a former incarnation outlives the news of a new one."""
        if self.view.synced:
            assert self.held() == self.truth[self.view.position()]
        if self.view.position()[1] == 0:
            assert self.tree.count(self.index) == 0

    def held(self) -> dict[int, int]:
        """What the view has of the worker: block -> mask of its tiers."""
        _, members = holdings(self.tree)
        return {block: mask for block, its in members.items() for worker, mask in its if worker == self.index}

    def check_right(self) -> None:
        """All that the worker has said is known, and nothing else."""
        assert self.view.synced
        assert self.view.digest == self.log.digest
        assert self.view.position() == (self.log.epoch, self.log.next_seq)
        assert self.held() == held_by(self.log)

    def calm_down(self) -> None:
        """The network delivers what is under way, the worker one step more, and whatever that leads to."""
        for _ in range(3):
            while self.network:
                self.deliver(hostile=False)
                self.check()
            self.work(self.log)
        while self.network:
            self.deliver(hostile=False)
            self.check()


def damaged(batch: EventBatch, chance: random.Random) -> EventBatch:
    """One bit of one hash is wrong; checks of the transport did not see it."""
    events = list(batch.events)
    for position, event in enumerate(events):
        if isinstance(event, BlockStored | BlockRemoved) and len(event.block_hashes):
            hashes = event.block_hashes.copy()
            hashes[chance.randrange(len(hashes))] ^= np.uint64(1 << chance.randrange(8, 64))
            events[position] = replace(event, block_hashes=hashes)
            break
    return batch._replace(events=tuple(events))


def run_links(links: list[Link], chance: random.Random) -> None:
    """The hostile part of a schedule."""
    for _ in range(STEPS):
        link = chance.choice(links)
        roll = chance.random()
        if roll < 0.45:
            link.work(link.log)
        elif roll < 0.47:
            link.start()
        elif roll < 0.50:
            link.work(chance.choice(link.logs))
        elif link.network:
            link.deliver(hostile=True)
            link.check()
            link.tree.check()


def counts_of(links: list[Link]) -> dict[str, int]:
    return {field.name: sum(getattr(link.view.counts, field.name) for link in links) for field in fields(ViewCounts)}


def simulate(seed: int) -> dict[str, int]:
    """One schedule; returns what happened in it."""
    chance = random.Random(seed)
    tree = make_tree()
    links = [Link(f"w{index}", index, tree, chance) for index in range(2)]
    run_links(links, chance)
    for link in links:
        link.calm_down()
        link.check_right()
    counts = counts_of(links)
    assert counts.pop("truncated") == 0
    return counts


def simulate_with_little_room(seed: int) -> dict[str, int]:
    """One schedule in which a cap of the tree keeps blocks out, until all workers but one are gone."""
    chance = random.Random(seed)
    tree = make_tree(max_blocks=LITTLE_ROOM)
    links = [Link(f"w{index}", index, tree, chance) for index in range(4)]
    run_links(links, chance)
    for link in links:
        link.calm_down()
        assert link.view.synced or link.view.truncated
    last = links[-1]
    for link in links[:-1]:
        link.view.forget()
    last.calm_down()
    last.check_right()
    return counts_of(links)


def simulate_all(seeds: range, simulation: Callable[[int], dict[str, int]] = simulate) -> dict[str, int]:
    totals: dict[str, int] = {}
    for seed in seeds:
        try:
            counts = simulation(seed)
        except Exception as error:
            raise AssertionError(f"the schedule of seed {seed} fails: {simulation.__name__}({seed})") from error
        for name, count in counts.items():
            totals[name] = totals.get(name, 0) + count
    return totals


def test_views_are_right_whenever_they_say_so_and_in_the_end() -> None:
    """Under any schedule; and the schedules do hold every kind of trouble."""
    totals = simulate_all(range(SCHEDULES))
    assert all(count > SCHEDULES / 2 for count in totals.values()), totals


def test_views_that_are_cut_short_are_right_once_there_is_room() -> None:
    """Under any schedule; and many are cut short."""
    totals = simulate_all(range(SCHEDULES // 2), simulate_with_little_room)
    assert all(count > SCHEDULES / 4 for count in totals.values()), totals


@pytest.mark.slow
def test_views_converge_under_ten_thousand_schedules() -> None:
    """The same, for longer."""
    simulate_all(range(SCHEDULES, SCHEDULES + MANY_SCHEDULES))
    simulate_all(range(SCHEDULES, SCHEDULES + MANY_SCHEDULES), simulate_with_little_room)


def test_a_schedule_is_drawn_from_its_seed_alone() -> None:
    """So that one that failed can be run again."""
    assert simulate(7) == simulate(7)
