"""KeyMapper: what captured and made-up events mean in our keys. The traps are those that consumers of such events have
fallen into; test_mapper_model.py has the general case."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from kv_events.foreign.dialects import decode_foreign
from kv_events.foreign.events import (
    ForeignBatch,
    ForeignCleared,
    ForeignRemoved,
    ForeignStored,
    ForeignUnknown,
)
from kv_events.foreign.labels import MAX_GROUPS, MAX_REALMS
from kv_events.foreign.mapper import IdentityMapper, KeyMapper, Mapper
from radix.hashing import BlockHasher, derive_salt
from radix.keys import hashes_of
from radix.tree import Tier
from tests.support.foreign_servers import MODEL, Follower
from tests.support.golden import capture

B = 4  # our block size, and theirs where nothing else is said
DEVICE, HOST, DISK = Tier


def keys(
    tokens: Sequence[int], block_size: int = B, adapter: str = "", tenant: str = "", secret: bytes = b""
) -> list[int]:
    """What a router looks for."""
    return hashes_of(BlockHasher(block_size, derive_salt(MODEL, adapter, tenant), secret).keys(list(tokens))).tolist()


def stored(
    hashes: Sequence[int | bytes], first_token: int = 0, parent: int | bytes | None = None, **fields: object
) -> ForeignStored:
    """A chain of blocks of B consecutive tokens."""
    tokens = np.arange(first_token, first_token + B * len(hashes), dtype=np.uint32)
    return ForeignStored(tuple(hashes), parent, tokens, B)._replace(**fields)


def removed(*hashes: int | bytes, **fields: object) -> ForeignRemoved:
    return ForeignRemoved(hashes)._replace(**fields)


class Known:
    """What a mapper's events add up to."""

    def __init__(self, mapper: Mapper | None = None) -> None:
        self.mapper = mapper or KeyMapper(MODEL, B)
        self.follower = Follower()

    @property
    def counts(self) -> dict[str, int]:
        """Those that are not 0."""
        counts = self.mapper.counts
        return {name: getattr(counts, name) for name in counts.__slots__ if getattr(counts, name)}

    def take(self, *events: object) -> list[Event]:
        made = [each for event in events for each in self.mapper.map(event)]  # type: ignore[arg-type]
        self.follower.apply(made)
        if isinstance(self.mapper, KeyMapper):
            self.mapper.check()
        return made

    def depth(self, prompt: Sequence[int], tier: Tier = DEVICE, block_size: int = B, **salt: str) -> int:
        """Leading blocks of a prompt that are held."""
        held = [(tier, key) in self.follower.held for key in keys(prompt, block_size, **salt)]
        return held.index(False) if False in held else len(held)


# What real servers sent.


def batches(name: str) -> list[ForeignBatch]:
    return [decode_foreign(message.payload) for message in capture(name) if message.payload]


@pytest.mark.parametrize("name", ["vllm-0.32-int/live", "vllm-0.32-bytes-cbor/live"])
@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 24])
def test_a_captured_vllm_server_holds_the_prompts_that_it_was_sent(name: str, block_size: int) -> None:
    """In integers or bytes, in blocks of ours of any size: the prompts of the capture match as far as its whole blocks
    of 32 go, until they are evicted; nothing else does."""
    known = Known(KeyMapper(MODEL, block_size))
    hundred = [*range(100, 200)]
    long_one = [*range(1000, 1050)] * 4
    captured = batches(name)
    expected = 96 // block_size

    def depth(prompt: Sequence[int], tenant: str = "") -> int:
        return known.depth(prompt, block_size=block_size, tenant=tenant)

    known.take(*captured[0].events)
    assert depth(hundred) == expected
    assert depth([*hundred[:95], 0]) == 95 // block_size
    known.take(*(event for batch in captured[1:4] for event in batch.events))
    assert depth([*hundred[:96], *[7, 8, 9] * 11][:128]) == 128 // block_size  # the branch of batch 2
    assert depth(hundred, tenant="tenant-1") == 64 // block_size  # batch 3: the same tokens under a cache salt
    known.take(*(event for batch in captured[4:6] for event in batch.events))
    assert depth(long_one) == 192 // block_size
    known.take(*(event for batch in captured[6:10] for event in batch.events))
    assert depth(hundred) == depth(hundred, tenant="tenant-1") == 0  # evicted, tail first
    known.take(*(event for batch in captured[10:12] for event in batch.events))
    assert depth(long_one) == 0
    known.take(*captured[12].events)  # cleared, and the first prompt again
    assert known.follower.held == {(DEVICE, key) for key in keys(hundred[:96], block_size)}
    assert not any(
        known.counts.get(reason) for reason in ("conflicts", "orphans", "misfits", "refused", "other_groups")
    )


