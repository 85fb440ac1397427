"""Load: own reservations squared with what workers report."""

from __future__ import annotations

from typing import Any

import pytest

from rhizome.errors import Duplicate, Overloaded
from router import load as load_module
from router.fleet import WorkerReport
from router.load import SILENCE_LIMIT_S, Load, Reservation
from router.table import Column, WorkerTable


def reserve(
    load: Load, name: str, tokens: int = 100, *, streamed: bool = True, now: float = 0.0, worker: str = "w"
) -> None:
    load.reserve(
        Reservation(
            request_id=name,
            worker_id=worker,
            prefill_tokens=tokens,
            blocks=tokens // 10,
            prompt_tokens=tokens,
            sequences=1,
            predicted_ttft_s=0.1,
            routed_at=now,
            tokens_s=tokens / 1000,
            prefill_s=tokens / 1000 + 0.01,
            streamed=streamed,
        )
    )


def make_load(*workers: str) -> Load:
    load = Load(WorkerTable())
    for slot, worker in enumerate(workers or ("w",)):
        load._table.add(slot)
        load.add_worker(worker, slot)
    return load


def left(load: Load) -> dict[str, int]:
    return {name: request.prefill_tokens for name, request in load.of("w").reservations.items()}


def columns(load: Load, worker: str = "w") -> dict[str, Any]:
    """What decisions would read of a worker."""
    values = load._table.values[:, load.of(worker).slot]
    return {column.name.lower(): float(values[column]) for column in Column}


def test_a_request_counts_from_the_decision_to_its_end() -> None:
    """Its tokens until its first token, its sequences and blocks until it ends."""
    load = make_load()
    reserve(load, "a", 100)
    reserve(load, "b", 50)
    state = load.of("w")
    assert (state.queued_prefill_tokens, state.sequences, state.decoding, state.pending_blocks) == (150, 2, 0, 15)
    assert load.prefilled("a", 1.0) is not None
    assert load.prefilled("a", 1.0) is None
    assert (state.queued_prefill_tokens, state.sequences, state.decoding) == (50, 2, 1)
    assert load.release("a", 9.0) is not None
    assert load.release("a", 9.0) is None
    assert (state.queued_prefill_tokens, state.sequences, state.decoding, state.pending_blocks) == (50, 1, 0, 5)
    load.check(["w"])


def test_what_others_sent_to_a_worker_is_seen_in_its_reports() -> None:
    """Beyond the own reservations only; it goes when the reports say so."""
    load = make_load()
    reserve(load, "a", 100)
    load.report("w", WorkerReport(running=3, waiting=2, prefill_tokens_outstanding=700, blocks_in_use=7), 1.0)
    state = load.of("w")
    assert (state.queued_prefill_tokens, state.sequences, state.decoding, state.blocks_in_use) == (700, 5, 4, 7)
    load.report("w", WorkerReport(running=1, prefill_tokens_outstanding=100), 2.0)
    assert (state.queued_prefill_tokens, state.sequences) == (100, 1)


def test_a_report_shows_how_far_requests_are() -> None:
    """Requests that a worker surely has cannot have more left than it reports; younger ones may be new to it."""
    load = make_load()
    reserve(load, "a", 1000)
    reserve(load, "b", 1000)
    load.report("w", WorkerReport(prefill_tokens_outstanding=0), 1.0)  # may be older than the requests
    state = load.of("w")
    assert state.queued_prefill_tokens == 2000
    reserve(load, "c", 500)
    load.report("w", WorkerReport(prefill_tokens_outstanding=1400), 2.0)
    assert {name: request.prefill_tokens for name, request in state.reservations.items()} == {
        "a": 400,
        "b": 1000,
        "c": 500,
    }
    load.prefilled("a", 2.1)
    assert state.queued_prefill_tokens == 1500
    load.report("w", WorkerReport(prefill_tokens_outstanding=300), 3.0)
    assert left(load) == {"a": 0, "b": 0, "c": 300}
    load.check(["w"])


def test_blocks_are_pending_until_a_report_counts_them() -> None:
    """A request whose prefill is done is in the next report's blocks in use, and no longer promised."""
    load = make_load()
    reserve(load, "a", 100)
    load.prefilled("a", 0.1)
    assert load.of("w").pending_blocks == 10
    load.report("w", WorkerReport(blocks_in_use=11), 1.0)
    assert load.of("w").pending_blocks == 0
    load.release("a", 9.0)
    load.check(["w"])


