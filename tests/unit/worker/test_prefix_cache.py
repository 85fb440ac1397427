"""Finding, listing and forgetting prefix blocks."""

import numpy as np

from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored
from radix.hashing import BlockHasher, derive_salt
from worker.prefix_cache import CachedBlock, PrefixCache, hash_of, pack

HASHER = BlockHasher(4, derive_salt("m"))


def keys_of(tokens: list[int]) -> list[bytes]:
    data = HASHER.keys(np.array(tokens, np.uint32)).tobytes()
    return [data[at : at + 16] for at in range(0, len(data), 16)]


def chain(keys: list[bytes], tokens: list[int]) -> list[CachedBlock]:
    """The contents of a prompt's full blocks under these keys."""
    contents: list[CachedBlock] = []
    for index, key in enumerate(keys):
        packed = pack(tokens[index * 4 : index * 4 + 4])
        contents.append(CachedBlock(key, packed, contents[-1] if contents else None))
    return contents


def look(cache: PrefixCache, keys: list[bytes], tokens: list[int]) -> list[int]:
    return cache.lookup(chain(keys, tokens))


def fill(cache: PrefixCache, tokens: list[int], keys: list[bytes] | None = None) -> list[int]:
    """Allocate and list the full blocks of a prompt, under its own keys or under made-up ones; they stay in use."""
    blocks = []
    for content in chain(keys or keys_of(tokens), tokens):
        blocks.append(cache.pool.allocate())
        cache.insert(blocks[-1], content)
    return blocks


def test_the_longest_held_prefix_is_found() -> None:
    """A prompt that shares two of three blocks finds these two, in order."""
    cache = PrefixCache(8, 4)
    blocks = fill(cache, list(range(12)))
    other = [*range(8), 99, 98, 97, 96]
    assert look(cache, keys_of(other), other) == blocks[:2]


def test_a_block_with_other_tokens_is_not_reused_even_under_an_equal_key() -> None:
    """A forged or colliding key must not mix contents."""
    cache = PrefixCache(8, 4)
    fill(cache, list(range(8)))
    assert look(cache, keys_of(list(range(8))), [0, 1, 2, 3, 50, 51, 52, 53]) == [
        look(cache, keys_of(list(range(4))), list(range(4)))[0]
    ]
    assert look(cache, keys_of(list(range(8))), [50, 51, 52, 53, 4, 5, 6, 7]) == []


def test_of_two_blocks_under_one_key_the_second_stays_uncached() -> None:
    """It is counted, found by nobody, free when its user ends, and no event names it; the first is found as before."""
    cache = PrefixCache(8, 4)
    first, second = [1, 2, 3, 4], [5, 6, 7, 8]
    key = keys_of(first)
    cached = fill(cache, first)
    cache.take_events()
    planted = fill(cache, second, key)
    assert cache.take_events() == ()
    assert cache.collisions == 1
    assert look(cache, key, second) == []
    assert look(cache, key, first) == cached
    cache.pool.release(planted)
    assert (cache.pool.in_use, cache.pool.idle, cache.pool.available) == (1, 0, 7)
    cache.check()


def test_of_two_keys_that_share_their_low_half_the_second_stays_uncached() -> None:
    """Events know the low half alone: a hash stands for one block, so that log and tree stay in step."""
    cache = PrefixCache(8, 4)
    tokens = [1, 2, 3, 4]
    (key,) = keys_of(tokens)
    cached = fill(cache, tokens)
    other = [key[:8] + b"another!"]
    cache.take_events()
    fill(cache, [5, 6, 7, 8], other)
    fill(cache, tokens, other)
    assert cache.collisions == 2
    assert cache.take_events() == ()
    assert look(cache, other, tokens) == []
    assert look(cache, [key], tokens) == cached
    cache.check()


def test_what_follows_a_colliding_block_is_not_reused_after_its_twin() -> None:
    """Keys that collide once agree ever after, and so may tokens; the contents still follow different prefixes."""
    cache = PrefixCache(8, 4)
    first, second = [1, 2, 3, 4], [5, 6, 7, 8]
    tail = [9, 9, 9, 9]
    keys = keys_of(first + tail)
    cached = fill(cache, first)
    fill(cache, second + tail, keys)
    assert look(cache, keys, first + tail) == cached
    assert look(cache, keys, second + tail) == []
    third = fill(cache, first + tail, keys)
    assert cache.collisions == 2, "the tail after the second prefix keeps its key"
    cache.pool.release(third)
    cache.check()


def test_what_an_evicted_block_left_behind_is_not_reused_after_its_twin() -> None:
    """The tail outlives its prefix; another prefix comes under the same key; the tail is still that of the first."""
    cache = PrefixCache(3, 4)
    first, second = [1, 2, 3, 4], [5, 6, 7, 8]
    tail = [9, 9, 9, 9]
    keys = keys_of(first + tail)
    head, rest = fill(cache, first + tail)
    cache.pool.release([head, rest])
    for _ in range(2):
        cache.pool.allocate()  # the free one, then the head
    cache.pool.release([head])
    planted = fill(cache, second, keys[:1])
    assert look(cache, keys, second + tail) == planted
    assert look(cache, keys, first + tail) == []


