"""`rhizome status`: what a router knows of its workers, and how good its predictions were."""

from __future__ import annotations

import asyncio
import json

import pytest

from deploy.status import run_status
from tests.support.router_cluster import PROMPT, Cluster, with_cluster


def test_status_tells_predictions_and_outcomes(capsys: pytest.CaptureFixture[str]) -> None:
    """For each worker and over all; nothing of requests that never were."""

    async def test(running: Cluster) -> None:
        await running.join()
        await running.ready()
        await asyncio.to_thread(run_status, running.address, as_json=False)
        assert "first tokens" not in capsys.readouterr().out
        for _ in range(3):
            await running.client.complete(token_ids=PROMPT)
        await asyncio.to_thread(run_status, running.address, as_json=False)
        heads, worker, total = capsys.readouterr().out.splitlines()
        assert heads.split()[:3] == ["worker", "state", "in"]
        assert worker.startswith("worker-0")
        assert worker.rstrip().endswith("1x")
        assert total.startswith("3 first tokens since the start")
        await asyncio.to_thread(run_status, running.address, as_json=True)
        told = json.loads(capsys.readouterr().out)
        (entry,) = told["workers"]
        for seen in (told["predictions"], entry["predictions"]):
            assert seen["requests"] == "3"
            assert 0 < seen["observed_mean_s"] < 60
            assert 0 < seen["error_p50_s"] <= seen["error_p90_s"]

    with_cluster(test)


def test_an_empty_router_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Rather than a table without rows."""

    async def test(running: Cluster) -> None:
        await asyncio.to_thread(run_status, running.address, as_json=False)
        assert capsys.readouterr().out.strip() == f"{running.address}: no worker is registered"

    with_cluster(test)
