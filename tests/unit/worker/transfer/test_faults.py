"""Every message between puller and holder goes wrong, in turn and in every way."""

from __future__ import annotations

import pytest

from tests.support.block_transfer import PooledHolder, content, held, keys_of, private_memory, pull_once
from tests.support.faulty_stream import FAULTS, Fault, FaultyTransport
from worker.transfer.holder import Holder
from worker.transfer.memory import BlockLayout
from worker.transfer.messages import How
from worker.transfer.puller import PullResult

LAYOUT = BlockLayout(1 << 20)  # four in a batch
KEYS = keys_of(10)
SLOTS = [3, 11, 0, 7, 5, 1, 9, 2, 10, 6]
MESSAGES = 5  # PULL, GRANT with the first batch, two batches, RELEASE


class World:
    """A holder of ten blocks, and a puller with room for twelve."""

    def __init__(self) -> None:
        self.now = 0.0
        memory = private_memory(16, LAYOUT)
        self.cache = PooledHolder(memory)
        self.cache.store(KEYS)
        self.holder = Holder("holder", 1, memory, self.cache, max_leased_blocks=100, clock=lambda: self.now)
        self.pool = private_memory(12, LAYOUT)

    def pull(self, *faults: tuple[Fault, How]) -> PullResult:
        """Over as many ways as faults, the first one first."""
        self.holder.offers = tuple(f"way{at}://here" for at in range(len(faults)))
        ways = [FaultyTransport(f"way{at}", self.holder, *fault) for at, fault in enumerate(faults)]
        return pull_once(self.pool, ways, self.holder.lease(KEYS), KEYS, SLOTS, 30.0)

    def check(self, result: PullResult) -> None:
        """What counts is right, the rest is zero, and the holder's blocks are free: at once, or when the lease ends."""
        for at, slot in enumerate(SLOTS):
            expected = content(KEYS[at], LAYOUT) if at < result.blocks else bytes(LAYOUT.block_bytes)
            assert held(self.pool, slot) == expected
        assert not any(held(self.pool, slot)[0] for slot in (4, 8))
        self.now += 1e6
        self.holder.expire()
        assert self.holder.leases.blocks == 0
        self.cache.check()


@pytest.mark.parametrize("how", list(How), ids=lambda how: how.name)
@pytest.mark.parametrize("kind", FAULTS)
def test_a_pull_ends_well_whatever_goes_wrong(kind: str, how: How) -> None:
    """With leading blocks that are right, a reason where not all came, nothing left behind and nothing pinned."""
    for number in range(MESSAGES):
        world, fault = World(), Fault(kind, number)
        result = world.pull((fault, how))
        assert result.blocks == 10 or result.reason
        world.check(result)


@pytest.mark.parametrize("how", list(How), ids=lambda how: how.name)
def test_without_a_fault_all_arrives(how: How) -> None:
    """In that many messages: the test above strikes every one."""
    world, fault = World(), Fault("", 99)
    result = world.pull((fault, how))
    assert (result.blocks, result.reason) == (10, "")
    assert fault.count <= MESSAGES
    assert how is How.FROM_MEMORY or fault.count == MESSAGES
    world.check(result)


@pytest.mark.parametrize("kind", [kind for kind in FAULTS if kind != "stalls"])
def test_the_next_way_goes_on_where_one_broke(kind: str) -> None:
    """What came over the first way is not sent again, and all arrives; but a holder's refusal is the last word."""
    for number in range(MESSAGES - 1):
        world = World()
        result = world.pull((Fault(kind, number), How.IN_STREAM), (Fault("", 99), How.IN_STREAM))
        refused = number == 0 and kind in ("flipped", "cut", "garbage")
        assert result.blocks == (0 if refused else 10), result
        assert sum(attempt.blocks for attempt in result.attempts) == result.blocks
        world.check(result)


def test_a_deadline_ends_all_ways() -> None:
    """Whoever is too slow is not followed by somebody else: there is no time left."""
    world = World()
    result = world.pull((Fault("stalls", 2), How.IN_STREAM), (Fault("", 99), How.IN_STREAM))
    assert result.blocks == 4
    assert len(result.attempts) == 1
    world.check(result)
