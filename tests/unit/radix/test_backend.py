"""Which core runs, and how that is said and chosen."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from radix.backend import choose

ASK = "import radix; print(radix.BACKEND, type(radix.make_tree(max_blocks=9)).__name__, radix.BACKEND_REASON)"


def ask(code: str, switch: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"RHIZOME_RADIX": switch}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def hide_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "radix._native", None)  # an import of it raises ImportError


def test_the_reference_can_be_forced() -> None:
    """RHIZOME_RADIX=reference runs plain Python, and that is the reason given."""
    assert ask(ASK, "reference").stdout == "reference ReferenceTree RHIZOME_RADIX=reference\n"


def test_the_extension_runs_where_it_is_there() -> None:
    """And then there is no reason to give."""
    pytest.importorskip("radix._native", reason="no extension: `make native` builds it")
    assert ask(ASK, "").stdout == ask(ASK, "native").stdout == "native NativeTree \n"


def test_without_the_extension_the_reference_runs_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is the ImportError's text."""
    hide_extension(monkeypatch)
    for wanted in (None, ""):
        module, reason = choose(wanted)
        assert module is None
        assert "radix._native" in reason


def test_a_missing_extension_can_be_made_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """RHIZOME_RADIX=native: nobody runs on plain Python unawares."""
    hide_extension(monkeypatch)
    with pytest.raises(ImportError, match=r"RHIZOME_RADIX=native, but .*radix\._native"):
        choose("native")


def test_a_switch_that_means_nothing_is_refused() -> None:
    """The error names it, its value and what there is."""
    with pytest.raises(ValueError, match="RHIZOME_RADIX is 'fast': 'native', 'reference' or nothing"):
        choose("fast")
