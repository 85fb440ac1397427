"""Which core runs: the compiled one where the extension imports, else plain Python, which gives the same answers.

The environment variable RHIZOME_RADIX decides otherwise: `reference` runs plain Python, and with `native` a missing
extension is an error. It is read once, when `radix` is imported.
"""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType

SWITCH = "RHIZOME_RADIX"


def choose(wanted: str | None) -> tuple[ModuleType | None, str]:
    """The extension, and "" or why plain Python runs in its place. `wanted` is the value of RHIZOME_RADIX.

    Raises ImportError where `native` is wanted and cannot be had, ValueError for a value that means nothing.
    """
    if wanted == "reference":
        return None, f"{SWITCH}={wanted}"
    if wanted not in ("native", "", None):
        raise ValueError(f"{SWITCH} is {wanted!r}: 'native', 'reference' or nothing")
    try:
        return import_module("radix._native"), ""
    except ImportError as error:
        if wanted:
            raise ImportError(f"{SWITCH}={wanted}, but the extension cannot be imported: {error}") from error
        return None, str(error)


native, BACKEND_REASON = choose(os.environ.get(SWITCH))
"""The extension `radix._native`, or None; and why it is None, as a line for people."""

BACKEND = "reference" if native is None else "native"
