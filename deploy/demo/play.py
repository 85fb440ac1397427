"""The demo's conversations, played on a fleet that serves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
import numpy as np

from deploy.conversations import SYSTEM_PROMPT, TurnTokens, reading_time_s, user_message
from deploy.demo.figures import Outcome, Pulls, Row, TreeCheck
from deploy.demo.stages import Mode
from kv_events.bus.grpc import GrpcEventSource
from kv_events.events import Snapshot
from rhizome import rpc
from rhizome.v1 import fleet_pb2
from rhizome.v1.router_pb2 import WorkerEntry
from router.client import Client
from router.tokenizing import PromptTokenizer

ANSWER_TOKENS = 32
SETTLE_TIMEOUT_S = 30.0
POLL_S = 0.02


class Player:
    """Plays on one fleet; what it sees is added to the outcome."""

    def __init__(
        self,
        client: Client,
        tokenizer: PromptTokenizer,
        sessions: int,
        turns: int,
        outcome: Outcome,
        on_row: Callable[[Row], None],
    ) -> None:
        self._client = client
        self._tokenizer = tokenizer
        self._sessions = sessions
        self._turns = turns
        self._outcome = outcome
        self._on_row = on_row
        self._pulled: dict[str, Pulls] = {}

    async def warm_up(self) -> None:
        """One request to each worker, so that no mode pays for first-time costs."""
        workers = await self._client.workers()
        for _ in workers:
            await self._client.complete("warm-up " * 64, policy="round-robin", max_tokens=4, bypass_prefix_cache=True)
        if any(worker.role == fleet_pb2.WORKER_ROLE_PREFILL for worker in workers):
            # An answer that uses no cache is a decode worker's alone.
            await self._client.complete("warm-up " * 64, max_tokens=4)
            _, entries = await self._settled()
            self._pulled = {name: Pulls.of(entry.status) for name, entry in entries.items()}
        self._outcome.block_size = workers[0].model.block_size

    async def play(self, mode: Mode) -> None:
        """All conversations side by side, from empty caches."""
        await self._client.clear_caches()
        async with asyncio.timeout(SETTLE_TIMEOUT_S):
            while any(worker.indexed_blocks for worker in await self._client.workers()):
                await asyncio.sleep(POLL_S)
        first = not self._outcome.tokens
        sessions = (self._converse(mode, session, first) for session in range(self._sessions))
        for rows in await asyncio.gather(*sessions):
            self._outcome.rows += rows
        await self._look(mode.name)

    async def _converse(self, mode: Mode, session: int, first: bool) -> list[Row]:
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
                workers=tuple(answer.worker_ids),
                itl_ms=tuple(round(gap_s * 1000, 3) for gap_s in answer.itl_s),
            )
            if first:
                prompt = tuple(self._tokenizer.encode_chat(messages))
                self._outcome.tokens.append(TurnTokens(session + 1, turn + 1, prompt, row.tokens))
            self._on_row(row)
            rows.append(row)
            messages.append({"role": "assistant", "content": answer.text})
        return rows

    async def _look(self, mode: str) -> None:
        """Each worker's own block set beside the router's tree of it, and what it has pulled in this mode."""
        snapshots, entries = await self._settled()
        checks, pulls = {}, {}
        for name, snapshot in snapshots.items():
            hashes, digest = await self._client.index(name)
            equal = np.array_equal(np.sort(snapshot.block_hashes), hashes) and digest == snapshot.digest
            checks[name] = TreeCheck(len(snapshot.block_hashes), len(hashes), equal)
            total = Pulls.of(entries[name].status)
            pulls[name] = total.since(self._pulled.get(name, Pulls()))
            self._pulled[name] = total
        self._outcome.trees[mode] = checks
        self._outcome.pulls[mode] = pulls

    async def _settled(self) -> tuple[dict[str, Snapshot], dict[str, WorkerEntry]]:
        """What workers hold; what the router knows of them, once its trees and their own reports are as new as that."""
        addresses = {worker.worker_id: worker.address for worker in await self._client.workers()}
        snapshots = {name: await _snapshot(address) for name, address in addresses.items()}
        async with asyncio.timeout(SETTLE_TIMEOUT_S):
            while True:
                entries = {worker.worker_id: worker for worker in await self._client.workers()}
                known = {
                    name: min(entry.next_event_seq, entry.status.next_event_seq) for name, entry in entries.items()
                }
                if all(known.get(name, 0) >= snapshot.next_seq for name, snapshot in snapshots.items()):
                    return snapshots, entries
                await asyncio.sleep(POLL_S)


async def _snapshot(address: str) -> Snapshot:
    async with grpc.aio.insecure_channel(address, options=rpc.CHANNEL_OPTIONS) as channel:
        return await GrpcEventSource(channel).snapshot()
