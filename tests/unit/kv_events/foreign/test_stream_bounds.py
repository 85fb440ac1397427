"""ForeignStream's bounds."""

from __future__ import annotations

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
