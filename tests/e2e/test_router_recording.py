"""A router writes down what it streams, as a trace that can be read."""

from __future__ import annotations

import json
from pathlib import Path

from deploy.traces.reuse import measure_reuse
from deploy.traces.trace import read_trace
from tests.support.router_cluster import PROMPT, Cluster, with_cluster


def test_streamed_requests_are_recorded(tmp_path: Path) -> None:
    """Lengths and shared prefixes of every streamed request, in order of arrival; requests of direct mode are not."""

    async def test(running: Cluster) -> None:
        await running.join()
        await running.ready()
        for _ in range(2):
            await running.client.complete(token_ids=PROMPT)
        await running.client.complete(token_ids=[*PROMPT[:320], 7])

    path = tmp_path / "seen.jsonl"
    with_cluster(test, record_trace=path)
    for line in path.read_text().splitlines():
        assert json.loads(line)["ttft_ms"] > 0
        assert json.loads(line)["predicted_ttft_ms"] > 0
    trace = read_trace(path)
    assert [request.input_tokens for request in trace.requests] == [400, 400, 321]
    assert all(request.output_tokens >= 2 for request in trace.requests)
    assert trace.block_size == 16
    assert measure_reuse(trace).hits == [0, 25, 20]
