"""What a routing decision costs: from token ids to a worker, in process.

The tree is the index benchmark's workload; each prompt, besides, has blocks held by four workers: all of them, half or
none, in turn. A prompt's hashes are computed each time; nothing of one is kept from decision to decision. Between
decisions, untimed, a worker reports, a request comes to its first token, and one ends. Times are the thread's own, of
the CPU: a decision waits for nothing. Parts of a submission are timed once more by themselves, each with the clock's
own time in it.
"""

from __future__ import annotations

from collections import deque
from time import thread_time_ns

import numpy as np

from benchmarks.index_plan import size
from benchmarks.report import AT_MOST, Figure, Row, row
from benchmarks.routing_plan import OURS, Plan
from benchmarks.workload import BLOCK_SIZE, PREFIX_HOLDERS, Workload
from radix.hashing import BlockHasher, derive_salt
from radix.keys import Tokens, hashes_of
from router.candidates import Candidates
from router.choice import choose
from router.core import Router, RouteRequest
from router.fleet import ModelCard, WorkerInfo, WorkerReport
from router.load import Reservation
from router.policies import Prompt, make_policy

MODEL, VOCABULARY = "model", 128_256
HELD_SHARES = (1.0, 0.5, 0.0)  # of a prompt's blocks, on each of its holders
IN_FLIGHT, PREFILLING = 4, 0.25  # requests for each worker; prefills for each worker
INTERVAL_S = 0.01  # of the router's clock, between requests
BLOCKS = 1 << 16  # of a worker's memory
REPORT = WorkerReport(running=8, blocks_total=BLOCKS, blocks_in_use=BLOCKS // 4, blocks_cached=BLOCKS // 2)
P50_US, P99_US = 60.0, 200.0
PARTS = "match", "columns", "scores", "choice", "reserve"


def decision_rows(plan: Plan) -> list[Row]:
    """Percentiles of a decision's time, in all and by part."""
    hasher = BlockHasher(BLOCK_SIZE, derive_salt(MODEL))
    prompts = _prompts(plan)
    router = _router(plan, hasher, prompts)
    times, held = _times(plan, router, hasher, prompts)
    parts = _parts(plan, router, hasher, prompts)
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
        *(_row(name.format(f"part {part} p50"), parts[:, column], 50) for column, part in enumerate(PARTS)),
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
        start = thread_time_ns()
        hashes = hashes_of(hasher.keys(tokens))
        hashed = thread_time_ns()
        decision = router.submit(RouteRequest(name, MODEL, len(tokens), hashes), now)
        end = thread_time_ns()
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


def _parts(
    plan: Plan, router: Router, hasher: BlockHasher, prompts: list[Tokens]
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Microseconds of each of PARTS: (decisions, parts). The fleet is as the decisions have left it."""
    policy, table = make_policy(OURS), router._table.values
    slots = np.arange(plan.decision_workers, dtype=np.intp)
    now = INTERVAL_S * (plan.warm_up + plan.decisions)
    times = np.zeros((plan.decisions, 1 + len(PARTS)), np.int64)
    for number in range(plan.decisions):
        tokens = prompts[number % len(prompts)]
        hashes = hashes_of(hasher.keys(tokens))
        started = thread_time_ns()
        held_blocks = router.index.match(hashes)
        matched = thread_time_ns()
        rows = Candidates(slots, table, len(tokens), BLOCK_SIZE, held_blocks, now)
        predicted = thread_time_ns()
        scores = policy.scores(Prompt("", hashes), rows)
        scored = thread_time_ns()
        best = choose(rows, scores, policy.tie)
        chosen = thread_time_ns()
        worker = router.index.slot_names[slots[best[1] if best else 0]]
        router.load.reserve(
            Reservation(f"part {number}", worker, len(tokens), len(hashes), len(tokens), 1, 1.0, now, 1.0, 1.0, True)
        )
        times[number] = (started, matched, predicted, scored, chosen, thread_time_ns())
        router.load.release(f"part {number}", now)
    return np.diff(times) / 1e3
