"""Batches of every release, made up at random: written by msgspec with its classes, or in any encoding of msgpack."""

from __future__ import annotations

import random
import struct
from functools import partial
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kv_events import wire
from kv_events.foreign import dialects
from kv_events.foreign.dialects import (
    ForeignCleared,
    ForeignEvent,
    ForeignRemoved,
    ForeignStored,
    ForeignUnknown,
    decode_foreign,
)
from kv_events.foreign.fields import event_of
from tests.support import golden
from tests.support.releases import RELEASES, Release


@pytest.mark.parametrize("name", golden.RELEASES)
def test_the_table_of_releases_is_theirs(name: str) -> None:
    """Fields as listed, and bytes as written, with the classes of the releases themselves."""
    payload, fields, _ = golden.release(name)
    release = RELEASES[name]
    for kind in ("BlockStored", "BlockRemoved", "AllBlocksCleared"):
        assert list(release.event(kind).__struct_fields__) == fields[kind]
    assert list(release.batch().__struct_fields__) == fields["KVEventBatch"]
    assert msgspec.msgpack.encode(msgspec.msgpack.decode(payload, type=release.batch())) == payload


INTEGERS = st.integers(-(2**63), 2**64 - 1)
HASHES = INTEGERS | st.binary(min_size=1, max_size=64)
TEXT = st.text(max_size=20)
SCALARS = st.none() | st.booleans() | INTEGERS | st.floats(allow_nan=False) | TEXT | st.binary(max_size=40)
KEYS = st.lists(SCALARS | st.lists(SCALARS, max_size=2), max_size=3)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "block_hashes": st.lists(HASHES, max_size=4),
    "parent_block_hash": st.none() | HASHES,
    "token_ids": st.lists(st.integers(0, 2**32 - 1), max_size=20),
    "block_size": st.integers(0, wire.MAX_BLOCK_SIZE),
    "lora_id": st.none() | INTEGERS,
    "medium": st.none() | st.sampled_from(["GPU", "CPU", "STORAGE", "CPU_PINNED", "DISK", "EXTERNAL"]) | TEXT,
    "lora_name": st.none() | TEXT,
    "extra_keys": st.none() | st.lists(st.none() | KEYS, max_size=4),
    "group_idx": st.none() | st.integers(0, 2**31 - 1),
    "kv_cache_spec_kind": st.none() | st.sampled_from(["full_attention", "sliding_window", "mamba"]) | TEXT,
    "kv_cache_spec_sliding_window": st.none() | st.integers(0, 2**31 - 1),
    "locality": st.none() | st.sampled_from(["LOCAL", "REMOTE"]),
    "ownership": st.none() | SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(TEXT, SCALARS, max_size=2),
    "session_id": st.none() | TEXT,
    "cache_salt": st.none() | TEXT,
}


def events_of(release: Release) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    """Events of a release, as their kind and their fields, in order."""
    each = []
    for kind in ("BlockStored", "BlockRemoved", "AllBlocksCleared"):
        names = release.event(kind).__struct_fields__
        values = st.tuples(*(VALUES[name] for name in names))
        each.append(st.tuples(st.just(kind), values.map(partial(_named, names))))
    return st.one_of(each)


def _named(names: tuple[str, ...], values: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(names, values, strict=True))


EVENTS = {name: events_of(release) for name, release in RELEASES.items()}


def expected(kind: str, fields: dict[str, Any]) -> ForeignEvent:
    """What such an event says."""
    get = fields.get
    medium = "GPU" if get("medium") is None else fields["medium"]
    if kind == "AllBlocksCleared":
        return ForeignCleared()
    if kind == "BlockRemoved":
        return ForeignRemoved(tuple(fields["block_hashes"]), medium, get("group_idx"), get("locality"))
    keys = get("extra_keys")
    return ForeignStored(
        tuple(fields["block_hashes"]),
        fields["parent_block_hash"],
        fields["token_ids"],
        fields["block_size"],
        medium,
        fields["lora_id"],
        get("lora_name"),
        tuple(map(frozen, keys)) if keys and any(keys) else None,
        get("cache_salt"),
        get("group_idx"),
        get("kv_cache_spec_kind"),
        get("kv_cache_spec_sliding_window"),
        get("locality"),
    )


def frozen(value: Any) -> Any:
    return tuple(map(frozen, value)) if isinstance(value, list) else value


def plain(event: ForeignEvent) -> ForeignEvent:
    return event._replace(token_ids=event.token_ids.tolist()) if isinstance(event, ForeignStored) else event  # type: ignore[arg-type]


def same(event: ForeignEvent, other: ForeignEvent) -> bool:
    """Whether both say the same, in the same types: 1, 1.0 and True are not one."""
    return repr(event) == repr(other)


