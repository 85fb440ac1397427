"""What a routing decision costs: from token ids to a worker, in process.

The tree is the index benchmark's workload; each prompt, besides, has blocks held by four workers: all of them, half or
none, in turn. A prompt's hashes are computed each time; nothing of one is kept from decision to decision. Between
decisions, untimed, a worker reports, a request comes to its first token, and one ends.
"""

from __future__ import annotations

from collections import deque
from time import perf_counter_ns

import numpy as np

from benchmarks.index_plan import size
from benchmarks.report import AT_MOST, Figure, Row, row
from benchmarks.routing_plan import OURS, Plan
from benchmarks.workload import BLOCK_SIZE, PREFIX_HOLDERS, Workload
from radix.hashing import BlockHasher, derive_salt
from radix.keys import Tokens, hashes_of
from router.core import Router, RouteRequest
from router.fleet import ModelCard, WorkerInfo, WorkerReport

MODEL, VOCABULARY = "model", 128_256
HELD_SHARES = (1.0, 0.5, 0.0)  # of a prompt's blocks, on each of its holders
IN_FLIGHT, PREFILLING = 4, 0.25  # requests for each worker; prefills for each worker
INTERVAL_S = 0.01  # of the router's clock, between requests
BLOCKS = 1 << 16  # of a worker's memory
REPORT = WorkerReport(running=8, blocks_total=BLOCKS, blocks_in_use=BLOCKS // 4, blocks_cached=BLOCKS // 2)
P50_US, P99_US = 60.0, 200.0


def decision_rows(plan: Plan) -> list[Row]:
    """Percentiles of a decision's time, in all and by part."""
    hasher = BlockHasher(BLOCK_SIZE, derive_salt(MODEL))
    prompts = _prompts(plan)
    router = _router(plan, hasher, prompts)
    times, held = _times(plan, router, hasher, prompts)
    whole = times.sum(axis=1)
    name = f"decision {{}} {plan.decision_tokens} tokens {size(plan.decision_entries)} W{plan.decision_workers}"
    note = f"{len(whole)} decisions, {held / len(whole):.1%} held; {len(router.index.tree)} entries"
    return [
        _row(name.format("p50"), whole, 50, P50_US, f"hashing and submit; {note}"),
        _row(name.format("p99"), whole, 99, P99_US, f"hashing and submit; {note}"),
        *(
            _row(name.format(f"{part} p{percent}"), times[:, column], percent)
            for column, part in enumerate(("hashing", "submit"))
            for percent in (50, 99)
        ),
    ]


def _row(
    what: str,
    times_us: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
    percent: int,
    goal: float | None = None,
    note: str = "",
) -> Row:
    return row(what, "us", Figure(float(np.percentile(times_us, percent))), goal=goal, goal_is=AT_MOST, note=note)


def _prompts(plan: Plan) -> list[Tokens]:
    rng = np.random.default_rng(2)
    shape = plan.decision_prompts, plan.decision_tokens
    return list(rng.integers(0, VOCABULARY, shape, dtype=np.uint32))


def _router(plan: Plan, hasher: BlockHasher, prompts: list[Tokens]) -> Router:
    """With its workers' caches, and all of them at work for others as well."""
    router = Router(policy=OURS, lease_s=1e9)
    workers = plan.decision_workers
    card = ModelCard(MODEL, 2 * plan.decision_tokens, VOCABULARY, BLOCK_SIZE, "")
    for number in range(workers):
        name = f"worker-{number}"
        router.register(WorkerInfo(name, 1, f"{name}:1", card, BLOCKS, 256, 4096, 8192), 0.0)
        router.set_ready(name, 1)
        router.heartbeat(name, 1, REPORT, 0.0)
    tree = router.index.tree
    rng = np.random.default_rng(3)
    for number, tokens in enumerate(prompts):
        hashes = hashes_of(hasher.keys(tokens))
        hashes = hashes[: int(len(hashes) * HELD_SHARES[number % len(HELD_SHARES)])]
        for worker in rng.choice(workers, min(PREFIX_HOLDERS, workers), replace=False).tolist():
            if len(hashes):
                tree.store(router.index.slot(f"worker-{worker}"), hashes)
    workload = Workload(workers, max(0, plan.decision_entries - len(tree)))
    for run in (*workload.prefixes(), *map(workload.session, range(workload.sessions))):
        tree.store(router.index.slot(f"worker-{run.worker}"), run.hashes, run.parent)
    return router


def _times(
    plan: Plan, router: Router, hasher: BlockHasher, prompts: list[Tokens]
) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.float64]], int]:
    """Microseconds of each decision: (decisions, 2), hashing and submit; and how many requests were held. One that is
    held and not free to go at once is given up, so that all meet the same fleet."""
    rng = np.random.default_rng(4)
    rounds = -(-(plan.warm_up + plan.decisions) // len(prompts))
    order = np.concatenate([rng.permutation(len(prompts)) for _ in range(rounds)])[: plan.warm_up + plan.decisions]
    waiting: deque[str] = deque()
    decoding: deque[str] = deque()
    times = np.zeros((len(order), 2))
    held, now = 0, 0.0
    for number, prompt in enumerate(order.tolist()):
        now += INTERVAL_S
        router.heartbeat(f"worker-{number % plan.decision_workers}", 1, REPORT, now)
        tokens, name = prompts[prompt], str(number)
        start = perf_counter_ns()
        hashes = hashes_of(hasher.keys(tokens))
        hashed = perf_counter_ns()
        decision = router.submit(RouteRequest(name, MODEL, len(tokens), hashes), now)
        end = perf_counter_ns()
        times[number] = (hashed - start) / 1e3, (end - hashed) / 1e3
        if decision is None:
            held += number >= plan.warm_up
            if not router.dispatch(now):
                router.finish(name, now)
                continue
        waiting.append(name)
        if len(waiting) > PREFILLING * plan.decision_workers:
            decoding.append(waiting.popleft())
            router.first_token(decoding[-1], now)
        if len(decoding) > IN_FLIGHT * plan.decision_workers:
            router.finish(decoding.popleft(), now)
    return times[plan.warm_up :], held
