"""What vLLM and SGLang servers send, read: captured frames, every release's shape, and the odd settings between."""

from __future__ import annotations

from typing import Any

import msgpack
import msgspec
import numpy as np
import pytest

from kv_events import wire
from kv_events.bus.zmq_frames import goodbye
from kv_events.events import BlockStored, EventBatch
from kv_events.foreign.dialects import (
    ForeignBatch,
    ForeignCleared,
    ForeignEvent,
    ForeignRemoved,
    ForeignStored,
    ForeignUnknown,
    decode_foreign,
    dialect_of,
)
from tests.support import golden
from tests.support.releases import RELEASES, Metadata


def plain(event: ForeignEvent) -> Any:
    """An event in a form that compares."""
    if isinstance(event, ForeignStored):
        assert event.token_ids.dtype == np.uint32
        return event._replace(token_ids=tuple(event.token_ids.tolist()))  # type: ignore[arg-type]
    return event


def told(event: Any) -> Any:
    """The same of an event as decoded.json has it: a map, or an array of which the release says what is where."""
    kind, get = event["type"], event.get
    if kind == "AllBlocksCleared":
        return ForeignCleared()
    hashes, medium = tuple(event["block_hashes"]), get("medium") or "GPU"
    if kind == "BlockRemoved":
        return ForeignRemoved(hashes, medium, get("group_idx"))
    extra = [None if keys is None else tuple(keys) for keys in get("extra_keys") or ()]
    return ForeignStored(
        hashes,
        event["parent_block_hash"],
        tuple(event["token_ids"]),  # type: ignore[arg-type]
        event["block_size"],
        medium,
        event["lora_id"],
        get("lora_name"),
        tuple(extra) if any(extra) else None,
        get("cache_salt"),
        get("group_idx"),
        get("kv_cache_spec_kind"),
        get("kv_cache_spec_sliding_window"),
    )


@pytest.mark.parametrize("name", golden.CAPTURES)
def test_captured_frames_say_what_was_decoded_of_them(name: str) -> None:
    """Every batch of every capture, to the last token; an end marker is no batch."""
    messages = golden.capture(name)
    for message in messages:
        if message.decoded is None:
            with pytest.raises(wire.WireError):
                decode_foreign(message.payload)
            continue
        batch = decode_foreign(message.payload)
        ts, events, rank = message.decoded
        assert (batch.ts, batch.rank) == (ts, rank)
        assert [plain(event) for event in batch.events] == [told(event) for event in events]
        assert dialect_of(message.payload) == "foreign"
    assert any(message.decoded for message in messages)


@pytest.mark.parametrize("name", golden.RELEASES)
def test_a_batch_of_each_release_says_the_same(name: str) -> None:
    """The one batch that was encoded with the classes of several releases."""
    payload, fields, (ts, events, rank) = golden.release(name)
    batch = decode_foreign(payload)
    named = [
        event if isinstance(event, dict) else dict(zip(["type", *fields[event[0]]], event, strict=True))
        for event in events
    ]
    assert (batch.ts, batch.rank) == (ts, rank)
    assert [plain(event) for event in batch.events] == [told(event) for event in named]


def batch_of(*events: Any, **changes: Any) -> bytes:
    payload: bytes = msgpack.packb([changes.get("ts", 1.5), list(events), *changes.get("more", [0])])
    return payload


def only(event: Any) -> Any:
    """What a batch with this event alone decodes to."""
    (found,) = decode_foreign(batch_of(event)).events
    return plain(found)


STORED = ["BlockStored", [1, 2], 7, [10, 11, 12, 13], 2, None]
MAP = {"type": "BlockStored", "block_hashes": [1], "parent_block_hash": None, "token_ids": [5], "block_size": 1}


