"""`rhizome calibrate` against simulated workers, whose true step times are known."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from deploy import calibrate as calibration
from deploy.calibrate import Effort, PoorFit, calibrate, report, run_calibrate
from kv_events.log import EventLog
from rhizome.errors import Conflict
from rhizome.v1 import fleet_pb2, generation_pb2, worker_pb2, worker_pb2_grpc
from router.client import SyncClient
from tests.support.processes import Launcher
from worker.byte_tokenizer import byte_tokenizer_files
from worker.engine import Engine
from worker.engine_thread import EngineThread
from worker.hardware_file import load_hardware
from worker.scheduler import SchedulerConfig
from worker.service import WorkerIdentity, running_server
from worker.simulated_runner import VOCAB_SIZE, SimulatedRunner
from worker.step_fit import StepFit
from worker.step_time import HARDWARE, StepTimeModel
from worker.tokenizer import Tokenizer

TRUE = HARDWARE["70b-4xh100"]
EFFORT = Effort(longest=2048, max_batch=8, rounds=1)


class Clock:
    """Time that passes by sleeping alone: steps take what the model says, however busy this machine is."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@asynccontextmanager
async def worker(max_model_len: int = 8192) -> AsyncIterator[str]:
    """A simulated worker in virtual time behind a real server; yields its address."""
    config = SchedulerConfig(
        num_blocks=4000, max_model_len=max_model_len, max_batched_tokens=500, max_running=16, max_waiting=16
    )
    clock = Clock()
    files = byte_tokenizer_files(8192)
    runner = SimulatedRunner(TRUE.steps, clock=clock, sleep=clock.sleep)
    engine = Engine(
        config,
        runner,
        EventLog("w", 1, config.block_size, 1000),
        new_decoder=Tokenizer(files).detokenizer,
        eos_token_ids=frozenset(),
        clock=runner.busy_s,
        wall_clock=clock,
    )
    card = fleet_pb2.ModelCard(name="m", max_model_len=max_model_len, vocab_size=VOCAB_SIZE, block_size=16)
    thread = EngineThread(engine)
    thread.start()
    try:
        async with running_server(WorkerIdentity("w", 1, card, files), thread, "127.0.0.1", 0) as address:
            yield address
    finally:
        thread.stop()


def test_what_was_simulated_is_found() -> None:
    """Steps of sizes that were never measured are predicted within 10%, far larger ones included."""

    async def main() -> None:
        said: list[str] = []
        async with worker() as address:
            hardware, fit = await calibrate(address, EFFORT, name="found", max_running=16, say=said.append)
        assert fit.error_p90 < 0.02
        assert (hardware.kv_tokens, hardware.max_batched_tokens, hardware.max_running) == (64_000, 500, 16)
        for decoding, context, chunks in (
            (0, 0, [(0, 77)]),
            (0, 0, [(30_000, 4000)]),
            (100, 300_000, []),
            (7, 900, []),
            (20, 40_000, [(500, 300), (0, 64)]),
        ):
            true_s = TRUE.steps.step_s(decoding, context, chunks)
            assert hardware.steps.step_s(decoding, context, chunks) == pytest.approx(true_s, rel=0.1)
        assert any("beside 4 answers" in line for line in said)
        assert "attention_s" in report(hardware, fit)

    asyncio.run(main())


def test_prompts_are_no_longer_than_the_worker_takes() -> None:
    """A worker with a shorter limit than asked for is measured up to it."""

    async def main() -> None:
        async with worker(max_model_len=600) as address:
            hardware, fit = await calibrate(address, EFFORT, name="short", max_running=16, say=lambda _: None)
        assert fit.error_p90 < 0.05
        assert hardware.max_batched_tokens == 500

    asyncio.run(main())


def test_a_worker_that_others_use_is_refused() -> None:
    """Their steps would be taken for ours; so would those of requests that come in between."""

    async def main() -> None:
        async with worker() as address, grpc.aio.insecure_channel(address) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            message = worker_pb2.WorkerGenerateRequest(
                token_ids=b"\7\0\0\0" * 50, sampling=generation_pb2.SamplingParams(max_tokens=2)
            )

            async def other(_: str) -> None:
                [chunk async for chunk in stub.Generate(message)]

            probed = calibration.Probe(stub, 16, 64_000, 1000, worker_id="w")

            async def work() -> None:
                await probed.prompt(100)
                await other("")

            with pytest.raises(Conflict, match="served others meanwhile"):
                await probed.measure(work)

    asyncio.run(main())


def test_a_poor_fit_is_not_written_unless_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal has the whole report; --force writes."""
    fit = StepFit(StepTimeModel(1, 1, 1, 1, 1, 1), (), 0.1, 0.4)

    async def found(*_: object, **__: object) -> tuple[object, StepFit]:
        return replace(TRUE, name="poor"), fit

    monkeypatch.setattr(calibration, "calibrate", found)
    out = tmp_path / "poor.toml"

    def run(*, force: bool) -> str:
        settings = {"router": "", "worker": "h:1", "worker_id": None, "name": None, "max_running": 16}
        return asyncio.run(run_calibrate(out, **settings, effort=EFFORT, force=force, say=lambda _: None))  # type: ignore[arg-type]

    with pytest.raises(PoorFit, match=r"held out(.|\n)*the p90 of the error is 40\.0%: 15% is the limit"):
        run(force=False)
    assert not out.exists()
    assert "held out" in run(force=True)
    assert load_hardware(str(out)).name == "poor"


def rhizome(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "deploy.cli", *arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=110)


def test_a_routers_worker_is_calibrated_while_it_gets_nothing_else(tmp_path: Path) -> None:
    """The command as typed; the worker serves again afterwards, and the file serves as hardware."""
    out = tmp_path / "found.toml"
    with Launcher(None, "--simulated", "--hardware", "70b-4xh100", "--time-scale", "4") as launcher:
        small = ("--longest", "1024", "--max-batch", "2", "--rounds", "1")
        done = rhizome("calibrate", "--router", launcher.address, "--out", str(out), *small, "--force")
        assert done.returncode == 0, done.stderr
        assert "held out" in done.stdout
        with SyncClient(launcher.address) as client:
            assert not client.workers()[0].draining
    found = load_hardware(str(out))
    assert (found.name, found.kv_tokens, found.max_batched_tokens) == ("found", 805 * 512, 1024)


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        ("--out /nonesuch/file.toml", "out is '/nonesuch/file.toml': a file in a folder that exists"),
        ("--out x.toml --worker here", "worker is 'here': host:port"),
        ("--out x.toml --longest 10", "longest is 10: at least 1024"),
        ("--out x.toml --rounds 0", "rounds is 0: at least 1"),
        ("--out x.toml --max-running 0", "max_running is 0: at least 1"),
    ],
)
def test_bad_input_is_one_line(arguments: str, refusal: str) -> None:
    """Field, value and limit; exit code 2, before anything is measured."""
    done = rhizome("calibrate", *arguments.split())
    assert done.returncode == 2
    assert done.stderr == f"rhizome: {refusal}\n"
