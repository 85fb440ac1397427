"""A fleet's status, from what its launcher and its routers know."""

from __future__ import annotations

import json

import pytest

from deploy.fleet.show import fleet_rows, show_fleet
from rhizome.v1 import launcher_pb2, router_pb2

SERVING, STARTING = launcher_pb2.SERVER_STATE_SERVING, launcher_pb2.SERVER_STATE_STARTING
STATUS = launcher_pb2.FleetStatus(
    name="demo",
    launcher="local",
    servers=[
        launcher_pb2.ServerStatus(name="router-0", role="router", state=SERVING, address="h:1", pid=7),
        launcher_pb2.ServerStatus(name="router-1", role="router", state=SERVING, address="h:2"),
        launcher_pb2.ServerStatus(name="chat-0", role="both", state=SERVING, address="h:3", restarts=1),
        launcher_pb2.ServerStatus(name="chat-1", role="both", state=SERVING, address="h:4"),
        launcher_pb2.ServerStatus(name="chat-2", role="both", state=STARTING, problem="no memory\x1b[2J"),
    ],
)


def entry(name: str, in_flight: int, lease_left_s: float, *, draining: bool = False) -> router_pb2.WorkerEntry:
    told = router_pb2.WorkerEntry(
        worker_id=name, epoch=5, in_flight=in_flight, lease_left_s=lease_left_s, draining=draining
    )
    told.status.blocks_total, told.status.blocks_in_use, told.status.blocks_cached = 100, 10, 30
    return told


def test_what_all_routers_know_of_a_worker_comes_together() -> None:
    """Requests in flight are added up, the shortest lease counts, and one router that drains it is enough to say so."""
    known = {"h:1": [entry("chat-0", 2, 2.5)], "h:2": [entry("chat-0", 1, 1.5, draining=True)]}
    rows = {row["server"]: row for row in fleet_rows(STATUS, known)}
    worker = rows["chat-0"]
    assert (worker["in_flight"], worker["lease_left_s"], worker["state"], worker["epoch"]) == (3, 1.5, "draining", 5)
    assert worker["cached_share"] == 0.4
    assert worker["restarts"] == 1
    assert rows["router-0"]["in_flight"] == 2
    assert (rows["chat-1"]["state"], rows["chat-2"]["state"]) == ("not joined", "starting")


def test_a_router_that_does_not_answer_is_said_to(capsys: pytest.CaptureFixture[str]) -> None:
    """And why a server does not start, without control characters."""
    show_fleet(STATUS, {"h:1": [], "h:2": None}, as_json=False)
    heads, *lines = capsys.readouterr().out.splitlines()
    assert heads.split()[:4] == ["server", "role", "state", "host"]
    assert "no answer" in lines[1]
    assert lines[-1].startswith("chat-2: no memory")
    assert "\x1b" not in lines[-1]
    show_fleet(STATUS, {"h:1": [], "h:2": None}, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert [row["server"] for row in told["servers"]][:2] == ["router-0", "router-1"]


def test_what_workers_pulled_from_each_other_is_shown_where_there_is_any(capsys: pytest.CaptureFixture[str]) -> None:
    """By transport; a worker that only lends is there, too; programs get every figure of the router that knows most."""
    show_fleet(STATUS, {"h:1": [entry("chat-0", 0, 2.5)]}, as_json=False)
    assert "pulled over" not in capsys.readouterr().out
    puller, lender, late = entry("chat-0", 0, 2.5), entry("chat-1", 0, 2.5), entry("chat-0", 0, 2.5)
    puller.status.pulls, puller.status.pulls_short, puller.status.pull_skipped_blocks = 3, 1, 1234
    puller.status.pulled_blocks, puller.status.fetch_token_s = 93, 1e-6
    puller.status.pull_counts.add(transport="shm", pulls=3, failed=1, blocks=90, size_bytes=3 << 20, seconds=0.5)
    puller.status.pull_counts.add(transport="tcp\x1b", pulls=1, blocks=3, size_bytes=1 << 20)
    lender.status.lent_blocks = 93
    known = {"h:1": [late, lender], "h:2": [puller]}
    show_fleet(STATUS, known, as_json=False)
    text = capsys.readouterr().out
    assert "\x1b" not in text
    shm, tcp, other = (line.split() for line in text.splitlines()[-4:-1])
    assert shm[:3] == ["chat-0", "shm", "90"]
    assert shm[-5:] == ["3", "1", "1", "1,234", "0"]
    assert tcp[:2] == ["tcp?", "3"]
    assert (other[0], other[-1]) == ("chat-1", "93")
    show_fleet(STATUS, known, as_json=True)
    rows = {row["server"]: row["pulled"] for row in json.loads(capsys.readouterr().out)["servers"]}
    assert (rows["chat-0"]["blocks"], rows["chat-0"]["token_s"], rows["chat-1"]["lent_blocks"]) == (93, 1e-6, 93)
    assert [way["size_bytes"] for way in rows["chat-0"]["by_transport"]] == [3 << 20, 1 << 20]
    assert rows["chat-1"]["token_s"] is rows["router-0"] is None
