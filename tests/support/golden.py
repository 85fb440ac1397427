"""The frames in tests/golden: what real servers sent, and what they say (see the README there)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[1] / "golden"
CAPTURES = sorted(str(path.parent.relative_to(GOLDEN)) for path in GOLDEN.glob("*/*/decoded.json"))
RELEASES = sorted(path.stem for path in (GOLDEN / "dialects").glob("*.json"))


@dataclass(frozen=True)
class Message:
    """One message as it came; `decoded` is its payload as plain values, None for an end marker."""

    topic: bytes
    seq: bytes
    payload: bytes
    decoded: Any


def capture(name: str) -> list[Message]:
    """The messages of one of CAPTURES, in the order in which they came."""
    folder = GOLDEN / name
    decoded = json.loads((folder / "decoded.json").read_text(), object_hook=_with_bytes)
    return [
        Message(
            (folder / f"{message['i']:04}.topic").read_bytes(),
            (folder / f"{message['i']:04}.seq").read_bytes(),
            (folder / f"{message['i']:04}.payload").read_bytes(),
            message.get("payload") or None,
        )
        for message in decoded
    ]


def release(name: str) -> tuple[bytes, dict[str, list[str]], Any]:
    """The batch of one of RELEASES: its bytes, the fields of its classes, and what it holds as plain values."""
    described = json.loads((GOLDEN / "dialects" / f"{name}.json").read_text())
    return (GOLDEN / "dialects" / f"{name}.payload").read_bytes(), described["fields"], described["decoded"]


def payloads() -> dict[str, bytes]:
    """Every payload, end markers left out."""
    found = {f"{name}/{at}": each.payload for name in CAPTURES for at, each in enumerate(capture(name)) if each.payload}
    return found | {name: release(name)[0] for name in RELEASES}


def _with_bytes(value: dict[str, Any]) -> Any:
    return bytes.fromhex(value["__bytes_hex__"]) if set(value) == {"__bytes_hex__"} else value
