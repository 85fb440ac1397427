"""Prefill apart from decode, with real processes: the answers are those of one worker, whatever fails on the way."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from deploy.fleet.config import FleetConfig, Model, Routers, WorkerGroup
from deploy.fleet.plan import plan_fleet
from deploy.local import Child, LocalCluster
from rhizome.v1 import router_pb2
from router.client import Ask, Client

PROMPT = [1 + at * 7 % 250 for at in range(800)]  # 50 full blocks
GREEDY: Ask = {"temperature": 0.0, "ignore_eos": True}
SAMPLED: Ask = {"temperature": 1.0, "seed": 5, "ignore_eos": True}


@asynccontextmanager
async def fleet(model: Path, decoders: int = 2) -> AsyncIterator[tuple[LocalCluster, Client]]:
    """A prefill worker, and decode workers that compute no prompt while it is there."""
    groups = [WorkerGroup(role="prefill", name="prefill"), WorkerGroup(role="decode", name="decode", count=decoders)]
    routers = Routers(port=0, local_prefill_ms=0)
    cluster = LocalCluster(
        plan_fleet(FleetConfig(model=Model(path=model), routers=routers, workers=groups)),
        worker_arguments=("--kv-cache-mib", "16", "--validate"),
    )
    async with asyncio.timeout(150), cluster, Client(cluster.address) as client:
        await client.wait_ready(workers=1 + decoders)
        yield cluster, client


def with_fleet(model: Path, test: Callable[[LocalCluster, Client], Awaitable[None]], decoders: int = 2) -> None:
    """Nothing may be held anywhere at the end."""

    async def main() -> None:
        async with fleet(model, decoders) as (cluster, client):
            await test(cluster, client)
            await until(client, nothing_held)

    asyncio.run(main())


async def entries(client: Client) -> dict[str, router_pb2.WorkerEntry]:
    return {entry.worker_id: entry for entry in await client.workers()}


async def until(client: Client, holds: Callable[[dict[str, router_pb2.WorkerEntry]], bool]) -> None:
    known: dict[str, router_pb2.WorkerEntry] = {}
    try:
        async with asyncio.timeout(60):
            while not holds(known := await entries(client)):
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"it did not come to pass: {known}") from None


def nothing_held(known: dict[str, router_pb2.WorkerEntry]) -> bool:
    return all(entry.in_flight == entry.status.blocks_in_use == 0 for entry in known.values())


def process(cluster: LocalCluster, name: str) -> Child:
    (child,) = [child for child in cluster.workers if child.name == name]
    return child


def asking(prompt: list[int], sampling: Ask, max_tokens: int = 24) -> Ask:
    return {"token_ids": prompt, "max_tokens": max_tokens, **sampling}


def whole_of(ask: Ask) -> Ask:
    """The same by one worker: without a cache nothing is split."""
    return {**ask, "bypass_prefix_cache": True}


async def alone(client: Client, ask: Ask) -> list[int]:
    """What one worker answers."""
    return (await client.complete(**whole_of(ask))).token_ids


def test_turns_of_a_chat_come_back_to_the_decode_worker_that_has_them(tiny_model: Path) -> None:
    """Its first token is the prefill worker's; only blocks that are new travel; the answers are those of one worker,
    greedy and sampled."""

    async def turns(client: Client, prompt: list[int], sampling: Ask) -> None:
        decoder, held = "", 0
        for turn in range(3):
            before = await entries(client)
            ask = asking(prompt, sampling, max_tokens=20)
            answer = await client.complete(**ask)
            assert answer.token_ids == await alone(client, ask)
            await until(client, nothing_held)  # else a late report of that request would make a worker look busy
            assert (answer.prompt_tokens, answer.completion_tokens) == (len(prompt), 20)
            begun, went_on = answer.worker_ids
            assert (begun, went_on) == ("prefill-0", decoder or went_on)
            assert (answer.cached_tokens == 0) == (turn == 0)
            decoder, (pulled, skipped) = went_on, counts(before, went_on)
            now = pulled + len(prompt) // 16 - held, skipped + held
            await until(client, lambda known: counts(known, decoder) == now)  # noqa: B023
            held = (len(prompt) + 20 - 1) // 16  # the last token is answered and not computed
            prompt = [*prompt, *answer.token_ids, *(3 + (turn + at) % 200 for at in range(40))]
        known = await entries(client)
        assert known["prefill-0"].status.decode_tokens == 0
        assert known[decoder].status.pull_transport == "shm"

    async def test(__: LocalCluster, client: Client) -> None:
        await turns(client, [1, *PROMPT], GREEDY)
        await turns(client, [2, *PROMPT], SAMPLED)

    with_fleet(tiny_model, test)


def counts(known: dict[str, router_pb2.WorkerEntry], worker_id: str) -> tuple[int, int]:
    status = known[worker_id].status
    return status.pulled_blocks, status.pull_skipped_blocks


def test_an_answer_of_one_token_stays_where_it_began(tiny_model: Path) -> None:
    """And what has no full block goes on without a pull; stop strings and log-probabilities are those of one worker."""

    async def test(__: LocalCluster, client: Client) -> None:
        one = await client.complete(**asking(PROMPT, GREEDY, max_tokens=1))
        assert (one.worker_ids, one.finish_reason) == (["prefill-0"], "length")
        short = asking(PROMPT[:9], GREEDY, max_tokens=8)
        assert (await client.complete(**short)).token_ids == await alone(client, short)
        text = (await client.complete(**asking(PROMPT, GREEDY, max_tokens=12))).text
        for cut in (text[:1], text[1:3], text[2:6]):
            told: Ask = {**asking(PROMPT, GREEDY, max_tokens=12), "stop": [cut], "logprobs": 2}
            split, whole = await client.complete(**told), await client.complete(**whole_of(told))
            assert (split.text, split.finish_reason) == (whole.text, whole.finish_reason)
            assert split.choices[0].logprobs == whole.choices[0].logprobs
        await until(client, lambda known: counts(known, "decode-0")[0] == 50)
        assert (await entries(client))["decode-0"].status.pulls == 1

    with_fleet(tiny_model, test, decoders=1)


def test_a_prefill_worker_that_dies_before_its_token_is_done_without(tiny_model: Path) -> None:
    """A decode worker computes the prompt."""

    async def test(cluster: LocalCluster, client: Client) -> None:
        ask = asking(PROMPT, GREEDY)
        whole = await alone(client, ask)
        child = process(cluster, "prefill-0")
        os.kill(child.pid, signal.SIGSTOP)
        answering = asyncio.create_task(client.complete(**ask))
        await until(client, lambda known: known["prefill-0"].in_flight > 0)
        os.kill(child.pid, signal.SIGKILL)
        answer = await answering
        assert answer.token_ids == whole
        assert answer.worker_id.startswith("decode")

    with_fleet(tiny_model, test)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "is too slow"])
def test_a_prefill_worker_that_is_gone_after_its_token_is_not_waited_for(tiny_model: Path, end: signal.Signals) -> None:
    """What has not been pulled is computed, and the answer goes on."""

    async def test(cluster: LocalCluster, client: Client) -> None:
        ask = asking(PROMPT, GREEDY)
        whole = await alone(client, ask)
        child = process(cluster, "prefill-0")
        tokens: list[int] = []
        async with aclosing(client.generate(**ask)) as chunks:
            async for chunk in chunks:
                if not tokens:
                    os.kill(child.pid, end)
                tokens += chunk.token_ids
        assert tokens == whole
        if end is signal.SIGSTOP:
            os.kill(child.pid, signal.SIGCONT)
        await until(client, lambda known: "prefill-0" in known)

    with_fleet(tiny_model, test)


def test_a_decode_worker_that_dies_is_replaced_in_mid_answer(tiny_model: Path) -> None:
    """Another goes on after the last token that was delivered."""

    async def test(cluster: LocalCluster, client: Client) -> None:
        ask = asking(PROMPT, SAMPLED, max_tokens=60)
        whole = await alone(client, ask)
        tokens: list[int] = []
        workers: list[str] = []
        async with aclosing(client.generate(**ask)) as chunks:
            async for chunk in chunks:
                tokens += chunk.token_ids
                workers += [chunk.worker_id] if chunk.worker_id else []
                if len(tokens) == 10:
                    os.kill(process(cluster, workers[-1]).pid, signal.SIGKILL)
        assert tokens == whole
        assert workers[0] == "prefill-0"
        assert set(workers[1:]) == {"decode-0", "decode-1"}
        await until(client, lambda known: len(known) == 3)

    with_fleet(tiny_model, test)


def test_a_client_that_goes_away_leaves_nothing(tiny_model: Path) -> None:
    """Neither with the worker that began nor with the one that went on, whenever it goes."""

    async def test(__: LocalCluster, client: Client) -> None:
        for after in (1, 2, 5):
            async with aclosing(client.generate(**asking(PROMPT[after:], GREEDY, max_tokens=200))) as chunks:
                seen = 0
                async for _ in chunks:
                    seen += 1
                    if seen == after:
                        break

    with_fleet(tiny_model, test)
