"""What ends a transfer. None of these leaves `Puller.pull`: they become the reason in its result."""

from __future__ import annotations

from rhizome.errors import RhizomeError


class TransferFailed(RhizomeError):
    """The way to the holder broke, or what came over it makes no sense."""

    code = "UNAVAILABLE"


class Refused(RhizomeError):
    """The holder's own word that it will not: another way to it would hear the same."""

    code = "PERMISSION_DENIED"


class OutOfTime(RhizomeError):
    """The deadline passed, or the pull was given up."""

    code = "DEADLINE_EXCEEDED"
