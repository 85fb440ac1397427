"""What foreign bytes may not do: other errors than WireError, sizes over the limits, memory beyond their own size."""

from __future__ import annotations

import random
import struct
import tracemalloc
from contextlib import suppress
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_events import wire
from kv_events.events import BlockStored
from kv_events.foreign import dialects, fields
from kv_events.foreign.dialects import ForeignRemoved, ForeignStored, decode_foreign, dialect_of
from kv_events.foreign.mapper import IdentityMapper, KeyMapper
from tests.support import golden

GOLDEN = golden.payloads()
STORED = {"type": "BlockStored", "block_hashes": [1], "parent_block_hash": None, "token_ids": [5], "block_size": 1}
REMOVED = {"type": "BlockRemoved", "block_hashes": [1]}


def batch_of(*events: Any, ts: Any = 1.5, rank: Any = 0) -> bytes:
    payload: bytes = msgpack.packb([ts, list(events), rank])
    return payload


def stored(**changes: Any) -> bytes:
    return batch_of({**STORED, **changes})


def with_bytes(field: str, data: bytes, **changes: Any) -> bytes:
    """A batch of one event, of which a field is these bytes."""
    return stored(**changes, **{field: "?"}).replace(b"\xa1?", data)


REFUSED = {
    "nothing": b"",
    "an end marker": bytes(0),
    "a number": b"\x01",
    "text": msgpack.packb("hello"),
    "an empty array": b"\x90",
    "one element": msgpack.packb([1.5]),
    "no events": msgpack.packb([1.5, None, 0]),
    "events are a map": msgpack.packb([1.5, {}, 0]),
    "an empty map": b"\x80",
    "a map without events": msgpack.packb({"ts": 1.5}),
    "a map without a time": msgpack.packb({"events": []}),
    "something follows": batch_of() + b"\xc0",
    "ts is text": batch_of(ts="now"),
    "ts is nil": batch_of(ts=None),
    "ts is true": batch_of(ts=True),
    "ts is not a number": batch_of(ts=float("nan")),
    "ts is infinite": batch_of(ts=float("inf")),
    "ts is a timestamp": batch_of(ts=msgpack.Timestamp(1, 2)),
    "rank is negative": batch_of(rank=-1),
    "rank is huge": batch_of(rank=2**31),
    "rank is text": batch_of(rank="0"),
    "rank is true": batch_of(rank=True),
    "an event is nil": batch_of(None),
    "an event is a number": batch_of(5),
    "an event is text": batch_of("BlockStored"),
    "an event is empty": batch_of([]),
    "an event is an empty map": batch_of({}),
    "no type": batch_of({"block_hashes": [1]}),
    "type is a number": batch_of([1, [1]]),
    "type is an array": batch_of([["BlockStored"], [1]]),
    "type is an array in a map": batch_of({"type": []}),
    "type is bytes": batch_of([b"BlockStored", [1]]),
    "type is long": batch_of(["x" * 257]),
    "no hashes": batch_of({"type": "BlockRemoved"}),
    "hashes are nil": batch_of(["BlockRemoved", None]),
    "hashes are a number": batch_of(["BlockRemoved", 1]),
    "hashes are bytes": batch_of(["BlockRemoved", b"12345678"]),
    "hashes are a map": batch_of(["BlockRemoved", {"a": 1}]),
    "a hash is a float": stored(block_hashes=[1.0]),
    "a hash is true": stored(block_hashes=[True]),
    "a hash is nil": stored(block_hashes=[None]),
    "a hash is text": stored(block_hashes=["12345678"]),
    "a hash is an array": stored(block_hashes=[[1]]),
    "a hash has no bytes": stored(block_hashes=[b""]),
    "a hash has 65 bytes": stored(block_hashes=[bytes(65)]),
    "the parent is a float": stored(parent_block_hash=1.5),
    "the parent is text": stored(parent_block_hash="1"),
    "the parent has 65 bytes": stored(parent_block_hash=bytes(65)),
    "tokens are a number": stored(token_ids=5),
    "tokens are text": stored(token_ids="hello"),
    "a token is negative": stored(token_ids=[-1]),
    "a token is too large": stored(token_ids=[2**32]),
    "a token is the largest integer": stored(token_ids=[2**64 - 1]),
    "a token is a float": stored(token_ids=[1, 2.0]),
    "a token is true": stored(token_ids=[True]),
    "a token is nil": stored(token_ids=[None]),
    "block size is negative": stored(block_size=-1),
    "block size is huge": stored(block_size=2**20 + 1),
    "block size is a float": stored(block_size=16.0),
    "medium is a number": stored(medium=1),
    "medium is long": stored(medium="x" * 257),
    "medium of a removal is a number": batch_of({**REMOVED, "medium": 1}),
    "lora_id is a float": stored(lora_id=1.5),
    "lora_name is a number": stored(lora_name=7),
    "lora_name is long": stored(lora_name="x" * (4001)),
    "cache_salt is bytes": stored(cache_salt=b"salt"),
    "cache_salt is long": stored(cache_salt="x" * (4001)),
    "a salt in the seventh place is a number": batch_of(
        ["BlockStored", [1], None, [], 1, None, None, {"cache_salt": 1}]
    ),
    "extra keys are text": stored(extra_keys="salt"),
    "extra keys are a map": stored(extra_keys={"a": 1}),
    "extra keys are nested deep": stored(extra_keys=[[[[[[1]]]]]]),
    "extra keys hold a timestamp": stored(extra_keys=[[msgpack.Timestamp(1, 2)]]),
    "too many fields": stored(**{str(n): n for n in range(64)}),
    "too many places": batch_of(["BlockStored", [1], *[None] * 63]),
    "too many elements": msgpack.packb([1.5, [], *[0] * 63]),
    "too many events": batch_of(*[["AllBlocksCleared"]] * (dialects.MAX_EVENTS_PER_BATCH + 1)),
    "too many hashes in an event": batch_of(["BlockRemoved", [1] * (dialects.MAX_HASHES_PER_BATCH + 1)]),
    "too many hashes in all": batch_of(*[["BlockRemoved", [1] * 15_000]] * 18),
    "too many tokens in an event": stored(token_ids=[1] * (wire.MAX_TOKENS_PER_BATCH + 1)),
    "too many tokens in all": batch_of(*[{**STORED, "token_ids": [1] * 15_000}] * 70),
    "too many extra keys": stored(extra_keys=[None] * (dialects.MAX_EXTRA_KEYS_PER_EVENT + 1)),
    "too large extra keys": stored(extra_keys=[["x" * 100]] * 5_300),
    "too large extra keys in all": batch_of(*[{**STORED, "extra_keys": [["x" * 10_000]]}] * 53),
    "too large": bytes(wire.MAX_PAYLOAD_BYTES + 1),
    "a value that should be small is large": stored(parent_block_hash=bytes(20_000)),
    "a reserved byte": b"\xc1" * 8,
    "a reserved byte in an event": with_bytes("news", b"\xc1"),
    "text that is not UTF-8": with_bytes("cache_salt", b"\xa4\xff\xfe\xfd\xfc"),
    "an extension type for text": with_bytes("medium", b"\xd4\x05\x00"),
    "deep": b"\x91" * 100_000,
    "deep in a field": with_bytes("news", b"\x91" * 100_000),
    "deep where a scalar is due": with_bytes("block_size", b"\x91" * 100_000),
    "deep among hashes": with_bytes("block_hashes", b"\x91" * 100_000),
    "deep among extra keys": with_bytes("extra_keys", b"\x91" * 100_000),
}


