"""Errors that may cross the wire. Each knows its gRPC status by name, so that cores can raise them without gRPC."""

from __future__ import annotations

from typing import ClassVar


class RhizomeError(Exception):
    """Base of every error that a caller is told about."""

    code: ClassVar[str] = "INTERNAL"


class InvalidRequest(RhizomeError):
    """A value that is refused before anything is allocated for it."""

    code = "INVALID_ARGUMENT"

    def __init__(self, field: str, value: object, limit: str) -> None:
        shown = repr(value)
        if len(shown) > 100:
            shown = shown[:97] + "..."
        super().__init__(f"{field} is {shown}: {limit}")
        self.field = field
        self.value = value
        self.limit = limit


class NotServed(RhizomeError):
    """A model or a worker that is not there."""

    code = "NOT_FOUND"


class Denied(RhizomeError):
    """A ticket or a proof that does not hold."""

    code = "PERMISSION_DENIED"


class Conflict(RhizomeError):
    """A state that does not allow the call: an old epoch, a block size unlike the fleet's."""

    code = "FAILED_PRECONDITION"


class Trimmed(RhizomeError):
    """Events that are no longer kept: take a snapshot."""

    code = "OUT_OF_RANGE"


class Duplicate(RhizomeError):
    """A request id that is in flight already."""

    code = "ALREADY_EXISTS"


class Unavailable(RhizomeError):
    """Nobody can serve this now: no worker, or the worker went away."""

    code = "UNAVAILABLE"


class Overloaded(RhizomeError):
    """A bound is reached. Nothing was queued; try again after `retry_after_s`."""

    code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