def test_a_captured_sglang_server_holds_the_prompts_that_it_was_sent() -> None:
    """Signed hashes, a cache salt as a field of its own, many removals in one event."""
    known = Known(KeyMapper(MODEL, 16))
    prompt = [*range(100, 196)]
    captured = batches("sglang-0.5.23-default/live")
    known.take(*(event for batch in captured[:4] for event in batch.events))
    assert known.depth(prompt, block_size=16) == 6
    assert known.depth([*prompt[:48], *[7] * 32], block_size=16) == 5
    assert known.depth(prompt, block_size=16, tenant="tenant-1") == 2
    assert known.depth([5] * 32, block_size=16) == 2
    known.take(*captured[4].events)
    assert known.depth(prompt, block_size=16) == 3
    known.take(*captured[5].events)
    assert not known.follower.held


# The traps.


def test_trap_1_of_a_hybrid_models_tokens_and_blocks_that_do_not_fit_none_is_mapped() -> None:
    """Tokens may span more than the blocks: which are whose cannot be told. It is counted; a tool that looks at hashes
    alone shows them all the same."""
    known, hashes = Known(), Known(IdentityMapper())
    spanning = stored([1, 2])._replace(token_ids=np.arange(5 * B, dtype=np.uint32))
    for event in (spanning, stored([3])._replace(block_size=0), stored([])._replace(token_ids=np.zeros(3, np.uint32))):
        assert known.take(event) == []
    assert known.counts == {"misfits": 3}
    assert len(hashes.take(spanning)) == 1
    assert hashes.follower.held == {(DEVICE, 1), (DEVICE, 2)}


def test_trap_2_only_groups_of_full_attention_count() -> None:
    """A group's kind is learned from its stores: the full-attention one may be number 2. A removal tells but the
    number, and one from another group, of the very same hash, removes nothing."""
    known = Known()
    known.take(
        stored([1, 2], group_idx=0, spec_kind="sliding_window"),
        stored([1, 2], group_idx=1, spec_kind="mamba"),
        stored([1, 2], group_idx=2, spec_kind="full_attention"),
        removed(1, 2, group_idx=0),
        removed(2, group_idx=1),
    )
    assert known.depth(range(8)) == 2
    known.take(removed(2, group_idx=2))
    assert known.depth(range(8)) == 1
    assert known.counts["other_groups"] == 2


@pytest.mark.parametrize("kind", ["full_attention", "mla_attention", "sink_full_attention", "unknown", None])
def test_trap_2_kinds_that_a_prefix_needs_whole_count(kind: str | None) -> None:
    """So do those that are not told."""
    known = Known()
    known.take(stored([1], group_idx=0, spec_kind=kind))
    assert known.depth(range(4)) == 1


@pytest.mark.parametrize("kind", ["sliding_window", "chunked_local_attention", "cross_attention", "of a later release"])
def test_trap_2_other_kinds_do_not_count(kind: str) -> None:
    """Neither does one that is not known: to claim too little is safe."""
    known = Known()
    assert known.take(stored([1], group_idx=0, spec_kind=kind)) == []


