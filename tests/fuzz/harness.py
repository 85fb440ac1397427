"""One target of tests.fuzz.targets under atheris: python -m tests.fuzz.harness TARGET [libFuzzer's options] [FILE ...]

With files it reads those and ends: so a finding is seen again.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["kv_events"], enable_loader_override=False):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Never returns: libFuzzer ends the process."""
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, TARGETS[name].read)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
