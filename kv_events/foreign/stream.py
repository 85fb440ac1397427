"""ForeignStream: a vLLM or SGLang server's numbered batches, in whatever order they come, become an ordinary EventLog.

What such a server gives is less than what our own workers give. A sequence number counts its batches from 0 and starts
anew with the process; there is no epoch, no digest and no snapshot; a replay socket repeats the last so many batches
(vLLM: 10,000 steps by default, and only where it is set). So here is found out, from the numbers and times of batches
alone, what a cursor of ours is told: gaps, duplicates and restarts. Where a gap cannot be filled, what the server holds
is not known any more and is forgotten: the log may claim too little, never a block that the server does not have.

No I/O and no clock. The shell around it (kv_events.bus.foreign_zmq) does this:

    stream = ForeignStream(worker, mapper, epoch)       # epoch: larger than at any former start, e.g. wall time in ms
    stream.connected()                                  # subscribed: at the start and at each further connection
    stream.offer(seq, payload)                          # each message of the PUB socket
    if stream.needs_replay:                             # look after each call; one replay at a time
        from_seq = stream.begin_replay()                # asks the ROUTER socket: [empty, from_seq as 8 bytes]
        stream.replayed(seq, payload)                   # each answer, meanwhile offers go on
        stream.end_replay(answered=True)                # the end marker; False: it did not come, or no socket is there
    stream.log                                          # read it anew after each restart: the former one is closed
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TypeAlias

from kv_events.events import AllBlocksCleared, Event
from kv_events.foreign.dialects import decode_foreign
from kv_events.foreign.events import ForeignBatch
from kv_events.foreign.mapper import Mapper, with_joined_removals
from kv_events.log import DEFAULT_CAPACITY, EventLog
from kv_events.wire import WireError

MAX_WAITING = 1024
"""Batches kept while those before them are asked for: 10 s of 10 ms steps, some MiB. Further ones are let go: the
replay brings them."""

MAX_WAITING_BYTES = 16 * 2**20
"""Of their payloads, which take about five times as much when they are decoded: a second of the largest batches that a
server sends in earnest, and 16 KiB for each of MAX_WAITING."""

RECENT = 1024
"""Batches whose times are remembered, to tell a duplicate from a batch of a new process."""

MAX_BLOCKS = 2**22
"""Held at once, beyond which what the server holds is forgotten: 67 million tokens in blocks of 16 are more than any
cache holds, so its removals are not heard of. About 300 MB."""

OVERLAP = 8
"""Known batches that a replay repeats after a new connection: another time under a known number is another process.
More than one, as a new process's first batches may have been taken before the news of the connection came."""

MAX_FRUITLESS = 3
"""Replays that were answered and did not bring the batch that is missing, before it is given up. (One may have been
asked for before the server got so far; a ROUTER drops what its queue does not hold.)"""

MAX_UNANSWERED = 3
"""Replays without an answer before the server is taken to have no replay socket."""

Offered: TypeAlias = ForeignBatch | bytes


@dataclass(slots=True)
class ForeignCounts:
    """Since the stream was made. In batches, but for gaps, replays and restarts."""

    batches: int = 0  # offered
    applied: int = 0
    duplicates: int = 0  # and late ones of a process that is over
    malformed: int = 0  # not decodable
    lost: int = 0  # never to be had: before a late join, in gaps that no replay filled
    gaps: int = 0  # times that batches were missing
    forgotten: int = 0  # times that what the server holds was not known any more
    replays: int = 0  # asked for
    unanswered: int = 0  # replays
    restarts: int = 0  # new processes found


