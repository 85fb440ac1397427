"""What the type checker is told of the extension is what the extension has."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from types import ModuleType

import pytest

from radix.backend import native

STUB = Path(__file__).parents[3] / "radix/_native.pyi"


def parameters(function: ast.FunctionDef) -> list[str]:
    """Names in order; that of a positional-only one is of no meaning."""
    arguments = function.args
    assert not any((arguments.vararg, arguments.kwarg, arguments.kwonlyargs))
    return ["/" for _ in arguments.posonlyargs] + [argument.arg for argument in arguments.args]


def stubbed() -> dict[str, list[str] | None]:
    """Qualified name -> parameters; None for a class or a property."""
    names: dict[str, list[str] | None] = {}
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.ClassDef):
            names[node.name] = None
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    names[f"{node.name}.{member.name}"] = None if member.decorator_list else parameters(member)
        elif isinstance(node, ast.FunctionDef):
            names[node.name] = parameters(node)
    return names


def bound(module: ModuleType) -> dict[str, list[str] | None]:
    """The same, from what nanobind says of its functions."""
    names: dict[str, list[str] | None] = {}
    for name, value in vars(module).items():
        if inspect.isclass(value):
            names[name] = None
            for member, inner in vars(value).items():
                if isinstance(inner, property):
                    names[f"{name}.{member}"] = None
                elif hasattr(inner, "__nb_signature__") and member != "__new__":  # __init__ is the same
                    names[f"{name}.{member}"] = signature(inner)
        elif hasattr(value, "__nb_signature__"):
            names[name] = signature(value)
    return names


def signature(function: object) -> list[str]:
    """Parameters of a function of nanobind's; overloads must agree in them."""
    overloads = [re.sub(r"\\\d+", "...", text) for text, *_ in function.__nb_signature__]  # type: ignore[attr-defined]
    shapes = [parameters(ast.parse(f"{text}: ...").body[0]) for text in overloads]  # type: ignore[arg-type]
    assert all(shape == shapes[0] for shape in shapes)
    return shapes[0]


@pytest.mark.skipif(native is None, reason="nothing is compiled")
def test_the_stub_has_what_the_extension_has() -> None:
    """The same names, and for each function the same parameters, in both directions."""
    assert native is not None
    assert stubbed() == bound(native)
