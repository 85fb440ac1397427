"""`rhizome doctor`: what runs on this machine, and whether it is fit."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import platform
import random
from collections.abc import Callable
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rhizome.ticket import SECRET_VARIABLE, fleet_secret

if TYPE_CHECKING:
    from radix.tree import PrefixTree

_log = logging.getLogger(__name__)

CORE_SWITCH = "RHIZOME_RADIX"  # see radix.backend
WORKER_MODULES = ("torch", "safetensors")  # the extra "worker"
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Status(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    WARNING = "warning"  # works, but not as well or as safely as it could
    BROKEN = "broken"  # does not do what it should


class Finding(NamedTuple):
    """One fact about this machine."""

    name: str
    status: Status
    text: str


Result = tuple[Status, str]
"""What a check returns: its part of a Finding."""


def check_python() -> Result:
    """The interpreter."""
    return Status.OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}"


def check_package() -> Result:
    """The installed distribution; a bare source tree has none."""
    try:
        return Status.OK, f"{metadata.version('rhizome')} in {Path(__file__).parents[1]}"
    except metadata.PackageNotFoundError:
        return Status.WARNING, f"{Path(__file__).parents[1]} is not installed: pip install ."


def check_core() -> Result:
    """Which core of the index runs. Plain Python is a warning, unless an extension is there and does not load."""
    from radix import BACKEND_REASON
    from radix.backend import native

    if native is not None:
        return Status.OK, f"native: {native.__file__}"
    text = f"plain Python: same answers, far slower ({BACKEND_REASON})"
    if os.environ.get(CORE_SWITCH) == "reference":
        return Status.WARNING, text
    if importlib.util.find_spec("radix._native"):
        return Status.BROKEN, f"{text}: install again with pip install --force-reinstall --no-deps"
    return Status.WARNING, f"{text}; install a C++20 compiler, then Rhizome again (in a checkout: make native)"


def check_hashing() -> Result:
    """The published vector of SipHash-2-4-128, and a prompt's keys by the core that runs and by the reference."""
    import numpy as np

    from radix import BACKEND, siphash
    from radix.backend import native

    low, high = 0x0706050403020100, 0x0F0E0D0C0B0A0908
    if siphash.siphash128(b"", low, high).hex() != "a3817f04ba25a8e66df67214c7550293":
        return Status.BROKEN, "the reference is not SipHash-2-4"
    tokens = np.arange(1000, dtype=np.uint32)
    for block_size in (1, 16):
        expected = siphash.block_keys(tokens, block_size, low, high)
        if not np.array_equal((native or siphash).block_keys(tokens, block_size, low, high), expected):
            return Status.BROKEN, f"{BACKEND} and reference differ for blocks of {block_size}"
    return Status.OK, "SipHash-2-4 as published; a prompt's keys as the reference has them"


def check_tree() -> Result:
    """A small stream of stores and removals on the tree that runs and on the reference."""
    from radix import BACKEND, make_tree
    from radix.reference import ReferenceTree

    if difference := tree_difference(make_tree(), ReferenceTree()):
        return Status.BROKEN, f"{BACKEND} and reference differ: {difference}"
    return Status.OK, f"{STEPS} changes, each followed by a match, as the reference has them"


STEPS = 300
WORKERS = 3


def tree_difference(tree: PrefixTree, oracle: PrefixTree) -> str:
    """Where two empty trees first differ over STEPS random changes; "" if nowhere."""
    import numpy as np

    draw = random.Random(7)  # noqa: S311 - no secret, and the same each time
    chain = np.array([draw.getrandbits(64) | 1 for _ in range(64)], dtype=np.uint64)
    for step in range(STEPS):
        worker, start, length = draw.randrange(WORKERS), draw.randrange(len(chain)), draw.randrange(1, 48)
        part, parent = chain[start : start + length], int(chain[start - 1]) if start else 0
        if draw.random() < 0.6:
            changed = [one.store(worker, part, parent) for one in (tree, oracle)]
        else:
            changed = [one.remove(worker, part[::2].copy()) for one in (tree, oracle)]
        depths = [one.match(chain).as_dict() for one in (tree, oracle)]
        digests = [one.digest(worker).hex() for one in (tree, oracle)]
        for what, (found, expected) in (("changed", changed), ("match", depths), ("digest", digests)):
            if found != expected:
                return f"step {step}, {what}: {found} for {expected}"
    tree.check()
    return ""


def check_torch() -> Result:
    """What workers compute with; a router does without."""
    if missing := [name for name in WORKER_MODULES if not importlib.util.find_spec(name)]:
        return Status.OK, f"no {', '.join(missing)}: fit for a router; workers need pip install 'rhizome[worker]'"
    import safetensors
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    text = f"{torch.__version__}, safetensors {safetensors.__version__}; {', '.join(devices) or 'no GPU: CPU only'}"
    return Status.OK, text


def check_wire() -> Result:
    """gRPC and the generated protobuf code, which refuses a runtime that is older than itself."""
    import google.protobuf
    import grpc

    import rhizome.v1.router_pb2_grpc
    import rhizome.v1.worker_pb2_grpc  # noqa: F401

    return Status.OK, f"grpc {grpc.__version__}, protobuf {google.protobuf.__version__}"


def check_secret() -> Result:
    """What workers and router trust each other by."""
    if fleet_secret():
        return Status.OK, f"{SECRET_VARIABLE} is set: workers and tickets are signed"
    text = f"{SECRET_VARIABLE} is not set: any worker that reaches a router may join (`rhizome up` makes one)"
    return Status.WARNING, text


def check_cpus() -> Result:
    """How many CPUs there are for this process."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Status.OK, f"{usable} of {os.cpu_count()} usable"


def check_huge_pages(switch: Path = HUGE_PAGES) -> Result:
    """Whether the index gets the huge pages that it asks for: its lookups are random, and miss the TLB without them."""
    try:
        mode = switch.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        mode = "unknown"
    if mode in ("always", "madvise"):
        return Status.OK, f"transparent huge pages: {mode}"
    text = f"transparent huge pages: {mode}; lookups in a large index are slower (echo madvise > {switch})"
    return Status.WARNING, text


CHECKS: dict[str, Callable[[], Result]] = {
    "python": check_python,
    "rhizome": check_package,
    "core": check_core,
    "hashing": check_hashing,
    "tree": check_tree,
    "torch": check_torch,
    "wire": check_wire,
    "secret": check_secret,
    "cpus": check_cpus,
    "huge pages": check_huge_pages,
}


def examine(checks: dict[str, Callable[[], Result]] = CHECKS) -> list[Finding]:
    """One finding a check; a check that fails is one, too."""
    findings = []
    for name, check in checks.items():
        try:
            findings.append(Finding(name, *check()))
        except Exception as error:  # whatever it is, it is what a doctor looks for
            findings.append(Finding(name, Status.BROKEN, f"{type(error).__name__}: {error}"))
    return findings


def run_doctor(json_output: bool) -> int:
    """Print what was found, one line a fact, or one JSON object. Returns the exit code: 1 where something is broken."""
    findings = examine()
    fit = all(finding.status is not Status.BROKEN for finding in findings)
    if json_output:
        print(json.dumps({"fit": fit, "findings": [finding._asdict() for finding in findings]}))
    else:
        for finding in findings:
            print(f"{finding.status:8} {finding.name:11} {finding.text}")
    return 0 if fit else 1


def announce_core() -> None:
    """Log which core of the index this process runs on."""
    status, text = check_core()
    _log.log(logging.INFO if status is Status.OK else logging.WARNING, "index core: %s", text)
