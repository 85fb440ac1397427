"""The README's module map, from what each file says of itself: `python -m tests.support.module_map` writes it anew."""

from __future__ import annotations

import ast
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("radix", "kv_events", "router", "worker", "deploy", "proto/rhizome", "benchmarks")
SOURCES = (".py", ".cpp", ".hpp")
START, END = "<!-- module map -->\n", "<!-- end of module map -->\n"


def _sentence(path: Path) -> str:
    """The first sentence of a module's docstring, or of the comment that a C++ file begins with."""
    if path.suffix == ".py":
        words = ast.get_docstring(ast.parse(path.read_text())) or ""
    else:
        comment = takewhile(lambda line: line.startswith("//"), path.read_text().splitlines())
        words = " ".join(line.removeprefix("//") for line in comment)
    text = " ".join(words.split())
    return text.partition(". ")[0].removesuffix(".")


def module_map() -> str:
    """A block for each package, a line for each file."""
    lines = []
    for package in PACKAGES:
        folder = ROOT / package
        lines += ["", f"**`{package}/`** {_sentence(folder / '__init__.py')}", "", "| file | what |", "| --- | --- |"]
        for path in sorted(folder.rglob("*")):
            if path.suffix not in SOURCES or "_pb2" in path.name or path == folder / "__init__.py":
                continue
            what = _sentence(path)
            assert what, f"{path} does not begin with what it is"
            lines.append(f"| `{path.relative_to(folder)}` | {what} |")
    return "\n".join(lines[1:]) + "\n"


def with_map(readme: str) -> str:
    """A README with its map between the two marks replaced."""
    before, _, rest = readme.partition(START)
    return before + START + "\n" + module_map() + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_map(readme.read_text()))