@pytest.mark.parametrize("payload", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_batch_is_refused(payload: bytes) -> None:
    """With WireError, which says what was wrong in a line."""
    with pytest.raises(wire.WireError, match=r".") as refused:
        decode_foreign(payload)
    assert len(str(refused.value)) < 300
    with suppress(wire.WireError):
        dialect_of(payload)


def test_every_limit_can_be_reached() -> None:
    """A step below what is refused above is read."""
    hashes, tokens = dialects.MAX_HASHES_PER_BATCH, wire.MAX_TOKENS_PER_BATCH
    assert len(decode_foreign(batch_of(*[["AllBlocksCleared"]] * dialects.MAX_EVENTS_PER_BATCH)).events) == 2**16
    (event,) = decode_foreign(stored(block_hashes=[2**64 - 1] * hashes)).events
    assert isinstance(event, ForeignStored)
    assert len(event.block_hashes) == hashes
    (event,) = decode_foreign(stored(token_ids=[2**32 - 1] * tokens, extra_keys=[None] * 2**16)).events
    assert isinstance(event, ForeignStored)
    assert event.token_ids.tolist() == [2**32 - 1] * tokens
    assert event.extra_keys is None
    pages = [["BlockStored", [at], at - 1, [at], 1, None] for at in range(2**15)]  # SGLang with pages of one token
    assert len(decode_foreign(batch_of(*pages)).events) == 2**15
    decode_foreign(stored(lora_name="\U0001f40d" * 4000, cache_salt="x" * 4000))
    decode_foreign(batch_of(*[{**STORED, "extra_keys": [["x" * 10_000]]}] * 52))
    decode_foreign(batch_of(*[{**STORED, "extra_keys": [["x" * 20_000]]}] * 53))
    decode_foreign(stored(extra_keys=[["x" * 100]] * 5_000))
    decode_foreign(stored(block_size=2**20, **{str(n): n for n in range(59)}))


@pytest.mark.parametrize("padding", [0, 1 << 15])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("group_idx", -1),
        ("group_idx", 2**31),
        ("group_idx", "0"),
        ("kv_cache_spec_kind", 1),
        ("kv_cache_spec_kind", "x" * 257),
        ("kv_cache_spec_kind", ["full_attention"]),
        ("kv_cache_spec_sliding_window", -1),
        ("kv_cache_spec_sliding_window", "x" * 20_000),
        ("locality", 1),
        ("locality", {"node": "b"}),
        ("lora_id", 1.5),
        ("lora_id", msgpack.Timestamp(1, 2)),
        ("lora_id", msgpack.ExtType(5, bytes(20_000))),
    ],
)
def test_an_odd_field_that_no_key_depends_on_does_not_cost_the_batch(field: str, value: Any, padding: int) -> None:
    """It is counted and left out, in stores and removals; a store that might claim too much for it claims nothing."""
    told = {**STORED, "lora_name": "sql", "later": "x" * padding}
    plain, odd = decode_foreign(batch_of(told, {**told, field: value})).events
    assert isinstance(plain, ForeignStored)
    assert isinstance(odd, ForeignStored)
    assert odd.odd == 1
    unsure = {"kv_cache_spec_kind": {"spec_kind": "?"}, "locality": {"locality": "REMOTE"}}.get(field, {})
    assert repr(odd) == repr(plain._replace(odd=1, **unsure))
    for mapper in (IdentityMapper(), KeyMapper("m", 1, adapter="sql")):
        assert bool(mapper.map(odd)) is not bool(unsure)
        assert mapper.counts.odd == 1
    (removal,) = decode_foreign(batch_of({**REMOVED, "later": "x" * padding, field: value})).events
    assert removal == ForeignRemoved((1,), odd=int(field in ("group_idx", "locality")))


