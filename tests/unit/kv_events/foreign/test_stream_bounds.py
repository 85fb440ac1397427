"""ForeignStream's bounds."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest

from kv_events.foreign import stream as streams
from kv_events.foreign.events import ForeignBatch, ForeignStored
from kv_events.foreign.identity import IdentityMapper
from kv_events.foreign.stream import ForeignStream


def test_a_server_that_only_ever_stores_takes_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past more blocks than any server holds, what it holds is not known: it is forgotten; what follows is known."""
    monkeypatch.setattr(streams, "MAX_BLOCKS", 100)
    stream = ForeignStream("w0", IdentityMapper(), 1)
    stream.connected()
    stream.begin_replay()
    stream.end_replay(answered=True)
    tokens = np.zeros(16, dtype=np.uint32)
    for seq in range(250):
        stream.offer(seq, ForeignBatch(float(seq), (ForeignStored((seq + 1,), seq or None, tokens, 16),)))
        assert len(stream.log) <= 100
    assert stream.counts.forgotten == 2
    assert stream.log.snapshot().block_hashes.tolist() == list(range(203, 251))


def test_large_batches_that_wait_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few they are; what is let go comes again in the replay."""
    monkeypatch.setattr(streams, "MAX_WAITING_BYTES", 10_000)
    payloads = []
    for seq in range(50):
        stored = ["BlockStored", [seq + 1], seq or None, [70_000] * 256, 256]
        payloads.append(msgpack.packb([float(seq), [stored], 0]))
    stream = ForeignStream("w0", IdentityMapper(), 1)
    stream.connected()
    stream.begin_replay()
    stream.end_replay(answered=True)
    for seq in range(1, 50):
        stream.offer(seq, payloads[seq])
        assert sum(len(payloads[seq]) for seq in stream._waiting) <= 10_000
    assert stream._waiting
    first = stream.begin_replay()
    for seq in range(first, 50):
        stream.replayed(seq, payloads[seq])
    stream.end_replay(answered=True)
    assert stream.in_step
    assert len(stream.log) == 50
    assert stream.counts.lost == stream.counts.forgotten == 0
