"""`rhizome events explain`: a prompt's keys, who holds how much of it, and what the router would choose and why."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy.events.show import Output, table
from deploy.events.targets import open_router
from kv_events.bus.url import BusUrl, parse_bus_url
from kv_events.inspect.words import counted, key_text, printable
from radix.keys import Hashes
from radix.tree import Tier
from rhizome.errors import InvalidRequest
from rhizome.v1.fleet_pb2 import WORKER_ROLE_DECODE, WORKER_ROLE_OBSERVED, WORKER_ROLE_PREFILL

if TYPE_CHECKING:
    from rhizome.v1.router_pb2 import Candidate, Decision, WorkerEntry
    from router.client import Client

MAX_TREE_ENTRIES = 2**20
"""Up to so many (worker, block) entries the router's tree is fetched, which also tells tiers: some 10 MB."""

KEYS_SHOWN = 3
MAX_PROMPT_BYTES = 16 * 2**20  # of a gRPC message


@dataclass(frozen=True, slots=True)
class ExplainOptions:
    """What `explain` was asked for: a prompt, or token ids."""

    router: str  # router://host:port
    prompt: str | None = None  # -: standard input
    token_ids: Sequence[int] | None = None
    chat: bool = False  # the prompt is a user's message, to be put into the model's chat template
    system: str | None = None  # a system prompt before it; chat only
    model: str = ""
    as_json: bool = False


@dataclass(frozen=True, slots=True)
class Holding:
    """How much of a prompt one worker holds, from its beginning on."""

    worker: str
    blocks: int
    tokens: int
    tier_blocks: dict[str, int] | None  # leading blocks held in this tier or a faster one; None: not known
    candidate: bool  # the router may choose it for this request

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        names = ("worker", "blocks", "tokens", "tier_blocks", "candidate")
        return {name: getattr(self, name) for name in names}


async def run_explain(options: ExplainOptions) -> None:
    """Print it. Raises InvalidRequest, grpc.aio.AioRpcError."""
    ask = _ask(options)
    async with open_router(options.router) as client:
        decision = await client.explain(**ask)
        entries = {entry.worker_id: entry for entry in await client.workers()}
        hashes = np.frombuffer(decision.block_hashes, "<u8").astype(np.uint64)
        holdings = await _holdings(client, decision, entries, hashes)
    size, model = _block_size(decision, entries), _model(options.model, decision, entries)
    notes = mismatches(entries.values(), model, size, {holding.worker for holding in holdings if holding.blocks})
    if options.as_json:
        Output(as_json=True).json(_as_json(decision, hashes, holdings, notes))
    else:
        _print(Output(), decision, hashes, holdings, size, notes, entries)


def _ask(options: ExplainOptions) -> dict[str, Any]:
    if options.prompt is None and options.token_ids is None:
        raise InvalidRequest("prompt", "", "a text, - for standard input, or --token-ids: one of them is needed")
    if options.prompt is not None and options.token_ids is not None:
        raise InvalidRequest("prompt", options.prompt, "a text, - for standard input, or --token-ids: only one of them")
    if options.system is not None and not options.chat:
        raise InvalidRequest("system", options.system, "with --chat: a plain text has no system prompt")
    ask: dict[str, Any] = {"model": options.model}
    if options.token_ids is not None:
        if options.chat:
            raise InvalidRequest("chat", True, "a text: token ids are a prompt already")
        return ask | {"token_ids": options.token_ids}
    text = _standard_input() if options.prompt == "-" else options.prompt or ""
    if not options.chat:
        return ask | {"prompt": text}
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    return ask | {"messages": [*system, {"role": "user", "content": text}]}


