"""Batches as bytes: what others read from ours, what we read back, and what is refused.

Whatever is decoded here is decoded in Python and, where it runs, by the native core, and must come out the same.
"""

from __future__ import annotations

import random
import struct
import tracemalloc
from contextlib import suppress
from typing import Any

import hypothesis.strategies as st
import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings

from kv_events import wire
from kv_events.columns import changes_of
from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, Event, EventBatch, UnknownEvent
from radix.backend import native
from radix.keys import Hashes

needs_native = pytest.mark.skipif(native is None, reason="there is no native core to compare with")

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


def decode(payload: bytes) -> EventBatch:
    """wire.decode, after a look at whether the native core and Python agree. Raises WireError if Python does."""
    received = wire.decode(payload)
    expected = wire.decode_in_python(payload)
    for name in ("worker", "epoch", "seq", "digest", "ts"):
        value = getattr(received, name)
        assert (type(value), value) == (type(getattr(expected, name)), getattr(expected, name))
    columns, right = changes_of(received.events), changes_of(expected.events)
    for name in ("kinds", "tiers", "parents", "ends", "hashes"):
        column = getattr(columns, name)
        assert column.dtype == getattr(right, name).dtype
        assert column.tolist() == getattr(right, name).tolist()
    return received


def is_read_natively(payload: bytes) -> bool:
    return isinstance(wire.decode(payload).events, wire.DecodedEvents)


HASHES = st.lists(st.integers(1, 2**64 - 1), max_size=3).map(lambda each: blocks(*each))
TOKENS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20).map(lambda each: np.array(each, np.uint32))
COMMON_MEDIUMS = st.sampled_from(["GPU", "CPU", "DISK"])


def batches(
    tokens: st.SearchStrategy[Any], mediums: st.SearchStrategy[str], workers: st.SearchStrategy[str]
) -> st.SearchStrategy[EventBatch]:
    events = st.one_of(
        st.builds(BlockStored, HASHES, st.integers(0, 2**64 - 1), st.integers(0, wire.MAX_BLOCK_SIZE), tokens, mediums),
        st.builds(BlockRemoved, HASHES, mediums),
        st.just(AllBlocksCleared()),
    )
    return st.builds(
        EventBatch,
        workers,
        st.integers(1, wire.MAX_COUNT),
        st.integers(0, wire.MAX_COUNT),
        st.lists(events, max_size=5).map(tuple),
        st.binary(min_size=16, max_size=16),
        st.floats(allow_nan=False, allow_infinity=False),
    )


BATCHES = batches(st.none() | TOKENS, COMMON_MEDIUMS | st.text(max_size=20), st.text(min_size=1, max_size=60))
COMMON = batches(st.none(), COMMON_MEDIUMS, st.sampled_from(["w0", "worker-12.svc"]))


@settings(deadline=None)
@given(BATCHES, st.booleans())
def test_what_is_encoded_is_read_back(sent: EventBatch, positional: bool) -> None:
    """Every field of every event, in both encodings, with arrays of the right types."""
    received = decode(wire.encode(sent, positional=positional))
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
    lora_name: str | None
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
    stored, removed = decode(payload).events
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
    events = decode(raw([later, ["BlockMoved", {"x": [1, 2]}, 3], stored(news={"a": [[1]]}), ["AllBlocksCleared", 1]]))
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
    "tokens are nil": raw([stored(token_ids=None)]),
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
    with pytest.raises(wire.WireError, match=r"."):
        wire.decode_in_python(payload)


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
        received = decode(bytes(payload))
    except wire.WireError:
        return
    assert received.epoch >= 1
    assert len(received.digest) == 16


def common(*events: Event, **changes: Any) -> EventBatch:
    """A batch such as our own workers send."""
    return batch(BlockStored(blocks(2**63 + 1, 2**40), 2**62, 16), *events, **changes)


@needs_native
@pytest.mark.parametrize("positional", [False, True])
def test_the_native_core_reads_what_our_own_workers_send(positional: bool) -> None:
    """Stores, removals and clears in every tier; no events; long names; sizes at which memory is taken."""
    for medium in ("GPU", "CPU", "DISK"):
        events = BlockStored(blocks(5, 6), 0, 16, medium=medium), BlockRemoved(blocks(7), medium), AllBlocksCleared()
        assert is_read_natively(wire.encode(common(*events), positional=positional))
    for sent in (batch(), common(worker="w" * 255), common(ts=-0.0), common(epoch=wire.MAX_COUNT, seq=wire.MAX_COUNT)):
        assert is_read_natively(wire.encode(sent, positional=positional))
    for size in range(40):
        chain = np.arange(1, size + 1, dtype=np.uint64) << np.uint64(30)
        payload = wire.encode(batch(*[BlockStored(chain, 7, 16), BlockRemoved(chain)] * size), positional=positional)
        assert is_read_natively(payload)
        decode(payload)


