"""`rhizome events …`: the commands. What they need is imported when they run: --help and completion stay quick."""

from __future__ import annotations

import asyncio
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from deploy.events import recording_commands
from deploy.events.completion import complete_target, complete_worker
from deploy.events.group import EventsGroup

events_app = typer.Typer(
    cls=EventsGroup,
    help="Look into event streams: a router's workers, any bus, vLLM and SGLang servers, recordings.",
    no_args_is_help=True,
    epilog="TARGET is router://HOST:PORT (each worker of that router), a bus URL (grpc://, zmq://, redis://), or a "
    "recording. Ends with 0, also by Ctrl-C where that is the end (tail, top, stats, record); with 2 for bad input, "
    "with 1 for what cannot be reached, is damaged or is not right; elsewhere Ctrl-C ends with 130.",
)

DEFAULT_TARGET = "router://127.0.0.1:7700"


class Kind(StrEnum):
    """Of an event."""

    STORED = "stored"
    REMOVED = "removed"
    CLEARED = "cleared"


class TreeForm(StrEnum):
    """In which a tree is written."""

    TEXT = "text"
    JSON = "json"
    DOT = "dot"
    SVG = "svg"


Target = Annotated[
    str,
    typer.Argument(help="router://HOST:PORT, a bus URL or a recording", autocompletion=complete_target),
]
Worker = Annotated[str | None, typer.Option("--worker", help="only this one", autocompletion=complete_worker)]
Workers = Annotated[
    list[str] | None,
    typer.Option("--worker", help="only this one; may be repeated", autocompletion=complete_worker),
]
Json = Annotated[bool, typer.Option("--json", help="one JSON object a line")]


def examples(*commands: str) -> str:
    """The end of a command's help."""
    return "\n\n".join(["Examples:", *(f"  rhizome events {command}" for command in commands)])


@events_app.command(
    epilog=examples(
        "tail",
        "tail --worker worker-0 --kind removed",
        "tail zmq://127.0.0.1:5557 --from 0 --json | jq .keys",
        "tail redis://127.0.0.1/kv:worker-0 --rates",
        "tail session.rhz --key 3f0a",
    )
)
def tail(
    target: Target = DEFAULT_TARGET,
    workers: Workers = None,
    kinds: Annotated[
        list[Kind] | None, typer.Option("--kind", help="only events of this kind; may be repeated")
    ] = None,
    key: Annotated[str | None, typer.Option(metavar="HEX", help="only blocks whose hash begins so")] = None,
    start: Annotated[
        int | None,
        typer.Option("--from", min=0, metavar="SEQ", help="begin with this batch of each worker; without it, live"),
    ] = None,
    follow: Annotated[bool, typer.Option(help="go on when all that is kept was shown")] = True,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="end after so many lines")] = None,
    rates: Annotated[bool, typer.Option("--rates", help="a line of rates for each worker and second instead")] = False,
    as_json: Json = False,
) -> None:
    """Print events as they come, until Ctrl-C: when, whose, which batch, what, where, how many blocks, keys, parent.

    Gaps, restarts and lost connections get a line of their own, and do not end it.
    """
    from deploy.events.tail import TailOptions, run_tail
    from kv_events.inspect.words import parse_key

    options = TailOptions(
        target=target,
        workers=tuple(workers or ()),
        kinds=tuple(kinds or ()),
        key=None if key is None else parse_key("key", key),
        start=start,
        follow=follow,
        limit=limit,
        rates=rates,
        as_json=as_json,
    )
    asyncio.run(run_tail(options))


@events_app.command(
    epilog=examples(
        "tree",
        "tree --depth 3 --worker worker-0",
        "tree --below 3f0a91 --format json | jq .nodes",
        "tree session.rhz --out tree.svg",
    )
)
def tree(
    target: Target = DEFAULT_TARGET,
    depth: Annotated[int, typer.Option(min=0, max=10_000, help="levels; blocks in a chain are one")] = 8,
    below: Annotated[
        str | None, typer.Option(metavar="HEX", help="begin with this block: its hash, or how it begins")
    ] = None,
    max_nodes: Annotated[int, typer.Option(min=0, max=100_000, help="most matched first, then largest")] = 60,
    worker: Worker = None,
    form: Annotated[
        TreeForm | None,
        typer.Option("--format", help="svg needs Graphviz [default: as --out ends, else text]"),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="a file instead of standard output")] = None,
) -> None:
    """Show the prefix tree: who holds what, and, of a router, how many recent requests went there.

    Blocks that follow each other without a branch, with the same holders, are one line.
    """
    from deploy.events.tree import TreeOptions, run_tree
    from kv_events.inspect.words import parse_key

    key = None if below is None else parse_key("below", below)
    asyncio.run(run_tree(TreeOptions(target, depth, max_nodes, key, worker, form and form.value, out)))


@events_app.command(
    epilog=examples(
        "explain 'Which shelf holds the comet logs?'",
        "explain --chat 'Which shelf holds the comet logs?' --system 'You keep the archive.'",
        "explain - --json < prompt.txt",
        "explain --token-ids 17,4,99,3",
    )
)
def explain(
    prompt: Annotated[str | None, typer.Argument(help="a text; - reads it from standard input")] = None,
    router: Annotated[str, typer.Option("--router", help="host:port of a router")] = "127.0.0.1:7700",
    chat: Annotated[bool, typer.Option("--chat", help="a user's message for the model's chat template")] = False,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="with --chat: the system prompt before it")
    ] = None,
    token_ids: Annotated[str | None, typer.Option("--token-ids", metavar="N,N,...", help="instead of a text")] = None,
    model: Annotated[str, typer.Option(help="which model; without it, the only one")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object")] = False,
) -> None:
    """Say which blocks a prompt has, who holds how much of it, what the router would choose, and why."""
    from deploy.events.explain import ExplainOptions, parse_token_ids, run_explain
    from deploy.events.targets import ROUTER_SCHEME

    options = ExplainOptions(
        router=router if router.startswith(ROUTER_SCHEME) else ROUTER_SCHEME + router,
        prompt=prompt,
        token_ids=None if token_ids is None else parse_token_ids(token_ids),
        chat=chat,
        system=system,
        model=model,
        as_json=as_json,
    )
    asyncio.run(run_explain(options))


@events_app.command(epilog=examples("top", "top zmq://127.0.0.1:5557", "top redis://127.0.0.1/kv:worker-0"))
def top(
    target: Target = DEFAULT_TARGET,
    workers: Workers = None,
    interval: Annotated[float, typer.Option(min=0.1, max=60, help="seconds between two looks")] = 1.0,
) -> None:
    """Watch workers and the hottest prefixes, full screen and live.

    Keys: s sorts by the next column, r reverses, p pauses, enter looks into a prefix, q quits.
    """
    from deploy.events.top import run_top

    asyncio.run(run_top(target, tuple(workers or ()), interval))


recording_commands.add_to(events_app, examples)
