"""Rows of the index benchmark: block keys of a prompt."""

from __future__ import annotations

import random
from time import perf_counter_ns

import numpy as np

from benchmarks import peer_index
from benchmarks.index_plan import OURS, PEER, REFERENCE, Bench, Samples
from benchmarks.measure import in_turn
from benchmarks.report import Row, number
from benchmarks.workload import BLOCK_SIZE
from radix import siphash
from radix.hashing import BlockHasher, derive_salt

GOAL = 10.0
SIDES = (OURS, "list", PEER)
REFERENCE_TOKENS = 8_192


def hash_rows(bench: Bench) -> list[Row]:
    """Tokens a second: ours from an array and from a list, the peer from a list, which is all that it takes."""
    rows = []
    for tokens in bench.plan.hash_tokens:
        samples = _measure(bench, tokens)
        peer = samples.values[PEER]
        note = (
            "128-bit chained keys from a uint32 array; the peer's are of 64 bits, not chained, from a list of ints; "
            f"our reference {number(samples.values[REFERENCE][0])}"
        )
        rows.append(bench.row(f"hash {tokens}", "M tokens/s", samples, GOAL, note=note))
        listed = Samples({OURS: samples.values["list"], PEER: peer})
        rows.append(bench.row(f"hash {tokens} list", "M tokens/s", listed, note="ours from a list of ints too"))
    return rows


def _measure(bench: Bench, tokens: int) -> Samples:
    hasher = BlockHasher(BLOCK_SIZE, derive_salt("benchmark"))
    rng = random.Random(tokens)
    prompts = [[rng.randrange(150_000) for _ in range(tokens)] for _ in range(4)]
    arrays = [np.array(prompt, dtype=np.uint32) for prompt in prompts]
    samples = Samples()
    start = perf_counter_ns()
    siphash.block_keys(arrays[0][:REFERENCE_TOKENS], BLOCK_SIZE, 1, 2, None)
    samples.add(REFERENCE, min(tokens, REFERENCE_TOKENS) * 1e3 / (perf_counter_ns() - start))
    for repeat in range(max(5, bench.plan.hashed_tokens // tokens)):
        prompt, array = prompts[repeat % 4], arrays[repeat % 4]
        for side in in_turn(SIDES, repeat):
            if side == PEER and not bench.peer_name:
                continue
            start = perf_counter_ns()
            if side == PEER:
                peer_index.hash_tokens(prompt, BLOCK_SIZE)
            else:
                hasher.keys(array if side == OURS else prompt)
            samples.add(side, tokens * 1e3 / (perf_counter_ns() - start))
    return samples