def test_direct_requests_live_by_the_workers_word() -> None:
    """First token and end come in reports; one that nobody speaks of any more expires; a stream's end is its own."""
    load = make_load()
    reserve(load, "direct", streamed=False)
    reserve(load, "streamed")
    word = WorkerReport(
        prefilled_request_ids=("direct", "unknown"), finished_request_ids=("streamed", "unknown"), running=2
    )
    load.report("w", word, 5.0)
    assert [name for name, each in load.of("w").reservations.items() if each.prefilled] == ["direct"]
    load.report("w", WorkerReport(finished_request_ids=("direct",)), 6.0)
    assert "direct" not in load
    reserve(load, "silent", streamed=False, now=10.0)
    load.report("w", WorkerReport(prefilled_request_ids=("silent",)), 20.0)
    assert load.expire(20.0 + SILENCE_LIMIT_S - 0.1) == []
    assert [request.request_id for request in load.expire(20.0 + SILENCE_LIMIT_S)] == ["silent"]
    assert "streamed" in load
    load.check(["w"])


def test_only_the_worker_that_has_a_request_speaks_of_it() -> None:
    """Another worker's report that names it changes nothing."""
    load = make_load("v", "w")
    reserve(load, "a", worker="w", streamed=False)
    load.report("v", WorkerReport(prefilled_request_ids=("a",), finished_request_ids=("a",)), 1.0)
    assert "a" in load
    assert load.of("w").decoding == 0


def test_a_dropped_worker_takes_its_load_along_and_a_stream_keeps_its_id() -> None:
    """Until the stream has ended the id stays in flight, and its end touches nothing of the new incarnation."""
    load = make_load()
    reserve(load, "streamed")
    reserve(load, "direct", streamed=False)
    load.drop_worker("w")
    assert ("streamed" in load, "direct" in load) == (True, False)
    load.add_worker("w", 0)
    with pytest.raises(Duplicate):
        reserve(load, "streamed")
    assert load.of("w").sequences == 0
    load.prefilled("streamed", 1.0)
    load.release("streamed", 9.0)
    assert load.of("w").sequences == 0
    assert len(load) == 0
    load.check(["w"])


def test_requests_in_flight_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many is refused and leaves no trace."""
    monkeypatch.setattr(load_module, "MAX_IN_FLIGHT", 2)
    load = make_load()
    reserve(load, "a")
    reserve(load, "b")
    with pytest.raises(Overloaded):
        reserve(load, "c")
    assert load.of("w").sequences == 2
    load.check(["w"])


def test_decisions_read_what_the_load_is() -> None:
    """Every change is written to the table: sums, the head of the queue and since when it is that."""
    load = make_load()
    reserve(load, "a", 100, now=1.0)
    reserve(load, "b", 50, now=2.0)
    seen = columns(load)
    assert (seen["queued"], seen["queued_tokens"], seen["queued_s"]) == (2, 150, pytest.approx(0.15))
    assert (seen["head_s"], seen["head_since"], seen["last_routed"]) == (pytest.approx(0.11), 1.0, 2)
    load.prefilled("a", 3.0)
    seen = columns(load)
    assert (seen["queued"], seen["head_s"], seen["head_since"]) == (1, pytest.approx(0.06), 3.0)
    assert (seen["sequences"], seen["decoding"], seen["context"]) == (2, 1, 100)
    load.release("b", 4.0)
    assert (columns(load)["queued_s"], columns(load)["head_s"], columns(load)["head_since"]) == (0.0, 0.0, 4.0)


def test_blocks_of_a_request_that_ended_are_free_before_the_next_report() -> None:
    """Not twice: the next report no longer counts them."""
    load = make_load()
    reserve(load, "a", 100)
    load.prefilled("a", 0.1)
    load.report("w", WorkerReport(blocks_in_use=30), 1.0)
    load.release("a", 1.1)
    assert columns(load)["blocks_in_use"] == 20
    load.report("w", WorkerReport(blocks_in_use=25), 2.0)
    assert columns(load)["blocks_in_use"] == 25


def test_how_long_blocks_are_in_use_is_learned_from_those_that_were_served() -> None:
    """One that was given up before its first token tells nothing."""
    load = make_load()
    for number in range(200):
        reserve(load, f"a{number}", now=0.0)
        reserve(load, f"b{number}", now=0.0)
        load.prefilled(f"a{number}", 1.0)
        load.release(f"a{number}", 2.0)
        load.release(f"b{number}", 500.0)
    assert columns(load)["residence_s"] == pytest.approx(2.0, rel=0.01)
