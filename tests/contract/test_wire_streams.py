"""What the fuzzer of the batch reader in tests/native has learned: the decoder in Python says the same of it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kv_events import wire
from kv_events.columns import changes_of
from radix.backend import native

SEEDS = Path(__file__).parents[1] / "native/batches.txt"


@pytest.mark.skipif(native is None, reason="there is no native core to compare with")
def test_the_fuzzers_batches_mean_the_same_to_both_decoders() -> None:
    """What the native core reads of them, and of damaged ones, the decoder in Python reads too, with equal content."""
    assert native is not None
    rng, payloads = random.Random(7), [bytes.fromhex(line) for line in SEEDS.read_text().splitlines()]
    for payload in list(payloads):
        for _ in range(40):
            damaged = bytearray(payload)
            damaged[rng.randrange(len(damaged))] = rng.choice([rng.randrange(256), 0, 0xC0, 0xFF])
            payloads.append(bytes(damaged))
    read = [(native.decode_batch(payload), payload) for payload in payloads]
    common = [(found, wire.decode_in_python(payload)) for found, payload in read if found is not None]
    assert len(common) > len(payloads) // 10
    for found, expected in common:
        assert (found.worker, found.epoch, found.seq) == (expected.worker, expected.epoch, expected.seq)
        assert (found.digest, found.ts) == (expected.digest, expected.ts)
        columns = changes_of(expected.events)
        for name in ("kinds", "tiers", "parents", "ends", "hashes"):
            assert getattr(found, name).tolist() == getattr(columns, name).tolist()
