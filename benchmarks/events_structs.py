"""vLLM's event classes as msgspec structs, written after its documentation, and their way into the peer's JSON.

Needs msgspec, which comes with the extra `test`.
"""

from __future__ import annotations

from typing import Any

import msgspec


class BlockStored(msgspec.Struct, tag=True, omit_defaults=True, gc=False):
    """A chain of blocks is held."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None


class BlockRemoved(msgspec.Struct, tag=True, omit_defaults=True, gc=False):
    """Blocks are held no longer."""

    block_hashes: list[int]
    medium: str | None = None


class AllBlocksCleared(msgspec.Struct, tag=True, gc=False):
    """Nothing is held."""


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """One step's events. Further elements are passed over."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


class _Block(msgspec.Struct, gc=False):
    block_hash: int
    tokens_hash: int


class _Stored(msgspec.Struct, gc=False):
    parent_hash: int | None
    blocks: list[_Block]


class _Removed(msgspec.Struct, gc=False):
    block_hashes: list[int]


class _Data(msgspec.Struct, omit_defaults=True, gc=False):
    stored: _Stored | None = None
    removed: _Removed | None = None


class _Event(msgspec.Struct, gc=False):
    event_id: int
    data: _Data
    dp_rank: int


DECODER = msgspec.msgpack.Decoder(EventBatch)
_ENCODE = msgspec.json.Encoder().encode


def as_json(event_id: int, event: Any, hashed: list[int] | None) -> bytes:
    """An event as the peer's tree takes it; `hashed`: its own hashes of the blocks' tokens, else the block hashes."""
    if isinstance(event, BlockStored):
        pairs = zip(event.block_hashes, hashed or event.block_hashes, strict=True)
        data = _Data(stored=_Stored(event.parent_block_hash, [_Block(*pair) for pair in pairs]))
    else:
        data = _Data(removed=_Removed(event.block_hashes))
    return _ENCODE(_Event(event_id, data, 0))
