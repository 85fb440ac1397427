"""How the tools write and read block hashes, tiers, names and numbers."""

from __future__ import annotations

import pytest

from kv_events.inspect.words import counted, key_text, parse_key, printable, tiers_of
from rhizome.errors import InvalidRequest


def test_a_key_is_a_hash_or_how_it_begins() -> None:
    """A range of hashes; whole ones name just one."""
    assert parse_key("key", "0x3F") == (0x3F << 56, (0x40 << 56) - 1)
    assert parse_key("key", key_text(77)) == (77, 77)
    assert parse_key("key", "f") == (0xF << 60, 2**64 - 1)
    for wrong in ("", "0x", "g", "1" * 17, "-1", "1 2", "٣"):
        with pytest.raises(InvalidRequest, match="key is .*hexadecimal digits"):
            parse_key("key", wrong)


def test_text_from_afar_cannot_drive_a_terminal() -> None:
    """Escapes, line ends and invisible marks become question marks; letters of any script stay."""
    assert printable("wörker-0 中") == "wörker-0 中"
    assert printable("a\x1b[31m\nb\u202e") == "a?[31m?b?"


def test_tiers_and_numbers_are_words() -> None:
    """As people read them."""
    assert tiers_of(0b101) == ["device", "disk"]
    assert (counted(1, "block"), counted(12_000, "block"), counted(2, "branch", "branches")) == (
        "1 block",
        "12,000 blocks",
        "2 branches",
    )
