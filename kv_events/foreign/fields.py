"""An event of vLLM or SGLang from values that msgpack gave: every release's fields, each checked where it is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from kv_events.foreign.events import (
    NO_TOKENS,
    ODD_KIND,
    REMOTE,
    BlockHash,
    ExtraKey,
    ForeignCleared,
    ForeignEvent,
    ForeignRemoved,
    ForeignStored,
    ForeignUnknown,
)
from kv_events.wire import MAX_BLOCK_SIZE, MAX_STRING_BYTES, WireError
from radix.keys import Tokens

MAX_FIELDS = 64  # of a batch or an event: four times what any known release writes
MAX_HASH_BYTES = 64  # SHA-512; known are 8, 16 and 32
MAX_SALT_CHARS = 4000  # of salts and adapters' names, which users choose; at 4 bytes each they are small values
MAX_DEPTH = 4  # of extra keys within a block's: an image is (identifier, offset)
MAX_INDEX = 2**31 - 1  # of ranks, groups and windows

ADAPTERS = (-(2**63), 2**64 - 1)  # their numbers

_INTEGERS = {int}
_HASHES = {int, bytes}
_SCALARS = {str, int, float, bool, bytes, type(None)}

POSITIONS = {
    # The seventh is an adapter's name in vLLM, a map of what SGLang 0.5.18 and 0.5.19 know of the request.
    "BlockStored": (
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_id",
        "medium",
        "lora_name",
        "extra_keys",
        "group_idx",
        "kv_cache_spec_kind",
        "kv_cache_spec_sliding_window",
        "locality",
    ),
    "BlockRemoved": ("block_hashes", "medium", "group_idx", "locality"),
    "AllBlocksCleared": (),
}
FIELDS = POSITIONS | {"BlockStored": (*POSITIONS["BlockStored"], "cache_salt")}
"""What maps have; what else they have is passed over."""

ADVISORY = frozenset({"lora_id", "group_idx", "kv_cache_spec_kind", "kv_cache_spec_sliding_window", "locality"})
"""Fields that no key depends on (an adapter's number: where it has a name). One that cannot be read does not cost the
batch: it counts as not told, and where that could claim too much, the store as one of blocks that do not count."""

ODD: Any = object()
"""Stands for such a field that could not even be unpacked."""


def event_of(value: Any) -> ForeignEvent:
    """An event from an array or a map. Raises WireError."""
    if type(value) is dict:
        kind, fields = value.get("type"), value
    elif type(value) is list and value:
        kind = value[0]
        fields = dict(zip(POSITIONS.get(kind, ()), value[1:], strict=False)) if type(kind) is str else {}
    else:
        raise WireError(f"an event is {shown(value)}: an array or a map is needed")
    if len(value) > MAX_FIELDS:
        raise WireError(f"an event has {len(value)} fields: at most {MAX_FIELDS}")
    return event_from(kind, fields)


def event_from(kind: Any, fields: Mapping[Any, Any]) -> ForeignEvent:
    """An event from its kind and the fields that are known, by name; what is missing or None has its default."""
    if kind == "BlockStored":
        return _stored(fields)
    if kind == "BlockRemoved":
        get = fields.get
        medium, group, locality = get("medium"), get("group_idx"), get("locality")
        odd = 0
        if group is not None and not _is_index(group):
            group, odd = None, 1
        if locality is not None and not _is_short_text(locality):
            locality, odd = None, odd + 1
        medium = "GPU" if medium is None else text("medium", medium)
        return ForeignRemoved(_hashes(get("block_hashes")), medium, group, locality, odd)
    if kind == "AllBlocksCleared":
        return ForeignCleared()
    return ForeignUnknown(text("the type of an event", kind))


def _stored(fields: Mapping[Any, Any]) -> ForeignStored:
    get = fields.get
    parent, medium, locality = get("parent_block_hash"), get("medium"), get("locality")
    block_size, window = get("block_size"), get("kv_cache_spec_sliding_window")
    group, spec_kind = get("group_idx"), get("kv_cache_spec_kind")
    lora_id, lora_name, salt = get("lora_id"), get("lora_name"), get("cache_salt")
    if type(lora_name) is dict:
        salt = lora_name.get("cache_salt") if salt is None else salt
        lora_name = lora_name.get("lora_name")
    if type(lora_id) is str:  # SGLang's own numbers of adapters are text
        lora_id, lora_name = None, lora_id if lora_name is None else lora_name
    odd = 0
    if lora_id is not None and lora_name is not None and not _is_adapter(lora_id):
        lora_id, odd = None, 1
    if group is not None and not _is_index(group):
        group, odd = None, odd + 1
    if spec_kind is not None and not _is_short_text(spec_kind):
        spec_kind, group, odd = ODD_KIND, None, odd + 1  # what is known of the group's kind stays so
    if window is not None and not _is_index(window):
        window, odd = None, odd + 1
    if locality is not None and not _is_short_text(locality):
        locality, odd = REMOTE, odd + 1
    return ForeignStored(
        _hashes(get("block_hashes")),
        None if parent is None else _hashes([parent])[0],
        _tokens(get("token_ids")),
        0 if block_size is None else integer("block_size", block_size, 0, MAX_BLOCK_SIZE),
        "GPU" if medium is None else text("medium", medium),
        None if lora_id is None else integer("lora_id", lora_id, *ADAPTERS),
        None if lora_name is None else text("lora_name", lora_name, MAX_SALT_CHARS),
        _extra_keys(get("extra_keys")),
        None if salt is None else text("cache_salt", salt, MAX_SALT_CHARS),
        group,
        spec_kind,
        window,
        locality,
        odd,
    )


def _is_index(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_INDEX


def _is_adapter(value: Any) -> bool:
    return type(value) is int and ADAPTERS[0] <= value <= ADAPTERS[1]


def _is_short_text(value: Any) -> bool:
    return type(value) is str and len(value) <= MAX_STRING_BYTES


def integer(field: str, value: Any, low: int, high: int) -> int:
    """`value`, an integer within these bounds. Raises WireError."""
    if type(value) is not int or not low <= value <= high:
        raise WireError(f"{field} is {shown(value)}: an integer from {low} to {high} is needed")
    return value


def text(field: str, value: Any, limit: int = MAX_STRING_BYTES) -> str:
    """`value`, a string of at most so many characters. Raises WireError."""
    if type(value) is not str or len(value) > limit:
        raise WireError(f"{field} is {shown(value)}: a string of at most {limit} characters is needed")
    return value


def shown(value: object) -> str:
    """A value in an error's text, cut short."""
    if isinstance(value, list | tuple | dict | np.ndarray):
        return f"a {type(value).__name__} of {len(value)}"
    written = repr(value[:40] if isinstance(value, str | bytes) else value)
    return written if not isinstance(value, str | bytes) or len(value) <= 40 else f"{written}... ({len(value)} long)"


def tokens_of(values: list[Any]) -> Tokens:
    """Integers, or pairs of them, as an array: of each pair the first. Raises WireError."""
    kinds = set(map(type, values))
    if kinds != _INTEGERS:
        if kinds == {list} and set(map(len, values)) == {2}:
            kinds = {type(each) for pair in values for each in pair}
            values = [pair[0] for pair in values]
        if kinds != _INTEGERS:
            raise WireError("token_ids hold other than integers, or pairs of them")
    try:
        return np.array(values, dtype=np.uint32)
    except OverflowError as error:
        raise WireError(f"token_ids hold what is no token: {error}") from error


def _tokens(value: Any) -> Tokens:
    if type(value) is list:
        return tokens_of(value) if value else NO_TOKENS
    if value is None:
        return NO_TOKENS
    if not isinstance(value, np.ndarray):  # an array was checked where it was read
        raise WireError(f"token_ids is {shown(value)}: an array is needed")
    return value


def _hashes(value: Any) -> tuple[BlockHash, ...]:
    if type(value) is not list:
        raise WireError(f"block_hashes is {shown(value)}: an array is needed")
    kinds = set(map(type, value))
    if not kinds <= _INTEGERS:
        if not kinds <= _HASHES:
            raise WireError("block_hashes hold other than integers and bytes")
        for each in value:
            if type(each) is bytes and not 1 <= len(each) <= MAX_HASH_BYTES:
                raise WireError(f"a block hash has {len(each)} bytes: from 1 to {MAX_HASH_BYTES} are needed")
    return tuple(value)


def _extra_keys(value: Any) -> tuple[tuple[ExtraKey, ...] | None, ...] | None:
    if value is None:
        return None
    if type(value) is not list:
        raise WireError(f"extra_keys is {shown(value)}: an array is needed")
    if value.count(None) == len(value):  # as in most batches
        return None
    keys = tuple(map(extra_key_of, value))
    return keys if any(keys) else None


def extra_key_of(value: Any) -> tuple[ExtraKey, ...] | None:
    """What one block depends on beside its tokens. Raises WireError."""
    if value is None or type(value) is tuple:  # a tuple was checked where it was read
        return value
    if type(value) is list and _SCALARS.issuperset(map(type, value)):
        return tuple(value)
    frozen = _frozen(value, MAX_DEPTH)
    return frozen if type(frozen) is tuple else (frozen,)


def _frozen(value: Any, depth: int) -> ExtraKey:
    if isinstance(value, (list, tuple, dict)):
        if not depth:
            raise WireError(f"extra_keys are nested deeper than {MAX_DEPTH}")
        parts = value.items() if isinstance(value, dict) else value
        return tuple(_frozen(part, depth - 1) for part in parts)
    if type(value) in _SCALARS:
        return value  # type: ignore[no-any-return]
    raise WireError(f"extra_keys hold a {type(value).__name__}")
