"""Which fleets the demo plays on, and where."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.demo.places import Embedded, place
from deploy.demo.stages import disagg_stages, routing_stages
from deploy.fleet.plan import plan_fleet
from rhizome.errors import Unavailable


def test_routing_is_played_three_ways_on_one_fleet() -> None:
    """The first mode is the one that the others are compared with."""
    (stage,) = routing_stages("demo-1", 2)
    assert [mode.name for mode in stage.modes] == ["kv-aware", "round-robin", "cache-off"]
    plan = plan_fleet(stage.fleet)
    assert [worker.name for worker in plan.workers] == ["worker-0", "worker-1"]
    assert not any("local-prefill" in argument for argument in plan.routers[0].arguments())


def test_prefill_apart_from_decode_comes_after_as_many_workers_that_do_both() -> None:
    """All prompts go to the prefill worker; the demo takes little of a Ray cluster's CPUs."""
    together, apart = (plan_fleet(stage.fleet) for stage in disagg_stages("demo-1", 3))
    assert [worker.role for worker in together.workers] == ["both"] * 3
    assert [worker.name for worker in apart.workers] == ["prefill-0", "decode-0", "decode-1"]
    assert "--local-prefill-ms=0" in apart.routers[0].arguments()
    assert sum(server.resources.cpus for server in (*apart.routers, *apart.workers)) < 1


def test_without_ray_the_demo_is_embedded(tmp_path: Path) -> None:
    """Nothing is started before a fleet is asked for."""
    with place(None, tmp_path, print) as there:
        assert isinstance(there, Embedded)


def test_ray_is_started_where_none_runs_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """auto looks for one first; an address that was given has to be there."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'rhizome[ray]'")
    from deploy.demo import on_ray

    did: list[str] = []

    def connect(address: str) -> None:
        did.append(f"connect {address}")
        raise Unavailable("no Ray cluster there")

    monkeypatch.setattr(on_ray, "connect", connect)
    monkeypatch.setattr(on_ray.ray, "init", lambda **options: did.append(f"start {options['address']}"))
    with place("auto", tmp_path, lambda text: None):
        assert did == ["connect auto", "start local"]
    did.clear()
    with place("local", tmp_path, lambda text: None):
        assert did == ["start local"]
    did.clear()
    with pytest.raises(Unavailable), place("host:6379", tmp_path, lambda text: None):
        pass
    assert did == ["connect host:6379"]
