"""How the event tools write and read what they talk about: block hashes, tiers, names, numbers."""

from __future__ import annotations

from typing import NamedTuple

from radix.tree import Tier
from rhizome.errors import InvalidRequest

HASH_DIGITS = 16

_HEX = frozenset("0123456789abcdef")


def key_text(block_hash: int) -> str:
    """A block hash as 16 hexadecimal digits."""
    return f"{block_hash:016x}"


class KeyRange(NamedTuple):
    """The block hashes that begin with some hexadecimal digits: from `low` to `high`, both included."""

    low: int
    high: int


def parse_key(field: str, digits: str) -> KeyRange:
    """The hashes that begin with 1 to 16 hexadecimal digits. Raises InvalidRequest."""
    plain = digits.lower().removeprefix("0x")
    if not 1 <= len(plain) <= HASH_DIGITS or not set(plain) <= _HEX:
        raise InvalidRequest(field, digits, f"1 to {HASH_DIGITS} hexadecimal digits, a block hash or how it begins")
    shift = 4 * (HASH_DIGITS - len(plain))
    low = int(plain, 16) << shift
    return KeyRange(low, low + (1 << shift) - 1)


def printable(text: str) -> str:
    """Text from afar for a terminal: what could move its cursor or change its colours becomes a question mark."""
    return text if text.isprintable() else "".join(char if char.isprintable() else "?" for char in text)


def tiers_of(mask: int) -> list[str]:
    """The names of the tiers in a bit mask."""
    return [tier.name.lower() for tier in Tier if mask >> tier & 1]


def counted(count: int, one: str, many: str = "") -> str:
    """As in `1 block`, `12,000 blocks`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
