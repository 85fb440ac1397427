"""A pytest plugin: the tests run on the extension that the environment variable RADIX_SANITIZED names.

`make sanitize` gives it builds with sanitizers; nothing else knows of them.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path

import pytest

_file = Path(os.environ["RADIX_SANITIZED"]).resolve(strict=True)
_spec = importlib.util.spec_from_file_location("radix._native", _file)
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
sys.modules["radix._native"] = _module  # before anybody imports it


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What runs none of this build costs time only: the reference by itself, and the fuzzer, another build."""
    idle = [item for item in items if "[reference" in item.name or "fuzzers_model" in item.name]
    config.hook.pytest_deselected(items=idle)
    items[:] = [item for item in items if item not in idle]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """It was this build that ran: what tests of anything else find, or do not find, says nothing."""
    from radix.backend import native

    runtime = os.environ["RADIX_SANITIZER_SYMBOL"]
    assert native is _module
    assert Path(native.__file__ or "") == _file
    assert runtime.encode() in _file.read_bytes(), f"{_file} does not call {runtime}"
    assert hasattr(ctypes.CDLL(None), runtime), f"{runtime} is not loaded"
