"""Block keys: what shares them, what never does, and their fixed values, by every kernel that runs here."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from radix import hashing, siphash
from radix.backend import native
from radix.hashing import MAX_BLOCK_SIZE, MAX_TOKEN_ID, BlockHasher, as_tokens, derive_salt
from radix.keys import BlockKeys, hashes_of, keys_from_bytes

SALT = derive_salt("model")
SECRET = b"a fleet's secret"
TOKENS = st.lists(st.integers(0, MAX_TOKEN_ID), max_size=60)
WORD = st.integers(0, 2**64 - 1)
OFFICIAL_KEY = (0x0706050403020100, 0x0F0E0D0C0B0A0908)
OFFICIAL_VECTORS = {  # of the authors' reference code (vectors_sip128): by length, of the bytes 0, 1, 2 ...
    0: "a3817f04ba25a8e66df67214c7550293",
    1: "da87c1d86b99af44347659119b22fc45",
    2: "8177228da4a45dc7fca38bdef60affe4",
    3: "9c70b60c5267a94e5f33b6b02985ed51",
    8: "3b62a9ba6258f5610f83e264f31497b4",
    15: "5493e99933b0a8117e08ec0f97cfc3d9",
    24: "2db479ae78bd50d8882a8a178a6132ad",
    32: "7c3956ca5eeafc3e363e9d556546eb68",
    40: "df6a301e95c95dad97ae0cc8c6913bd8",
    48: "f7e5aef549f782cf379055a608269b16",
    56: "1938f2cf72d54ee97e94166fa91d2a36",
    63: "5150d1772f50834a503e069a973fbd7c",
}

BlockKeysFunction: TypeAlias = Callable[..., BlockKeys]
KERNELS = [pytest.param(siphash.block_keys, id="reference")]
if native is not None:  # the widest that this machine has, and those that narrower machines run
    KERNELS += [pytest.param(partial(native.block_keys, lanes=lanes), id=f"native-{lanes}") for lanes in (8, 4, 2)]


@pytest.fixture(params=["reference"] if native is None else ["native", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a BlockHasher runs on."""
    if request.param == "reference":
        monkeypatch.setattr(hashing, "native", None)


both_backends = pytest.mark.usefixtures("backend")
within_fixture = partial(settings, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@both_backends
def test_the_values_are_fixed() -> None:
    """Keys are part of the contract between processes and releases: these never change."""
    assert derive_salt("m", "a", "t").hex() == "74e4735c76291dcb6fba3745552a7492a1c0214aed526646372388a53c2928bf"
    keys = BlockHasher(4, derive_salt("m")).keys(range(1, 10))
    assert keys.astype("<u8").tobytes().hex() == "9b1366ac7bdc62ac8028cb42ce09c144c538b664dfe0dc0029035a00ba97a608"
    keys = BlockHasher(16, derive_salt("m"), SECRET).keys(range(1, 34))
    assert keys.astype("<u8").tobytes().hex() == "981392b98aff07a59e31d977e526ce68b6148214847051b0db653a27f8e13bbb"


@pytest.mark.parametrize("length", OFFICIAL_VECTORS)
def test_the_hash_is_siphash_2_4_128(length: int) -> None:
    """The authors' own test vectors."""
    assert siphash.siphash128(bytes(range(length)), *OFFICIAL_KEY).hex() == OFFICIAL_VECTORS[length]


@pytest.mark.parametrize("block_keys", KERNELS)
@pytest.mark.parametrize("length", [24, 32, 40, 48, 56])
def test_each_kernel_computes_the_official_vectors(block_keys: BlockKeysFunction, length: int) -> None:
    """A message of the vectors is a block of tokens, and the key before it as its last 16 bytes."""
    message = bytes(range(length))
    tokens = np.frombuffer(message[:-16], np.uint32)
    keys = block_keys(tokens, len(tokens), *OFFICIAL_KEY, np.frombuffer(message[-16:], np.uint64))
    assert keys.tobytes().hex() == OFFICIAL_VECTORS[length]


@both_backends
def test_a_key_is_the_keyed_hash_that_is_documented() -> None:
    """Tokens as little-endian uint32, zeros up to 8 bytes, the key before; each key's low half is the block hash."""
    tokens = [1, 2**32 - 1, 70_000, 4, 5, 6]
    key_low, key_high = 2**63 + 5, 7
    data = np.array(tokens, "<u4").tobytes()
    first = siphash.siphash128(data[:12] + bytes(4) + bytes(16), key_low, key_high)
    second = siphash.siphash128(data[12:] + bytes(4) + first, key_low, key_high)
    keys = (hashing.native or siphash).block_keys(as_tokens(tokens), 3, key_low, key_high, None)
    assert keys.tobytes() == keys_from_bytes(first + second).tobytes()
    assert keys.dtype == np.uint64
    assert keys.flags.c_contiguous
    assert hashes_of(keys).tolist() == [int.from_bytes(key[:8], "little") for key in (first, second)]


@pytest.mark.parametrize("block_keys", KERNELS[1:])
@settings(max_examples=200, deadline=None)
@given(data=st.data(), block_size=st.integers(1, 40), blocks=st.integers(0, 35), key=st.tuples(WORD, WORD))
def test_each_kernel_equals_the_reference(
    block_keys: BlockKeysFunction, data: st.DataObject, block_size: int, blocks: int, key: tuple[int, int]
) -> None:
    """For any block size, number of blocks (so every fill of the lanes), tail and parent."""
    size = blocks * block_size + data.draw(st.integers(0, block_size - 1))
    tokens = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 2**32, size, np.uint32)
    parent = data.draw(st.none() | st.tuples(WORD, WORD).map(lambda words: np.array(words, np.uint64)))
    expected = siphash.block_keys(tokens, block_size, *key, parent)
    assert block_keys(tokens, block_size, *key, parent).tolist() == expected.tolist()


