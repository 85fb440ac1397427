"""Batches as bytes: what others read from ours, what we read back, and what is refused."""

from __future__ import annotations

import random
import tracemalloc
from typing import Any

import hypothesis.strategies as st
import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings

from kv_events import wire
from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventBatch, UnknownEvent
from radix.keys import Hashes

DIGEST = bytes(range(16))


def blocks(*hashes: int) -> Hashes:
    return np.array(hashes, dtype=np.uint64)


def batch(*events: Event, **changes: Any) -> EventBatch:
    fields = {"worker": "w0", "epoch": 3, "seq": 9, "events": events, "digest": DIGEST, "ts": 1.5}
    return EventBatch(**{**fields, **changes})


STORED = BlockStored(blocks(1, 2**64 - 1), 7, 2, np.array([10, 11, 12, 2**32 - 1], dtype=np.uint32), "GPU")
THREE = batch(STORED, BlockRemoved(blocks(1), "CPU"), AllBlocksCleared())


def plain(event: Event) -> tuple[object, ...]:
    """An event in a form that compares."""
    match event:
        case BlockStored():
            tokens = None if event.token_ids is None else event.token_ids.tolist()
            return ("stored", event.block_hashes.tolist(), event.parent_hash, event.block_size, tokens, event.medium)
        case BlockRemoved():
            return ("removed", event.block_hashes.tolist(), event.medium)
        case _:
            return (event,)


HASHES = st.lists(st.integers(1, 2**64 - 1), max_size=20).map(lambda each: blocks(*each))
MEDIUMS = st.text(max_size=20)
EVENTS = st.one_of(
    st.builds(
        BlockStored,
        HASHES,
        st.integers(0, 2**64 - 1),
        st.integers(0, wire.MAX_BLOCK_SIZE),
        st.none() | st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20).map(lambda t: np.array(t, np.uint32)),
        MEDIUMS,
    ),
    st.builds(BlockRemoved, HASHES, MEDIUMS),
    st.just(AllBlocksCleared()),
)
BATCHES = st.builds(
    EventBatch,
    st.text(min_size=1, max_size=60),
    st.integers(1, wire.MAX_COUNT),
    st.integers(0, wire.MAX_COUNT),
    st.lists(EVENTS, max_size=5).map(tuple),
    st.binary(min_size=16, max_size=16),
    st.floats(allow_nan=False, allow_infinity=False),
)


@settings(deadline=None)
@given(BATCHES, st.booleans())
def test_what_is_encoded_is_read_back(sent: EventBatch, positional: bool) -> None:
    """Every field of every event, in both encodings, with arrays of the right types."""
    received = wire.decode(wire.encode(sent, positional=positional))
    for name in ("worker", "epoch", "seq", "digest", "ts"):
        assert getattr(received, name) == getattr(sent, name)
    assert [plain(event) for event in received.events] == [plain(event) for event in sent.events]
    for event in received.events:
        if isinstance(event, BlockStored | BlockRemoved):
            assert event.block_hashes.dtype == np.uint64
        if isinstance(event, BlockStored) and event.token_ids is not None:
            assert event.token_ids.dtype == np.uint32


# vLLM's documented message classes (kv_events.py of its 0.32 and 0.9 releases), written down as msgspec structs.


class MapStored(msgspec.Struct, omit_defaults=True, gc=False, tag="BlockStored"):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None = None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None


class MapRemoved(msgspec.Struct, omit_defaults=True, gc=False, tag="BlockRemoved"):
    block_hashes: list[bytes | int]
    medium: str | None
    group_idx: int | None = None


class MapCleared(msgspec.Struct, omit_defaults=True, gc=False, tag="AllBlocksCleared"):
    pass


class MapBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[MapStored | MapRemoved | MapCleared]
    data_parallel_rank: int | None = None


class ArrayStored(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag="BlockStored"):
    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None


class ArrayRemoved(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag="BlockRemoved"):
    block_hashes: list[int]


class ArrayCleared(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag="AllBlocksCleared"):
    pass


class ArrayBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[ArrayStored | ArrayRemoved | ArrayCleared]
    data_parallel_rank: int | None = None


@pytest.mark.parametrize(("positional", "shape"), [(False, MapBatch), (True, ArrayBatch)])
def test_consumers_of_vllms_events_read_ours(positional: bool, shape: type[Any]) -> None:
    """Its msgspec classes decode our batches; what trails the third element does not disturb them."""
    payload = wire.encode(batch(STORED, BlockStored(blocks(5), 0, 2), *THREE.events[1:]), positional=positional)
    read = msgspec.msgpack.decode(payload, type=shape)
    assert (read.ts, read.data_parallel_rank) == (1.5, 0)
    stored, first, removed, cleared = read.events
    assert stored.block_hashes == [1, 2**64 - 1]
    assert (stored.parent_block_hash, stored.block_size, stored.lora_id) == (7, 2, None)
    assert stored.token_ids == [10, 11, 12, 2**32 - 1]
    assert first.parent_block_hash is None
    assert first.token_ids == [], "prompt tokens stay with the worker unless it is told to publish them"
    assert removed.block_hashes == [1]
    assert type(cleared).__name__.endswith("Cleared")
    if not positional:
        assert (stored.medium, removed.medium) == ("GPU", "CPU")


