"""Fleet: leases, epochs, agreement over a model, bounds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rhizome.errors import Conflict, InvalidRequest, NotServed, Overloaded, Unavailable
from router.fleet import (
    MAX_MODELS_REMEMBERED,
    MAX_WORKERS,
    Fleet,
    ModelCard,
    Role,
    WorkerInfo,
    WorkerReport,
    parse_role,
)

CARD = ModelCard("m", max_model_len=1000, vocab_size=100, block_size=16, tokenizer_sha256="abc")
INFO = WorkerInfo("w", 1, "host:1", CARD, blocks_total=10, max_running=4, max_waiting=4, max_batched_tokens=64)


def worker(name: str, **changes: object) -> WorkerInfo:
    return replace(INFO, worker_id=name, **changes)  # type: ignore[arg-type]


def test_a_lease_is_kept_by_heartbeats_and_by_registering_again() -> None:
    """A member is there until lease_s after its last word, not longer."""
    fleet = Fleet(lease_s=3.0)
    assert fleet.register(INFO, 0.0)
    assert fleet.expire(2.9) == []
    fleet.heartbeat("w", 1, WorkerReport(running=2), 2.9)
    assert not fleet.register(INFO, 5.0)
    assert fleet.expire(7.9) == []
    assert fleet.expire(8.0) == [INFO]
    with pytest.raises(NotServed):
        fleet.heartbeat("w", 1, WorkerReport(), 8.0)


def test_a_new_epoch_replaces_and_an_older_one_is_refused() -> None:
    """The newest incarnation is the worker; what an older one says has no effect."""
    fleet = Fleet()
    fleet.register(worker("w", epoch=5), 0.0)
    fleet.get("w").draining = True
    for act in (
        lambda: fleet.register(worker("w", epoch=4), 1.0),
        lambda: fleet.heartbeat("w", 4, WorkerReport(), 1.0),
    ):
        with pytest.raises(Conflict, match="epoch 4"):
            act()
    with pytest.raises(NotServed):
        fleet.heartbeat("w", 6, WorkerReport(), 1.0)
    assert fleet.register(worker("w", epoch=6, address="host:2"), 1.0)
    assert (fleet.get("w").info.address, fleet.get("w").draining) == ("host:2", False)
    with pytest.raises(NotServed):
        fleet.remove("w", 5)
    fleet.remove("w", 6)
    assert len(fleet) == 0


def test_two_workers_under_one_id_and_epoch_are_told_apart() -> None:
    """The second is refused, naming where the first is."""
    fleet = Fleet()
    fleet.register(INFO, 0.0)
    with pytest.raises(Conflict, match="host:1"):
        fleet.register(worker("w", address="host:2"), 0.0)


@pytest.mark.parametrize(("field", "value"), [("block_size", 32), ("vocab_size", 99), ("tokenizer_sha256", "def")])
def test_a_models_workers_agree(field: str, value: object) -> None:
    """A card unlike the fleet's is refused with both values; alone, a worker may change its own card in a new epoch."""
    fleet = Fleet()
    fleet.register(INFO, 0.0)
    other = replace(CARD, **{field: value})  # type: ignore[arg-type]
    with pytest.raises(Conflict, match=field) as caught:
        fleet.register(worker("x", model=other), 0.0)
    assert repr(value) in str(caught.value)
    assert repr(getattr(CARD, field)) in str(caught.value)
    assert fleet.register(worker("y", model=replace(other, name="another")), 0.0)
    assert fleet.register(worker("w", epoch=2, model=other), 0.0)


def test_the_card_of_a_model_is_what_every_worker_takes() -> None:
    """The shortest length counts; a name may be left out where only one model is served."""
    fleet = Fleet()
    with pytest.raises(Unavailable, match="no worker is registered"):
        fleet.card("m")
    fleet.register(INFO, 0.0)
    fleet.register(worker("x", model=replace(CARD, max_model_len=500)), 0.0)
    assert fleet.card("m").max_model_len == fleet.card("").max_model_len == 500
    fleet.register(worker("y", model=replace(CARD, name="n")), 0.0)
    with pytest.raises(InvalidRequest, match="m, n"):
        fleet.card("")
    with pytest.raises(NotServed, match="served: m, n"):
        fleet.card("z")
    fleet.remove("y", 1)
    with pytest.raises(Unavailable, match="for model n"):
        fleet.card("n")


def test_roles() -> None:
    """Numbers of the wire; others are refused."""
    assert [parse_role(number) for number in (1, 2, 3)] == [Role.BOTH, Role.PREFILL, Role.DECODE]
    for number in (0, 4, -1):
        with pytest.raises(InvalidRequest, match="role"):
            parse_role(number)


@pytest.mark.parametrize(
    "change",
    [
        {"worker_id": ""},
        {"worker_id": "a b"},
        {"worker_id": "x" * 257},
        {"worker_id": "naïve"},
        {"address": ""},
        {"epoch": 0},
        {"blocks_total": 0},
        {"max_running": 0},
        {"max_batched_tokens": 0},
        {"model": replace(CARD, name="")},
        {"model": replace(CARD, block_size=0)},
        {"model": replace(CARD, vocab_size=0)},
        {"model": replace(CARD, max_model_len=0)},
    ],
)
def test_senseless_registrations_are_refused(change: dict[str, object]) -> None:
    """By field and limit, and nothing is kept of them."""
    fleet = Fleet()
    with pytest.raises(InvalidRequest) as caught:
        fleet.register(replace(INFO, **change), 0.0)  # type: ignore[arg-type]
    assert next(iter(change)) in caught.value.field or "model" in caught.value.field
    assert len(fleet) == 0


def test_the_fleet_is_bounded() -> None:
    """One worker too many is refused; a known one may still renew."""
    fleet = Fleet()
    for number in range(MAX_WORKERS):
        fleet.register(worker(f"w{number}", model=replace(CARD, name=f"m{number}")), 0.0)
    with pytest.raises(Overloaded, match="full"):
        fleet.register(worker("more"), 0.0)
    assert fleet.register(worker("w0", epoch=2, model=replace(CARD, name="m0")), 0.0)
    assert len(fleet._models_seen) == MAX_MODELS_REMEMBERED
