"""A worker's transports: which are opened, and what is told of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.processes import WorkerSettings
from deploy.transfers import DEFAULT_TRANSPORTS, TRANSPORTS, Transfers, check_transports, transfers
from rhizome.errors import InvalidRequest
from tests.support.block_transfer import LAYOUT
from tests.support.memory_runner import MemoryRunner
from tests.unit.worker.test_engine import make_engine
from tests.unit.worker.test_peers import CONFIG
from worker.engine_thread import EngineThread
from worker.service import WorkerIdentity
from worker.transfer.memory import BlockMemory
from worker.transfer.transports import nixl

SETTINGS = WorkerSettings(model_dir=Path(), worker_id="w")


def opened(settings: WorkerSettings, look: Callable[[Transfers, tuple[str, ...]], None]) -> None:
    """What a worker has, and what it offers at h:5."""
    memory = BlockMemory.shared(LAYOUT, CONFIG.num_blocks)
    thread = EngineThread(make_engine(CONFIG, runner=MemoryRunner(CONFIG.num_blocks, CONFIG.block_size)))

    async def main() -> None:
        identity = WorkerIdentity("w", 7, None, {})  # type: ignore[arg-type]
        async with transfers(settings, identity, thread, memory) as moved:
            look(moved, moved.offers_at("h:5"))

    thread.start()
    try:
        asyncio.run(main())
    finally:
        thread.stop()


def names(offers: tuple[str, ...]) -> list[str]:
    return [offer.partition("://")[0] for offer in offers]


def test_all_but_nixl_is_there_by_default() -> None:
    """NIXL must be named: it lets whoever reaches its listeners read the pool."""
    assert set(TRANSPORTS) - set(DEFAULT_TRANSPORTS) == {"nixl"}

    def look(moved: Transfers, offers: tuple[str, ...]) -> None:
        assert names(offers) == list(DEFAULT_TRANSPORTS)
        assert moved.fetch_token_s > 0

    opened(SETTINGS, look)


def test_grpc_alone_opens_no_port_of_its_own() -> None:
    """Blocks go through the worker's own server, at the address by which others reach it."""

    def look(moved: Transfers, offers: tuple[str, ...]) -> None:
        assert offers == ("grpc://others-say:5",)
        assert len(moved.handlers) == 1

    opened(replace(SETTINGS, transports=("grpc",), advertise="others-say"), look)


def test_a_nixl_that_does_not_start_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The worker goes on with what else there is; with nothing else it neither offers nor pulls."""

    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("no backend")

    monkeypatch.setattr(nixl, "NixlEndpoint", failing)
    opened(replace(SETTINGS, transports=("nixl", "shm")), lambda _, offers: _same(names(offers), ["shm"]))
    assert "nixl does not start here, and is left out: no backend" in caplog.text

    def look(moved: Transfers, offers: tuple[str, ...]) -> None:
        assert (offers, moved.fetch_token_s) == ((), 0)

    opened(replace(SETTINGS, transports=("nixl",)), look)


def _same(found: object, expected: object) -> None:
    assert found == expected


def test_what_cannot_be_chosen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """NIXL where it is not installed with what to install; none at all."""
    monkeypatch.setattr(nixl, "MODULES", ())
    with pytest.raises(InvalidRequest, match="pip install"):
        check_transports(["nixl"])
    with pytest.raises(InvalidRequest, match="at least one of"):
        check_transports([])
    check_transports(DEFAULT_TRANSPORTS)