def _standard_input() -> str:
    data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    if len(data) > MAX_PROMPT_BYTES:
        raise InvalidRequest("prompt", f"more than {MAX_PROMPT_BYTES} bytes", f"at most {MAX_PROMPT_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest("prompt", "standard input", f"UTF-8 ({error.reason} at byte {error.start})") from None


def parse_token_ids(text: str) -> list[int]:
    """Numbers with commas or spaces between them. Raises InvalidRequest."""
    words = text.replace(",", " ").split()
    if not words or not all(word.isascii() and word.isdecimal() for word in words):
        raise InvalidRequest("token-ids", text, "numbers with commas between them")
    return [int(word) for word in words]


async def _holdings(
    client: Client, decision: Decision, entries: dict[str, WorkerEntry], hashes: Hashes
) -> list[Holding]:
    """Those that hold anything, and all candidates; who holds most comes first."""
    candidates = {each.worker_id: each.cached_tokens - each.fetched_tokens for each in decision.candidates}
    tokens = candidates | {overlap.worker_id: overlap.cached_tokens for overlap in decision.observed}
    sizes = {name: entry.model.block_size for name, entry in entries.items()}
    size = _block_size(decision, entries)
    depths = {name: held // max(1, sizes.get(name) or size) for name, held in tokens.items()}
    tiers: dict[str, dict[str, int]] = {}
    if len(hashes) and sum(entry.indexed_blocks for entry in entries.values()) <= MAX_TREE_ENTRIES:
        whole = await client.tree(hottest=0)
        matches = whole.tree.match(hashes)
        for number, within in zip(matches.workers.tolist(), matches.tier_depths.T.tolist(), strict=True):
            if name := whole.workers[number]:
                tiers[name] = {tier.name.lower(): within[tier] for tier in Tier}
                depths[name] = max(within)
    holdings = [
        Holding(name, depth, depth * (sizes.get(name) or size), tiers.get(name), name in candidates)
        for name, depth in depths.items()
        if depth or name in candidates
    ]
    return sorted(holdings, key=lambda holding: (-holding.blocks, holding.worker))


def _block_size(decision: Decision, entries: dict[str, WorkerEntry]) -> int:
    """Of the worker that was chosen; where none is, of a server that is observed; 0 where it is not known."""
    entry = entries.get(decision.worker_id)
    if entry is not None:
        return entry.model.block_size
    sizes = [_bus(entry).block_size for entry in entries.values() if entry.role == WORKER_ROLE_OBSERVED]
    return next(filter(None, sizes), 0)


def _model(asked: str, decision: Decision, entries: dict[str, WorkerEntry]) -> str:
    """Whose keys the prompt got."""
    entry = entries.get(decision.worker_id)
    if asked or entry is not None:
        return asked or entries[decision.worker_id].model.name
    models = [_bus(entry).model for entry in entries.values() if entry.role == WORKER_ROLE_OBSERVED]
    return next(filter(None, models), "")


def _bus(entry: WorkerEntry) -> BusUrl:
    try:
        return parse_bus_url(entry.events_url)
    except InvalidRequest:  # of a router of another release
        return BusUrl("")


def mismatches(entries: Iterable[WorkerEntry], model: str, block_size: int, holders: Collection[str]) -> list[str]:
    """Observed servers of which no block can have a prompt's keys, by their URLs: which, and why."""
    notes = []
    for entry in entries:
        if entry.role != WORKER_ROLE_OBSERVED or entry.worker_id in holders:
            continue
        bus = _bus(entry)
        if bus.model and bus.model != model:
            notes.append(f"{entry.worker_id} cannot match: its URL says model={bus.model}, the prompt's is {model}")
        elif bus.model and bus.block_size != block_size:
            size = f"block_size={bus.block_size}, the prompt's blocks have {block_size} tokens"
            notes.append(f"{entry.worker_id} cannot match: its URL says {size}")
        elif bus.scheme == "zmq" and not bus.model and bus.dialect != "rhizome":
            foreign = "" if bus.dialect in ("vllm", "sglang") else ", if it is vLLM or SGLang"
            notes.append(f"{entry.worker_id} cannot match{foreign}: its URL has no model= and block_size=")
    return notes


def _as_json(decision: Decision, hashes: Hashes, holdings: Sequence[Holding], notes: Sequence[str]) -> dict[str, Any]:
    return {
        "prompt_tokens": decision.prompt_tokens,
        "keys": [key_text(block) for block in hashes.tolist()],
        "holders": [holding.as_json() for holding in holdings],
        "worker": decision.worker_id,
        "decode_worker": decision.decode_worker_id,
        "policy": decision.policy,
        "reason": decision.reason,
        "candidates": [_terms(candidate) for candidate in decision.candidates],
        "notes": list(notes),
    }


def _terms(candidate: Candidate) -> dict[str, Any]:
    """All of them; without a score where the candidate cannot take the request: JSON has no infinity."""
    terms = {field.name: getattr(candidate, field.name) for field in candidate.DESCRIPTOR.fields}
    return terms | {"score": candidate.score if math.isfinite(candidate.score) else None}


def _print(
    output: Output,
    decision: Decision,
    hashes: Hashes,
    holdings: Sequence[Holding],
    block_size: int,
    notes: Sequence[str],
    entries: Mapping[str, WorkerEntry],
) -> None:
    blocks = counted(len(hashes), "full block") + (f" of {block_size}" if block_size else "")
    output.line([("prompt   ", "note"), (f"{counted(decision.prompt_tokens, 'token')}, {blocks}", "")])
    if len(hashes):
        more = f" … {key_text(int(hashes[-1]))}" if len(hashes) > KEYS_SHOWN else ""
        shown = " ".join(map(key_text, hashes[:KEYS_SHOWN].tolist()))
        output.line([("keys     ", "note"), (shown + more, "key")])
    chosen = [(printable(decision.worker_id), "worker"), (f", by {decision.policy}", "")]
    output.line([("chosen   ", "note"), *(chosen if decision.worker_id else [("none", "bad")])])
    if decision.decode_worker_id:
        output.line([("then     ", "note"), (printable(decision.decode_worker_id), "worker"), (" would go on", "")])
    output.line([("why      ", "note"), (printable(decision.reason), "")])
    for note in notes:
        output.line([("note     ", "note"), (printable(note), "bad")])
    output.text("")
    rows = [
        [printable(h.worker), f"{h.blocks:,} of {len(hashes):,}", f"{h.tokens:,}", _tiers_text(h)] for h in holdings
    ]
    if not rows:
        output.text("no worker holds any of it", "note")
    for line in table(("holds", "blocks", "tokens", "where"), rows) if rows else ():
        output.line(line)
    if not decision.candidates:
        return
    output.text("")
    for line in table(_TERMS, [_row(candidate, entries.get(candidate.worker_id)) for candidate in decision.candidates]):
        output.line(line)


def _tiers_text(holding: Holding) -> str:
    """How many of the leading blocks each tier adds to those of faster ones."""
    parts, faster = [], 0
    for tier, depth in (holding.tier_blocks or {}).items():
        if depth > faster:
            parts.append(f"{depth - faster} {tier}")
        faster = max(faster, depth)
    return ", ".join(parts if holding.candidate else [*parts, "not a candidate"])


_TERMS = (
    "candidate",
    "cached",
    "fetched",
    "to compute",
    "queued",
    "running",
    "free",
    "queue s",
    "fetch s",
    "prefill s",
    "decode s",
    "TTFT s",
    "score",
)
_PARTIAL = {WORKER_ROLE_PREFILL: "prefill", WORKER_ROLE_DECODE: "decode"}


def _row(candidate: Candidate, entry: WorkerEntry | None) -> list[str]:
    name = printable(candidate.worker_id)
    if entry is not None and entry.role in _PARTIAL:
        name += f" ({_PARTIAL[entry.role]})"
    counts = (
        candidate.cached_tokens,
        candidate.fetched_tokens,
        candidate.prefill_tokens,
        candidate.queued_prefill_tokens,
        candidate.running,
        candidate.free_blocks,
    )
    times = (candidate.queue_s, candidate.fetch_s, candidate.prefill_s, candidate.decode_s, candidate.predicted_ttft_s)
    score = f"{candidate.score:.4g}" if math.isfinite(candidate.score) else "not for this"
    return [name, *(f"{count:,}" for count in counts), *(f"{time:.4f}" for time in times), score]