def test_trap_2_a_removal_from_a_group_never_heard_of_counts() -> None:
    """As for a router that joined late: nothing is claimed that may be gone. Groups are remembered within a bound."""
    known = Known()
    known.take(stored([1, 2]), removed(2, group_idx=9))
    assert known.depth(range(8)) == 1
    known.take(*(stored([1], group_idx=number, spec_kind="mamba") for number in range(MAX_GROUPS + 1)))
    known.take(removed(1, group_idx=MAX_GROUPS - 1))
    assert known.depth(range(8)) == 1
    known.take(removed(1, group_idx=MAX_GROUPS))
    assert known.depth(range(8)) == 0


def test_trap_3_a_clear_comes_late_and_in_order() -> None:
    """It comes with the next step, before that step's stores, in one batch: what follows it is held."""
    known = Known()
    known.take(stored([1, 2]))
    made = known.take(ForeignCleared(), stored([1]))
    assert [type(event) for event in made] == [AllBlocksCleared, BlockStored]
    assert known.depth(range(8)) == 1


def test_trap_4_a_block_stored_twice_is_gone_with_the_first_removal() -> None:
    """Two equal prompts at once store the same hash twice, and each eviction sends a removal: to count them, or not to,
    goes wrong somewhere. A removed block is taken for gone, which can only claim too little."""
    known = Known()
    known.take(stored([1, 2]), stored([1, 2]))
    assert known.take(removed(2))
    assert known.depth(range(8)) == 1
    assert known.take(removed(2)) == []


def test_trap_4_hits_that_are_announced_again_change_nothing() -> None:
    """And bring back what was taken for gone."""
    known = Known()
    known.take(stored([1, 2]), stored([1, 2]))
    assert known.take(stored([1]), stored([2], B, parent=1)) == []
    known.take(removed(2))
    known.take(stored([1, 2]))
    assert known.depth(range(8)) == 2
    assert known.counts["repeated"] == 5


@pytest.mark.parametrize(
    "events", [[removed(3), removed(2)], [removed(3, 2)], [removed(2, 3)], [removed(2), removed(3)]]
)
def test_trap_5_removals_come_one_by_one_or_many_at_once(events: list[ForeignRemoved]) -> None:
    """vLLM sends one a hash, tail first; SGLang packs many; the order does not matter."""
    known = Known()
    known.take(stored([1, 2, 3]))
    known.take(*events)
    assert known.depth(range(12)) == 1
    assert known.follower.held == {(DEVICE, keys(range(4))[0])}


def test_trap_6_copies_in_another_tier_are_told_without_tokens() -> None:
    """A known block is held there, too, until it is removed there, whatever becomes of it on the device."""
    known = Known()
    known.take(stored([1, 2]), ForeignStored((1, 2), medium="CPU"), removed(2), removed(1))
    assert known.depth(range(8)) == 0
    assert known.depth(range(8), HOST) == 2
    known.take(removed(2, medium="CPU"), ForeignStored((1,), medium="STORAGE"))
    assert known.depth(range(8), HOST) == 1
    assert known.depth(range(8), DISK) == 1


def test_trap_6_a_copy_of_a_block_that_is_gone_is_understood() -> None:
    """It was evicted from the device, and then told to be on the host: its tokens are still known."""
    known = Known()
    known.take(stored([1, 2]), removed(2), removed(1), ForeignStored((2, 1), medium="CPU"))
    assert known.depth(range(8), HOST) == 2


def test_trap_6_a_copy_of_an_unknown_block_waits_for_its_tokens() -> None:
    """Which may come with a store on the device, or not at all."""
    known = Known()
    assert known.take(ForeignStored((1, 2, 3), medium="CPU"), removed(3, medium="CPU")) == []
    assert known.counts["untold"] == 3
    known.take(stored([1, 2, 3]))
    assert (known.depth(range(12)), known.depth(range(12), HOST)) == (3, 2)