@needs_native
def test_what_is_not_common_is_left_to_python() -> None:
    """Other mediums, kinds, fields and elements, and text that is not ASCII."""
    for payload in (
        wire.encode(common(BlockRemoved(blocks(1), "CPU_PINNED"))),
        wire.encode(common(worker="wörker")),
        raw([{"type": "BlockPromoted"}]),
        raw([stored(group_idx=1)]),
        raw([stored(lora_id=3)]),
        raw([stored(lora_name="x")]),
        raw([{"type": "BlockRemoved", "block_hashes": [1], "block_size": 4}]),
        raw([], further=1),
        raw([{**stored(medium="CPU"), "mediun": None}]).replace(b"mediun", b"medium"),
    ):
        decode(payload)
        assert not is_read_natively(payload)


@needs_native
def test_both_decoders_have_the_same_limits() -> None:
    """At each limit a batch is read natively; a step further it is refused."""
    chunk = np.arange(1, wire.MAX_HASHES_PER_EVENT + 2, dtype=np.uint64) << np.uint64(40)
    cleared = AllBlocksCleared()

    def removals(*sizes: int) -> list[list[Any]]:
        return [["BlockRemoved", chunk[:size].tolist()] for size in sizes]

    most = wire.MAX_HASHES_PER_EVENT
    assert 2 * most == wire.MAX_HASHES_PER_BATCH
    at_and_over = (
        (raw(removals(most)), raw(removals(most + 1))),
        (raw(removals(most, most)), raw(removals(most, most, 1))),
        (wire.encode(batch(*[cleared] * wire.MAX_EVENTS_PER_BATCH)), raw([["AllBlocksCleared"]] * 2**14 + [["x"]])),
        (raw([stored(block_size=wire.MAX_BLOCK_SIZE)]), raw([stored(block_size=wire.MAX_BLOCK_SIZE + 1)])),
        (raw([], epoch=wire.MAX_COUNT), raw([], epoch=wire.MAX_COUNT + 1)),
        (raw([], seq=wire.MAX_COUNT), raw([], seq=wire.MAX_COUNT + 1)),
    )
    for at_limit, over in at_and_over:
        assert is_read_natively(at_limit)
        decode(at_limit)
        with pytest.raises(wire.WireError):
            wire.decode(over)


class Packer:
    """msgpack with every value in any of its encodings, and often one value, or a field more, that is wrong."""

    def __init__(self, chance: random.Random, value: Any) -> None:
        self.chance = chance
        self.odd = 0
        self.pack(value)
        self.odd = chance.choice([0, chance.randint(1, -self.odd)])  # which value, counted from 1

    def pack(self, value: Any) -> bytes:
        self.odd -= 1
        if self.odd == 0 and not isinstance(value, dict):
            value = self.chance.choice([None, 0, 1, -1, 2**63, 1.5, float("nan"), "", "GPU", b"", [], [0], {}])
        match value:
            case bool() | None | float() | bytes():
                packed: bytes = msgpack.packb(value)
                return packed
            case int():
                return self.integer(value)
            case str():
                data = value.encode()
                return self.header(len(data), 0xA0, 31, 0xD9, "BHI") + data
            case list():
                return self.header(len(value), 0x90, 15, 0xDC, "HI") + b"".join(map(self.pack, value))
            case dict():
                fields = [*value.items()]
                if self.chance.random() < 0.5:
                    self.chance.shuffle(fields)
                if fields and self.odd == 0:
                    fields.append((self.chance.choice([*stored(medium="GPU")]), self.chance.choice([None, 1, [1], []])))
                parts = [self.pack(part) for field in fields for part in field]
                return self.header(len(fields), 0x80, 15, 0xDE, "HI") + b"".join(parts)
        raise AssertionError(value)

    def integer(self, value: int) -> bytes:
        short = [bytes([value])] if 0 <= value < 128 else []
        return self.one_of(short + self.numbers(value, 0xCC, "BHIQ") + self.numbers(value, 0xD0, "bhiq"))

    def header(self, size: int, short: int, most: int, code: int, kinds: str) -> bytes:
        return self.one_of(([bytes([short | size])] if size <= most else []) + self.numbers(size, code, kinds))

    def numbers(self, value: int, code: int, kinds: str) -> list[bytes]:
        """`value` as each of these kinds of struct that holds it, behind codes that ascend."""
        ways = []
        for offset, kind in enumerate(kinds):
            with suppress(struct.error):
                ways.append(bytes([code + offset]) + struct.pack(">" + kind, value))
        return ways

    def one_of(self, ways: list[bytes]) -> bytes:
        return ways[0] if self.chance.random() < 0.97 else self.chance.choice(ways)


def structure(sent: EventBatch, positional: bool, chance: random.Random) -> list[Any]:
    """What an encoder packs, with what may be left out left out at times."""
    read = msgpack.unpackb(wire.encode(sent, positional=positional), strict_map_key=False)
    for event in read[1]:
        for name in ("parent_block_hash", "token_ids", "lora_id", "medium"):
            if not positional and name in event and chance.random() < 0.2:
                del event[name]
        if positional and chance.random() < 0.2:
            del event[chance.randint(1, len(event)) :]
    return read


