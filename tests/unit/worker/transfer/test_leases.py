"""Leases: what is pinned, and for how long."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from itertools import takewhile

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rhizome.errors import InvalidRequest, NotServed, Overloaded
from rhizome.transfer_ticket import MAX_KEYS, TransferTicket, read_signed, sign
from tests.support.block_transfer import LAYOUT, PooledHolder, keys_of, private_memory
from worker.transfer.holder import Holder
from worker.transfer.memory import BlockLayout, BlockMemory
from worker.transfer.messages import How, PullRequest, encode_pull

KEYS = keys_of(8)
MAX_BLOCKS = 12
LARGE = BlockLayout(1 << 20)  # four in a step of sealing


class LeasesAsModelled(RuleBasedStateMachine):
    """A holder beside a list of what should be leased."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.memory = private_memory(20)
        self.cache = PooledHolder(self.memory)
        self.cache.store(KEYS)
        self.holder = Holder(
            "holder",
            1,
            self.memory,
            self.cache,
            max_leased_blocks=MAX_BLOCKS,
            clock=lambda: self.now,
            wall_clock=lambda: self.now,
        )
        self.tickets: list[bytes] = []
        self.live: dict[bytes, tuple[range, float]] = {}  # lease -> blocks by key, end
        self.revoked = 0

    @rule(count=st.integers(1, 10), ttl_s=st.sampled_from([1.0, 5.0, 500.0]))
    def lease(self, count: int, ttl_s: float) -> None:
        """For the first keys, of which it holds eight."""
        self._drop_ended()
        room = MAX_BLOCKS - self._leased()
        try:
            ticket = self.holder.lease([*KEYS, *keys_of(2, "x")][:count], ttl_s)
        except Overloaded:
            assert room == 0
            return
        told = read_signed(b"", ticket, 0)
        assert len(told) == min(count, 8, room)
        self.tickets.append(ticket)
        self.live[told.lease_id] = (range(len(told)), self.now + min(ttl_s, 60.0))

    @rule(first=st.integers(0, 7), count=st.integers(1, 10))
    def make_ticket(self, first: int, count: int) -> None:
        """As a router does: nothing is pinned by that."""
        keys = b"".join(keys_of(10)[first : first + count])
        self.tickets.append(sign(b"", TransferTicket("holder", 1, int(1000 * (self.now + 5)), keys, ())))

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), how=st.sampled_from(list(How)))
    def show(self, data: st.DataObject, how: How) -> None:
        """Any ticket made so far, to pull all that it names."""
        ticket = data.draw(st.sampled_from(self.tickets))
        told = read_signed(b"", ticket, 0)
        self._drop_ended()
        answer = b"".join(
            bytes(piece)
            for pieces in self.holder.serve(encode_pull(PullRequest(ticket, 0, len(told), LAYOUT, how))[12:])
            for piece in pieces
        )
        granted = answer[4] == 129
        expired = 1000 * self.now >= told.expires_unix_ms
        room = MAX_BLOCKS - self._leased()
        held = sum(1 for _ in takewhile(KEYS.__contains__, told.key_list()))
        assert granted == (not expired and (told.lease_id in self.live or (room > 0 and held > 0)))
        if granted and told.lease_id not in self.live:
            first = KEYS.index(told.keys[:16])
            blocks = range(first, first + min(held, room))
            self.live[told.lease_id] = (blocks, min(told.expires_unix_ms / 1000, self.now + 60))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """One of those that hold; twice, which is as once."""
        lease_id = data.draw(st.sampled_from(list(self.live)))
        self.holder.release(lease_id)
        self.holder.release(lease_id)
        del self.live[lease_id]

    @rule(seconds=st.sampled_from([0.5, 3.0, 70.0]), expire=st.booleans())
    def wait(self, seconds: float, expire: bool) -> None:
        """Time passes, and is noticed or not."""
        self.now += seconds
        if expire:
            self.holder.expire()

    @invariant()
    def pinned_is_what_is_leased(self) -> None:
        """When it is looked at, what ended is free; and a block that was taken back has another generation, while those
        that another lease is on have the one that it knows."""
        self._drop_ended()
        self.holder.expire()
        assert len(self.holder.leases) == len(self.live)
        leased = self._leased()
        assert self.holder.leases.blocks == leased <= MAX_BLOCKS
        assert int(self.memory.generations.sum()) == self.revoked
        for lease in map(self.holder.leases.get, self.live):
            assert lease is not None
            assert self.memory.generations[lease.blocks].tolist() == lease.generations
        self.cache.pool.check()
        assert self.cache.pinned <= leased
        assert bool(self.cache.pinned) == bool(leased)

    def _leased(self) -> int:
        return sum(len(blocks) for blocks, _ in self.live.values())

    def _drop_ended(self) -> None:
        ended = [self.live.pop(lease_id)[0] for lease_id, (_, end) in list(self.live.items()) if end <= self.now]
        taken_back = {block for blocks in ended for block in blocks}
        self.revoked += len(taken_back.difference(*(blocks for blocks, _ in self.live.values())))


