"""What a shell offers for a target, and for a worker of one."""

from __future__ import annotations

from pathlib import Path

import typer

PATIENCE_S = 0.5
"""For a router's answer while somebody waits at a prompt."""

SCHEMES = ("router://127.0.0.1:7700", "grpc://", "zmq://", "redis://")
MAX_FILES = 100


def complete_target(incomplete: str) -> list[str]:
    """The kinds of URLs, and files."""
    urls = [scheme for scheme in SCHEMES if scheme.startswith(incomplete)]
    if "://" in incomplete:
        return urls
    folder, _, name = incomplete.rpartition("/")
    try:
        found = sorted((Path(folder) if folder else Path("/" if incomplete[:1] == "/" else ".")).iterdir())
    except OSError:
        return urls
    prefix = f"{folder}/" if "/" in incomplete else ""
    files = [f"{prefix}{path.name}{'/' if path.is_dir() else ''}" for path in found if path.name.startswith(name)]
    return urls + files[:MAX_FILES]


def complete_worker(ctx: typer.Context, incomplete: str) -> list[str]:
    """The workers of the router that is the target; none where there is none, or it does not answer at once."""
    import grpc

    from deploy.events.targets import router_address
    from rhizome.errors import InvalidRequest
    from rhizome.v1 import router_pb2, router_pb2_grpc

    try:
        address = router_address(str(ctx.params.get("target") or SCHEMES[0]))
        with grpc.insecure_channel(address) as channel:
            stub = router_pb2_grpc.RouterStub(channel)
            workers = stub.ListWorkers(router_pb2.ListWorkersRequest(), timeout=PATIENCE_S).workers
    except (InvalidRequest, grpc.RpcError):
        return []
    return sorted(entry.worker_id for entry in workers if entry.worker_id.startswith(incomplete))