def test_trap_6_a_tier_may_be_told_with_tokens() -> None:
    """As it is in the tier's own words."""
    known = Known()
    known.take(stored([1, 2], medium="CPU_PINNED"))
    assert (known.depth(range(8)), known.depth(range(8), HOST)) == (0, 2)


# Adapters, salts, images.


def test_an_adapters_blocks_are_those_of_its_prompts() -> None:
    """By name, by number where no name is told, or as the URL says where neither is."""
    known = Known(KeyMapper(MODEL, B, adapter="base"))
    known.take(
        stored([1], lora_id=7, lora_name="sql", extra_keys=(("sql",),)),
        stored([2], lora_id=8, extra_keys=((8,),)),
        stored([3]),
    )
    assert [known.depth(range(4), adapter=name) for name in ("sql", "8", "base", "", "7")] == [1, 1, 1, 0, 0]


def test_a_cache_salt_is_a_tenant() -> None:
    """vLLM tells it in the first block's extra keys, behind the adapter's name; SGLang in a field. What follows the
    first block is the tenant's, too."""
    known = Known()
    known.take(
        stored([1, 2], extra_keys=(("red",), None)),
        stored([3], 2 * B, parent=2, extra_keys=(None,)),
        stored([11, 12], cache_salt="green"),
        stored([13], 2 * B, parent=12, cache_salt="green"),
        stored([21, 22], lora_name="sql", extra_keys=(("sql", "blue"), ("sql",))),
    )
    assert known.depth(range(12)) == 0
    assert known.depth(range(12), tenant="red") == known.depth(range(12), tenant="green") == 3
    assert known.depth(range(12), adapter="sql", tenant="blue") == 2
    assert "marked" not in known.counts


@pytest.mark.parametrize(
    "extras",
    [
        (("picture", 0),),
        ("salt", ("picture", 0)),
        (b"\x00" * 32,),
        (0.5,),
        ("two", "strings"),
        (None,),
        ("sql", ("picture", 3), "salt"),
    ],
)
def test_blocks_that_depend_on_more_than_tokens_match_no_plain_prompt(extras: tuple[object, ...]) -> None:
    """Images, embeddings and whatever comes: such blocks are held, and counted, under keys of their own, as are all
    that follow them; what comes before them is plain."""
    known = Known()
    made = known.take(stored([1, 2, 3], lora_name="sql", extra_keys=(("sql",), ("sql", *extras), ("sql",))))
    assert sum(len(event.block_hashes) for event in made if isinstance(event, BlockStored)) == 3
    assert known.depth(range(12), adapter="sql") == 1
    tenants = [extra for extra in extras if isinstance(extra, str)]
    held = {key for _, key in known.follower.held}
    for tenant in ["", *tenants]:
        assert not held & set(keys(range(12), adapter="sql", tenant=tenant)[1:])
    assert known.counts["marked"] == 1


def test_the_same_image_makes_the_same_keys() -> None:
    """Another makes others; and the keys go on from block to block as always."""
    other = (("cat", 1),)
    first, same, different = Known(), Known(), Known()
    first.take(stored([1, 2, 3], extra_keys=(None, (("cat", 0),), None)))
    same.take(stored([7, 8], extra_keys=(None, (("cat", 0),))), stored([9], 2 * B, parent=8))
    different.take(stored([1, 2, 3], extra_keys=(None, other, None)))
    assert first.follower.held == same.follower.held
    assert len(first.follower.held & different.follower.held) == 1


def test_a_hash_that_is_told_with_another_adapter_or_salt_is_not_mapped() -> None:
    """Some server's hashes may not depend on them: then nothing is said of whose the block is."""
    known = Known()
    known.take(stored([1]))
    assert known.take(stored([2], B, parent=1, lora_name="sql")) == []
    assert known.take(stored([2], B, parent=1, cache_salt="red")) == []
    known.take(stored([2], B, parent=1))
    assert known.take(stored([3, 2], 100)) != []  # of two blocks the second is known to follow another
    assert known.counts["conflicts"] == 3
    assert known.depth(range(8)) == 2


