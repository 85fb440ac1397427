"""`rhizome demo`: the same conversations on one embedded cluster, KV-aware, round-robin and without a cache."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import grpc
import numpy as np
from rich.console import Console
from rich.table import Table

from deploy.conversations import SYSTEM_PROMPT, TurnTokens, most_cached_tokens, reading_time_s, user_message
from deploy.fleet.config import FleetConfig, Model, Routers, WorkerGroup
from deploy.fleet.plan import plan_fleet
from deploy.local import LocalCluster
from kv_events.bus.grpc import GrpcEventSource
from rhizome import rpc
from router.client import Client
from router.tokenizing import PromptTokenizer
from worker.tiny_model import make_tiny_model
from worker.tokenizer import tokenizer_files

ANSWER_TOKENS = 32
SETTLE_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to serve the conversations."""

    name: str
    policy: str
    bypass_prefix_cache: bool


MODES = (
    Mode("kv-aware", "predicted-ttft", bypass_prefix_cache=False),
    Mode("round-robin", "round-robin", bypass_prefix_cache=False),
    Mode("cache-off", "round-robin", bypass_prefix_cache=True),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One turn as it was served. Sessions and turns are counted from 1."""

    mode: str
    session: int
    turn: int
    worker: str
    prompt_tokens: int
    cached_tokens: int
    ttft_ms: float
    answer: str
    tokens: tuple[int, ...]  # of the answer


@dataclass(frozen=True, slots=True)
class Summary:
    """One mode's figures over turns 2 and later."""

    mode: str
    hit_share: float  # cached prompt tokens / prompt tokens
    hit_share_of_maximum: float
    mean_ttft_ms: float


@dataclass(frozen=True, slots=True)
class TreeCheck:
    """A worker's block set, asked of the worker itself and of the router."""

    worker_blocks: int
    router_blocks: int
    equal: bool  # block by block, and by digest


Trees = dict[str, dict[str, TreeCheck]]  # by mode and worker


class Demo:
    """One run of the demo on a running cluster."""

    def __init__(
        self,
        client: Client,
        tokenizer: PromptTokenizer,
        sessions: int,
        turns: int,
        on_row: Callable[[Row], None],
    ) -> None:
        self._client = client
        self._tokenizer = tokenizer
        self._sessions = sessions
        self._turns = turns
        self._on_row = on_row
        self.rows: list[Row] = []
        self.tokens: list[TurnTokens] = []  # of the first mode; the others answer the same or the demo fails

    async def play(self, mode: Mode) -> None:
        """All conversations side by side, from empty caches."""
        await self._client.clear_caches()
        async with asyncio.timeout(SETTLE_TIMEOUT_S):
            while any(worker.indexed_blocks for worker in await self._client.workers()):
                await asyncio.sleep(0.02)
        sessions = (self._converse(mode, session) for session in range(self._sessions))
        for rows in await asyncio.gather(*sessions):
            self.rows += rows

    def answers_identical(self) -> bool:
        """Whether every turn was answered alike in all modes, token for token."""
        answers: dict[tuple[int, int], set[tuple[int, ...]]] = {}
        for row in self.rows:
            answers.setdefault((row.session, row.turn), set()).add(row.tokens)
        return all(len(different) == 1 for different in answers.values())

    def summaries(self, block_size: int) -> list[Summary]:
        """A line for each mode that was played."""
        most = most_cached_tokens(self.tokens, block_size)
        result = []
        for mode in dict.fromkeys(row.mode for row in self.rows):
            rows = [row for row in self.rows if row.mode == mode and row.turn > 1]
            cached = sum(row.cached_tokens for row in rows)
            best = sum(most[row.session, row.turn] for row in rows)
            share = cached / sum(row.prompt_tokens for row in rows)
            result.append(Summary(mode, share, cached / best if best else 0.0, mean(row.ttft_ms for row in rows)))
        return result

    async def trees_equal(self) -> dict[str, TreeCheck]:
        """Each worker's own block set beside the router's view of it, once the view has caught up."""
        checks = {}
        for worker in await self._client.workers():
            async with grpc.aio.insecure_channel(worker.address, options=rpc.CHANNEL_OPTIONS) as channel:
                snapshot = await GrpcEventSource(channel).snapshot()
            await self._caught_up(worker.worker_id, snapshot.next_seq)
            hashes, digest = await self._client.index(worker.worker_id)
            equal = np.array_equal(np.sort(snapshot.block_hashes), hashes) and digest == snapshot.digest
            checks[worker.worker_id] = TreeCheck(len(snapshot.block_hashes), len(hashes), equal)
        return checks

    async def _caught_up(self, worker_id: str, next_seq: int) -> None:
        async with asyncio.timeout(SETTLE_TIMEOUT_S):
            while True:
                entries = {worker.worker_id: worker for worker in await self._client.workers()}
                if entries[worker_id].next_event_seq >= next_seq:
                    return
                await asyncio.sleep(0.02)

    async def warm_up(self) -> None:
        """One request to each worker, so that no mode pays for first-time costs."""
        workers = await self._client.workers()
        for _ in workers:
            await self._client.complete("warm-up " * 64, policy="round-robin", max_tokens=4, bypass_prefix_cache=True)

    async def _converse(self, mode: Mode, session: int) -> list[Row]:
        messages = [{"role": "system", "content": SYSTEM_PROMPT}]
        rows = []
        for turn in range(self._turns):
            await asyncio.sleep(reading_time_s(session, turn))
            messages.append({"role": "user", "content": user_message(session, turn)})
            answer = await self._client.complete(
                messages=messages,
                policy=mode.policy,
                bypass_prefix_cache=mode.bypass_prefix_cache,
                temperature=0.0,
                max_tokens=ANSWER_TOKENS,
                ignore_eos=True,
            )
            row = Row(
                mode=mode.name,
                session=session + 1,
                turn=turn + 1,
                worker=answer.worker_id,
                prompt_tokens=answer.prompt_tokens,
                cached_tokens=answer.cached_tokens,
                ttft_ms=answer.ttft_s * 1000,
                answer=answer.text,
                tokens=tuple(answer.token_ids),
            )
            if mode is MODES[0]:
                prompt = tuple(self._tokenizer.encode_chat(messages))
                self.tokens.append(TurnTokens(session + 1, turn + 1, prompt, row.tokens))
            self._on_row(row)
            rows.append(row)
            messages.append({"role": "assistant", "content": answer.text})
        return rows


async def run_demo(*, workers: int, sessions: int, turns: int, json_output: bool) -> int:
    """Play all modes and print the outcome; the exit code: 1 when answers differ or a tree is not its worker's."""
    console = Console(stderr=json_output, highlight=False)
    with tempfile.TemporaryDirectory(prefix="rhizome-demo-") as folder:
        model_dir = Path(folder) / "tiny"
        make_tiny_model(model_dir)
        tokenizer = PromptTokenizer(tokenizer_files(model_dir))
        fleet = FleetConfig(
            model=Model(path=model_dir), routers=Routers(port=0), workers=[WorkerGroup(name="worker", count=workers)]
        )
        async with (
            LocalCluster(plan_fleet(fleet), on_event=lambda text: console.print(f"[dim]{text}[/dim]")) as cluster,
            Client(cluster.address) as client,
        ):
            demo = Demo(client, tokenizer, sessions, turns, on_row=lambda row: _print_row(console, row))
            await demo.warm_up()
            trees: Trees = {}
            for mode in MODES:
                console.print(f"\n[bold]{mode.name}[/bold]  session turn worker    prompt cached  TTFT")
                await demo.play(mode)
                trees[mode.name] = await demo.trees_equal()
            block_size = (await client.workers())[0].model.block_size
    summaries = demo.summaries(block_size)
    identical = demo.answers_identical()
    _print_summary(console, summaries, trees, identical=identical)
    if json_output:
        print(json.dumps(_report(demo, summaries, trees, identical=identical), indent=1))
    return 0 if identical and _all_equal(trees) else 1


def _all_equal(trees: Trees) -> bool:
    return all(check.equal for checks in trees.values() for check in checks.values())


def _print_row(console: Console, row: Row) -> None:
    console.print(
        f"{'':{len(row.mode)}}  {row.session:7d} {row.turn:4d} {row.worker:9s} "
        f"{row.prompt_tokens:6d} {row.cached_tokens:6d} {row.ttft_ms:6.0f} ms"
    )


def _print_summary(console: Console, summaries: list[Summary], trees: Trees, *, identical: bool) -> None:
    table = Table(title="Turns 2 and later")
    for heading in ("mode", "hit share of prompt tokens", "of the maximum", "mean TTFT", "against KV-aware"):
        table.add_column(heading, justify="left" if heading == "mode" else "right")
    best = summaries[0].mean_ttft_ms
    for line in summaries:
        table.add_row(
            line.mode,
            f"{line.hit_share:.3f}",
            f"{line.hit_share_of_maximum:.3f}",
            f"{line.mean_ttft_ms:.0f} ms",
            f"{line.mean_ttft_ms / best:.2f}x",
        )
    console.print(table)
    console.print("The maximum: what one cache of unlimited size, shared by all, would hold.", soft_wrap=True)
    console.print(f"Answers identical in the three runs: {'yes' if identical else 'NO'}")
    for mode, checks in trees.items():
        for worker, check in checks.items():
            held = f"{worker} holds {check.worker_blocks} blocks, the router's tree has {check.router_blocks} of it"
            console.print(f"After {mode}: {held}: {'equal' if check.equal else 'NOT EQUAL'}", soft_wrap=True)


def _report(demo: Demo, summaries: list[Summary], trees: Trees, *, identical: bool) -> dict[str, object]:
    return {
        "answers_identical": identical,
        "hit_share": summaries[0].hit_share,
        "hit_share_of_maximum": summaries[0].hit_share_of_maximum,
        "trees_equal": _all_equal(trees),
        "modes": {line.mode: asdict(line) for line in summaries},
        "trees": {mode: {name: asdict(check) for name, check in checks.items()} for mode, checks in trees.items()},
        "rows": [asdict(row) for row in demo.rows],
    }
