"""What prefill apart from decode adds to a request: `python -m benchmarks.disagg [--quick] [--json FILE]`.

Simulated workers, whose steps and pulls take what the model of an H100 and its network says: one of role both, and
beside it one that prefills and one that decodes, each fleet with a router of its own, all as processes of this machine.
One request at a time, fleets in turn; every prompt is new and fills its blocks: the decode worker has nothing of it to
compute.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from statistics import mean
from typing import Literal

from benchmarks.report import Figure, Row, figure, machine, print_table, row, write_json
from deploy.fleet.config import FleetConfig, Model, Routers, WorkerGroup
from deploy.fleet.plan import plan_fleet
from deploy.local import LocalCluster
from radix import BACKEND
from router.client import Client
from worker.hardware_file import load_hardware

HARDWARE = "8b-1xh100"
ANSWER_TOKENS = 16
ROUNDS, QUICK_ROUNDS = 60, 10
PROMPTS = {"1k": 1024, "8k": 8192}  # tokens


def main() -> None:
    """Measure, print, and write what --json names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="ten requests of each kind")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = asyncio.run(measured(QUICK_ROUNDS if arguments.quick else ROUNDS))
    print_table("Prefill apart from decode", rows)
    if arguments.json:
        write_json(arguments.json, "disagg", {**machine(), "index": BACKEND, "quick": arguments.quick}, rows)


async def measured(rounds: int) -> list[Row]:
    """Both fleets side by side."""
    async with AsyncExitStack() as stack:
        whole = await stack.enter_async_context(_client("both"))
        split = await stack.enter_async_context(_client("prefill", "decode"))
        token_s = load_hardware(HARDWARE).fetch_token_s
        rows: list[Row] = []
        for name, tokens in PROMPTS.items():
            times = []
            for number in range(rounds + 2):
                pair = [await _times(client, number, tokens) for client in (whole, split)]
                times.append([after - before for before, after in zip(*pair, strict=True)])
            totals, firsts, seconds, rest = map(_figure, zip(*times[2:], strict=True))
            network = f"the hand-over: ticket, pull, a step; the modelled network alone {1000 * tokens * token_s:.1f}"
            rows += [
                row(f"split adds {name}", "ms", totals, note=f"to a request of {ANSWER_TOKENS} tokens"),
                row(f"split adds {name} first token", "ms", firsts),
                row(f"split adds {name} second token", "ms", seconds, note=network),
                row(f"split adds {name} later token", "ms", rest),
            ]
        return rows


async def _times(client: Client, number: int, tokens: int) -> tuple[float, float, float, float]:
    """Seconds in all, to the first token, from it to the second, and for each later one."""
    prompt = [1 + number, 1 + tokens % 250, *(1 + at * 7 % 250 for at in range(tokens - 2))]
    answer = await client.complete(token_ids=prompt, max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True)
    second, *later = answer.itl_s
    return answer.total_s, answer.ttft_s, second, mean(later)


def _figure(seconds: Sequence[float]) -> Figure:
    return figure(1000 * each for each in seconds)


@asynccontextmanager
async def _client(*roles: Literal["both", "prefill", "decode"]) -> AsyncIterator[Client]:
    """Of a fleet with a worker of each role, in which decode workers compute no prompt."""
    config = FleetConfig(
        model=Model(simulated=HARDWARE),
        routers=Routers(port=0, local_prefill_ms=0),
        workers=[WorkerGroup(role=role, name=role) for role in roles],
    )
    async with LocalCluster(plan_fleet(config)) as cluster, Client(cluster.address) as client:
        await client.wait_ready(workers=len(roles))
        yield client


if __name__ == "__main__":
    main()
