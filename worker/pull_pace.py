"""What it takes to pull a token's KV from another worker, as measured. Pure."""

from __future__ import annotations

OLD_SHARE = 0.9  # of what was known before, in what is known after a pull


class PullPace:
    """A running estimate over long pulls that brought everything: the time of short ones is that of round trips, which
    routers count apart."""

    def __init__(self, block_size: int, least_blocks: int) -> None:
        """`block_size`: tokens in a block. Pulls of fewer than `least_blocks` are short."""
        self._block_size = block_size
        self._least_blocks = least_blocks
        self._seconds = 0.0
        self._tokens = 0.0

    @property
    def token_s(self) -> float:
        """Seconds for a token; 0 before the first long pull."""
        return self._seconds / self._tokens if self._tokens else 0.0

    def add(self, wanted: int, arrived: int, seconds: float) -> None:
        """A pull of so many blocks took so long; one that was cut tells nothing."""
        if arrived == wanted >= self._least_blocks:
            self._seconds = OLD_SHARE * self._seconds + seconds
            self._tokens = OLD_SHARE * self._tokens + arrived * self._block_size
