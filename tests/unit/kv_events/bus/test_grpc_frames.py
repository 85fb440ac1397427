"""How batches share the messages of a gRPC stream."""

from __future__ import annotations

import numpy as np
import pytest

from kv_events.bus.grpc import FRAME_BYTES, _frames
from kv_events.events import BlockRemoved
from kv_events.log import EventLog
from rhizome.v1 import worker_pb2 as pb


@pytest.mark.parametrize("blocks", [1, 100, 5_000, 60_000])
def test_every_batch_is_in_one_message_and_messages_are_bounded(blocks: int) -> None:
    """In order, whatever their size; one that is larger than a message should be has one of its own."""
    log = EventLog("w", 1, 16)
    for step in range(40):
        log.append([BlockRemoved(np.arange(2**40 + step, 2**40 + step + blocks, dtype=np.uint64))], 0.0)
    entries = log.read(3, 100)
    frames = [pb.EventFrame.FromString(frame) for frame in _frames(entries)]
    payloads = [payload for frame in frames for payload in (frame.payload, *frame.more)]
    assert payloads == [entry.payload for entry in entries]
    seq = 3
    for frame in frames:
        assert frame.seq == seq
        seq += 1 + len(frame.more)
        assert not frame.more or sum(map(len, (frame.payload, *frame.more))) <= FRAME_BYTES
    size = len(payloads[0])
    assert len(frames) == -(-len(entries) // max(1, FRAME_BYTES // size))