class Odd:
    """msgpack with every value in any encoding that holds it, and strings of any width."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance

    def pack(self, value: Any) -> bytes:
        match value:
            case bool() | None:
                return msgpack.packb(value)  # type: ignore[no-any-return]
            case float():
                single = struct.unpack(">f", struct.pack(">f", value))[0] if abs(value) < 1e30 else None
                narrow = single == value and self.chance.random() < 0.5
                return b"\xca" + struct.pack(">f", value) if narrow else b"\xcb" + struct.pack(">d", value)
            case int():
                return self.integer(value)
            case str():
                return self.sized(value.encode(), [(0xD9, "B"), (0xDA, "H"), (0xDB, "I")], 0xA0, 32)
            case bytes():
                return self.sized(value, [(0xC4, "B"), (0xC5, "H"), (0xC6, "I")], 0, 0)
            case list() | tuple():
                return self.header(len(value), [(0xDC, "H"), (0xDD, "I")], 0x90, 16) + b"".join(map(self.pack, value))
            case dict():
                pairs = [part for pair in value.items() for part in pair]
                return self.header(len(value), [(0xDE, "H"), (0xDF, "I")], 0x80, 16) + b"".join(map(self.pack, pairs))
        raise TypeError(value)

    def integer(self, value: int) -> bytes:
        forms = [(0xCC, "B"), (0xCD, "H"), (0xCE, "I"), (0xCF, "Q"), (0xD0, "b"), (0xD1, "h"), (0xD2, "i"), (0xD3, "q")]
        fitting = [bytes([code]) + packed for code, form in forms if (packed := _packed(form, value)) is not None]
        if -32 <= value < 128:
            fitting.append(struct.pack("b", value))
        return self.chance.choice(fitting)

    def sized(self, data: bytes, forms: list[tuple[int, str]], fix: int, below: int) -> bytes:
        return self.header(len(data), forms, fix, below) + data

    def header(self, count: int, forms: list[tuple[int, str]], fix: int, below: int) -> bytes:
        fitting = [bytes([code]) + packed for code, form in forms if (packed := _packed(form, count)) is not None]
        if count < below:
            fitting.append(bytes([fix | count]))
        return self.chance.choice(fitting)


def _packed(form: str, value: int) -> bytes | None:
    try:
        return struct.pack(">" + form, value)
    except struct.error:
        return None


def written(release: Release, events: list[tuple[str, dict[str, Any]]], chance: random.Random) -> list[Any]:
    """Events as arrays or maps: trailing places that are nil, and fields that are, may be left out; more may follow."""
    found: list[Any] = []
    for kind, fields in events:
        named = {"type": kind, **fields}
        if release.positional:
            array = list(named.values())
            while array[-1] is None and chance.random() < 0.5:
                array.pop()
            found.append(array)
        else:
            kept = {name: value for name, value in named.items() if value is not None or chance.random() < 0.5}
            more = {"later": [{"a": 1}]} if chance.random() < 0.3 else {}
            pairs = list({**kept, **more}.items())
            if chance.random() < 0.3:
                chance.shuffle(pairs)
            found.append(dict(pairs))
    return found


@pytest.mark.parametrize("name", RELEASES)
@settings(max_examples=40, deadline=None, phases=[Phase.generate])
@given(data=st.data())
def test_what_a_release_writes_is_read(name: str, data: st.DataObject) -> None:
    """Field for field: as its own classes write it, and in any other form that means the same."""
    release = RELEASES[name]
    events = data.draw(st.lists(EVENTS[name], max_size=4))
    ts, rank = data.draw(st.floats(0, 2e9)), data.draw(st.none() | st.integers(0, 7))
    right = [expected(kind, fields) for kind, fields in events]
    values = [release.event(kind)(**fields) for kind, fields in events]
    own = msgspec.msgpack.encode(release.batch()(ts, values, *([rank] if release.rank else [])))
    chance = data.draw(st.randoms(use_true_random=False))
    odd = Odd(chance).pack([ts, written(release, events, chance), *([rank] if release.rank else [])])
    for payload in (own, odd):
        batch = decode_foreign(payload)
        assert (batch.ts, batch.rank) == (ts, rank if release.rank else None)
        for found, wanted in zip(batch.events, right, strict=True):
            assert same(plain(found), wanted)


ODD_VALUES = [
    None,
    0,
    -1,
    1.5,
    True,
    "",
    "x" * 300,
    b"",
    [],
    [0],
    [""],
    [[0]],
    [[1, 2]],
    {},
    {"cache_salt": "s"},
    "New",
]


@settings(max_examples=200, deadline=None, phases=[Phase.generate])
@given(st.one_of(list(EVENTS.values())), st.sampled_from(list(RELEASES.values())), st.randoms(use_true_random=False))
def test_an_event_is_read_field_by_field_as_it_is_read_at_once(
    event: tuple[str, dict[str, Any]], release: Release, chance: random.Random
) -> None:
    """Large events are walked, small ones unpacked: both say the same, of damaged ones too."""
    (value,) = written(release, [event], chance)
    names = list(value) if isinstance(value, dict) else range(len(value))
    if names and chance.random() < 0.5:
        value[chance.choice(list(names))] = chance.choice(ODD_VALUES)
    data = Odd(chance).pack(value)
    at_once: ForeignEvent | type[wire.WireError]
    try:
        at_once = plain(event_of(msgpack.unpackb(data)))
    except wire.WireError:
        at_once = wire.WireError
    try:
        walked: Any = plain(dialects._walk(dialects._Reader(data), dialects._Room()))
    except (wire.WireError, *dialects._REFUSED):
        walked = wire.WireError
    assert repr(walked) == repr(at_once)


def test_an_unknown_kind_is_itself_whatever_it_holds() -> None:
    """Of a later release, with fields of known names in other forms."""
    payload = msgpack.packb([1.5, [{"type": "New", "block_hashes": {"a": 1}, "token_ids": "x" * 20_000}], 0])
    assert decode_foreign(payload).events == (ForeignUnknown("New"),)
