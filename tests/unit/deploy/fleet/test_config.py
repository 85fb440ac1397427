"""A fleet's file: what it may say, and how it is told what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.fleet.reading import MAX_FILE_BYTES, BadConfig, parse_fleet, read_fleet
from rhizome.errors import InvalidRequest

LEAST = "model: {tiny: true}\nworkers: [{}]\n"


def wrong(text: str) -> list[str]:
    with pytest.raises(BadConfig) as caught:
        parse_fleet(text, "fleet.yaml")
    return str(caught.value).splitlines()


def test_two_lines_describe_a_fleet() -> None:
    """Everything but the model and one group of workers has a default."""
    fleet = parse_fleet(LEAST, "fleet.yaml")
    assert fleet.model.tiny
    assert [(group.name, group.role, group.count) for group in fleet.workers] == [("both", "both", 1)]
    assert (fleet.routers.count, fleet.routers.port, fleet.routers.policy) == (1, 7700, "predicted-ttft")


def test_every_error_names_line_field_value_and_limit() -> None:
    """All that is wrong is told at once, each where it stands."""
    text = """name: demo
model:
  tiny: true
routers:
  policy: nonsense
workers:
  - role: prefill
  - role: decode
    count: two
    resources: {cpus: -1}
    cout: 3
"""
    told = wrong(text)
    assert [line.partition(" is ")[0] for line in told] == [
        "fleet.yaml:5: routers.policy",
        "fleet.yaml:9: workers.1.count",
        "fleet.yaml:10: workers.1.resources.cpus",
        "fleet.yaml:11: workers.1.cout",
    ]
    assert "'nonsense': one of random, round-robin" in told[0]
    assert told[2].endswith("-1: greater than or equal to 0")
    assert told[3].endswith("is not known")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "fleet.yaml:1: it is empty"),
        ("a: [", "fleet.yaml:1: expected the node content, but found '<stream end>'"),
        ("model: {tiny: true}\nmodel: 3", "fleet.yaml:2: model is given twice"),
        ("workers: [{}]", "fleet.yaml:1: model is missing"),
        ("model: {tiny: true}\nworkers: [{}, {}]", "two groups of workers are called both: give each a name"),
        ("model: {tiny: true, path: x}\nworkers: [{}]", "exactly one of path, tiny and simulated is needed"),
        ("model: {}\nworkers: [{}]", "exactly one of path, tiny and simulated is needed, not none"),
        (LEAST + "host: 10.0.0.1", "fleet.yaml:3: "),
        (LEAST + "host: 0.0.0.0\ninsecure: true", "is a wildcard"),
        (LEAST + "routers: {port: 65535, count: 2}", "leaves no room for 2 routers"),
        ("model: {tiny: true}\nworkers: [{role: prefill}]", "prefill workers need decode workers"),
        ("model: {tiny: true}\nworkers: [{name: a}, {name: b, block_size: 8}]", "the same block_size"),
        ("model: {tiny: true}\nworkers: [{transports: [tcp, tcp]}]", "transports names tcp twice"),
        (
            "model: {tiny: true}\nworkers: [{role: prefill, transports: [shm]}, {role: decode, transports: [tcp]}]",
            "no worker can pull from prefill workers by shm: see transports",
        ),
        ("model: {tiny: true}\nworkers: [{name: a b}]", "'a b': 1 to 40 letters, digits and dashes"),
    ],
)
def test_what_makes_no_fleet_is_refused(text: str, line: str) -> None:
    """With one line that says why."""
    told = wrong(text)
    assert len(told) == 1
    assert line in told[0]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("registry: redis://u:secret@h:1/x?y", "registry is 'redis://u:***@h:1/x?y': no query"),
        ("registry: redis://:se#cret@h:1/x", "registry is 'redis://:***@h:1/x': redis://host:port"),
        ("registry: redis:/u:secret@h/x", "registry is 'redis:***@h/x': one of"),
        ("registry: u:secret@h/x", "registry is 'u:***@h/x': one of"),
        ("routers: redis://u:secret@h/x", "routers is 'redis://u:***@h/x': a valid dictionary"),
        ("registri: redis://u:secret@h/x", "registri is not known"),
        ("registry: [redis://u:secret@h/x]", "registry: a valid string"),
    ],
)
def test_a_password_is_never_shown(text: str, shown: str) -> None:
    """Whatever else is wrong with a URL, or with where it stands."""
    (line,) = wrong(LEAST + text)
    assert "cret" not in line
    assert line.startswith(f"fleet.yaml:3: {shown}")


def test_aliases_cannot_blow_a_file_up() -> None:
    """Each use of an alias counts."""
    text = "a: &a [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]\n"
    for name, before in zip("bcdefg", "abcdef", strict=True):
        text += f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n"
    (line,) = wrong(text)
    assert "more than 10000 values" in line


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Missing, or absurdly large."""
    with pytest.raises(InvalidRequest, match=r"absent.yaml.*No such file"):
        read_fleet(tmp_path / "absent.yaml")
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(InvalidRequest, match="at most"):
        read_fleet(large)