def test_large_extra_keys_of_a_block_make_it_no_plain_prompts() -> None:
    """An embedding, say: the batch is read, the block's keys are its own, and those of the blocks around it right."""
    tokens = {"block_hashes": [1, 2, 3], "token_ids": [5, 6, 7]}

    def keys(*extra_keys: Any) -> list[int]:
        (event,) = decode_foreign(stored(**tokens, extra_keys=extra_keys)).events
        mapped = [event for event in KeyMapper("m", 1).map(event) if isinstance(event, BlockStored)]
        return [int(block) for event in mapped for block in event.block_hashes]

    plain, large, other = keys(None, None, None), keys(None, ["x" * 20_000], None), keys(None, ["y" * 20_000], None)
    assert large == keys(None, ["x" * 20_000], None)
    assert plain[0] == large[0] == other[0]
    assert len({*plain, *large, *other}) == 7
    assert plain[0] != keys(["x" * 20_000], None, None)[0], "it is no tenant, either"


def test_a_large_event_is_read_like_a_small_one() -> None:
    """Prefills of thousands of blocks, with bytes for hashes and keys for each block."""
    count = 6000
    event = {
        **STORED,
        "block_hashes": [at.to_bytes(32, "big") for at in range(1, count + 1)],
        "parent_block_hash": bytes(32),
        "token_ids": list(range(16 * count)),
        "block_size": 16,
        "extra_keys": [["salt"], *[[["image", -at]] if at % 2 else None for at in range(1, count)]],
        "group_idx": 1,
        "news": [{"of": "a later release"}] * count,
    }
    (large,) = decode_foreign(batch_of(event)).events
    assert isinstance(large, ForeignStored)
    expected = fields.event_of(event)
    assert isinstance(expected, ForeignStored)
    assert np.array_equal(large.token_ids, expected.token_ids)
    assert large._replace(token_ids=None) == expected._replace(token_ids=None)  # type: ignore[arg-type]
    names = list(fields.POSITIONS["BlockStored"])
    (same,) = decode_foreign(batch_of(["BlockStored", *[event.get(name) for name in names], event["news"]])).events
    assert isinstance(same, ForeignStored)
    assert same._replace(token_ids=None) == expected._replace(token_ids=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", GOLDEN)
def test_a_frame_cut_off_anywhere_is_refused(name: str) -> None:
    """Each length that is not the whole."""
    payload = GOLDEN[name]
    for length in range(len(payload)):
        with pytest.raises(wire.WireError):
            decode_foreign(payload[:length])
    for longer in (payload + b"\x00", payload + payload):
        with pytest.raises(wire.WireError):
            decode_foreign(longer)


@pytest.mark.parametrize("name", [name for name, payload in GOLDEN.items() if len(payload) < 400])
def test_a_frame_with_any_bit_flipped_is_read_or_refused(name: str) -> None:
    """And what is read of it stays within the types that are promised."""
    payload = GOLDEN[name]
    for at in range(8 * len(payload)):
        damaged = bytearray(payload)
        damaged[at // 8] ^= 1 << at % 8
        try:
            batch = decode_foreign(bytes(damaged))
        except wire.WireError:
            continue
        check(batch)


def check(batch: dialects.ForeignBatch) -> None:
    """That a batch is what its types say."""
    assert type(batch.ts) is float
    assert batch.rank is None or 0 <= batch.rank < 2**31
    for event in batch.events:
        if isinstance(event, ForeignStored):
            assert event.token_ids.dtype == np.uint32
            assert event.token_ids.ndim == 1
            assert 0 <= event.block_size <= 2**20
            hash(event._replace(token_ids=None))  # type: ignore[arg-type] # mappers keep them in sets
        if not isinstance(event, dialects.ForeignCleared | dialects.ForeignUnknown):
            assert all(
                -(2**63) <= each < 2**64 if isinstance(each, int) else 1 <= len(each) <= 64
                for each in event.block_hashes
            )
            assert type(event.medium) is str


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(GOLDEN)), st.randoms(use_true_random=False))
def test_damaged_frames_are_read_or_refused(name: str, damage: random.Random) -> None:
    """Bytes changed, cut out, doubled, or taken from another frame."""
    payload = bytearray(GOLDEN[name])
    for _ in range(damage.randint(1, 4)):
        at, length = damage.randrange(len(payload)), damage.randint(1, 9)
        match damage.randrange(4):
            case 0:
                payload[at] = damage.choice([damage.randrange(256), 0xDD, 0xDF, 0xC1, 0xC7, 0x91, 0x81, 0xC0])
            case 1:
                del payload[at : at + length]
            case 2:
                payload[at:at] = payload[at : at + length]
            case 3:
                other = GOLDEN[damage.choice(sorted(GOLDEN))]
                start = damage.randrange(len(other))
                payload[at : at + length] = other[start : start + length]
        if not payload:
            break
    for read in (decode_foreign, dialect_of):
        try:
            found = read(bytes(payload))
        except wire.WireError:
            continue
        if isinstance(found, dialects.ForeignBatch):
            check(found)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_raise_wire_error_only(payload: bytes) -> None:
    """As a batch, and as an event of one."""
    for data in (payload, b"\x93\x01\x91" + payload + b"\x00"):
        for read in (decode_foreign, dialect_of):
            try:
                read(data)
            except wire.WireError:
                continue


