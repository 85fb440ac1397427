"""Hardware by preset or from a TOML file, every field checked; and written as such a file. Torch-free."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from rhizome.errors import InvalidRequest
from rhizome.validate import check_name
from worker.step_time import HARDWARE, Hardware, StepTimeModel

MAX_FILE_BYTES = 2**16
MAX_SOURCE_CHARS = 1000
MAX_TOKENS = 2**32  # of KV; keeps sums of contexts far from where floats lose whole numbers
MAX_SECONDS = 3600.0  # of any term
STEPS = "steps"  # the table that holds the step-time model


def load_hardware(name_or_path: str) -> Hardware:
    """A preset by its name, or what a file says.

    Raises InvalidRequest, which names the file, the field, its value and the limit.
    """
    if name_or_path in HARDWARE:
        return HARDWARE[name_or_path]
    path = Path(name_or_path)
    limit = f"one of {', '.join(HARDWARE)}, or a TOML file"
    try:
        if not path.is_file():
            raise InvalidRequest("hardware", name_or_path, limit)
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidRequest(f"{path}: size", path.stat().st_size, f"at most {MAX_FILE_BYTES} bytes")
        text = path.read_text("utf-8")
    except (OSError, ValueError) as error:  # unreadable, not UTF-8, a name that no file can have
        raise InvalidRequest("hardware", name_or_path, f"{limit} ({error})") from None
    return parse_hardware(text, str(path))


def parse_hardware(text: str, file: str) -> Hardware:
    """Hardware from a file's text. Raises InvalidRequest."""
    try:
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidRequest(f"{file}: text", f"{len(text)} characters", f"TOML ({error})") from None
    table = values.pop(STEPS, None)
    if not isinstance(table, dict):
        raise InvalidRequest(f"{file}: {STEPS}", table, f"a table with {', '.join(_names(StepTimeModel))}")
    steps = StepTimeModel(**_checked(StepTimeModel, table, f"{file}: {STEPS}."))
    hardware = Hardware(steps=steps, **_checked(Hardware, values, f"{file}: "))
    _check_together(hardware, file)
    return hardware


def dump_hardware(hardware: Hardware) -> str:
    """The text of a file from which `load_hardware` makes the same."""
    values = asdict(hardware)
    steps = values.pop(STEPS)
    return _lines(values) + f"\n[{STEPS}]\n" + _lines(steps)


def _lines(values: Mapping[str, object]) -> str:
    # JSON's strings are TOML's, but that TOML wants DEL escaped.
    lines = (f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in values.items())
    return "".join(lines).replace("\x7f", "\\u007f")


def _names(kind: type[Any]) -> list[str]:
    return [field.name for field in fields(kind) if field.name != STEPS]


def _checked(kind: type[Any], values: Mapping[str, object], place: str) -> dict[str, Any]:
    """The fields of a dataclass from a table: none missing, none unknown, each of its type and within its limits."""
    for name in values:
        if name not in _names(kind):
            raise InvalidRequest(
                place + name, values[name], f"there is no such field; known: {', '.join(_names(kind))}"
            )
    checked: dict[str, Any] = {}
    for field in fields(kind):
        if field.name == STEPS:
            continue
        if field.name in values:
            checked[field.name] = _check(place + field.name, str(field.type), values[field.name])
        elif field.default is MISSING:
            raise InvalidRequest(place + field.name, None, "it is needed")
    return checked


def _check(field: str, kind: str, value: object) -> str | int | float:
    if kind == "str":
        if not isinstance(value, str) or len(value) > MAX_SOURCE_CHARS:
            raise InvalidRequest(field, value, f"a text of at most {MAX_SOURCE_CHARS} characters")
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "int":
        if not number or not isinstance(value, int) or not 0 <= value <= MAX_TOKENS:
            raise InvalidRequest(field, value, f"a whole number, 0 to {MAX_TOKENS}")
        return value
    assert kind == "float", kind
    if not number or not isinstance(value, int | float) or not (0 <= value <= MAX_SECONDS and math.isfinite(value)):
        raise InvalidRequest(field, value, f"seconds, 0 to {MAX_SECONDS:g}")
    return float(value)


def _check_together(hardware: Hardware, file: str) -> None:
    """What a single field does not show: nothing may be free of charge for ever, or cheaper for being more."""
    check_name(f"{file}: name", hardware.name)
    for name in ("kv_tokens", "max_running"):
        if getattr(hardware, name) < 1:
            raise InvalidRequest(f"{file}: {name}", getattr(hardware, name), "at least 1")
    if hardware.max_batched_tokens < hardware.max_running:
        limit = f"at least max_running ({hardware.max_running}): every running sequence gets a token a step"
        raise InvalidRequest(f"{file}: max_batched_tokens", hardware.max_batched_tokens, limit)
    steps = hardware.steps
    for name, other in (("prefill_step_s", "token_s"), ("decode_step_s", "sequence_s")):
        if getattr(steps, name) + getattr(steps, other) <= 0:
            raise InvalidRequest(f"{file}: {STEPS}.{name}", getattr(steps, name), f"above 0, where {other} is 0")
    most = steps.context_token_s / (2 * hardware.kv_tokens)
    if steps.context_square_s > most:
        limit = f"at most context_token_s / (2 * kv_tokens), {most:g}: more context does not cost less"
        raise InvalidRequest(f"{file}: {STEPS}.context_square_s", steps.context_square_s, limit)
