"""The README's module map, from the modules' own docstrings: `python -m tests.support.module_map` writes it anew."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("radix", "kv_events", "router", "worker", "deploy", "proto/rhizome")
START, END = "<!-- module map -->\n", "<!-- end of module map -->\n"


def _sentence(path: Path) -> str:
    """The first sentence of a module's docstring."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
    return text.partition(". ")[0].removesuffix(".")


def module_map() -> str:
    """A block for each package, a line for each file."""
    lines = []
    for package in PACKAGES:
        folder = ROOT / package
        lines += ["", f"**`{package}/`** {_sentence(folder / '__init__.py')}", "", "| file | what |", "| --- | --- |"]
        for path in sorted(folder.rglob("*.py")):
            if "_pb2" in path.name or path == folder / "__init__.py":
                continue
            lines.append(f"| `{path.relative_to(folder)}` | {_sentence(path)} |")
    return "\n".join(lines[1:]) + "\n"


def with_map(readme: str) -> str:
    """A README with its map between the two marks replaced."""
    before, _, rest = readme.partition(START)
    return before + START + "\n" + module_map() + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_map(readme.read_text()))