@pytest.mark.parametrize("block_keys", KERNELS)
@pytest.mark.parametrize("block_size", [1, 16])
def test_prompts_that_are_hashed_at_once_get_their_own_keys(block_keys: BlockKeysFunction, block_size: int) -> None:
    """Long calls let other threads run; each still gets what it gets alone."""
    prompts = [np.arange(start, start + 1500 * block_size, dtype=np.uint32) for start in range(4)]
    alone = [block_keys(prompt, block_size, 1, 2, None).tobytes() for prompt in prompts]
    together: dict[int, bytes] = {}

    def hash_prompt(index: int) -> None:
        together[index] = block_keys(prompts[index], block_size, 1, 2, None).tobytes()

    threads = [threading.Thread(target=hash_prompt, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[index] for index in range(4)] == alone
    assert len(set(alone)) == 4


@both_backends
@within_fixture()
@given(tokens=TOKENS, block_size=st.integers(1, 7), cut=st.integers(0, 10))
def test_hashing_in_steps_equals_hashing_at_once(tokens: list[int], block_size: int, cut: int) -> None:
    """A conversation that grows by whole blocks gets the keys of the whole."""
    hasher = BlockHasher(block_size, SALT, SECRET)
    whole = hasher.keys(tokens)
    assert whole.shape == (len(tokens) // block_size, 2), "a tail has no key"
    cut = min(cut, len(whole))
    head = hasher.keys(tokens[: cut * block_size])
    tail = hasher.keys(tokens[cut * block_size :], parent=head[-1] if cut else None)
    assert np.concatenate([head, tail]).tolist() == whole.tolist()


@both_backends
@within_fixture()
@given(tokens=st.lists(st.integers(0, 5), min_size=1, max_size=40), at=st.integers(0, 39))
def test_a_change_changes_its_block_and_all_after_it(tokens: list[int], at: int) -> None:
    """A key names the whole prefix: keys before the change stay, none after it does."""
    at %= len(tokens)
    changed = [*tokens[:at], tokens[at] + 1, *tokens[at + 1 :]]
    before, after = (BlockHasher(4, SALT).keys(each) for each in (tokens, changed))
    assert before[: at // 4].tolist() == after[: at // 4].tolist()
    assert not {*map(tuple, before[at // 4 :].tolist())} & {*map(tuple, after[at // 4 :].tolist())}


@both_backends
def test_model_adapter_and_tenant_separate_keys() -> None:
    """No two of these salts agree, also where the parts run together to the same text."""
    parts = [("m",), ("m", "a"), ("m", "", "a"), ("ma",), ("", "m"), ("m", "a", "t"), ("m", "at"), ("mat",), ("",)]
    salts = {derive_salt(*part) for part in parts}
    assert len(salts) == len(parts)
    keys = {BlockHasher(4, salt).keys(range(4)).tobytes() for salt in salts}
    assert len(keys) == len(parts)


@both_backends
def test_secrets_separate_keys() -> None:
    """Whoever lacks the fleet's secret computes other keys; one of any length counts to its last byte."""
    secrets = [b"", b"a" * 16, b"a" * 64, b"a" * 65, b"a" * 99 + b"b", b"a" * 100]
    keys = {BlockHasher(4, SALT, secret).keys(range(4)).tobytes() for secret in secrets}
    assert len(keys) == len(secrets)


@both_backends
def test_a_block_size_does_not_share_keys_with_another() -> None:
    """Blocks of 4 and of 8 tokens have different keys for the same prompt, and so have 3 tokens and 4 with a zero."""
    of_4, of_8 = (hashes_of(BlockHasher(size, SALT).keys(range(16))) for size in (4, 8))
    assert not set(of_4.tolist()) & set(of_8.tolist())
    assert BlockHasher(3, SALT).keys([1, 2, 3]).tolist() != BlockHasher(4, SALT).keys([1, 2, 3, 0]).tolist()


@both_backends
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint32, np.int64, np.uint64, ">u4", "<u4"])
def test_any_integer_type_gives_the_same_keys(dtype: str) -> None:
    """Lists, tuples, ranges, and arrays of any byte order, width and stride."""
    hasher = BlockHasher(4, SALT)
    expected = hasher.keys(range(0, 40, 2)).tolist()
    assert hasher.keys(np.arange(40).astype(dtype)[::2]).tolist() == expected
    assert hasher.keys(np.arange(0, 40, 2).astype(dtype)).tolist() == expected
    assert hasher.keys(list(range(0, 40, 2))).tolist() == expected
    assert hasher.keys(tuple(range(0, 40, 2))).tolist() == expected
    assert hasher.keys([np.int64(each) for each in range(0, 40, 2)]).tolist() == expected


@both_backends
@pytest.mark.parametrize(
    ("tokens", "error", "text"),
    [
        ([1, -1], ValueError, "-1 to 1: 0 to 4294967295"),
        ([2**32], ValueError, "4294967296"),
        ((0, 2**40), ValueError, "1099511627776"),
        ([2**64], TypeError, "integers from 0 to"),
        ([1, 2.5], TypeError, "float64"),
        (["a"], TypeError, "integers"),
        ([True], TypeError, "bool"),
        ([[1, 2]], ValueError, "one dimension"),
        (np.zeros((2, 2), np.uint32), ValueError, "one dimension"),
        (3, ValueError, "one dimension"),
        (None, ValueError, "one dimension"),
    ],
)
def test_what_is_not_a_token_is_refused(tokens: object, error: type[Exception], text: str) -> None:
    """The error names the value and the limit."""
    with pytest.raises(error, match=text):
        BlockHasher(1, SALT).keys(tokens)


@both_backends
@pytest.mark.parametrize("tokens", [[], (), range(0), np.zeros(0), np.zeros(0, np.uint32)])
def test_no_tokens_have_no_keys(tokens: object) -> None:
    """Shape (0, 2)."""
    assert as_tokens(tokens).dtype == np.uint32
    assert BlockHasher(1, SALT).keys(tokens).shape == (0, 2)


@both_backends
@pytest.mark.parametrize(
    ("parent", "error"),
    [
        (b"0" * 16, TypeError),
        (np.zeros(2), TypeError),
        (np.zeros(2, np.int64), TypeError),
        (np.zeros((1, 2), np.uint64), TypeError),
        (np.zeros(3, np.uint64), ValueError),
    ],
)
def test_what_is_not_a_parent_key_is_refused(parent: object, error: type[Exception]) -> None:
    """A parent is one key, shape (2,)."""
    with pytest.raises(error, match="parent"):
        BlockHasher(1, SALT).keys([1], parent=parent)


@pytest.mark.parametrize("block_keys", KERNELS)
def test_a_kernel_takes_nothing_else_than_its_arrays(block_keys: BlockKeysFunction) -> None:
    """It converts nothing, and a block size of 0 would divide by it."""
    with pytest.raises(TypeError, match="tokens is list: a one-dimensional array of uint32 is needed"):
        block_keys([1], 1, 1, 2, None)
    with pytest.raises(TypeError, match=r"tokens is int64 \(1,\)"):
        block_keys(np.zeros(1, np.int64), 1, 1, 2, None)
    with pytest.raises(ValueError, match="block_size is 0"):
        block_keys(np.zeros(1, np.uint32), 0, 1, 2, None)


@both_backends
def test_block_size_and_salt_are_checked() -> None:
    """A hasher cannot be made with a size or a salt that means nothing; one larger than any prompt gives no key."""
    with pytest.raises(ValueError, match="block_size is 0: at least 1"):
        BlockHasher(0, SALT)
    with pytest.raises(ValueError, match="block_size is 4294967296: .* at most 4294967295"):
        BlockHasher(2**32, SALT)
    with pytest.raises(ValueError, match="salt has 3 bytes: 32"):
        BlockHasher(16, b"abc")
    assert BlockHasher(MAX_BLOCK_SIZE, SALT).keys(range(9)).shape == (0, 2)


def test_a_hash_of_zero_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 stands for the root, so a key whose low half would be 0 gets 1 there, and the chain goes on from that."""
    absorbed: list[int] = []

    def absorb(state: siphash.State, word: int) -> siphash.State:
        absorbed.append(word)
        return state

    monkeypatch.setattr(siphash, "_absorb", absorb)
    monkeypatch.setattr(siphash, "_finish", lambda state: (0, 77))
    keys = siphash.block_keys(np.array([5, 6], np.uint32), 1, 1, 2)
    assert keys.tolist() == [[1, 77], [1, 77]]
    assert absorbed[1:3] == [0, 0], "the root, before the first block"
    assert absorbed[4:6] == [1, 77]


def test_torn_keys_are_refused() -> None:
    """Keys come in 16 bytes each."""
    with pytest.raises(ValueError, match="16 bytes each, not 17"):
        keys_from_bytes(bytes(17))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 4).flatmap(lambda keys: st.binary(min_size=16 * keys, max_size=16 * keys)))
def test_keys_survive_their_wire_form(data: bytes) -> None:
    """bytes -> keys -> bytes."""
    assert keys_from_bytes(data).tobytes() == data
