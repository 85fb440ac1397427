"""Fuzzes every reader of bytes from afar, one after the other: python -m tests.fuzz --runs N (make fuzz-events).

build/fuzz-events keeps what was learned, and the input of a finding, which

    python -m tests.fuzz.harness TARGET FILE

shows again. Ends with 1 when there is one.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

from tests.fuzz import seeds
from tests.fuzz.targets import TARGETS

RSS_LIMIT_MB = 768  # Python with NumPy and atheris is 150 to 250 of them
HANGS_S = 600  # on one input; one that is only slow is found by the harness


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the readers of events.")
    parser.add_argument("--runs", type=int, default=100_000, help="inputs in all [default: 100000]")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this one; may be repeated")
    parser.add_argument("--folder", type=Path, default=Path("build/fuzz-events"))
    options = parser.parse_args()
    names = options.target or list(TARGETS)
    shares = sum(TARGETS[name].share for name in names)
    total, failed = 0, []
    print(f"{'target':16} {'inputs':>10} {'seconds':>8} {'inputs/s':>9} {'peak RSS':>9}", flush=True)
    for name in names:
        runs = -(-options.runs * TARGETS[name].share // shares)
        started = time.monotonic()
        code, executed, peak_mb = fuzz(name, runs, options.folder)
        took_s = time.monotonic() - started
        total += executed
        print(f"{name:16} {executed:10,} {took_s:8.0f} {executed / took_s:9.0f} {peak_mb:6} MB", flush=True)
        if code:
            failed.append(name)
            print((options.folder / f"{name}.log").read_text(errors="replace")[-3000:], flush=True)
    print(f"{'all':16} {total:10,}   findings in: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def fuzz(name: str, runs: int, folder: Path) -> tuple[int, int, int]:
    """Run one target; its exit code, how many inputs were read, and the most memory, MB."""
    target = TARGETS[name]
    learned, first, words = folder / name, folder / f"{name}-seeds", folder / "words.txt"
    for each in (learned, first):
        each.mkdir(parents=True, exist_ok=True)
    for at, data in enumerate(target.seeds()):
        (first / f"{at:03}").write_bytes(data)
    quoted = ["".join(map("\\x{:02x}".format, word)) for word in seeds.DICTIONARY]
    words.write_text("".join(f'"{word}"\n' for word in quoted))
    command = [
        *(sys.executable, "-m", "tests.fuzz.harness", name),
        *(f"-runs={runs}", f"-max_len={target.max_len}", f"-rss_limit_mb={RSS_LIMIT_MB}", f"-timeout={HANGS_S}"),
        *("-print_final_stats=1", f"-dict={words}", f"-artifact_prefix={folder}/{name}-", str(learned), str(first)),
    ]
    with (folder / f"{name}.log").open("wb") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    said = (folder / f"{name}.log").read_text(errors="replace")
    executed, peak = (
        re.findall(rf"stat::{what}:\s*(\d+)", said) for what in ("number_of_executed_units", "peak_rss_mb")
    )
    return code, int(executed[-1]) if executed else 0, int(peak[-1]) if peak else 0


if __name__ == "__main__":
    sys.exit(main())
