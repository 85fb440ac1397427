"""KeyMapper against a server whose whole truth is known: after each event, the blocks of ours that it says to be held
are those of which every token is in a block that the server holds."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kv_events.foreign.events import ForeignCleared
from kv_events.foreign.mapper import KeyMapper
from radix.tree import Tier
from tests.support.foreign_servers import MODEL, Block, Follower, ForeignEngine

SIZES = [(16, 16), (4, 4), (8, 2), (6, 2), (2, 8), (3, 12), (6, 4), (4, 6), (3, 5), (5, 3), (7, 16)]  # theirs, ours
LONGEST = 40  # tokens
MEDIUMS = ["GPU", "GPU", "GPU", "CPU", "DISK"]
MEDIUM_OF = {Tier.DEVICE: "GPU", Tier.HOST: "CPU", Tier.DISK: "DISK"}

# Prompts that share prefixes of any length, also such that end within blocks.
PROMPTS = [
    [*range(100, 100 + LONGEST)],
    [*range(100, 111), *range(200, 229)],
    [*range(100, 123), *range(300, 317)],
    [7] * LONGEST,
    [*[7] * 17, *[8] * 23],
]


class Mapping(RuleBasedStateMachine):
    """A server that tells everything: parents first. So the mapper knows what the server holds, exactly."""

    @initialize(sizes=st.sampled_from(SIZES))
    def start(self, sizes: tuple[int, int]) -> None:
        theirs, self.ours = sizes
        self.engine = ForeignEngine(theirs)
        self.mapper = KeyMapper(MODEL, self.ours)
        self.follower = Follower()
        self.told: set[Block] = set()

    @rule(
        data=st.data(),
        prompt=st.sampled_from(PROMPTS),
        medium=st.sampled_from(MEDIUMS),
        tenant=st.sampled_from(["", "t"]),
    )
    def store(self, data: st.DataObject, prompt: list[int], medium: str, tenant: str) -> None:
        """A part of a prompt, from a block on whose parent was told of, and may be gone."""
        blocks = self.engine.chain(prompt, tenant)
        known = next((at for at, block in enumerate(blocks) if block not in self.told), len(blocks))
        first = data.draw(st.integers(0, min(known, len(blocks) - 1)))
        part = blocks[first : data.draw(st.integers(first + 1, len(blocks)))]
        self.told.update(part)
        self.follower.apply(self.mapper.map(self.engine.store(part, medium)))

    @precondition(lambda self: self.told)
    @rule(data=st.data(), medium=st.sampled_from(MEDIUMS))
    def copy(self, data: st.DataObject, medium: str) -> None:
        """Blocks are told to be in a tier, without their tokens."""
        order = sorted(self.told)
        blocks = data.draw(st.lists(st.sampled_from(order), min_size=1, max_size=4, unique=True))
        self.follower.apply(self.mapper.map(self.engine.store(blocks, medium, tell_tokens=False)))

    @precondition(lambda self: self.engine.held)
    @rule(data=st.data(), medium=st.sampled_from(MEDIUMS))
    def remove(self, data: st.DataObject, medium: str) -> None:
        """Any blocks, held or not."""
        blocks = data.draw(st.lists(st.sampled_from(sorted(self.engine.held)), min_size=1, max_size=6, unique=True))
        self.follower.apply(self.mapper.map(self.engine.remove(blocks, medium)))

    @rule(dice=st.integers(0, 9))
    def clear(self, dice: int) -> None:
        if dice == 0:
            self.engine.clear()
            self.told.clear()
            self.follower.apply(self.mapper.map(ForeignCleared()))

    @rule(dice=st.integers(0, 9))
    def lose_track(self, dice: int) -> None:
        """As after a gap: nothing counts as held, and what hashes mean is still known."""
        if dice == 0:
            self.engine.clear()
            self.mapper.forget()
            self.follower.held.clear()

    @invariant()
    def is_exact(self) -> None:
        if hasattr(self, "engine"):
            assert self.follower.held == self.engine.keys(self.ours)
            self.mapper.check()


Mapping.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
test_what_is_held_is_exact = Mapping.TestCase


class LateMapping(RuleBasedStateMachine):
    """A server of which not all was heard: events before a start, parents never told of, bounds that are reached.

    Then the mapper may know of too little, and never of a block that is not held; told all anew, it knows all.
    """

    @initialize(sizes=st.sampled_from(SIZES), bounds=st.sampled_from([(1000, 1000, 1000), (40, 3, 5), (1000, 0, 2)]))
    def start(self, sizes: tuple[int, int], bounds: tuple[int, int, int]) -> None:
        theirs, self.ours = sizes
        entries, tombstones, waiting = bounds
        self.roomy = entries == tombstones == waiting
        self.engine = ForeignEngine(theirs)
        self.mapper = KeyMapper(MODEL, self.ours, max_entries=entries, max_tombstones=tombstones, max_waiting=waiting)
        self.follower = Follower()

    @rule(
        data=st.data(),
        prompt=st.sampled_from(PROMPTS),
        medium=st.sampled_from(MEDIUMS),
        heard=st.sampled_from([1, 1, 1, 0]),
    )
    def store(self, data: st.DataObject, prompt: list[int], medium: str, heard: int) -> None:
        """Any part of a prompt."""
        blocks = self.engine.chain(prompt)
        first = data.draw(st.integers(0, len(blocks) - 1))
        part = blocks[first : data.draw(st.integers(first + 1, len(blocks)))]
        event = self.engine.store(part, medium, tell_tokens=data.draw(st.sampled_from([True, True, False])))
        if heard:
            self.follower.apply(self.mapper.map(event))

    @precondition(lambda self: self.engine.held)
    @rule(data=st.data(), medium=st.sampled_from(MEDIUMS))
    def remove(self, data: st.DataObject, medium: str) -> None:
        """Removals are all heard, else what is held could not be known."""
        blocks = data.draw(st.lists(st.sampled_from(sorted(self.engine.held)), min_size=1, max_size=6, unique=True))
        self.follower.apply(self.mapper.map(self.engine.remove(blocks, medium)))

    @rule(dice=st.integers(0, 9))
    def lose_track(self, dice: int) -> None:
        if dice == 0:
            self.engine.clear()
            self.mapper.forget()
            self.follower.held.clear()

    @precondition(lambda self: self.engine.held)
    @rule(dice=st.integers(0, 4))
    def tell_all(self, dice: int) -> None:
        """Parents first, each with its tokens."""
        if dice:
            return
        for block in sorted(self.engine.held):
            for end in range(self.engine.block_size, len(block.prefix), self.engine.block_size):
                ancestor = block._replace(prefix=block.prefix[:end])
                if ancestor not in self.engine.held:
                    self.follower.apply(self.mapper.map(self.engine.store([ancestor])))
            for tier in list(self.engine.held[block]):
                self.follower.apply(self.mapper.map(self.engine.store([block], MEDIUM_OF[tier])))
        if self.roomy:
            assert self.follower.held == self.engine.keys(self.ours)

    @invariant()
    def claims_nothing_that_is_not_held(self) -> None:
        if hasattr(self, "engine"):
            assert self.follower.held <= self.engine.keys(self.ours)
            self.mapper.check()


LateMapping.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
test_what_is_claimed_is_held = LateMapping.TestCase


@settings(max_examples=100, deadline=None)
@given(data=st.data(), sizes=st.sampled_from(SIZES), prompt=st.sampled_from(PROMPTS))
def test_orphans_are_mapped_when_their_parents_become_known(
    data: st.DataObject, sizes: tuple[int, int], prompt: list[int]
) -> None:
    """In whatever order the parts of a prompt are told: in the end all of it is held, and of what came out of order
    nothing was known before its parents were."""
    theirs, ours = sizes
    engine, mapper, follower = ForeignEngine(theirs), KeyMapper(MODEL, ours), Follower()
    blocks = engine.chain(prompt)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(blocks) - 1), max_size=4)))
    parts = [blocks[start:end] for start, end in zip([0, *cuts], [*cuts, len(blocks)], strict=True)]
    told: set[Block] = set()
    for part in data.draw(st.permutations(parts)):
        follower.apply(mapper.map(engine.store(part)))
        told.update(part)
        assert follower.held == engine.keys(ours, told)
        mapper.check()
    assert len({block for _, block in follower.held}) == len(blocks) * theirs // ours
    assert mapper.counts.adopted == mapper.counts.orphans
