"""Block keys: what shares them, what never does, and their fixed values."""

from __future__ import annotations

import hashlib

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from radix.hashing import MAX_TOKEN_ID, BlockHasher, derive_salt
from radix.keys import hashes_of, keys_from_bytes

SALT = derive_salt("model")
TOKENS = st.lists(st.integers(0, MAX_TOKEN_ID), max_size=60)


def test_the_values_are_fixed() -> None:
    """Keys are part of the contract between processes and releases: these never change."""
    assert derive_salt("m", "a", "t").hex() == "74e4735c76291dcb6fba3745552a7492a1c0214aed526646372388a53c2928bf"
    keys = BlockHasher(4, derive_salt("m")).keys(range(9))
    assert keys.astype("<u8").tobytes().hex() == "463e8961b7c1b33a700d4221849a1944b63375ff5c83659af197ceeceaa55c41"


def test_a_key_is_the_keyed_hash_that_is_documented() -> None:
    """BLAKE2b-128 under the salt over the parent key and the tokens as little-endian uint32."""
    tokens = [1, 2**32 - 1, 70_000, 4]
    first = hashlib.blake2b(bytes(16) + np.array(tokens[:2], "<u4").tobytes(), digest_size=16, key=SALT).digest()
    second = hashlib.blake2b(first + np.array(tokens[2:], "<u4").tobytes(), digest_size=16, key=SALT).digest()
    keys = BlockHasher(2, SALT).keys(tokens)
    assert keys.tobytes() == keys_from_bytes(first + second).tobytes()
    assert keys.dtype == np.uint64
    assert keys.flags.c_contiguous
    assert hashes_of(keys).tolist() == [int.from_bytes(key[:8], "little") for key in (first, second)]


@settings(deadline=None)
@given(tokens=TOKENS, block_size=st.integers(1, 7), cut=st.integers(0, 10))
def test_hashing_in_steps_equals_hashing_at_once(tokens: list[int], block_size: int, cut: int) -> None:
    """A conversation that grows by whole blocks gets the keys of the whole."""
    hasher = BlockHasher(block_size, SALT)
    whole = hasher.keys(tokens)
    assert whole.shape == (len(tokens) // block_size, 2), "a tail has no key"
    cut = min(cut, len(whole))
    head = hasher.keys(tokens[: cut * block_size])
    tail = hasher.keys(tokens[cut * block_size :], parent=head[-1] if cut else None)
    assert np.concatenate([head, tail]).tolist() == whole.tolist()


@settings(deadline=None)
@given(tokens=st.lists(st.integers(0, 5), min_size=1, max_size=40), at=st.integers(0, 39))
def test_a_change_changes_its_block_and_all_after_it(tokens: list[int], at: int) -> None:
    """A key names the whole prefix: keys before the change stay, none after it does."""
    at %= len(tokens)
    changed = [*tokens[:at], tokens[at] + 1, *tokens[at + 1 :]]
    before, after = (BlockHasher(4, SALT).keys(each) for each in (tokens, changed))
    assert before[: at // 4].tolist() == after[: at // 4].tolist()
    assert not {*map(tuple, before[at // 4 :].tolist())} & {*map(tuple, after[at // 4 :].tolist())}


def test_model_adapter_and_tenant_separate_keys() -> None:
    """No two of these salts agree, also where the parts run together to the same text."""
    parts = [("m",), ("m", "a"), ("m", "", "a"), ("ma",), ("", "m"), ("m", "a", "t"), ("m", "at"), ("mat",), ("",)]
    salts = {derive_salt(*part) for part in parts}
    assert len(salts) == len(parts)
    keys = {BlockHasher(4, salt).keys(range(4)).tobytes() for salt in salts}
    assert len(keys) == len(parts)


def test_a_block_size_does_not_share_keys_with_another() -> None:
    """Blocks of 4 and of 8 tokens have different keys for the same prompt."""
    of_4, of_8 = (hashes_of(BlockHasher(size, SALT).keys(range(16))) for size in (4, 8))
    assert not set(of_4.tolist()) & set(of_8.tolist())


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.uint64, ">u4", "<u4"])
def test_any_integer_type_gives_the_same_keys(dtype: str) -> None:
    """Lists, ranges and arrays of any byte order and width."""
    hasher = BlockHasher(4, SALT)
    assert hasher.keys(np.arange(40).astype(dtype)[::2]).tolist() == hasher.keys(range(0, 40, 2)).tolist()


@pytest.mark.parametrize(
    ("tokens", "error", "text"),
    [
        ([1, -1], ValueError, "-1 to 1: 0 to 4294967295"),
        ([2**32], ValueError, "4294967296"),
        ([2**64], TypeError, "integers from 0 to"),
        ([1.5], TypeError, "float64"),
        (["a"], TypeError, "integers"),
        ([True], TypeError, "bool"),
        ([[1, 2]], ValueError, "one dimension"),
        (3, ValueError, "one dimension"),
    ],
)
def test_what_is_not_a_token_is_refused(tokens: object, error: type[Exception], text: str) -> None:
    """The error names the value and the limit."""
    with pytest.raises(error, match=text):
        BlockHasher(1, SALT).keys(tokens)


@pytest.mark.parametrize(
    ("parent", "error"),
    [(b"0" * 16, TypeError), (np.zeros(2), TypeError), (np.zeros(3, np.uint64), ValueError)],
)
def test_what_is_not_a_parent_key_is_refused(parent: object, error: type[Exception]) -> None:
    """A parent is one key, shape (2,)."""
    with pytest.raises(error, match="parent"):
        BlockHasher(1, SALT).keys([1], parent=parent)


def test_block_size_and_salt_are_checked() -> None:
    """A hasher cannot be made with a size or a salt that means nothing."""
    with pytest.raises(ValueError, match="block_size is 0: at least 1"):
        BlockHasher(0, SALT)
    with pytest.raises(ValueError, match="salt has 3 bytes: 32"):
        BlockHasher(16, b"abc")


def test_a_hash_of_zero_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 stands for the root, so a key whose low half would be 0 gets 1 there, and the chain goes on from that."""

    class Zeros:
        seen: list[bytes] = []  # noqa: RUF012

        def __init__(self, data: bytes, **_: object) -> None:
            self.seen.append(data[:16])

        def digest(self) -> bytes:
            return bytes(8) + b"highhalf"

    monkeypatch.setattr(hashlib, "blake2b", Zeros)
    keys = BlockHasher(1, SALT).keys([5, 6])
    assert hashes_of(keys).tolist() == [1, 1]
    assert Zeros.seen == [bytes(16), (1).to_bytes(8, "little") + b"highhalf"]


def test_torn_keys_are_refused() -> None:
    """Keys come in 16 bytes each."""
    with pytest.raises(ValueError, match="16 bytes each, not 17"):
        keys_from_bytes(bytes(17))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 4).flatmap(lambda keys: st.binary(min_size=16 * keys, max_size=16 * keys)))
def test_keys_survive_their_wire_form(data: bytes) -> None:
    """bytes -> keys -> bytes."""
    assert keys_from_bytes(data).tobytes() == data
