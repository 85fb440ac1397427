"""Hardware files: what is written is read back, and what is wrong is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rhizome.errors import InvalidRequest
from worker.hardware_file import MAX_FILE_BYTES, dump_hardware, load_hardware, parse_hardware
from worker.step_time import HARDWARE, Hardware, StepTimeModel

SECONDS = st.floats(1e-12, 3600)
HARDWARES = st.builds(
    Hardware,
    name=st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=20),
    source=st.text(st.characters(exclude_categories=["Cs"]), max_size=200),
    steps=st.builds(StepTimeModel, SECONDS, SECONDS, SECONDS, SECONDS, SECONDS, SECONDS, st.just(0.0)),
    kv_tokens=st.integers(1, 2**32),
    host_kv_tokens=st.integers(0, 2**32),
    host_token_s=SECONDS,
    fetch_token_s=SECONDS,
    max_batched_tokens=st.integers(256, 2**20),
    max_running=st.integers(1, 256),
)
PRESET = HARDWARE["8b-1xh100"]


@given(HARDWARES)
def test_what_is_written_is_read_back(hardware: Hardware) -> None:
    """To the last bit, whatever the source says."""
    assert parse_hardware(dump_hardware(hardware), "file") == hardware


@pytest.mark.parametrize("name", HARDWARE)
def test_presets_are_found_by_name_and_fit_into_files(name: str, tmp_path: Path) -> None:
    """A preset keeps the limits that a file has to."""
    assert load_hardware(name) is HARDWARE[name]
    (tmp_path / "own.toml").write_text(dump_hardware(HARDWARE[name]))
    assert load_hardware(str(tmp_path / "own.toml")) == HARDWARE[name]


@pytest.mark.parametrize(
    ("old", "new", "refusal"),
    [
        ("token_s = 1.518e-05", "token_s = -1", "f: steps.token_s is -1: seconds, 0 to 3600"),
        ("token_s = 1.518e-05", "token_s = nan", "f: steps.token_s is nan: seconds, 0 to 3600"),
        ("token_s = 1.518e-05", "token_s = true", "f: steps.token_s is True: seconds, 0 to 3600"),
        ("token_s = 1.518e-05", "", "f: steps.token_s is None: it is needed"),
        (
            "token_s = 1.518e-05",
            "token_s = 1e-5\nfast = 1",
            "f: steps.fast is 1: there is no such field; known: prefill",
        ),
        ("kv_tokens = 404480", "kv_tokens = 404480.5", "f: kv_tokens is 404480.5: a whole number, 0 to 4294967296"),
        ("kv_tokens = 404480", "kv_tokens = 0", "f: kv_tokens is 0: at least 1"),
        ("kv_tokens = 404480", "kv_tokens = 4000000", "f: steps.context_square_s is 2.34"),
        ("max_running = 256", "max_running = 9000", "f: max_batched_tokens is 8192: at least max_running (9000)"),
        (
            "decode_step_s = 0.00574\nsequence_s = 2e-05",
            "decode_step_s = 0\nsequence_s = 0",
            "f: steps.decode_step_s is",
        ),
        ('name = "8b-1xh100"', 'name = "two words"', "f: name is 'two words': 1 to 128 printable"),
        ('name = "8b-1xh100"', "name = 8", "f: name is 8: a text of at most 1000 characters"),
        ("[steps]", "[other]", "f: steps is None: a table with prefill_step_s, "),
        ("[steps]", "[steps", "f: text is '"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, refusal: str) -> None:
    """File, field, value and limit."""
    text = dump_hardware(PRESET)
    assert old in text
    with pytest.raises(InvalidRequest) as caught:
        parse_hardware(text.replace(old, new, 1), "f")
    assert str(caught.value).startswith(refusal)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A name that is neither preset nor file, a folder, something too large, bytes that are no text."""
    (tmp_path / "large").write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name in ("nonesuch", str(tmp_path), str(tmp_path / "binary"), "a\0b"):
        with pytest.raises(InvalidRequest, match=r"^hardware is .*: one of 70b-4xh100, 8b-1xh100, or a TOML file"):
            load_hardware(name)
    with pytest.raises(InvalidRequest, match=rf"large: size is 65537: at most {MAX_FILE_BYTES} bytes"):
        load_hardware(str(tmp_path / "large"))


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=300))
def test_any_text_is_hardware_or_refused(text: str) -> None:
    """Nothing else is raised."""
    with pytest.raises(InvalidRequest):
        parse_hardware(text, "file")


def test_hardware_without_memory_elsewhere_is_whole() -> None:
    """Fields with defaults may be left out."""
    lines = dump_hardware(PRESET).splitlines()
    kept = [line for line in lines if not line.startswith(("host_", "fetch_", "max_", "context_square"))]
    expected = replace(
        Hardware(PRESET.name, PRESET.source, PRESET.steps, PRESET.kv_tokens),
        steps=replace(PRESET.steps, context_square_s=0.0),
    )
    assert parse_hardware("\n".join(kept), "file") == expected