class ForeignStream:
    """See above. Not for several threads at once; `log` may be read from any."""

    def __init__(
        self,
        worker: str,
        mapper: Mapper,
        epoch: int,
        *,
        capacity: int = DEFAULT_CAPACITY,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        """`worker` and `epoch` are the log's: `epoch` larger than at any former start. `capacity` in batches."""
        self.counts = ForeignCounts()
        self.mapper = mapper
        self.last_problem = ""  # of the last malformed batch
        self._capacity = capacity
        self._max_waiting = max_waiting
        self._log = EventLog(worker, epoch, mapper.block_size, capacity)
        self._next_seq = 0
        self._waiting: dict[int, ForeignBatch | None] = {}  # None: it came and could not be decoded
        self._waiting_bytes: dict[int, int] = {}  # of their payloads
        self._recent: dict[int, float] = {}  # applied: sequence number -> time
        self._last_ts = -inf  # of what was applied last; what is older is a former process's
        self._joined = False  # where the stream begins for us is settled
        self._doubted = False  # a new connection: is it the same process?
        self._mute = False  # the server gives no replays
        self._replay = _Replay()
        self._fruitless = self._unanswered = 0

    @property
    def log(self) -> EventLog:
        """The server's events as ours, in the epoch of its present process. Another object after each restart; the
        former one is closed then."""
        return self._log

    @property
    def next_seq(self) -> int:
        """The server's number of the next batch to be applied."""
        return self._next_seq

    @property
    def in_step(self) -> bool:
        """Whether all that was offered is applied, and nothing is known to be missing."""
        return self._joined and not self._doubted and not self._waiting

    @property
    def needs_replay(self) -> bool:
        """Whether a replay is to be asked for now."""
        return not (self._replay.running or self._mute or self.in_step)

    def close(self) -> None:
        """Nothing more comes: subscriptions to the log end."""
        self._log.close()

    # What the shell tells.

    def connected(self) -> None:
        """The connection to the server was made (again): it may be another process, and batches may have been missed.
        A replay that is under way counts no more."""
        self._mute = False
        self._unanswered = self._fruitless = 0
        self._replay.void = True
        self._waiting.clear()  # of the former connection: if it was the same process, the replay brings them again
        self._doubted = self._joined

    def offer(self, seq: int, batch: Offered) -> None:
        """Take a message of the server's PUB socket. Never raises for what is in it."""
        self.counts.batches += 1
        decoded = self._decoded(batch)
        if decoded is None:
            if seq >= self._next_seq:
                self._wait(seq, None, 0)
        elif seq == self._next_seq and self.in_step and decoded.ts >= self._last_ts:
            self._apply(seq, decoded)
        else:
            self._place(seq, decoded, _size(batch))
        self._go_on()

    def begin_replay(self) -> int:
        """The sequence number from which to ask; answers go to `replayed`, until `end_replay`."""
        assert self.needs_replay
        self.counts.replays += 1
        from_seq = self._begin_of_overlap() if self._joined else 0
        self._replay = _Replay(
            running=True,
            from_seq=from_seq,
            next_seq=self._next_seq,
            knew_gap=bool(self._waiting),
            verified=from_seq == self._next_seq,
        )
        return from_seq

    def _begin_of_overlap(self) -> int:
        from_seq = max(0, self._next_seq - 1)
        if self._doubted:
            while from_seq - 1 in self._recent and self._next_seq - from_seq < OVERLAP:
                from_seq -= 1
        return from_seq

    def replayed(self, seq: int, batch: Offered) -> None:
        """Take one answer of the replay that was begun last, in the order in which they come. Never raises for what is
        in it."""
        replay = self._replay
        if not replay.running or replay.void:
            return
        replay.answers += 1
        replay.newest = max(replay.newest, seq)
        decoded = self._decoded(batch)
        if self._joined and seq < self._next_seq:
            self._compare(seq, decoded)
            return
        if not self._joined or not replay.verified or (replay.answers == 1 and seq > self._next_seq):
            self._start_at(seq)  # what comes before is not kept by the server, or cannot be told to be of this process
            replay.verified = True
        if seq > self._next_seq:
            self._wait(seq, decoded, _size(batch))  # a hole among the answers: another replay may bring it
        elif decoded is None:
            self._start_at(seq + 1)  # no replay brings it any better
        else:
            self._apply(seq, decoded)

    def end_replay(self, answered: bool) -> None:
        """The replay is over: all answers came, or (not `answered`) none or not all of them in time."""
        replay, self._replay = self._replay, _Replay()
        if replay.void:
            return
        if answered and replay.newest + 1 < replay.next_seq:
            self._restart()  # it has not come as far as we had (or keeps nothing: then it is right to forget, too)
        elif replay.answers or answered:
            self._unanswered = 0
            if self._doubted and not replay.verified and answered:
                self._forget()
            self._doubted &= not (replay.verified or answered)
            self._joined |= answered
            self._purge()
        else:
            self.counts.unanswered += 1
            self._unanswered += 1
            self._mute = self._unanswered >= MAX_UNANSWERED
        self._go_on()
        if replay.knew_gap and self._waiting and self._next_seq == replay.next_seq and (answered or replay.answers):
            self._fruitless += 1
            if self._fruitless >= MAX_FRUITLESS:
                self._give_up()
        else:
            self._fruitless = 0

    # What came is told apart.

    def _decoded(self, batch: Offered) -> ForeignBatch | None:
        if isinstance(batch, ForeignBatch):
            return batch
        try:
            return decode_foreign(batch)
        except WireError as error:
            self.counts.malformed += 1
            self.last_problem = str(error)
            return None

    def _place(self, seq: int, batch: ForeignBatch, size_bytes: int) -> None:
        """A batch that is not simply the next one."""
        if self._is_of_new_process(seq, batch.ts):
            self._restart(since=batch.ts)
        if seq >= self._next_seq and batch.ts >= self._last_ts:
            self._wait(seq, batch, size_bytes)
            return
        self.counts.duplicates += 1
        if self._recent.get(seq) == batch.ts:
            return
        # Of a process that is over; or of a new one, and the server's clock was set back: the replay tells.
        if self._mute:
            self._restart()  # nothing tells, so neither process's blocks are claimed
        else:
            self._doubted = self._joined

    def _is_of_new_process(self, seq: int, ts: float) -> bool:
        """A number that was used, at a later time than it was used, or than a later number was."""
        if seq < self._next_seq:
            return ts > self._recent.get(seq, self._last_ts)
        if self._waiting and seq <= max(self._waiting):
            return any(other >= seq and batch and batch.ts < ts for other, batch in self._waiting.items())
        return False

    def _compare(self, seq: int, batch: ForeignBatch | None) -> None:
        """A batch that is known was replayed: was it this one?"""
        known = self._recent.get(seq)
        if batch is None or known is None:
            return
        if batch.ts != known:
            self._restart()
        elif seq == self._replay.from_seq:
            self._replay.verified = True

    # What is done with it.

    def _wait(self, seq: int, batch: ForeignBatch | None, size_bytes: int) -> None:
        if not self._waiting and self._joined and not self._doubted:
            self.counts.gaps += 1
        if self._waiting.get(seq) is not None:
            self.counts.duplicates += 1
        elif (seq in self._waiting or len(self._waiting) < self._max_waiting) and self._has_room(size_bytes):
            self._waiting[seq] = batch
            self._waiting_bytes[seq] = size_bytes

    def _has_room(self, size_bytes: int) -> bool:
        """Whether a payload of that size may wait, too."""
        self._waiting_bytes = {seq: self._waiting_bytes[seq] for seq in self._waiting}
        return sum(self._waiting_bytes.values()) + size_bytes <= MAX_WAITING_BYTES

    def _go_on(self) -> None:
        """Apply what waits, as far as it is known to follow."""
        if self._mute:
            self._give_up()
        elif self._waiting and self._joined and not self._doubted:
            self._join()

    def _join(self) -> None:
        joined = False
        while (batch := self._waiting.get(self._next_seq)) is not None and batch.ts >= self._last_ts:
            self._apply(self._next_seq, batch)
            joined = True
        if joined:
            self._purge()

    def _purge(self) -> None:
        """Let go what waits in vain: applied, or older than what was applied, so of a process that is over."""
        for seq, batch in list(self._waiting.items()):
            if seq < self._next_seq or (batch is not None and batch.ts < self._last_ts):
                del self._waiting[seq]

    def _apply(self, seq: int, batch: ForeignBatch) -> None:
        if self._waiting:
            self._waiting.pop(seq, None)
        self._next_seq = seq + 1
        self._last_ts = self._recent[seq] = batch.ts
        self._recent.pop(seq - RECENT, None)
        self.counts.applied += 1
        events: list[Event] = []
        for event in with_joined_removals(batch.events):
            events += self.mapper.map(event)
        if events:
            self._log.block_size = self.mapper.block_size
            self._log.append(events, batch.ts)
            if len(self._log) > MAX_BLOCKS:
                self._forget()

    def _start_at(self, seq: int) -> None:
        """The batches before `seq` are not to be had."""
        self.counts.lost += seq - self._next_seq
        if self._joined:
            self._forget()
        self._joined = True
        self._doubted = False
        self._next_seq = seq
        self._recent.clear()
        self._purge()

    def _forget(self) -> None:
        """What the server holds is not known any more. Its hashes will be understood all the same."""
        self.counts.forgotten += 1
        self.mapper.forget()
        if len(self._log):
            self._log.append([AllBlocksCleared()], max(0.0, self._last_ts))

    def _give_up(self) -> None:
        """Go on with what is there, without what is missing."""
        self._fruitless = 0
        if self._doubted:
            self._doubted = False
            self._forget()
        self._purge()
        while self._waiting:
            if self._joined:
                self._join()
            if self._waiting:
                first = min(self._waiting)
                self._start_at(first + (self._waiting[first] is None))

    def _restart(self, since: float | None = None) -> None:
        """Another process serves: nothing of what its predecessor held or said counts, and no batch from before
        `since`. None: not known; its clock may be behind its predecessor's."""
        self.counts.restarts += 1
        former = self._log
        self._log = EventLog(former.worker, former.epoch + 1, former.block_size, self._capacity)
        former.close()
        self.mapper.reset()
        earliest = self._last_ts if since is None else since
        self._waiting = {seq: batch for seq, batch in self._waiting.items() if batch and batch.ts >= earliest}
        if since is None or since < self._last_ts:
            self._last_ts = -inf
        self._recent.clear()
        self._next_seq = 0
        self._joined = self._doubted = False
        self._fruitless = 0
        self._replay.void = True  # it is of the former process, or began amid the new one's batches


def _size(batch: Offered) -> int:
    return len(batch) if isinstance(batch, bytes) else 0


@dataclass(slots=True)
class _Replay:
    """One that is asked for."""

    running: bool = False
    void: bool = False  # its answers count no more
    from_seq: int = 0
    next_seq: int = 0  # when it was begun
    knew_gap: bool = False  # batches waited then
    verified: bool = False  # it begins with the very batch that is known under that number
    answers: int = 0
    newest: int = -1  # of their numbers
