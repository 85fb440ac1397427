"""Processes that tests start and stop."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Self


class Launcher:
    """`rhizome up` with one worker on a free port, from ready to stopped."""

    def __init__(self, model: Path | None, *options: str, until: str = "ready: ") -> None:
        """Entered as soon as a line begins with `until`. Without a model the options say what is served."""
        self._until = until
        served = () if model is None else ("--model", str(model))
        arguments = ("up", *served, "--workers", "1", "--port", "0", *options)
        command = (sys.executable, "-m", "deploy.cli", *arguments)
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.children: list[int] = []
        self.address = ""

    def __enter__(self) -> Self:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"\(pid (\d+)\)", line):
                self.children.append(int(found[1]))
            if found := re.search(r"^ready: .* --router (\S+)", line):
                self.address = found[1]
            if line.startswith(self._until):
                return self
        self.process.__exit__(None, None, None)
        raise AssertionError("the launcher ended before it was ready")

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.__exit__(None, None, None)


def wait_until_gone(pid: int) -> None:
    """Return once there is no such process."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} is still there")
