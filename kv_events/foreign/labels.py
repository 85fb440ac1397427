"""What makes a foreign block what it is besides its tokens: group, adapter, salt, images; and the hasher for it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from kv_events.foreign.events import ExtraKey, ForeignStored
from radix.hashing import SALT_BYTES, BlockHasher, derive_salt

FULL_ATTENTION = frozenset({"full_attention", "mla_attention", "sink_full_attention", "unknown", "", None})
"""Kinds of cache groups that a prefix needs whole, or that are not told. Blocks of other kinds (sliding windows,
states) come and go in another way, and say nothing of how much of a prompt is there."""

MAX_GROUPS = 256  # whose kinds are remembered; a model has a handful
MAX_REALMS = 1024  # hashers kept ready, by adapter and tenant; making one takes microseconds


class Groups:
    """Which groups of a hybrid model's cache count: stores tell a group's kind, removals only its number."""

    def __init__(self) -> None:
        self._full: dict[int, bool] = {}

    def stores(self, group: int | None, kind: str | None) -> bool:
        """Whether a store in this group counts."""
        full = kind in FULL_ATTENTION
        if group is not None and (group in self._full or len(self._full) < MAX_GROUPS):
            self._full[group] = full
        return full

    def removes(self, group: int | None) -> bool:
        """Whether a removal from this group counts. From a group never heard of it does: it can only under-report."""
        return group is None or self._full.get(group, True)


class Label(NamedTuple):
    """Of a store."""

    adapter: str
    tenant: str  # "": none, or not told here
    marks: Mapping[int, bytes]  # index of a block -> digest of what else it depends on


_NO_MARKS: Mapping[int, bytes] = {}


def label_of(event: ForeignStored, base_adapter: str) -> Label:
    """`base_adapter` is that of a store which names none.

    vLLM tells in `extra_keys`, block by block, what went into a hash: the adapter's name, in a prompt's first block the
    cache salt, and images or embeddings. One string that is not the adapter's is taken for the salt. (An image's bare
    name, as some releases have it, then counts as a tenant: its keys are just as far from any plain prompt's.)
    """
    adapter = event.lora_name or (base_adapter if event.lora_id is None else str(event.lora_id))
    tenant = event.cache_salt or ""
    if event.extra_keys is None or not any(event.extra_keys):
        return Label(adapter, tenant, _NO_MARKS)
    marks = {}
    for index, extras in enumerate(event.extra_keys[: len(event.block_hashes)]):
        others = _others(extras, event) if extras else ()
        if not others:
            continue
        if index == 0 and event.parent_hash is None and len(others) == 1 and isinstance(others[0], str):
            tenant = tenant or others[0]
        else:
            marks[index] = hashlib.blake2b(repr(others).encode(), digest_size=SALT_BYTES).digest()
    return Label(adapter, tenant, marks)


def _others(extras: tuple[ExtraKey, ...], event: ForeignStored) -> tuple[ExtraKey, ...]:
    """`extras` without the adapter, which comes first."""
    if extras[0] is not None and extras[0] in (event.lora_name, event.lora_id):
        return extras[1:]
    return extras


@dataclass(frozen=True, slots=True, eq=False)
class Realm:
    """Blocks of one adapter and tenant, and of the same images: those whose keys one hasher makes."""

    adapter: str
    tenant: str
    hasher: BlockHasher

    def takes(self, label: Label) -> bool:
        """Whether a store of that label can go on from here. One that names no tenant is of its parent's."""
        return label.adapter == self.adapter and label.tenant in ("", self.tenant)


class Realms:
    """Makes realms of one model in our block size, under the fleet's secret."""

    def __init__(self, model: str, block_size: int, secret: bytes) -> None:
        self._model = model
        self._block_size = block_size
        self._secret = secret
        self._plain: dict[tuple[str, str], Realm] = {}

    def of(self, adapter: str, tenant: str) -> Realm:
        """The realm of prompts that are nothing but tokens."""
        realm = self._plain.get((adapter, tenant))
        if realm is None:
            realm = self._make(adapter, tenant, derive_salt(self._model, adapter, tenant))
            if len(self._plain) >= MAX_REALMS:
                del self._plain[next(iter(self._plain))]
            self._plain[adapter, tenant] = realm
        return realm

    def marked(self, realm: Realm, mark: bytes) -> Realm:
        """Where a block depends on more than tokens: its keys and those of what follows are no plain prompt's."""
        salt = hashlib.blake2b(realm.hasher.salt + mark, digest_size=SALT_BYTES, person=b"rhizome marked").digest()
        return self._make(realm.adapter, realm.tenant, salt)

    def _make(self, adapter: str, tenant: str, salt: bytes) -> Realm:
        return Realm(adapter, tenant, BlockHasher(self._block_size, salt, self._secret))
