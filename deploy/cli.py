"""The `rhizome` command. Bad input ends with exit code 2 and one line; a run that fails with 1."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from deploy.doctor import CORE_SWITCH, WORKER_MODULES, announce_core, run_doctor
from deploy.events.cli import events_app
from deploy.simulate.cli import EPILOG as SIMULATE_EPILOG
from deploy.simulate.cli import simulate
from deploy.traces.cli import traces_app
from rhizome.errors import RhizomeError

app = typer.Typer(
    help="KV-aware routing and prefix-cache service for LLM inference.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # main() has one line for what a person can mend
)
model_app = typer.Typer(help="Checkpoints for trying things out.", no_args_is_help=True)
config_app = typer.Typer(help="A fleet's file.", no_args_is_help=True)
app.add_typer(model_app, name="model")
app.add_typer(config_app, name="config")
app.add_typer(events_app, name="events")
app.add_typer(traces_app, name="trace")
app.command(epilog=SIMULATE_EPILOG)(simulate)

# What may follow --ray as its value: auto, host:port, ray://host:port.
RAY_ADDRESS = re.compile(r"auto|(ray://)?[^\s:/-][^\s/]*:\d+")

BAD_INPUT = ("INVALID_ARGUMENT", "FAILED_PRECONDITION")

EVENTS_HELP = (
    "publish KV events there, too: zmq://HOST:PORT, redis://HOST:PORT/STREAM or grpc://HOST:PORT; port 0 takes a free "
    "one, {worker} stands for the worker's id; zmq://HOST:PORT?dialect=vllm is for Dynamo and other strict readers of "
    "vLLM's events; may be repeated, routers read the first other one [default: the worker's own port]"
)

ModelDir = Annotated[Path | None, typer.Option("--model", help="folder of a Hugging Face checkpoint (Llama or Qwen3)")]
Simulated = Annotated[
    bool, typer.Option("--simulated", help="no model: steps take the time that they would on --hardware; needs no GPU")
]
HardwareName = Annotated[
    str | None,
    typer.Option("--hardware", help="to simulate: 70b-4xh100, 8b-1xh100 or a TOML file [default: 8b-1xh100]"),
]
TimeScale = Annotated[float | None, typer.Option(help="simulated hardware runs so many times faster [default: 1]")]
KvCacheMiB = Annotated[
    int | None, typer.Option("--kv-cache-mib", help="memory for KV blocks of each worker, MiB [default: 1024]")
]
RouterAddress = Annotated[str, typer.Option("--router", help="host:port of a router")]
Supervised = Annotated[bool, typer.Option("--supervised", hidden=True)]
Insecure = Annotated[bool, typer.Option("--insecure", help="serve off-host in the clear")]


FleetName = Annotated[str | None, typer.Option("--fleet", help="its name [default: the only one that runs]")]
OnRay = Annotated[
    str | None,
    typer.Option("--ray", metavar="[ADDRESS]", help="a Ray cluster by its host:port, or the one of this machine"),
]
DrainSeconds = Annotated[float, typer.Option(help="seconds that answers under way get to end")]


class RayCommand(TyperCommand):
    """A command whose --ray may stand without a value: the cluster of this machine."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give --ray the value that it lacks."""
        words = list(args)
        for at, word in enumerate(words):
            if word == "--ray" and not RAY_ADDRESS.fullmatch("".join(words[at + 1 : at + 2])):
                words[at] = "--ray=auto"
        return super().parse_args(ctx, words)


@app.callback()
def _configure(
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error")] = "info",
) -> None:
    level = logging.getLevelNamesMapping().get(log_level.upper())
    if level is None:
        raise typer.BadParameter("one of debug, info, warning, error", param_hint="--log-level")
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


@app.command(cls=RayCommand)
def up(
    config: Annotated[
        Path | None, typer.Option("--config", help="a fleet's file, instead of the options below: see config check")
    ] = None,
    ray: OnRay = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="folder of a checkpoint [default: a tiny one, made now]")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, max=64, help="engine workers [default: 2]")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="the router's port; 0 takes a free one [default: 7700]")
    ] = None,
    kv_cache_mib: KvCacheMiB = None,
    simulated: Simulated = False,
    hardware: HardwareName = None,
    time_scale: TimeScale = None,
    events: Annotated[list[str], typer.Option("--events", help=EVENTS_HELP)] = [],  # noqa: B006
) -> None:
    """Start a fleet on this machine: routers and workers; Ctrl-C or rhizome down ends all of it. With --ray, on a Ray
    cluster, where it stays until rhizome down --ray."""
    from deploy.fleet.commands import fleet_of_options, run_up
    from deploy.fleet.plan import plan_fleet
    from deploy.fleet.reading import read_fleet
    from rhizome.errors import InvalidRequest

    options: dict[str, Any] = {
        "model": model,
        "workers": workers,
        "port": port,
        "kv_cache_mib": kv_cache_mib,
        "simulated": simulated,
        "hardware": hardware,
        "time_scale": time_scale,
        "events": events,
    }
    for name, value in options.items():
        if config is not None and value not in (None, False, []):
            raise InvalidRequest(f"--{name.replace('_', '-')}", value, "not beside --config: say it in the file")
    plan = plan_fleet(fleet_of_options(**options) if config is None else read_fleet(config))
    announce_core()
    run_up(plan, ray)


