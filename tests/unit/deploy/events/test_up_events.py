"""`rhizome up --events`: where the events can be read."""

from __future__ import annotations

from deploy.local import event_lines
from rhizome.v1.router_pb2 import WorkerEntry


def test_up_says_where_each_workers_events_are_read() -> None:
    """With the port that was free; a password is for nobody's eyes; those on the worker's own port need no line."""
    entries = [
        WorkerEntry(worker_id="worker-1", events_url="redis://u:secret@127.0.0.1:6379/kv"),
        WorkerEntry(worker_id="worker-0", events_url="zmq://127.0.0.1:40001?replay=40007"),
        WorkerEntry(worker_id="worker-2"),
    ]
    assert event_lines(entries) == [
        "worker-0: events at zmq://127.0.0.1:40001?replay=40007",
        "worker-1: events at redis://u:***@127.0.0.1:6379/kv",
    ]