def test_what_a_field_holds() -> None:
    """Every field that is known, in the widest form that a release gives it."""
    event = {
        **MAP,
        "block_hashes": [-(2**63), 2**64 - 1, b"x", bytes(64)],
        "parent_block_hash": bytes(32),
        "token_ids": [0, 2**32 - 1],
        "lora_id": 2**40,
        "medium": "STORAGE",
        "lora_name": "sql",
        "extra_keys": [["salt"], None, [["image", 3], b"\x00\xff", 1.5], []],
        "cache_salt": "tenant-1",
        "group_idx": 0,
        "kv_cache_spec_kind": "sliding_window",
        "kv_cache_spec_sliding_window": 4096,
        "locality": "REMOTE",
        "ownership": {"of": [1]},
        "session_id": "s",
    }
    assert only(event) == ForeignStored(
        block_hashes=(-(2**63), 2**64 - 1, b"x", bytes(64)),
        parent_hash=bytes(32),
        token_ids=(0, 2**32 - 1),  # type: ignore[arg-type]
        block_size=1,
        medium="STORAGE",
        lora_id=2**40,
        lora_name="sql",
        extra_keys=(("salt",), None, (("image", 3), b"\x00\xff", 1.5), ()),
        cache_salt="tenant-1",
        group_idx=0,
        spec_kind="sliding_window",
        sliding_window=4096,
        locality="REMOTE",
    )
    removed = {"type": "BlockRemoved", "block_hashes": [3], "medium": "CPU", "group_idx": 2, "locality": "LOCAL"}
    assert only(removed) == ForeignRemoved((3,), "CPU", 2, "LOCAL")


def test_what_is_missing_or_nil_has_its_default() -> None:
    """In maps and in arrays of every length, down to the hashes alone; no group is told from group 0."""
    bare = ForeignStored((1,), token_ids=())  # type: ignore[arg-type]
    assert only({"type": "BlockStored", "block_hashes": [1]}) == bare
    for length in range(2, 13):
        assert only(["BlockStored", [1], *[None] * 12][:length]) == bare
    nothing = dict.fromkeys(["parent_block_hash", "token_ids", "block_size", "medium", "extra_keys", "cache_salt"])
    assert only({"type": "BlockStored", "block_hashes": [1], **nothing, "group_idx": None}) == bare
    assert only({**MAP, "group_idx": 0}).group_idx == 0
    assert only(["BlockRemoved", [1]]) == only(["BlockRemoved", [1], None, None, None]) == ForeignRemoved((1,))
    assert only({"block_hashes": [], "type": "BlockRemoved"}) == ForeignRemoved(())


def test_what_is_not_known_is_passed_over() -> None:
    """Fields, places, kinds and elements of releases to come, whatever they hold, and text that is no text."""
    deep: Any = []
    for _ in range(100):
        deep = [deep]
    later = {**MAP, "ownership": deep, "news": {1: {2: [3]}}, "when": msgpack.Timestamp(1, 2)}
    assert only(later) == only(MAP)
    assert only([*STORED, "GPU", None, None, 0, "full_attention", None, "LOCAL", deep, {}, 5]).group_idx == 0
    assert only({"type": "BlockPromoted", "block_hashes": "of another kind"}) == ForeignUnknown("BlockPromoted")
    assert only(["BlockMoved", {"x": [1]}, 3]) == ForeignUnknown("BlockMoved")
    assert only(["AllBlocksCleared", "GPU"]) == only({"type": "AllBlocksCleared", "medium": "GPU"}) == ForeignCleared()
    broken = batch_of({**MAP, "news": "????"}).replace(b"????", b"\xff\xfe\xfd\xfc")
    assert [plain(event) for event in decode_foreign(broken).events] == [only(MAP)]
    assert decode_foreign(batch_of(STORED, more=[3, {"later": deep}, None])).rank == 3


def test_batches_of_two_elements_of_more_and_as_maps() -> None:
    """vLLM's first ones had no rank; whole seconds are a time; a tag or names would change nothing."""
    (event,) = decode_foreign(batch_of(STORED)).events
    for payload in (
        msgpack.packb([2, [STORED]]),
        msgpack.packb([2.0, [STORED], None]),
        msgpack.packb(["KVEventBatch", 2, [STORED], None]),
        msgpack.packb({"ts": 2, "events": [STORED], "data_parallel_rank": None}),
        msgpack.packb({"type": "KVEventBatch", "events": [STORED], "ts": 2, "attn_dp_rank": None}),
    ):
        batch = decode_foreign(payload)
        assert (batch.ts, type(batch.ts), batch.rank) == (2.0, float, None)
        assert [plain(each) for each in batch.events] == [plain(event)]
        assert dialect_of(payload) == "foreign"
    assert decode_foreign(msgpack.packb([1.5, []])) == ForeignBatch(1.5, ())
    assert decode_foreign(msgpack.packb({"ts": 2, "events": [], "attn_dp_rank": 4})).rank == 4


