"""One target of tests.fuzz.targets under atheris: python -m tests.fuzz.harness TARGET [libFuzzer's options] [FILE ...]

With files it reads those and ends: so a finding is seen again.
"""

from __future__ import annotations

import sys
import time

import atheris

with atheris.instrument_imports(include=["kv_events"], enable_loader_override=False):
    from tests.fuzz.targets import TARGETS


SLOWEST_S = 5.0
"""Of processor time, for one input: libFuzzer's own limit is of time on the clock, and machines stall."""


def main() -> None:
    """Never returns: libFuzzer ends the process."""
    target = TARGETS[sys.argv.pop(1)]

    def read(data: bytes) -> None:
        started_s = time.process_time()
        target.read(data)
        took_s = time.process_time() - started_s
        assert took_s < SLOWEST_S, f"one input took {took_s:.1f} s"

    atheris.Setup(sys.argv, read)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
