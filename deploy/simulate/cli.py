"""`rhizome simulate`: the command. What it needs is imported when it runs: --help stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EPILOG = "\n\n".join(
    (
        "Examples:",
        "  rhizome simulate conversation_trace.jsonl --workers 16",
        "  rhizome simulate conversation_trace.jsonl --workers 8,16 --load 0.5,0.8,1 --policy all --out results/",
        "  rhizome simulate chat.jsonl.gz --workers 8 --speed 1,2,4 --policy predicted-ttft,bound --out results/",
        "  rhizome simulate chat.jsonl.gz --workers 8 --find-saturation round-robin,predicted-ttft",
        "  rhizome simulate chat.jsonl.gz --workers 8 --roles prefill=2,decode=6 --policy predicted-ttft --speed 1,2,4",
        "Times are virtual: equal arguments give equal numbers, on however many jobs. Ends with 2 for bad input.",
    )
)


def simulate(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="requests, as rhizome trace reads them")],
    workers: Annotated[str, typer.Option(metavar="N[,N...]", help="workers of the fleet")],
    policy: Annotated[
        str,
        typer.Option(
            metavar="A[,B...]",
            help="policies of rhizome router; bound, which is predicted-ttft over one shared cache without end; or all",
        ),
    ] = "predicted-ttft,dynamo,sglang,llm-d,lmetric,round-robin",
    speed: Annotated[
        str | None, typer.Option(metavar="X[,X...]", help="requests come so many times as fast [default: 1]")
    ] = None,
    load: Annotated[
        str | None,
        typer.Option(
            metavar="S[,S...]",
            help="instead of --speed: shares of the speed that saturates round-robin, which is found first, or taken "
            "from --out's results.json",
        ),
    ] = None,
    find_saturation: Annotated[
        str | None,
        typer.Option(
            metavar="A[,B...]", help="only find the speed at which a policy's mean TTFT is 5 times its unloaded one"
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="write results.json and plots there, over what a former run wrote"),
    ] = None,
    hardware: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="70b-4xh100, 8b-1xh100 or a TOML file of rhizome calibrate")
    ] = "70b-4xh100",
    routers: Annotated[int, typer.Option(help="replicas; each sees only its own decisions")] = 1,
    host_tier: Annotated[
        bool, typer.Option("--host-tier/--no-host-tier", help="workers keep evicted blocks in host memory")
    ] = False,
    peer_fetch: Annotated[
        bool, typer.Option("--peer-fetch/--no-peer-fetch", help="workers fetch KV blocks from each other")
    ] = False,
    roles: Annotated[
        str | None,
        typer.Option(
            metavar="prefill=N,decode=M",
            help="besides, the same workers with prefill apart from decode, blocks pulled; both=N: some that do all",
        ),
    ] = None,
    event_delay: Annotated[float, typer.Option(help="seconds until a KV event reaches a router")] = 0.002,
    event_loss: Annotated[float, typer.Option(help="share of event batches that are lost at first, 0 to 1")] = 0.0,
    report_interval: Annotated[float, typer.Option(help="seconds between a worker's load reports")] = 0.5,
    slo_ttft: Annotated[float, typer.Option(help="goodput: most seconds to the first token")] = 5.0,
    slo_itl: Annotated[float, typer.Option(help="goodput: most seconds from token to token, mean of a request")] = 0.1,
    objective: Annotated[
        str, typer.Option(metavar="ttft|slo", help="of predicted-ttft: the least TTFT, or the most goodput")
    ] = "ttft",
    requests: Annotated[int | None, typer.Option(help="only the trace's first ones [default: all]")] = None,
    seed: Annotated[int, typer.Option(help="of which events are lost")] = 0,
    jobs: Annotated[int | None, typer.Option(help="simulations at a time [default: one a CPU]")] = None,
    block_size: Annotated[
        int | None, typer.Option(help="tokens in a block, where the trace does not tell [default: 512]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="what results.json has, on standard output")] = False,
) -> None:
    """Replay a trace on simulated fleets: real routers, schedulers and caches, modelled step times, virtual time."""
    from deploy.simulate.command import run_simulate
    from deploy.simulate.fleet import Network
    from deploy.simulate.plan import Asked, checked_jobs, plan_of, setting_of
    from deploy.simulate.results import Slo
    from deploy.traces.trace import read_trace
    from worker.hardware_file import load_hardware

    plan = plan_of(Asked(workers, policy, speed, load, find_saturation, roles))
    jobs = checked_jobs(jobs)
    chosen = load_hardware(hardware)
    network = Network(event_delay_s=event_delay, event_loss=event_loss, report_interval_s=report_interval)
    read = read_trace(trace, block_size)
    setting = setting_of(
        read if requests is None else read.head(requests),
        chosen,
        network,
        routers=routers,
        host_tier=host_tier,
        peer_fetch=peer_fetch or plan.split is not None,  # whose workers can, so that those beside them can, too
        seed=seed,
        slo=Slo(slo_ttft, slo_itl),
        objective=objective,
    )
    run_simulate(plan, setting, jobs=jobs, out=out, as_json=as_json)
