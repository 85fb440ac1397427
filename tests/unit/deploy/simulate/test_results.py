"""A run's row: numbers worked out by hand, and a document that JSON can hold."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import lru_cache

import pytest

from deploy.simulate.fleet import Network
from deploy.simulate.results import (
    SHORT_TOKENS,
    Case,
    Row,
    Setting,
    Slo,
    document,
    header_of,
    known_saturation,
    short_work,
)
from deploy.simulate.sweep import Run, replay
from deploy.traces.trace import Trace, TraceRequest
from worker.step_time import HARDWARE

HARDWARE_70B = HARDWARE["70b-4xh100"]
STEPS = HARDWARE_70B.steps
DELAY_S = 2 * Network().delay_s  # to the worker and back

# Far apart: a prompt of 4 blocks and 1 token, the same again, and one that answers with a single token.
TRACE = Trace(
    "three",
    512,
    (
        TraceRequest(0.0, 2049, 11, (1, 2, 3, 4, 5)),
        TraceRequest(100.0, 2049, 11, (1, 2, 3, 4, 5)),
        TraceRequest(200.0, 1024, 1, (7, 8)),
    ),
)
SETTING = Setting(TRACE, HARDWARE_70B, Network())


@lru_cache
def replayed(slo: Slo = SETTING.slo, trace: Trace = TRACE, workers: int = 1) -> Run:
    """By a fleet of one."""
    return replay(replace(SETTING, slo=slo, trace=trace), Case("round-robin", workers, 1.0))


def test_times_are_those_of_the_step_model() -> None:
    """On an idle worker a first token takes the network and its prefill; the second equal prompt has one token left."""
    cold = STEPS.step_s(0, 0, [(0, 2049)]) + DELAY_S
    warm = STEPS.step_s(1, 2048) + DELAY_S
    other = STEPS.step_s(0, 0, [(0, 1024)]) + DELAY_S
    run = replayed()
    assert run.ttft_s.tolist() == pytest.approx([cold, warm, other])
    row = run.row
    assert row.ttft_mean_s == pytest.approx((cold + warm + other) / 3)
    assert row.ttft_p50_s == pytest.approx(other)
    assert row.itl_mean_s == pytest.approx(STEPS.decode_s(1, 2054, 1), rel=0.01)
    assert row.e2e_mean_s == pytest.approx(row.ttft_mean_s + 2 / 3 * 10 * row.itl_mean_s)


def test_shares_are_of_what_there_was() -> None:
    """Hits and savings in tokens, goodput in requests, rate by the trace's time."""
    row = replayed().row
    assert row.hit_ratio == pytest.approx(2048 / (2049 + 2049 + 1024))
    assert row.prefill_saved == pytest.approx(2049 / (2049 + 2049 + 1024))  # its last token came with a decode step
    assert (row.goodput, row.refused, row.preemptions, row.imbalance) == (1.0, 0, 0, 1.0)
    assert (row.requests, row.workers, row.routers, row.speed, row.load) == (3, 1, 1, 1.0, None)
    assert row.rate_per_s == pytest.approx(3 / 200)
    assert (row.held_share, math.isnan(row.held_mean_s)) == (0.0, True)


def test_goodput_counts_those_that_keep_the_slo() -> None:
    """A bound on the first token that only the warm one keeps; one on the others that only the single token keeps."""
    assert replayed(Slo(ttft_s=0.05)).row.goodput == pytest.approx(1 / 3)
    assert replayed(Slo(itl_s=0.001)).row.goodput == pytest.approx(1 / 3)


def test_refused_requests_miss_the_slo_and_have_no_times() -> None:
    """One that fits into no worker: counted, and in no mean."""
    trace = replace(TRACE, requests=(*TRACE.requests, TraceRequest(300.0, HARDWARE_70B.kv_tokens, 9, ())))
    row = replayed(trace=trace).row
    assert (row.requests, row.refused) == (4, 1)
    assert row.goodput == pytest.approx(3 / 4)
    assert row.ttft_mean_s == replayed().row.ttft_mean_s


def test_an_idle_worker_shows_as_imbalance() -> None:
    """Three requests in turn on two workers: the one with the cold prompt and the last is busier than the mean."""
    assert 1.0 < replayed(workers=2).row.imbalance < 2.0


def test_work_is_short_by_the_trace_alone() -> None:
    """The prompt's length decides, not what was seen of it before: that may have been pushed out."""
    blocks = tuple(range(100))
    requests = (
        TraceRequest(0.0, SHORT_TOKENS, 1, blocks[:16]),
        TraceRequest(1.0, SHORT_TOKENS + 1, 1, blocks[:17]),
        TraceRequest(2.0, SHORT_TOKENS + 1, 1, blocks[:17]),
        TraceRequest(3.0, 1, 1, (400,)),
    )
    assert short_work(Trace("t", 512, requests)) == [True, False, False, True]


def test_rows_are_json_with_null_for_what_is_not() -> None:
    """Every field by its name; nothing that strict JSON refuses."""
    row = replayed().row
    text = json.dumps(document(header_of(SETTING), {("round-robin", 1): 2.5}, [row]), allow_nan=False)
    read = json.loads(text)
    assert read["rows"][0]["held_mean_s"] is None
    assert read["rows"][0]["ttft_mean_s"] == row.ttft_mean_s
    assert set(read["rows"][0]) == set(Row.__slots__)
    assert read["trace"]["requests"] == 3
    assert read["hardware"]["name"] == "70b-4xh100"
    assert read["saturation"] == [{"policy": "round-robin", "workers": 1, "speed": 2.5}]


def test_saturation_is_taken_over_from_the_same_setting_alone() -> None:
    """Same trace, hardware, network and seed; another SLO changes nothing; nonsense is nothing."""
    found = {("round-robin", 16): 3.125, ("dynamo", 8): 1.5}
    former = json.loads(json.dumps(document(header_of(SETTING), found, [])))
    assert known_saturation(former, header_of(SETTING)) == found
    assert known_saturation(former, header_of(replace(SETTING, slo=Slo(1.0, 1.0)))) == found
    for other in (
        replace(SETTING, seed=1),
        replace(SETTING, trace=TRACE.head(2)),
        replace(SETTING, host_tier=True),
        replace(SETTING, network=Network(event_loss=0.1)),
    ):
        assert known_saturation(former, header_of(other)) == {}
    for nonsense in (None, [], {}, former | {"saturation": [{}]}, former | {"saturation": ["x"]}):
        assert known_saturation(nonsense, header_of(SETTING)) == {}
