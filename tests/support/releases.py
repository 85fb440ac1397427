"""The shapes of vLLM's and SGLang's event classes, release by release, as one table and as msgspec classes.

Which field came when is documented in both projects; tests/golden/dialects has the lists of some releases. A field that
has no default is always written, and its reader wants it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec

_HASH = bytes | int
_NEEDED = {
    "block_hashes": list[_HASH],
    "parent_block_hash": _HASH | None,
    "token_ids": list[int],
    "block_size": int,
    "lora_id": int | None,
}
_VLLM: dict[str, tuple[Any, ...]] = {
    "medium": (str | None,),
    "lora_name": (str | None,),
    "extra_keys": (list[tuple[Any, ...] | None] | None, None),
    "group_idx": (int | None, None),
    "kv_cache_spec_kind": (str | None, None),
    "kv_cache_spec_sliding_window": (int | None, None),
    "locality": (str | None, None),
    "ownership": (Any, None),
    "session_id": (str | None, None),
}
_SGLANG: dict[str, tuple[Any, ...]] = {
    "medium": (str | None, None),
    "cache_salt": (str | None, None),
    "session_id": (str | None, None),
    "lora_name": (str | None, None),
}


class Metadata(msgspec.Struct, omit_defaults=True):
    """What SGLang 0.5.18 and 0.5.19 write into the seventh place, where they know of a salt or a session."""

    cache_salt: str | None = None
    session_id: str | None = None


@dataclass(frozen=True)
class Release:
    """One release's classes. `stored` and `removed`: the fields that follow those of the first release."""

    name: str
    positional: bool
    stored: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    rank: str = "data_parallel_rank"  # "": batches have two elements

    @property
    def is_sglang(self) -> bool:
        return self.name.startswith("sglang")

    @cache  # noqa: B019 - a few releases, for good
    def event(self, kind: str) -> Any:
        """The class of a kind of event."""
        optional = _SGLANG if self.is_sglang else _VLLM
        fields: list[Any] = []
        if kind == "BlockStored":
            fields = [*_NEEDED.items(), *((name, *optional[name]) for name in self.stored)]
        elif kind == "BlockRemoved":
            fields = [("block_hashes", list[_HASH]), *((name, *optional[name]) for name in self.removed)]
        return msgspec.defstruct(
            kind, fields, tag=kind, array_like=self.positional, omit_defaults=not (self.is_sglang and self.positional)
        )

    @cache  # noqa: B019
    def batch(self) -> Any:
        """The class of a batch, of which msgspec reads the events as this release's classes."""
        kinds = tuple(self.event(kind) for kind in ("BlockStored", "BlockRemoved", "AllBlocksCleared"))
        events = list[kinds[0] | kinds[1] | kinds[2]]  # type: ignore[valid-type]
        rank: list[Any] = [(self.rank, int | None, None)] if self.rank else []
        return msgspec.defstruct("KVEventBatch", [("ts", float), ("events", events), *rank], array_like=True)


def _grown(make: str, *steps: tuple[str, bool, str, str]) -> list[Release]:
    """Releases of which each has the fields of the one before it, and more."""
    rank = "attn_dp_rank" if make == "sglang" else "data_parallel_rank"
    found: list[Release] = []
    stored: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    for version, positional, more_stored, more_removed in steps:
        stored, removed = (*stored, *more_stored.split()), (*removed, *more_removed.split())
        found.append(Release(f"{make}-{version}", positional, stored, removed, rank))
    return found


RELEASES = {
    release.name: release
    for release in [
        Release("vllm-0.8.5", positional=True, rank=""),
        *_grown(
            "vllm",
            ("0.9.2", True, "", ""),
            ("0.11.0", True, "medium", "medium"),
            ("0.15.1", True, "lora_name", ""),
            ("0.18.0", True, "extra_keys", ""),
            ("0.22.0", True, "group_idx kv_cache_spec_kind kv_cache_spec_sliding_window", "group_idx"),
            ("0.24.0", False, "", ""),
            ("0.26.0", False, "locality", "locality"),
            ("0.32.0", False, "ownership session_id", "ownership"),
        ),
        *_grown(
            "sglang",
            ("0.5.3.post3", True, "", ""),
            ("0.5.12", True, "medium", "medium"),
            ("0.5.20", False, "cache_salt session_id", ""),
            ("0.5.23", False, "lora_name", ""),
        ),
    ]
}
