"""`rhizome status`: a router's workers, how busy they are, what they pulled, and how good its predictions were."""

from __future__ import annotations

import grpc
from google.protobuf.json_format import MessageToDict

from deploy.events.show import Output, table
from deploy.pulled import show_pulled
from kv_events.inspect.words import printable
from rhizome import rpc
from rhizome.v1 import fleet_pb2, router_pb2, router_pb2_grpc
from rhizome.validate import check_address

TIMEOUT_S = 10.0
HEADS = ("worker", "state", "in flight", "running", "waiting", "KV in use", "hits", "TTFT", "error p50", "p90", "pace")


def run_status(router: str, *, as_json: bool) -> None:
    """Print what the router at host:port knows. Raises InvalidRequest for another address; gRPC's errors."""
    check_address("router", router)
    with grpc.insecure_channel(router, options=rpc.CHANNEL_OPTIONS) as channel:
        stub = router_pb2_grpc.RouterStub(channel)
        response = stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=TIMEOUT_S)
    output = Output(as_json=as_json)
    if as_json:
        output.json(MessageToDict(response, preserving_proto_field_name=True))
        return
    if not response.workers:
        output.text(f"{router}: no worker is registered", "note")
    else:
        for line in table(HEADS, [_row(entry) for entry in response.workers]):
            output.line(line)
    show_pulled(output, [(entry.worker_id, entry.status) for entry in response.workers])
    seen = response.predictions
    if seen.requests:
        output.text(
            f"{seen.requests} first tokens since the start; the latest: TTFT {_ms(seen.observed_mean_s)} on average, "
            f"{_ms(seen.predicted_mean_s)} predicted, error p50 {_ms(seen.error_p50_s)}, p90 {_ms(seen.error_p90_s)}"
        )


def _row(entry: router_pb2.WorkerEntry) -> tuple[str, ...]:
    name = printable(entry.worker_id)
    if entry.role == fleet_pb2.WORKER_ROLE_OBSERVED:
        return (name, "observed", *["-"] * (len(HEADS) - 2))
    status, seen = entry.status, entry.predictions
    hits = status.cached_prompt_tokens / status.prompt_tokens if status.prompt_tokens else 0.0
    told = [_ms(value) for value in (seen.observed_mean_s, seen.error_p50_s, seen.error_p90_s)]
    return (
        name,
        "draining" if entry.draining else "serving" if entry.index_synced else "resyncing",
        str(entry.in_flight),
        str(status.running),
        str(status.waiting),
        f"{status.blocks_in_use / max(1, status.blocks_total):.0%}",
        f"{hits:.0%}",
        *(told if seen.requests else ["-", "-", "-"]),
        f"{entry.pace:.2g}x",
    )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