def test_batches_that_msgspec_wrote_are_read() -> None:
    """Its encoder omits defaults and orders fields its own way; our fields trail the batch."""
    event = MapStored([1, 2], None, [], 16, None, "GPU", lora_name="x", extra_keys=[("salt",), None], group_idx=1)
    payload = msgspec.msgpack.encode([1.5, [event, MapRemoved([3], None)], None, 1, "w", 1, 0, DIGEST, {"more": [1]}])
    stored, removed = wire.decode(payload).events
    assert plain(stored) == ("stored", [1, 2], 0, 16, None, "GPU")
    assert plain(removed) == ("removed", [3], "GPU")


def raw(events: list[Any], **changes: Any) -> bytes:
    fields = {"ts": 1.5, "events": events, "rank": 0, "version": 1, "worker": "w0", "epoch": 3, "seq": 9}
    return msgpack.packb([*{**fields, "digest": DIGEST, **changes}.values()])


def stored(**changes: Any) -> dict[str, Any]:
    fields = {"type": "BlockStored", "block_hashes": [1], "parent_block_hash": None, "token_ids": [], "block_size": 4}
    return {**fields, **changes}


def test_unknown_kinds_and_fields_are_passed_over() -> None:
    """A newer worker's events become UnknownEvent, whatever they hold, and its further fields are skipped."""
    later = {"type": "BlockPromoted", "block_hashes": "not even a list", "deep": [[{"a": [1]}]]}
    events = wire.decode(
        raw([later, ["BlockMoved", {"x": [1, 2]}, 3], stored(news={"a": [[1]]}), ["AllBlocksCleared", 1]])
    )
    assert events.events[:2] == (UnknownEvent("BlockPromoted"), UnknownEvent("BlockMoved"))
    assert plain(events.events[2]) == ("stored", [1], 0, 4, None, "GPU")
    assert events.events[3] == AllBlocksCleared()


REFUSED = {
    "nothing": b"",
    "not an array": msgpack.packb({"ts": 1}),
    "a batch of another kind of worker": msgpack.packb([1.5, [], 0]),
    "torn": wire.encode(THREE)[:-1],
    "something follows": wire.encode(THREE) + b"\xc0",
    "ts is text": raw([], ts="now"),
    "ts is not a number": raw([], ts=float("nan")),
    "events is a map": raw({}),
    "another version": raw([], version=2),
    "no worker": raw([], worker=""),
    "worker is bytes": raw([], worker=b"w0"),
    "worker is long": raw([], worker="w" * 257),
    "epoch zero": raw([], epoch=0),
    "epoch is true": raw([], epoch=True),
    "epoch is huge": raw([], epoch=2**63),
    "seq is negative": raw([], seq=-1),
    "digest is short": raw([], digest=b"short"),
    "digest is text": raw([], digest="0" * 16),
    "an event is a number": raw([5]),
    "an event is empty": raw([[]]),
    "an event is an empty map": raw([{}]),
    "no type": raw([{"block_hashes": [1]}]),
    "type is a number": raw([{"type": 1}]),
    "no hashes": raw([{"type": "BlockRemoved"}]),
    "no block size": raw([["BlockStored", [1], None, []]]),
    "a hash is negative": raw([stored(block_hashes=[-5])]),
    "a hash is zero": raw([stored(block_hashes=[0])]),
    "a hash is a float": raw([stored(block_hashes=[1.0])]),
    "a hash is a boolean": raw([stored(block_hashes=[True])]),
    "a hash is bytes": raw([stored(block_hashes=[b"12345678"])]),
    "a hash is a list": raw([stored(block_hashes=[[]])]),
    "hashes are nil": raw([stored(block_hashes=None)]),
    "the parent is negative": raw([stored(parent_block_hash=-1)]),
    "a token is too large": raw([stored(token_ids=[2**32])]),
    "a token is negative": raw([stored(token_ids=[-1])]),
    "block size is huge": raw([stored(block_size=2**20 + 1)]),
    "medium is a number": raw([stored(medium=1)]),
    "too many events": raw([["AllBlocksCleared"]] * (wire.MAX_EVENTS_PER_BATCH + 1)),
    "too many hashes in an event": raw([["BlockRemoved", [1] * (wire.MAX_HASHES_PER_EVENT + 1)]]),
    "too many hashes in all": raw([["BlockRemoved", [1] * 60_000]] * 3),
    "too many tokens": raw([stored(token_ids=[1] * 600_000)] * 2),
    "too many fields": raw([{**stored(), **{str(n): n for n in range(40)}}]),
    "too many elements": msgpack.packb([1.5, [], 0, 1, "w0", 3, 9, DIGEST, *range(40)]),
    "too large": bytes(wire.MAX_PAYLOAD_BYTES + 1),
    "a reserved byte": b"\xc1" * 8,
    "text is not UTF-8": raw([], worker="????").replace(b"????", b"\xff\xfe\xfd\xfc"),
    "deep": b"\x91" * 100_000,
    "deep within a field": raw([stored(extra="?")]).replace(b"\xa1?", b"\x91" * 100_000),
    "deep where a scalar is due": raw([stored(block_size="?")]).replace(b"\xa1?", b"\x91" * 100_000),
    "an extension type": raw([], ts=msgpack.ExtType(5, b"abc")),
    "a timestamp": raw([], ts=msgpack.Timestamp(1, 2)),
}


