"""`rhizome events tree`: the prefix tree, cut to what a person can take in; as text, JSON, Graphviz or SVG."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from deploy.events.progress import progress_bar
from deploy.events.reading import state
from deploy.events.show import Output
from deploy.events.targets import Targets, open_targets, unavailable
from kv_events.inspect.observer import Observer
from kv_events.inspect.recording import RecordingReader
from kv_events.inspect.tree_cut import DEFAULT_DEPTH, DEFAULT_NODES, TreeCut, cut_tree
from kv_events.inspect.tree_text import dot, text_lines
from kv_events.inspect.words import KeyRange
from kv_events.view import WorkerView
from radix import make_tree
from radix.tree import HotPrefix, PrefixTree
from rhizome.errors import InvalidRequest, Unavailable

HOTTEST = 1000
DRAWING_S = 120.0
"""How long Graphviz may take; it is slow on many thousand nodes."""


@dataclass(frozen=True, slots=True)
class TreeOptions:
    """What `tree` was asked for."""

    target: str
    depth: int = DEFAULT_DEPTH  # levels of nodes
    max_nodes: int = DEFAULT_NODES
    below: KeyRange | None = None
    worker: str | None = None
    form: str | None = None  # text, json, dot or svg; None: by the ending of `out`, else text
    out: Path | None = None


@dataclass(slots=True)
class NamedTree:
    """A tree with its workers' names by number, and where matches went if that is known."""

    tree: PrefixTree
    names: Sequence[str]
    hottest: Sequence[HotPrefix] = ()
    left_out: list[str] = field(default_factory=list)  # what is missing, in words


FORMS = {".txt": "text", ".json": "json", ".dot": "dot", ".gv": "dot", ".svg": "svg"}
"""By a file's ending."""


def form_of(options: TreeOptions) -> str:
    """In which form the tree is wanted. Raises InvalidRequest for a file whose ending does not tell."""
    if options.form is not None:
        return options.form
    if options.out is None:
        return "text"
    form = FORMS.get(options.out.suffix.lower())
    if form is None:
        raise InvalidRequest("out", str(options.out), f"a name that ends in one of {', '.join(FORMS)}, or --format")
    return form


async def run_tree(options: TreeOptions) -> None:
    """Print the cut, or write it. Raises InvalidRequest, Unavailable, WireError."""
    options = replace(options, form=form_of(options))
    if options.form == "svg":
        _graphviz()
    async with open_targets(options.target, [options.worker] if options.worker else []) as targets:
        found = await read_tree(targets)
        for missing in found.left_out:
            print(f"rhizome: {missing}", file=sys.stderr)
        number = _number(found.names, options.worker)
        hottest, limits = found.hottest, {"depth": options.depth, "max_nodes": options.max_nodes}
        dump = await asyncio.to_thread(found.tree.dump)
        cut = cut_tree(dump, found.names, hottest=hottest, below=options.below, worker=number, **limits)
        _write(options, cut, targets.target)


async def read_tree(targets: Targets) -> NamedTree:
    """A router's own tree, or one made of what each stream holds now, or held at its recording's end."""
    if targets.router is not None:
        return await _router_tree(targets)
    if targets.recording is not None:
        return await asyncio.to_thread(_played, targets.recording, {stream.name for stream in targets.streams})
    names: list[str] = []
    found = NamedTree(make_tree(), names)
    for stream in targets.streams:
        snapshot, since = await state(stream.source)
        view = WorkerView(snapshot.worker, len(names), found.tree)
        names.append(snapshot.worker)
        await asyncio.to_thread(view.restore, snapshot)
        for batch in since:
            view.offer(batch)
        if not view.synced:
            found.left_out.append(f"{snapshot.worker}: what it says it holds does not add up")
    return found


async def _router_tree(targets: Targets) -> NamedTree:
    import grpc

    assert targets.router is not None
    try:
        whole = await targets.router.tree(HOTTEST)
    except grpc.aio.AioRpcError as error:
        raise unavailable(targets.target, error) from error
    left_out = [f"{whole.left_out} entries are left out: this process takes no more"] if whole.left_out else []
    return NamedTree(whole.tree, whole.workers, whole.hottest, left_out)


def _played(path: Path, names: Collection[str]) -> NamedTree:
    observer = Observer(window_s=None)
    with RecordingReader(path) as reader, progress_bar("reading", reader.size_bytes) as advance:
        for record in reader.records(names):
            observer.play(record)
            advance(record.offset)
        complete = reader.complete
    wrong = [report.name for report in observer.reports(time.time()) if not report.synced]
    left_out = [f"{name}: the recording does not add up to what this worker held" for name in wrong]
    if not complete:
        left_out.append(f"{path} was cut off: this is what is whole")
    return NamedTree(observer.tree, observer.names, left_out=left_out)


def _number(names: Sequence[str], worker: str | None) -> int | None:
    if worker is None:
        return None
    if worker not in names:
        raise InvalidRequest("worker", worker, f"one of {', '.join(filter(None, names)) or 'none: there is no worker'}")
    return names.index(worker)


def _write(options: TreeOptions, cut: TreeCut, whose: str) -> None:
    if options.form == "text":
        if options.out is None:
            output = Output()
            for segments in text_lines(cut, whose):
                output.line(segments)
            return
        text = "".join("".join(part.text for part in line) + "\n" for line in text_lines(cut, whose))
    elif options.form == "json":
        text = json.dumps(cut.as_json()) + "\n"
    else:
        text = dot(cut)
    data = text.encode()
    if options.form == "svg":
        data = _drawn(data)
    if options.out is None:
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
        return
    try:
        options.out.write_bytes(data)
    except OSError as error:
        raise InvalidRequest("out", str(options.out), f"a file that can be written ({error.strerror})") from error


def _graphviz() -> str:
    program = shutil.which("dot")
    if program is None:
        limit = "Graphviz draws it, and its program dot is not on PATH: install graphviz, or take --format dot"
        raise InvalidRequest("format", "svg", limit)
    return program


def _drawn(graph: bytes) -> bytes:
    try:
        done = subprocess.run(  # noqa: S603 - dot, from PATH
            [_graphviz(), "-Tsvg"], input=graph, capture_output=True, timeout=DRAWING_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"Graphviz took more than {DRAWING_S:g} s: ask for fewer nodes (--max-nodes)") from None
    if done.returncode:
        raise Unavailable(f"Graphviz failed: {done.stderr.decode(errors='replace').strip()[:500]}")
    return done.stdout
