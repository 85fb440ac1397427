"""Reads a fleet's file: YAML to a FleetConfig, with errors that name file, line, field and limit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from deploy.fleet.config import FleetConfig, Model, Refused
from rhizome.errors import InvalidRequest, RhizomeError

MAX_FILE_BYTES = 2**20
MAX_NODES = 10_000  # aliases count as often as they stand
PASSWORD = re.compile(r":(?!//).*@")  # of a URL, where none is expected or as it should not be written, too

Field_ = tuple[str | int, ...]


class BadConfig(RhizomeError):
    """A fleet's file that cannot be taken; one line for each thing that is wrong."""

    code = "INVALID_ARGUMENT"


def read_fleet(path: Path) -> FleetConfig:
    """The fleet of a file; paths in it start where the file lies.

    Raises BadConfig, and InvalidRequest for a file that cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidRequest("config", str(path), f"a file that can be read: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise InvalidRequest("config", str(path), f"at most {MAX_FILE_BYTES} bytes")
    fleet = parse_fleet(data.decode("utf-8", "replace"), str(path))
    return fleet.model_copy(update={"model": _placed(fleet.model, path.absolute().parent)})


def _placed(model: Model, folder: Path) -> Model:
    if model.path is not None:
        return model.model_copy(update={"path": folder / model.path.expanduser()})
    if model.simulated and model.simulated.endswith(".toml"):
        return model.model_copy(update={"simulated": str(folder / model.simulated)})
    return model


def parse_fleet(text: str, where: str) -> FleetConfig:
    """The same for the file's content; `where` is how errors call it."""
    reader = _Reader(where)
    content = reader.read(text)
    try:
        return FleetConfig.model_validate(content)
    except ValidationError as error:
        lines = [f"{where}:{reader.line(_place(each))}: {_told(each)}" for each in error.errors()]
        raise BadConfig("\n".join(lines)) from None


class _Reader:
    """YAML to plain values, remembering where each stood."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._lines: dict[Field_, int] = {}
        self._nodes = 0

    def read(self, text: str) -> Any:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                self._refuse(1, "it is empty")
            return self._plain(loader, node, ())
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            self._refuse(mark.line + 1 if mark else 1, error.problem or "not YAML")
        except yaml.YAMLError as error:
            self._refuse(1, str(error).splitlines()[0])
        finally:
            loader.dispose()

    def line(self, path: Sequence[str | int]) -> int:
        """Where a field stands, or the part that it is missing from."""
        parts = tuple(path)
        while parts and parts not in self._lines:
            parts = parts[:-1]
        return self._lines.get(parts, 1)

    def _plain(self, loader: yaml.SafeLoader, node: yaml.Node, path: Field_) -> Any:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            self._refuse(node.start_mark.line + 1, f"more than {MAX_NODES} values")
        self._lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(loader, child, (*path, index)) for index, child in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return loader.construct_object(node)
        plain: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key, str) or key in plain:
                self._refuse(line, f"{key} is given twice" if isinstance(key, str) else "a name is needed before the :")
            self._lines[(*path, key)] = line
            plain[key] = self._plain(loader, value_node, (*path, key))
        return plain

    def _refuse(self, line: int, problem: str) -> NoReturn:
        raise BadConfig(f"{self._where}:{line}: {problem}") from None


def _place(error: ErrorDetails) -> Field_:
    cause = error.get("ctx", {}).get("error")
    return error["loc"] or ((cause.field,) if isinstance(cause, Refused) else ())


def _told(error: ErrorDetails) -> str:
    field = ".".join(map(str, _place(error))) or "all of it"
    if error["type"] == "missing":
        return f"{field} is missing"
    if error["type"] == "extra_forbidden":
        return f"{field} is not known"
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, Refused):
        limit, value = cause.limit, cause.value
    else:
        limit, value = error["msg"].removeprefix("Value error, ").removeprefix("Input should be "), error["input"]
    if isinstance(value, dict | list):
        return f"{field}: {limit}"
    shown = PASSWORD.sub(":***@", repr(value))
    return f"{field} is {shown if len(shown) <= 100 else shown[:97] + '...'}: {limit}"