def test_orphans_of_another_adapter_are_not_adopted() -> None:
    """When their parent turns out to be of another."""
    known = Known()
    known.take(stored([2], B, parent=1, lora_name="sql"), stored([3], 2 * B, parent=2, lora_name="sql"))
    known.take(stored([1]))
    assert (known.depth(range(12)), known.depth(range(12), adapter="sql")) == (1, 0)
    assert known.counts["conflicts"] == 1


def test_adapters_and_tenants_are_remembered_within_a_bound() -> None:
    """More of them cost time, not memory."""
    known = Known()
    for number in range(MAX_REALMS + 10):
        known.take(stored([number], cache_salt=f"tenant {number}"))
    assert len(known.mapper._realms._plain) == MAX_REALMS  # type: ignore[attr-defined]
    assert known.depth(range(4), tenant="tenant 0") == known.depth(range(4), tenant=f"tenant {MAX_REALMS + 9}") == 1


def test_a_fleets_secret_keys_the_blocks() -> None:
    """As it does in its routers."""
    known = Known(KeyMapper(MODEL, B, secret=b"s" * 32))
    known.take(stored([1]))
    assert known.follower.held == {(DEVICE, keys(range(4), secret=b"s" * 32)[0])}


# Gaps, restarts, bounds.


def test_what_hashes_mean_outlives_a_gap() -> None:
    """Nothing counts as held any more; what follows a block that was known is understood."""
    known = Known()
    known.take(stored([1, 2]))
    known.mapper.forget()
    known.follower.held.clear()
    known.take(stored([3], 2 * B, parent=2))
    assert known.follower.held == {(DEVICE, keys(range(12))[2])}
    assert known.counts.get("orphans") is None


def test_of_what_was_known_before_a_gap_the_latest_is_kept() -> None:
    """Within the bound of tombstones, with all that it follows; what waited is gone."""
    known = Known(KeyMapper(MODEL, B, max_tombstones=10))
    known.take(stored(range(1, 9)), stored([77], parent=76), stored(range(11, 19), 100))
    known.mapper.forget()
    known.take()
    known.follower.held.clear()
    known.take(stored([19], 100 + 8 * B, parent=18), stored([9], 8 * B, parent=8), stored([76]))
    assert known.follower.held == {(DEVICE, keys(range(100, 136))[8]), (DEVICE, keys(range(4))[0])}
    assert known.counts["orphans"] == 2


def test_another_process_starts_anew() -> None:
    """Its hashes may mean anything, its groups may be others."""
    known = Known()
    known.take(stored([1], group_idx=0, spec_kind="mamba"), stored([1]))
    known.mapper.reset()
    known.follower.held.clear()
    known.take(stored([2], B, parent=1), removed(7, group_idx=0))
    assert not known.follower.held
    assert known.counts["orphans"] == 1
    known.take(stored([1], 100, group_idx=0))
    assert known.depth([*range(100, 104), *range(4, 8)]) == 2


def test_tombstones_are_bounded_and_the_oldest_go_first() -> None:
    """A parent that was evicted long ago is not known any more."""
    known = Known(KeyMapper(MODEL, B, max_tombstones=10))
    for number in range(100):
        known.take(stored([number], number * B), removed(number))
    forest = known.mapper._forest  # type: ignore[attr-defined]
    assert len(forest.nodes) == 10
    assert known.take(stored([1000], parent=99)) != []
    assert known.take(stored([1001], parent=0)) == []


