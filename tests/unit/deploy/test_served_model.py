"""What simulated workers have in place of a KV cache that others may read: stand-ins, where the hardware can pull."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deploy.processes import WorkerSettings
from deploy.served_model import simulated_fetch_token_s, simulated_model
from rhizome.errors import InvalidRequest
from worker.step_time import HARDWARE, Hardware

SMALL = replace(HARDWARE["8b-1xh100"], kv_tokens=8192)


def settings(hardware: Hardware, **changes: object) -> WorkerSettings:
    return WorkerSettings(None, "w", hardware=hardware, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("hardware", HARDWARE.values(), ids=HARDWARE)
def test_presets_pull(hardware: Hardware) -> None:
    """A token's KV comes at the pace of a network port of 200 to 400 Gb/s, and many times as fast as it is computed."""
    token_bytes = {"70b-4xh100": 320 * 1024, "8b-1xh100": 128 * 1024}[hardware.name]
    assert 20e9 < token_bytes / hardware.fetch_token_s < 55e9
    assert hardware.fetch_token_s < hardware.steps.token_s / 2


def test_there_is_a_stand_in_for_each_block() -> None:
    """Pools of one model and block size exchange them; those of another do not. Time runs faster by the scale."""
    asked = settings(SMALL, time_scale=10.0)
    memories = [
        simulated_model(each, SMALL).memory
        for each in (asked, settings(SMALL), settings(SMALL, model_name="x"), settings(SMALL, block_size=32))
    ]
    layouts = [memory.layout for memory in memories if memory is not None]
    assert [memory.num_blocks for memory in memories if memory is not None] == [512, 512, 512, 256]
    assert layouts[0] == layouts[1]
    assert len(set(layouts)) == 3
    assert simulated_fetch_token_s(asked, SMALL) == pytest.approx(SMALL.fetch_token_s / 10)
    for memory in memories:
        assert memory is not None
        memory.close()


def test_hardware_that_cannot_pull_has_no_memory_for_others() -> None:
    """As a calibrated one that nobody told of a network."""
    assert simulated_model(settings(SMALL), replace(SMALL, fetch_token_s=0.0)).memory is None


def test_a_pace_that_routers_would_refuse_is_refused_here() -> None:
    """A second for a token and more."""
    slow = replace(SMALL, fetch_token_s=0.5)
    with pytest.raises(InvalidRequest, match=r"hardware 8b-1xh100: fetch_token_s is 0.5: below 0.25"):
        simulated_model(settings(slow, time_scale=0.25), slow)