@pytest.mark.parametrize("payload", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_a_batch_is_refused(payload: bytes) -> None:
    """With WireError, which says what was wrong, and nothing else."""
    with pytest.raises(wire.WireError, match=r"."):
        wire.decode(payload)


@pytest.mark.parametrize(
    "header", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdc\xff\xff", b"\xc6\xff\xff\xff\xff"]
)
def test_claimed_sizes_allocate_nothing(header: bytes) -> None:
    """Headers that promise gigabytes, nested a thousand deep or in a field, cost no more than the bytes that came."""
    bombs = [header * 1000, b"\x98" + header * 500, b"\x98\x01" + header, b"\x98\x01\x91\x82\xa1x" + header * 500]
    bombs.append(raw([stored(block_hashes="?")]).replace(b"\xa1?", header * 100))
    bombs.append(raw([stored(block_size="?")]).replace(b"\xa1?", header * 100))
    tracemalloc.start()
    for bomb in bombs:
        with pytest.raises(wire.WireError):
            wire.decode(bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_raise_wire_error_only(payload: bytes) -> None:
    """Any bytes decode or raise WireError."""
    with pytest.raises(wire.WireError):
        wire.decode(payload)


@settings(max_examples=500, deadline=None)
@given(BATCHES, st.booleans(), st.randoms(use_true_random=False))
def test_damaged_batches_raise_wire_error_only(sent: EventBatch, positional: bool, damage: random.Random) -> None:
    """A batch with bytes changed, cut out or doubled decodes to some batch or raises WireError."""
    payload = bytearray(wire.encode(sent, positional=positional))
    for _ in range(damage.randint(1, 4)):
        at = damage.randrange(len(payload))
        match damage.randrange(3):
            case 0:
                payload[at] = damage.choice([damage.randrange(256), 0xDD, 0xDF, 0xC1, 0xC7, 0x91])
            case 1:
                del payload[at : at + damage.randint(1, 5)]
            case 2:
                payload[at:at] = payload[at : at + damage.randint(1, 5)]
        if not payload:
            break
    try:
        received = wire.decode(bytes(payload))
    except wire.WireError:
        return
    assert received.epoch >= 1
    assert len(received.digest) == 16


def test_what_is_too_large_is_not_sent() -> None:
    """The limits hold on both sides, so what one encodes the other decodes."""
    chunk = np.arange(1, wire.MAX_HASHES_PER_EVENT + 1, dtype=np.uint64) << np.uint64(40)
    largest = batch(BlockRemoved(chunk), BlockRemoved(chunk))
    assert wire.fits(largest.events)
    assert len(wire.decode(wire.encode(largest)).events[1].block_hashes) == len(chunk)
    for events in (
        [BlockRemoved(chunk)] * 3,
        [BlockRemoved(np.append(chunk, chunk[:1]))],
        [AllBlocksCleared()] * (wire.MAX_EVENTS_PER_BATCH + 1),
        [BlockStored(blocks(1), 0, 16, np.zeros(wire.MAX_TOKENS_PER_BATCH + 1, dtype=np.uint32))],
    ):
        assert not wire.fits(events)
        with pytest.raises(wire.WireError, match="too large"):
            wire.encode(batch(*events))


def test_the_largest_batch_fits_a_payload() -> None:
    """All limits reached at once stay below the limit of the payload."""
    chunk = np.arange(1, wire.MAX_HASHES_PER_EVENT + 1, dtype=np.uint64) << np.uint64(40)
    tokens = np.full(wire.MAX_TOKENS_PER_BATCH, 2**32 - 1, dtype=np.uint32)
    largest = [BlockStored(chunk, 1, 16, tokens), BlockRemoved(chunk)]
    filler = [AllBlocksCleared()] * (wire.MAX_EVENTS_PER_BATCH - 2)
    payload = wire.encode(batch(*largest, *filler, worker="w" * 255))
    assert len(payload) <= wire.MAX_PAYLOAD_BYTES
    assert len(wire.decode(payload).events) == wire.MAX_EVENTS_PER_BATCH


def test_unknown_events_are_not_sent() -> None:
    """Nobody can know what they would say."""
    with pytest.raises(wire.WireError, match="unknown kind"):
        wire.encode(batch(UnknownEvent("x")))
