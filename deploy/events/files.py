"""Recordings that a person names."""

from __future__ import annotations

from pathlib import Path

from kv_events.inspect.recording import RecordingReader, is_recording
from rhizome.errors import InvalidRequest


def open_recording(field: str, path: Path) -> RecordingReader:
    """Raises InvalidRequest for what is no recording, RecordingError for one whose index is damaged."""
    try:
        if not is_recording(path):
            raise InvalidRequest(field, str(path), "a recording of events: `rhizome events record` makes them")
        return RecordingReader(path)
    except OSError as error:
        limit = f"a recording that can be read ({error.strerror})"
        raise InvalidRequest(field, str(path), limit) from error