@needs_native
@settings(max_examples=1000, deadline=None)
@given(COMMON, st.booleans(), st.integers(0, 2**32))
def test_both_decoders_agree_whatever_the_encoding(sent: EventBatch, positional: bool, seed: int) -> None:
    """Fields in any order, doubled or left out, numbers and lengths wider than needed, wrong values: the native core
    reads nothing that Python does not, and nothing differently."""
    chance = random.Random(seed)
    value = structure(sent, positional, chance)
    payload = Packer(chance, value).pack(value)
    try:
        decode(payload)
    except wire.WireError:
        assert native.decode_batch(payload) is None


def test_decoded_events_are_a_sequence_like_any_other() -> None:
    """However they were read: length, items, slices, iteration and text."""
    received = decode(wire.encode(common(AllBlocksCleared(), BlockRemoved(blocks(3), "CPU"))))
    assert len(received.events) == 3
    assert [type(event).__name__ for event in received.events] == ["BlockStored", "AllBlocksCleared", "BlockRemoved"]
    assert plain(received.events[-1]) == ("removed", [3], "CPU")
    assert [plain(event) for event in received.events[:1]] == [("stored", [2**63 + 1, 2**40], 2**62, 16, None, "GPU")]
    assert received.events[1] is received.events[1]
    assert "AllBlocksCleared()" in repr(received)
    assert wire.encode(received) == wire.encode(common(AllBlocksCleared(), BlockRemoved(blocks(3), "CPU")))


def test_what_is_too_large_is_not_sent() -> None:
    """The limits hold on both sides, so what one encodes the other decodes."""
    chunk = np.arange(1, wire.MAX_HASHES_PER_EVENT + 1, dtype=np.uint64) << np.uint64(40)
    largest = batch(BlockRemoved(chunk), BlockRemoved(chunk))
    assert wire.fits(largest.events)
    assert len(decode(wire.encode(largest)).events[1].block_hashes) == len(chunk)
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
    assert len(decode(payload).events) == wire.MAX_EVENTS_PER_BATCH


@pytest.mark.parametrize("positional", [False, True])
def test_unknown_events_keep_their_kind(positional: bool) -> None:
    """A recorder writes what it has read: of an event that it does not know, the kind."""
    payload = wire.encode(batch(UnknownEvent("BlockMoved"), STORED), positional=positional)
    assert wire.decode(payload).events[0] == UnknownEvent("BlockMoved")
    assert plain(wire.decode(payload).events[1]) == plain(STORED)
    for kind in ("", "x" * 257, "BlockStored"):
        with pytest.raises(wire.WireError, match="no unknown kind"):
            wire.encode(batch(UnknownEvent(kind)), positional=positional)
    names = [UnknownEvent("x" * 256)] * (wire.MAX_EVENTS_PER_BATCH - 1)
    tokens = np.full(wire.MAX_TOKENS_PER_BATCH, 2**32 - 1, dtype=np.uint32)
    with pytest.raises(wire.WireError, match="too large"):
        wire.encode(batch(BlockStored(blocks(1), 0, 16, tokens), *names), positional=positional)


@needs_native
@pytest.mark.parametrize("positional", [False, True])
def test_prompt_tokens_do_not_slow_a_router_down(positional: bool) -> None:
    """A batch with tokens is read natively, by its columns; whoever looks at an event sees its tokens."""
    payload = wire.encode(THREE, positional=positional)
    assert is_read_natively(payload)
    assert [plain(event) for event in decode(payload).events] == [plain(event) for event in THREE.events]
    most = np.full(wire.MAX_TOKENS_PER_BATCH // 2, 70_000, dtype=np.uint32)
    halves = [BlockStored(blocks(1), 0, 16, most), BlockStored(blocks(2), 1, 16, most)]
    assert is_read_natively(wire.encode(batch(*halves), positional=positional))
    over = raw([stored(token_ids=most.tolist()), stored(token_ids=most.tolist()), stored(token_ids=[1])])
    with pytest.raises(wire.WireError):
        wire.decode(over)
    for token in (2**32, -1, 1.0, None):
        with pytest.raises(wire.WireError):
            wire.decode(raw([stored(token_ids=[1, token])]))


def test_a_payload_has_one_limit_for_both_decoders() -> None:
    """Integers written larger than they need be make one that is too large, and within every other limit."""
    tokens = b"\xdd" + struct.pack(">I", 950_000) + (b"\xcf" + bytes(7) + b"\x05") * 950_000
    payload = raw([stored(token_ids="?")]).replace(b"\xa1?", tokens)
    assert len(payload) > wire.MAX_PAYLOAD_BYTES
    with pytest.raises(wire.WireError, match="bytes: at most"):
        wire.decode(payload)


@pytest.mark.parametrize("field", ["block_hashes", "token_ids"])
def test_arrays_of_empty_arrays_cost_no_more_than_their_bytes(field: str) -> None:
    """A byte each in the payload, 64 in memory: they are not all made before they are refused."""
    count = 2**16 if field == "block_hashes" else 2**20
    payload = raw([stored(**{field: "?"})]).replace(b"\xa1?", b"\xdd" + struct.pack(">I", count) + b"\x90" * count)
    tracemalloc.start()
    with pytest.raises(wire.WireError):
        wire.decode(payload)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * len(payload) + 2**20