def long_array(count: int, element: bytes) -> bytes:
    return b"\xdd" + struct.pack(">I", count) + count * element


BOMBS = {
    "empty arrays in a field": with_bytes("news", long_array(2**20, b"\x90")),
    "empty maps in a field": with_bytes("news", long_array(2**20, b"\x80")),
    "small maps in a field": with_bytes("news", long_array(2**18, b"\x81\xa0\xc0")),
    "empty arrays for tokens": with_bytes("token_ids", long_array(2**20, b"\x90")),
    "empty maps for tokens": with_bytes("token_ids", long_array(2**20, b"\x80")),
    "pairs, and a break": with_bytes("token_ids", long_array(2**18, b"\x92\x01\x02") + b"\xc1"),
    "pairs of empty arrays": with_bytes("token_ids", long_array(2**18, b"\x92\x90\x90")),
    "empty arrays for hashes": with_bytes("block_hashes", long_array(2**18, b"\x90")),
    "one-byte hashes": with_bytes("block_hashes", long_array(2**18, b"\xc4\x01x")),
    "empty extra keys": with_bytes("extra_keys", long_array(2**14, b"\x90")),
    "small extra keys": with_bytes("extra_keys", long_array(2**14, b"\x92\x01\x91\x02")),
    "maps for extra keys": with_bytes("extra_keys", long_array(2**14, b"\x81\xa0\xc0")),
    "nested extra keys": with_bytes("extra_keys", long_array(2**14, b"\x91\x90")),
    "extra keys of extra keys": with_bytes("extra_keys", long_array(8, b"\xdc\x10\x00" + b"\x91\x90" * 2**12)),
    "empty arrays for events": b"\x93\x01" + long_array(2**16, b"\x90") + b"\x00",
    "events of an unknown kind": b"\x93\x01" + long_array(2**14, b"\x91\xa2ab") + b"\x00",
    "maps of an unknown kind": b"\x93\x01" + long_array(2**14, b"\x81\xa4type\xa2ab") + b"\x00",
    "small removals": b"\x93\x01" + long_array(2**14, b"\x92\xacBlockRemoved\x91\x01") + b"\x00",
    "small stores": b"\x93\x01" + long_array(2**14, b"\x92\xabBlockStored\x90") + b"\x00",
    "empty arrays for elements": b"\x94\x01\x90\x00" + long_array(2**20, b"\x90"),
    "empty arrays for a name": b"\x93\x01\x91\x81" + long_array(2**18, b"\x90") + b"\xc0\x00",
    "long text where none is due": stored(medium="x" * 2**20),
    **{
        f"{header.hex()} nested": with_bytes("news", header * 1000)
        for header in (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdc\xff\xff", b"\xc6\xff\xff\xff\xff")
    },
    **{
        f"{field} of {header.hex()}": with_bytes(field, header)
        for header in (
            b"\xdd\xff\xff\xff\xff",
            b"\xdd\x00\x0f\xff\xff",
            b"\xdf\xff\xff\xff\xff",
            b"\xc6\xff\xff\xff\xff",
        )
        for field in ("block_hashes", "token_ids", "extra_keys", "medium", "parent_block_hash")
    },
}


@pytest.mark.parametrize("payload", BOMBS.values(), ids=BOMBS.keys())
def test_no_bytes_cost_more_than_a_small_multiple_of_themselves(payload: bytes) -> None:
    """Containers of a byte are 64 bytes in Python, maps of three are 232: they are never all made at once, and of what
    stays of them there is a limit."""
    tracemalloc.start()
    try:
        for read in (decode_foreign, dialect_of):
            try:
                read(payload)
            except wire.WireError:
                continue
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 * len(payload) + 2**22


@pytest.mark.parametrize("padding", [0, 1 << 16])
@pytest.mark.parametrize("type_first", [True, False])
def test_a_field_that_a_kind_does_not_have_is_passed_over(padding: int, type_first: bool) -> None:
    """Whatever is in it, wherever the type stands, and in events that are read field by field, too."""
    nested: Any = 1
    for _ in range(50):
        nested = [nested]
    kind = {"type": "BlockRemoved"}
    rest = {"extra_keys": nested, "later": "x" * padding, "block_hashes": [1]}
    event = kind | rest if type_first else rest | kind
    batch = decode_foreign(msgpack.packb([1.5, [event], 0]))
    assert batch.events == (ForeignRemoved((1,)),)