def test_what_an_evicted_block_left_behind_is_found_when_that_is_computed_again() -> None:
    """The same tokens all the way up: whose computation it was does not matter."""
    cache = PrefixCache(4, 4)
    tokens = list(range(12))
    blocks = fill(cache, tokens)
    cache.pool.release(blocks)
    for _ in range(3):
        cache.pool.allocate()  # the free one, then the first two
    cache.pool.release(blocks[:2])
    again = fill(cache, tokens[:8])
    assert look(cache, keys_of(tokens), tokens) == [*again, blocks[2]]
    assert cache.collisions == 0
    cache.check()


def test_blocks_of_a_chain_share_an_event_and_a_fork_starts_a_new_one() -> None:
    """One BlockStored names a whole run of blocks and the block before it."""
    cache = PrefixCache(8, 4)
    fill(cache, list(range(12)))
    (stored,) = cache.take_events()
    assert isinstance(stored, BlockStored)
    hashes = [hash_of(key) for key in keys_of(list(range(12)))]
    assert stored.block_hashes.tolist() == hashes
    assert stored.parent_hash == 0
    fill(cache, [7, 7, 7, 7])
    (stored,) = cache.take_events()
    assert isinstance(stored, BlockStored)
    assert stored.parent_hash == 0
    assert cache.take_events() == ()


def test_events_tell_tokens_only_where_they_are_asked_for() -> None:
    """Prompts stay here by default; else each event has the tokens of all its blocks, in order."""
    tokens = [*range(11), 2**32 - 1]
    for include in (False, True):
        cache = PrefixCache(8, 4, include_token_ids=include)
        fill(cache, tokens)
        fill(cache, [*tokens[:4], 7, 7, 7, 7])
        cache.pool.release([fill(cache, [8, 8, 8, 8])[0]])
        events = cache.take_events()
        told = [event.token_ids for event in events if isinstance(event, BlockStored)]
        assert len(told) == len(events) == 3
        if include:
            assert [each.tolist() for each in told if each is not None] == [tokens, [7] * 4, [8] * 4]
            assert all(each is not None and each.dtype == np.uint32 for each in told)
        else:
            assert told == [None] * 3


def test_eviction_takes_the_tail_first_and_says_so() -> None:
    """Blocks released tail first are evicted tail first, so a prefix outlives what follows it."""
    cache = PrefixCache(3, 4)
    tokens = list(range(12))
    blocks = fill(cache, tokens)
    cache.take_events()
    cache.pool.release(reversed(blocks))
    cache.pool.allocate()
    (removed,) = cache.take_events()
    assert isinstance(removed, BlockRemoved)
    assert removed.block_hashes.tolist() == [hash_of(keys_of(tokens)[2])]
    assert look(cache, keys_of(tokens), tokens) == blocks[:2]
    cache.check()


def test_blocks_evicted_one_after_the_other_share_an_event() -> None:
    """One BlockRemoved names them all, in order."""
    cache = PrefixCache(3, 4)
    cache.pool.release(reversed(fill(cache, list(range(12)))))
    cache.take_events()
    for _ in range(3):
        cache.pool.allocate()
    (removed,) = cache.take_events()
    assert isinstance(removed, BlockRemoved)
    assert removed.block_hashes.tolist() == [hash_of(key) for key in reversed(keys_of(list(range(12))))]


def test_a_second_block_of_the_same_content_stays_unlisted() -> None:
    """Two equal prompts at once store each key once; the twin is free again when its user ends."""
    cache = PrefixCache(8, 4)
    first = fill(cache, list(range(4)))
    second = fill(cache, list(range(4)))
    assert len(cache.take_events()) == 1
    cache.pool.release(second)
    assert cache.pool.idle == 0
    cache.pool.release(first)
    assert cache.pool.idle == 1
    cache.check()


def test_clearing_forgets_everything_but_leaves_blocks_to_their_users() -> None:
    """After a clear nothing is found; a block in use is free once its user ends."""
    cache = PrefixCache(8, 4)
    used = fill(cache, list(range(8)))
    idle = fill(cache, [9] * 4)
    cache.pool.release(idle)
    cache.take_events()
    assert cache.clear() == 3
    assert cache.take_events() == (AllBlocksCleared(),)
    assert look(cache, keys_of(list(range(8))), list(range(8))) == []
    assert cache.pool.in_use == 2
    cache.pool.release(used)
    assert (cache.pool.in_use, cache.pool.idle, cache.pool.available) == (0, 0, 8)
    cache.check()
