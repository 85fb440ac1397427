"""The values that events are."""

from __future__ import annotations

import pytest

from kv_events.events import tier_of
from radix.tree import Tier


@pytest.mark.parametrize(
    ("medium", "tier"),
    [
        *[("GPU", Tier.DEVICE), ("CPU", Tier.HOST), ("CPU_PINNED", Tier.HOST), ("CPU_TIER1", Tier.HOST)],
        *[("HOST", Tier.HOST), ("DISK", Tier.DISK), ("STORAGE", Tier.DISK), ("CPU_TIER2", Tier.DISK)],
        *[("EXTERNAL", Tier.DISK), ("gpu", Tier.DISK), ("", Tier.DISK)],
    ],
)
def test_a_medium_is_in_a_tier(medium: str, tier: Tier) -> None:
    """The names of other projects mean what they mean there; a name that nobody knows is taken for the slowest."""
    assert tier_of(medium) is tier
