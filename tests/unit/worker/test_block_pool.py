"""The pool of physical blocks."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from worker.block_pool import BlockPool


class PoolMachine(RuleBasedStateMachine):
    """The pool against three plain lists: users, idle blocks in LRU order, free blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.evicted: list[int] = []
        self.pool = BlockPool(6, self.evicted.append)
        self.users: dict[int, int] = {}
        self.cached: set[int] = set()
        self.idle: list[int] = []

    @precondition(lambda self: len(self.users) < 6)
    @rule()
    def allocate(self) -> None:
        """Free blocks go first; then the least recently used idle one, whose content is given up."""
        had_free = len(self.users) + len(self.idle) < 6
        before = len(self.evicted)
        block = self.pool.allocate()
        if had_free:
            assert block not in self.idle
            assert len(self.evicted) == before
        else:
            assert block == self.idle.pop(0)
            assert self.evicted[before:] == [block]
            self.cached.discard(block)
        assert block not in self.users
        self.users[block] = 1

    @precondition(lambda self: self.users or self.idle)
    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted([*self.users, *self.idle])))
        self.pool.retain(block)
        if block in self.idle:
            self.idle.remove(block)
        self.users[block] = self.users.get(block, 0) + 1

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.users)))
        self.pool.release([block])
        self.users[block] -= 1
        if not self.users[block]:
            del self.users[block]
            if block in self.cached:
                self.idle.append(block)

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def list_block(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.users)))
        self.pool.set_cached(block, True)
        self.cached.add(block)

    @precondition(lambda self: self.cached)
    @rule(data=st.data())
    def unlist_block(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.cached)))
        self.pool.set_cached(block, False)
        self.cached.discard(block)
        if block in self.idle:
            self.idle.remove(block)

    @invariant()
    def agrees(self) -> None:
        """Free + idle + in use = total, and each count is the model's."""
        self.pool.check()
        assert self.pool.in_use == len(self.users)
        assert self.pool.idle == len(self.idle)
        assert self.pool.available == 6 - len(self.users)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_fresh_blocks_are_consecutive() -> None:
    """A sequence that starts on an empty pool gets neighbouring blocks: attention then reads them without a copy."""
    pool = BlockPool(8, lambda block: None)
    assert [pool.allocate() for _ in range(4)] == [0, 1, 2, 3]