LeasesAsModelled.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestLeasesAsModelled = LeasesAsModelled.TestCase


def test_a_cache_is_pinned_by_nobodys_ticket() -> None:
    """A lease on nothing leaves nothing."""
    memory = private_memory(4)
    cache = PooledHolder(memory)
    holder = Holder("holder", 1, memory, cache)
    with suppress(NotServed):
        holder.lease(KEYS)
    assert holder.leases.blocks == 0
    cache.check()


def test_a_lease_that_ends_leaves_blocks_to_those_who_read_them_under_another() -> None:
    """Who reads the memory sees its own lease as it was; when the last one has ended, it sees that, too."""
    now, memory = 0.0, private_memory(8)
    cache = PooledHolder(memory)
    cache.store(KEYS[:4])
    holder = Holder("holder", 1, memory, cache, max_leased_blocks=100, clock=lambda: now)
    holder.lease(KEYS[:4], ttl_s=1.0)
    other = holder.leases.get(read_signed(b"", holder.lease(KEYS[:2], ttl_s=9.0), 0).lease_id)
    assert other is not None
    now = 2.0
    assert holder.expire() == 1
    assert memory.generations[other.blocks].tolist() == other.generations
    assert memory.generations.sum() == 2  # of the blocks that nobody else reads
    now = 10.0
    assert holder.expire() == 1
    assert memory.generations[other.blocks].tolist() != other.generations


def test_no_more_is_lent_than_a_ticket_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is unpinned."""
    memory = BlockMemory(bytearray(MAX_KEYS + 2), BlockLayout(1), MAX_KEYS + 2)
    blocks, unpinned = range(MAX_KEYS + 2), list[int]()
    cache = PooledHolder(memory)
    monkeypatch.setattr(cache, "unpin", unpinned.extend)
    holder = Holder("holder", 1, memory, cache, max_leased_blocks=len(blocks), digests=False)
    ticket = holder.lend([number.to_bytes(16, "little") for number in blocks], blocks)
    assert len(read_signed(b"", ticket, 0)) == holder.leases.blocks == MAX_KEYS
    assert unpinned == [MAX_KEYS, MAX_KEYS + 1]


@pytest.mark.parametrize("lends", [True, False], ids=["lend", "lease"])
def test_without_a_ticket_there_is_no_lease(lends: bool) -> None:
    """What a ticket cannot say is an error, and nothing is leased."""
    holder = large_holder()
    holder.offers = ("nö://",)
    with pytest.raises(InvalidRequest, match="offer"):
        holder.lend(keys_of(8), range(8)) if lends else holder.lease(keys_of(8))
    assert len(holder.leases) == 0


def test_where_no_thread_is_to_be_had_digests_are_taken_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ticket is good without the thread that takes them ahead."""
    holder = large_holder()

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        ticket = holder.lease(keys_of(8))
    pieces = list(holder.serve(encode_pull(PullRequest(ticket, 0, 8, LARGE, How.IN_STREAM))[12:]))
    assert len(pieces) == 2
    assert holder.counts.blocks_told == 8


def large_holder(num_blocks: int = 8) -> Holder:
    """With all its blocks stored under keys, and leave to lease each twice."""
    memory = private_memory(num_blocks, LARGE)
    cache = PooledHolder(memory)
    cache.store(keys_of(num_blocks))
    return Holder("holder", 1, memory, cache, max_leased_blocks=2 * num_blocks)


def test_a_holder_that_closes_ends_its_sealing() -> None:
    """After the step that is under way: no thread goes on, none of what was to be sealed is, and nobody leases more."""
    holder = large_holder()
    entered, steps, digests = threading.Event(), list[Sequence[int]](), holder.memory.digests

    def slow(blocks: Sequence[int]) -> list[int]:
        steps.append(blocks)
        entered.set()
        threading.Event().wait(0.05)
        return digests(blocks)

    holder.memory.digests = slow  # type: ignore[method-assign]
    for _ in range(2):
        holder.lease(keys_of(8))
    assert entered.wait(30)
    holder.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "rhizome-seal"]
    assert len(steps) == 1
    with pytest.raises(Overloaded):
        holder.lease(keys_of(8))
    assert holder.leases.blocks == 0


def test_a_process_may_end_while_digests_are_taken() -> None:
    """Also where nobody closes the holder."""
    program = (
        "from tests.support.block_transfer import PooledHolder, keys_of, private_memory;"
        "from worker.transfer.memory import BlockLayout;"
        "from worker.transfer.holder import Holder;"
        "memory = private_memory(192, BlockLayout(1 << 20)); cache = PooledHolder(memory); keys = keys_of(192);"
        "cache.pin = lambda keys: list(range(len(keys)));"
        "holder = Holder('holder', 1, memory, cache, max_leased_blocks=1000);"
        "[holder.lease(keys) for _ in range(4)]"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
