"""The README tells the truth about the files."""

from __future__ import annotations

from tests.support.module_map import ROOT, with_map


def test_the_module_map_has_a_current_line_for_every_file() -> None:
    """`python -m tests.support.module_map` writes it; each line is the file's own first sentence."""
    readme = (ROOT / "README.md").read_text()
    assert readme == with_map(readme), "run: python -m tests.support.module_map"
