"""`rhizome status` of a fleet: what its launcher and its routers know, together, as a table and as JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import grpc

from deploy.events.show import Output, table
from deploy.pulled import pulled, show_pulled
from kv_events.inspect.words import printable
from rhizome.v1 import launcher_pb2
from rhizome.v1.router_pb2 import WorkerEntry
from router.client import Client

ROUTER_TIMEOUT_S = 5.0
HEADS = (
    *("server", "role", "state", "host", "pid", "address", "epoch"),
    *("restarts", "lease", "cached", "running", "in flight"),
)
STATES = {
    launcher_pb2.SERVER_STATE_PENDING: "pending",
    launcher_pb2.SERVER_STATE_STARTING: "starting",
    launcher_pb2.SERVER_STATE_SERVING: "serving",
}

Entries = Mapping[str, Sequence[WorkerEntry] | None]
"""What each router, by its address, knows of the workers; None of one that does not answer."""


async def ask_routers(status: launcher_pb2.FleetStatus) -> Entries:
    """Every router of the fleet."""
    addresses = [server.address for server in status.servers if server.role == "router" and server.address]
    return dict(zip(addresses, await asyncio.gather(*map(_ask, addresses)), strict=True))


async def _ask(router: str) -> Sequence[WorkerEntry] | None:
    try:
        async with asyncio.timeout(ROUTER_TIMEOUT_S), Client(router) as client:
            return await client.workers()
    except (TimeoutError, grpc.aio.AioRpcError):
        return None


def fleet_rows(status: launcher_pb2.FleetStatus, entries: Entries) -> list[dict[str, Any]]:
    """A row for each server; what is not known is None. Seconds, and shares from 0 to 1."""
    return [_row(server, entries) for server in status.servers]


def _row(server: launcher_pb2.ServerStatus, entries: Entries) -> dict[str, Any]:
    row = {
        "server": server.name,
        "group": server.group,
        "role": server.role,
        "state": STATES.get(server.state, "unknown"),
        "host": server.host,
        "node": server.node or None,
        "pid": server.pid or None,
        "address": server.address or None,
        "epoch": None,
        "restarts": server.restarts,
        "lease_left_s": None,
        "cached_share": None,
        "running": None,
        "in_flight": None,
        "pulled": None,
        "problem": server.problem or None,
    }
    if server.role == "router":
        known = entries.get(server.address)
        if known is None and row["state"] == "serving":
            row["state"] = "no answer"
        return row | {"in_flight": None if known is None else sum(entry.in_flight for entry in known)}
    known = _known(server, entries)
    if not known:
        return row | ({"state": "not joined"} if row["state"] == "serving" and entries else {})
    newest = _newest(known)
    held = newest.status.blocks_in_use + newest.status.blocks_cached
    if row["state"] == "serving" and any(entry.draining for entry in known):
        row["state"] = "draining"
    return row | {
        "epoch": newest.epoch,
        "lease_left_s": round(min(entry.lease_left_s for entry in known), 3),
        "cached_share": held / max(1, newest.status.blocks_total),
        "running": newest.status.running + newest.status.waiting,
        "in_flight": sum(entry.in_flight for entry in known),  # each router counts its own
        "pulled": pulled(newest.status),
    }


def _known(server: launcher_pb2.ServerStatus, entries: Entries) -> list[WorkerEntry]:
    """What the routers know of a worker."""
    return [entry for each in entries.values() for entry in each or () if entry.worker_id == server.name]


def _newest(known: Sequence[WorkerEntry]) -> WorkerEntry:
    return max(known, key=lambda entry: (entry.epoch, entry.status.pulls))


def show_fleet(status: launcher_pb2.FleetStatus, entries: Entries, *, as_json: bool) -> None:
    """Print it."""
    rows, output = fleet_rows(status, entries), Output(as_json=as_json)
    if as_json:
        output.json({"name": status.name, "launcher": status.launcher, "servers": rows})
        return
    for line in table(HEADS, [_cells(row) for row in rows]):
        output.line(line)
    workers = [(server.name, _known(server, entries)) for server in status.servers if server.role != "router"]
    show_pulled(output, [(name, _newest(known).status) for name, known in workers if known])
    for row in rows:
        if row["problem"] and row["state"] != "serving":
            output.text(printable(f"{row['server']}: {row['problem']}"), "bad")


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    def text(name: str, shape: str = "{}") -> str:
        return "-" if row[name] is None else shape.format(row[name])

    return (
        *(text("server"), text("role"), text("state"), text("host"), text("pid"), text("address"), text("epoch")),
        *(text("restarts"), text("lease_left_s", "{:.1f} s"), text("cached_share", "{:.0%}")),
        *(text("running"), text("in_flight")),
    )