@app.command()
def router(
    host: str = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 7700,
    policy: Annotated[
        str, typer.Option(help="predicted-ttft, round-robin, or another of router.policies")
    ] = "predicted-ttft",
    slo_ttft: Annotated[
        float | None,
        typer.Option(help="predicted-ttft: seconds to keep to the first token [default: as few as can be]"),
    ] = None,
    slo_itl: Annotated[
        float | None,
        typer.Option(help="predicted-ttft: seconds to keep from token to token, mean of an answer [default: no limit]"),
    ] = None,
    max_blocks: Annotated[
        int | None, typer.Option(help="cap of the index: (worker, block) entries in all [default: 67 million]")
    ] = None,
    max_blocks_per_worker: Annotated[
        int | None, typer.Option(help="cap of the index: blocks of one worker [default: 17 million]")
    ] = None,
    observe: Annotated[
        list[str],
        typer.Option(
            help="NAME=URL of a server whose KV events are indexed and that gets no requests, such as "
            "vllm-0=zmq://127.0.0.1:5557?model=MODEL&block_size=16; may be repeated"
        ),
    ] = [],  # noqa: B006
    registry: Annotated[
        str, typer.Option(help="redis://HOST:PORT/FLEET, where workers announce themselves to any number of routers")
    ] = "",
    local_prefill_ms: Annotated[
        float,
        typer.Option(
            min=0,
            help="decode workers compute prompts themselves that take no longer, and others where prefill workers are "
            "far behind; 0: none while a prefill worker has room",
        ),
    ] = 50.0,
    record_trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="write down when each streamed request came, its lengths and shared prefixes, for rhizome trace; "
            "a new file, up to 1 GiB",
        ),
    ] = None,
    insecure: Insecure = False,
    supervised: Supervised = False,
) -> None:
    """Start a router. Workers join it by themselves: rhizome worker --router HOST:PORT."""
    from deploy.processes import serve_until_stopped
    from rhizome.ticket import fleet_secret
    from router.objective import Objective
    from router.service import running_router

    optional = {
        "max_blocks": max_blocks,
        "max_blocks_per_worker": max_blocks_per_worker,
        "record_trace": record_trace,
    }
    given: dict[str, Any] = {name: value for name, value in optional.items() if value is not None}
    serving = running_router(
        host,
        port,
        policy=policy,
        objective=Objective(slo_ttft, slo_itl),
        secret=fleet_secret(),
        observe=observe,
        registry=registry,
        local_prefill_s=local_prefill_ms / 1000,
        insecure=insecure,
        **given,
    )
    asyncio.run(serve_until_stopped(serving, supervised=supervised))