def test_sglangs_metadata_in_the_seventh_place() -> None:
    """0.5.18 and 0.5.19 write a map there where the request has a salt or a session; vLLM an adapter's name."""
    release = RELEASES["sglang-0.5.12"]
    stored = release.event("BlockStored")
    salted = msgspec.defstruct("Salted", [("metadata", Metadata)], bases=(stored,), tag="BlockStored", kw_only=True)
    first = (*STORED[1:], "GPU")
    payload = msgspec.msgpack.encode(
        release.batch()(1.5, [salted(*first, metadata=Metadata("tenant-1", "s")), stored(*first)], 0)
    )
    with_salt, without = decode_foreign(payload).events
    assert isinstance(with_salt, ForeignStored)
    assert (with_salt.cache_salt, with_salt.lora_name) == ("tenant-1", None)
    assert plain(with_salt) == plain(without)._replace(cache_salt="tenant-1")
    assert only([*STORED, "GPU", "sql"]).lora_name == "sql"
    assert only([*STORED, "GPU", {}]) == only([*STORED, "GPU"])
    assert only([*STORED, "GPU", {"session_id": "s", "more": [1]}]) == only([*STORED, "GPU"])


def test_sglangs_pairs_of_tokens_where_eagle_drafts() -> None:
    """A page of n pairs is n tokens, the first of each: what follows a token does not change where it stands."""
    pairs = [[10, 11], [11, 12], [12, 13], [13, 14]]
    assert only(["BlockStored", [1, 2], 7, pairs, 2, None]) == only(STORED)
    long = [[at, at + 1] for at in range(9000)]
    assert only({**MAP, "token_ids": long}).token_ids == tuple(range(9000))
    for broken in ([[1, 2], [3]], [[1, 2], 3], [3, [1, 2]], [[1, 2, 3]], [[1, [2]]], [[1, None]], [[]], [[1, 2], []]):
        for values in (broken, [[1, 2]] * 9000 + broken, [1] * 9000 + broken):
            with pytest.raises(wire.WireError):
                decode_foreign(batch_of({**MAP, "token_ids": values}))


def test_an_adapter_that_is_known_by_text() -> None:
    """SGLang numbers adapters with text: it is taken for a name where there is none."""
    assert only([*STORED[:5], "ad-7"])[5:7] == (None, "ad-7")
    assert only({**MAP, "lora_id": "ad-7", "lora_name": "sql"})[5:7] == (None, "sql")
    assert only({**MAP, "lora_id": 7, "lora_name": "sql"})[5:7] == (7, "sql")


def test_extra_keys_in_other_forms() -> None:
    """No block has any: None. A block's only key need not be in an array; maps become pairs."""
    assert only({**MAP, "extra_keys": [None]}).extra_keys is None
    assert only({**MAP, "extra_keys": []}).extra_keys is None
    assert only({**MAP, "extra_keys": ["salt"]}).extra_keys == (("salt",),)
    assert only({**MAP, "extra_keys": [[{"id": "x", "at": 3}]]}).extra_keys == (((("id", "x"), ("at", 3)),),)
    assert only({**MAP, "extra_keys": [[True, [1, [2]]]]}).extra_keys == ((True, (1, (2,))),)


def test_our_own_batches_are_told_from_theirs() -> None:
    """By what is behind the third element; read as theirs they say the same."""
    hashes = np.array([1, 2], dtype=np.uint64)
    ours = EventBatch("w0", 1, 0, (BlockStored(hashes, 7, 2),), bytes(16), 1.5)
    for positional in (False, True):
        payload = wire.encode(ours, positional=positional)
        assert dialect_of(payload) == "rhizome"
        assert [plain(event) for event in decode_foreign(payload).events] == [
            ForeignStored((1, 2), 7, (), 2)  # type: ignore[arg-type]
        ]
    assert dialect_of(goodbye(1, 2)) == "rhizome"
    assert dialect_of(msgpack.packb([1.5, [], 0, "a", "later", "shape", "of", "theirs"])) == "foreign"
    assert dialect_of(msgpack.packb([1.5, [], 0, 1, "of", "theirs", 3])) == "foreign"
    for payload in (b"", b"\xc1", b"\x01", b"\xa5hello", b"\x98\x01", b"\x98" + b"\xc0" * 3):
        with pytest.raises(wire.WireError):
            dialect_of(payload)
