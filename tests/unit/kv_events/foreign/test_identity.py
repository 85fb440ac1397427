"""IdentityMapper: foreign hashes as they are, and what is remembered of them."""

from __future__ import annotations

import numpy as np

from kv_events.events import BlockStored
from kv_events.foreign.events import ForeignStored
from kv_events.foreign.identity import IdentityMapper


def test_the_latest_parents_are_remembered_and_no_more_than_its_bound() -> None:
    """However many blocks a server has told of: a copy in another tier follows its parent, one long ago the root."""
    mapper = IdentityMapper(max_parents=64)
    tokens = np.zeros(16, dtype=np.uint32)
    for block in range(1, 1001):
        mapper.map(ForeignStored((block,), block - 1 or None, tokens, 16))
        assert len(mapper._parents) + len(mapper._older) <= 64 + 1
    copies = mapper.map(ForeignStored((500, 980, 990), medium="CPU"))
    assert [event.parent_hash for event in copies if isinstance(event, BlockStored)] == [0, 979, 989]
    assert mapper.counts.untold == 1