@app.command()
def worker(
    model: ModelDir = None,
    worker_id: Annotated[
        str | None, typer.Option("--id", help="unique in the fleet, kept over restarts [default: host and process id]")
    ] = None,
    routers: Annotated[list[str], typer.Option("--router", help="host:port of a router to join; may be repeated")] = [],  # noqa: B006
    registry: Annotated[
        str, typer.Option(help="redis://HOST:PORT/FLEET, by which every router that reads it finds this worker")
    ] = "",
    host: str = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 0,
    role: Annotated[str, typer.Option(help="both, prefill or decode")] = "both",
    model_name: Annotated[
        str | None, typer.Option(help="as clients call it [default: the folder's or hardware's name]")
    ] = None,
    block_size: Annotated[int, typer.Option(help="tokens in a KV block")] = 16,
    kv_cache_mib: KvCacheMiB = None,
    simulated: Simulated = False,
    hardware: HardwareName = None,
    time_scale: TimeScale = None,
    max_model_len: Annotated[int | None, typer.Option(help="tokens of a request [default: the model's]")] = None,
    max_batched_tokens: Annotated[
        int | None, typer.Option(help="token budget of an engine step [default: 512, or the hardware's]")
    ] = None,
    max_running: Annotated[
        int | None, typer.Option(help="sequences that run at once [default: 64, or the hardware's]")
    ] = None,
    max_waiting: Annotated[int, typer.Option(help="requests that may wait")] = 256,
    events: Annotated[list[str], typer.Option("--events", help=EVENTS_HELP)] = [],  # noqa: B006
    event_token_ids: Annotated[
        bool, typer.Option("--event-token-ids", help="events tell the prompts' tokens, too: Dynamo and llm-d need them")
    ] = False,
    transports: Annotated[
        list[str],
        typer.Option(
            "--transport",
            help="a way for KV blocks from and to other workers: local, shm, nixl, tcp or grpc; may be repeated, "
            "the best first [default: all but nixl, in this order]",
        ),
    ] = [],  # noqa: B006
    threads: Annotated[int | None, typer.Option(help="CPU threads [default: all cores]")] = None,
    advertise: Annotated[
        str | None, typer.Option(help="host by which others reach this worker [default: --host]")
    ] = None,
    validate: Annotated[bool, typer.Option("--validate", hidden=True)] = False,
    insecure: Insecure = False,
    supervised: Supervised = False,
) -> None:
    """Start an engine worker that serves one model, or with --simulated one that only takes the time of one."""
    from deploy.processes import WorkerSettings, running_worker, serve_until_stopped
    from deploy.served_model import chosen_hardware
    from deploy.transfers import DEFAULT_TRANSPORTS

    settings = WorkerSettings(
        model_dir=model,
        worker_id=f"{socket.gethostname()}-{os.getpid()}" if worker_id is None else worker_id,
        routers=tuple(routers),
        registry=registry,
        host=host,
        port=port,
        role=role,
        model_name=model_name,
        block_size=block_size,
        kv_cache_mib=1024 if kv_cache_mib is None else kv_cache_mib,
        max_model_len=max_model_len,
        max_batched_tokens=max_batched_tokens,
        max_running=max_running,
        max_waiting=max_waiting,
        events=tuple(events),
        event_token_ids=event_token_ids,
        transports=tuple(transports) or DEFAULT_TRANSPORTS,
        threads=threads,
        advertise=advertise,
        validate=validate,
        insecure=insecure,
        hardware=chosen_hardware(
            hardware, simulated=simulated, time_scale=time_scale, model=model, kv_cache_mib=kv_cache_mib
        ),
        time_scale=1.0 if time_scale is None else time_scale,
    )
    asyncio.run(serve_until_stopped(running_worker(settings), supervised=supervised))


@app.command()
def chat(
    router: RouterAddress = "127.0.0.1:7700",
    system: Annotated[str, typer.Option(help="system prompt")] = "You are a helpful assistant.",
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer, tokens")] = 128,
    temperature: Annotated[float, typer.Option(min=0, max=100)] = 0.0,
) -> None:
    """Chat over several turns; each answer shows its worker, prompt tokens, cached tokens and TTFT."""
    from deploy.chat import run_chat

    run_chat(router, system, max_tokens, temperature)


@app.command(cls=RayCommand)
def status(
    fleet: FleetName = None,
    ray: OnRay = None,
    router: Annotated[
        str | None, typer.Option("--router", help="host:port of a router: only what it knows of its workers")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="one JSON object on standard output")] = False,
) -> None:
    """Show a fleet's servers: where they run, leases, caches. With --router a router's workers: load, cache hits, and
    predicted beside observed times to first token."""
    if router is not None:
        from deploy.status import run_status as run_router_status

        run_router_status(router, as_json=json_output)
        return
    from deploy.fleet.commands import run_status

    run_status(fleet, ray, as_json=json_output)


@app.command(cls=RayCommand)
def scale(
    group: Annotated[str, typer.Argument(help="a group of workers, or routers")],
    count: Annotated[int, typer.Argument(min=0, help="how many there are to be")],
    fleet: FleetName = None,
    ray: OnRay = None,
    drain: DrainSeconds = 30.0,
) -> None:
    """Change the number of a group's workers while the fleet serves; those that leave end their answers first. So it is
    with routers, in a fleet with a registry."""
    from deploy.fleet.commands import run_scale

    typer.echo(run_scale(group, count, fleet, ray, drain_s=drain))


@app.command(cls=RayCommand)
def down(fleet: FleetName = None, ray: OnRay = None, drain: DrainSeconds = 30.0) -> None:
    """End a fleet: no new requests, then, when those under way have ended, no more processes."""
    from deploy.fleet.commands import run_down

    run_down(fleet, ray, drain_s=drain)


@config_app.command()
def check(file: Annotated[Path, typer.Argument(help="a fleet's file")]) -> None:
    """Check a fleet's file without starting anything: each error by line, field, value and limit."""
    from deploy.fleet.commands import checked
    from deploy.fleet.plan import plan_fleet
    from deploy.fleet.reading import read_fleet

    typer.echo(checked(plan_fleet(read_fleet(file)), file))


