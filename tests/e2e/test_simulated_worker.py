"""Simulated workers on the command line: a fleet without GPUs, without torch, and with everything else real."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from router.client import SyncClient
from tests.support.processes import Launcher
from worker.hardware_file import dump_hardware
from worker.step_time import HARDWARE

WITHOUT_TORCH = (
    "import sys; sys.modules['torch'] = sys.modules['safetensors'] = None; from deploy.cli import main; main()"
)


def test_a_fleet_of_simulated_workers_serves(tmp_path: Path) -> None:
    """`up --simulated`: text and chat, answers as long as asked for, a second turn from the cache, own hardware."""
    hardware = tmp_path / "own.toml"
    hardware.write_text(dump_hardware(HARDWARE["70b-4xh100"]).replace("70b-4xh100", "own"))
    options = ("--workers", "2", "--simulated", "--hardware", str(hardware), "--time-scale", "50")
    with Launcher(None, *options) as launcher, SyncClient(launcher.address) as client:
        answer = client.complete("Tell me a story.", max_tokens=30)
        assert (len(answer.token_ids), len(answer.text), answer.finish_reason) == (30, 30, "length")
        turns = [{"role": "user", "content": "Which shelf holds the comet logs? " * 20}]
        first = client.complete(messages=turns, model="own", max_tokens=20)
        turns += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "Why?"}]
        second = client.complete(messages=turns, max_tokens=20)
        assert second.worker_id == first.worker_id
        assert second.cached_tokens >= first.prompt_tokens // 16 * 16
        entries = client.workers()
        assert {entry.status.blocks_total for entry in entries} == {805 * 512 // 16}
        steps = HARDWARE["70b-4xh100"].steps
        assert answer.total_s >= (steps.prefill_step_s + 29 * steps.decode_step_s) / 50


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-c", WITHOUT_TORCH, *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=110, input="")


def test_no_torch_is_needed() -> None:
    """A supervised worker starts, says where it serves, and ends with its parent, where torch is not installed."""
    command = (sys.executable, "-c", WITHOUT_TORCH, "--log-level=warning", "worker", "--simulated", "--supervised")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["address"].startswith("127.0.0.1:")
        assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        ("worker --simulated --hardware abacus", "hardware is 'abacus': one of 70b-4xh100, 8b-1xh100, or a TOML file"),
        ("up --simulated --hardware abacus", "hardware is 'abacus': one of 70b-4xh100, 8b-1xh100, or a TOML file"),
        ("worker --hardware 8b-1xh100", "hardware is '8b-1xh100': only with --simulated"),
        ("worker", "model is None: a folder with a Hugging Face checkpoint, or --simulated instead"),
        ("worker --simulated --time-scale 0", "time_scale is 0.0: above 0 and at most 1e+06"),
        ("worker --simulated --model x", "model is 'x': not with --simulated, which computes nothing"),
        ("up --simulated --kv-cache-mib 4", "kv_cache_mib is 4: not with --simulated: the hardware says how much KV"),
        ("worker --simulated --block-size 500000", "block_size is 500000: 1 to 404480, as 8b-1xh100 holds 404480"),
        ("worker --simulated --max-running 0", "max_running is 0: at least 1"),
        ("worker --simulated --max-running 9000", "max_batched_tokens is 8192: at least max_running (9000)"),
    ],
)
def test_bad_input_is_one_line(arguments: str, refusal: str) -> None:
    """Field, value and limit; exit code 2."""
    done = run(*arguments.split())
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"rhizome: {refusal}")