def test_stores_beyond_the_bound_are_refused_and_counted() -> None:
    """What is held stays, is told again and goes; then there is room."""
    known = Known(KeyMapper(MODEL, B, max_entries=20))
    known.take(*(stored([number], number * B) for number in range(30)))
    assert len(known.follower.held) == 9
    assert known.counts["refused"] == 21
    assert known.take(stored([0])) == []
    assert known.counts["refused"] == 21
    known.take(removed(*range(30)))
    known.take(stored([50, 51, 52]))
    assert known.depth(range(12)) == 3


def test_what_waits_for_parents_is_bounded_in_blocks_and_in_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest goes first, with all that waits for it."""
    monkeypatch.setattr("kv_events.foreign.mapper.MAX_WAITING_TOKENS", 1000)
    known = Known(KeyMapper(MODEL, B, max_waiting=10))
    for number in range(100):
        known.take(stored([10 * number + 2, 10 * number + 3], B, parent=10 * number + 1))
    forest = known.mapper._forest  # type: ignore[attr-defined]
    assert len(forest.waiting) <= 10
    known.take(stored([991]), stored([11]))
    assert known.depth(range(12)) == 3
    roomy = Known(KeyMapper(MODEL, B))
    for number in range(100):
        tokens = np.zeros(400, np.uint32)
        roomy.take(ForeignStored((10 * number,), 10 * number + 1, tokens, 400))
    assert len(roomy.mapper._forest.waiting) <= 6  # type: ignore[attr-defined]
    assert roomy.counts["dropped"] >= 190


def test_parents_in_a_circle_wait_for_ever_and_do_no_harm() -> None:
    """Only made-up events have them."""
    known = Known(KeyMapper(MODEL, B, max_waiting=4))
    circle = [*pairwise([1, 2, 3, 1]), (5, 5), (6, 7)]
    for parent, child in circle:
        known.take(stored([child], parent=parent))
    known.take(stored([8, 8]), stored([9, 8, 9]), removed(1, 2, 3, 5, 6, 7))
    assert not known.depth(range(100, 104))
    known.take(stored([1, 2, 3]), removed(3, 2, 1), ForeignCleared())
    assert not known.follower.held


def test_blocks_on_another_host_are_not_the_servers() -> None:
    """Nor are removals there."""
    known = Known()
    assert known.take(stored([1], locality="REMOTE")) == []
    known.take(stored([1], locality="LOCAL"))
    assert known.take(removed(1, locality="REMOTE")) == []
    assert known.depth(range(4)) == 1
    assert known.counts["remote"] == 1


def test_kinds_of_events_that_are_not_known_are_counted() -> None:
    """They change nothing."""
    known = Known()
    assert known.take(ForeignUnknown("BlockMoved")) == []
    assert known.counts == {"unknown": 1}


def test_two_blocks_of_theirs_may_hold_one_of_ours() -> None:
    """Blocks of 8 that differ in their second half share a block of ours of 4: it is held until both are gone."""
    known = Known()
    first, second = [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 9, 9, 9, 9]
    known.take(
        ForeignStored((1,), None, np.array(first, np.uint32), 8),
        ForeignStored((2,), None, np.array(second, np.uint32), 8),
    )
    assert known.counts["shared"] == 1
    assert known.take(removed(1))[0].block_hashes.tolist() == keys(first)[1:]  # type: ignore[union-attr]
    assert (known.depth(first), known.depth(second)) == (1, 2)
    known.take(removed(2))
    assert not known.follower.held


def test_our_block_size_has_limits() -> None:
    """Of the wire."""
    for wrong in (0, -1, 2**20 + 1):
        with pytest.raises(ValueError, match="block_size"):
            KeyMapper(MODEL, wrong)


def test_events_name_our_block_size_and_no_tokens() -> None:
    """Prompts go no further than here."""
    (event,) = Known(KeyMapper(MODEL, 2)).take(stored([1]))
    assert isinstance(event, BlockStored)
    assert (event.block_size, event.token_ids, event.medium) == (2, None, "GPU")
    assert isinstance(Known().take(stored([1]), removed(1))[1], BlockRemoved)