@app.command(cls=RayCommand)
def demo(
    json_output: Annotated[bool, typer.Option("--json", help="one JSON object on standard output")] = False,
    disagg: Annotated[
        bool, typer.Option("--disagg", help="play on workers that do everything, then with prefill apart from decode")
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="[ADDRESS]",
            help="play on a Ray cluster by its host:port, or on the one of this machine, which is started if need be",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=16, help="[default: 2, with --disagg 3: one of them for prefill]")
    ] = None,
    sessions: Annotated[int, typer.Option(min=1, max=64, help="concurrent conversations")] = 6,
    turns: Annotated[int, typer.Option(min=2, max=20, help="turns of each")] = 5,
    insecure: Annotated[bool, typer.Option("--insecure", help="with --ray: serve off-host in the clear")] = False,
) -> None:
    """Play multi-turn conversations on an embedded cluster: KV-aware, round-robin and without a cache. Ends with 1
    unless all answer alike."""
    from deploy.demo.command import run_demo
    from rhizome.errors import InvalidRequest

    count = (3 if disagg else 2) if workers is None else workers
    if disagg and count < 2:
        raise InvalidRequest("--workers", count, "2 to 16 with --disagg: one for prefill, the others for decode")
    options: dict[str, Any] = {"disagg": disagg, "ray": ray, "insecure": insecure, "json_output": json_output}
    sys.exit(run_demo(workers=count, sessions=sessions, turns=turns, **options))


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option("--out", help="the hardware file to write, for --hardware")],
    router: RouterAddress = "127.0.0.1:7700",
    worker: Annotated[str | None, typer.Option(help="host:port of a worker [default: the router's]")] = None,
    worker_id: Annotated[
        str | None, typer.Option("--id", help="which of the router's workers, where it has several")
    ] = None,
    name: Annotated[str | None, typer.Option(help="of the hardware [default: the file's name]")] = None,
    longest: Annotated[int, typer.Option(help="longest prompt to measure, tokens")] = 16_384,
    max_batch: Annotated[int, typer.Option(help="most answers at once to measure")] = 32,
    max_running: Annotated[int, typer.Option(help="the worker's own limit, to be written into the file")] = 64,
    rounds: Annotated[int, typer.Option(help="measurements of each kind; the fastest counts")] = 3,
    force: Annotated[bool, typer.Option("--force", help="write the file however large the error is")] = False,
) -> None:
    """Measure an idle worker and write a hardware file from which simulations know its step times."""
    from deploy.calibrate import Effort, run_calibrate

    effort = Effort(longest=longest, max_batch=max_batch, rounds=rounds)
    running = run_calibrate(
        out,
        router=router,
        worker=worker,
        worker_id=worker_id,
        name=name,
        effort=effort,
        max_running=max_running,
        force=force,
        say=lambda text: typer.echo(text, err=True),
    )
    typer.echo(asyncio.run(running))


@app.command()
def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="one JSON object on standard output")] = False,
) -> None:
    """Say what runs on this machine and whether it is fit. Ends with 1 when something is broken."""
    sys.exit(run_doctor(json_output))


@model_app.command()
def tiny(
    out: Annotated[Path, typer.Option("--out", help="folder to write; must not exist or be empty")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Make a small randomly initialised Llama checkpoint with a byte-level tokenizer and a chat template."""
    from rhizome.errors import InvalidRequest
    from worker.tiny_model import make_tiny_model

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidRequest("--out", str(out), "a folder that does not exist or is empty")
    make_tiny_model(out, seed=seed)
    typer.echo(f"{out}: a Llama checkpoint; serve it with: rhizome up --model {out}")


def main() -> None:
    """Entry point: errors that a person can mend become one line."""
    try:
        app(prog_name="rhizome")
    except RhizomeError as error:
        sys.exit(_fail(str(error), 2 if error.code in BAD_INPUT else 1))
    except ModuleNotFoundError as error:
        if error.name not in WORKER_MODULES:
            raise
        sys.exit(_fail(f"this needs {error.name}, which a router does without: pip install 'rhizome[worker]'", 2))
    except (ImportError, ValueError) as error:
        if not str(error).startswith(CORE_SWITCH):
            raise
        sys.exit(_fail(str(error), 2))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if _is(error, "grpc", "RpcError"):
            code = error.code().name  # type: ignore[attr-defined]
            sys.exit(_fail(f"{code}: {error.details()}", 2 if code in BAD_INPUT else 1))  # type: ignore[attr-defined]
        if _is(error, "kv_events.wire", "WireError"):
            sys.exit(_fail(str(error), 1))
        raise


def _is(error: Exception, module: str, name: str) -> bool:
    """Whether it is an error of a module, which is not imported for that: --help has to be quick."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(error, getattr(loaded, name))


def _fail(message: str, code: int) -> int:
    print(f"rhizome: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
