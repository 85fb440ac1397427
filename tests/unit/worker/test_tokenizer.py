"""Token ids to text, piece by piece: nothing lost, nothing cut through a character."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from worker.byte_tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, byte_tokenizer
from worker.config import CheckpointError
from worker.tokenizer import Tokenizer, tokenizer_files

CORPUS = [
    "the cat sat on the mat",
    "naïve façade — “quotes”",
    "日本語のテキスト",
    "🙂🙃 emoji 👩‍👩‍👧",
    "x = [1, 2]\n\ty",
] * 3


def wrap(inner: HFTokenizer) -> Tokenizer:
    return Tokenizer({"tokenizer.json": inner.to_str().encode()})


def byte_level_bpe() -> HFTokenizer:
    """Trained with merges, so that tokens hold parts of characters and several characters."""
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("zażółć gęślą", special=False)])
    return tokenizer


def sentencepiece_bpe() -> HFTokenizer:
    """As Llama 2's: pieces with ▁, bytes as <0xXX>, the text's first space dropped."""
    letters = "▁ abcdefghijklmnopqrstuvwxyzé日本"
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{n:02X}>" for n in range(256)], *letters, "▁t", "th", "▁th", "▁the"]
    vocab = {piece: n for n, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("▁", "t"), ("t", "h"), ("▁t", "h"), ("▁th", "e")]
    tokenizer = HFTokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


INNERS = {"tiny": byte_tokenizer(), "byte-level": byte_level_bpe(), "sentencepiece": sentencepiece_bpe()}
TOKENIZERS = {name: wrap(inner) for name, inner in INNERS.items()}


def streamed(tokenizer: Tokenizer, ids: list[int], sizes: list[int]) -> list[str]:
    """The pieces when ids are pushed in groups of the given sizes, then one by one."""
    detokenizer = tokenizer.detokenizer()
    pieces, at = [], 0
    for size in [*sizes, *[1] * len(ids)]:
        pieces.append(detokenizer.push(ids[at : at + size]))
        at += size
    return [*pieces, detokenizer.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(max_size=60) | st.sampled_from(CORPUS), sizes=st.lists(st.integers(0, 5), max_size=10))
def test_text_survives_encoding_and_streaming(name: str, text: str, sizes: list[int]) -> None:
    """Any text comes back whole, in pieces that never show a broken character; as the tokenizers library decodes it."""
    ids = INNERS[name].encode(text, add_special_tokens=False).ids
    if name == "sentencepiece" and "▁" in text:
        text = text.replace("▁", " ")  # the format cannot tell them apart
    pieces = streamed(TOKENIZERS[name], ids, sizes)
    assert "".join(pieces) == text == TOKENIZERS[name].decode(ids)
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text
    assert INNERS[name].decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("name", ["tiny", "byte-level"])
@given(data=st.data())
def test_any_token_ids_decode_as_the_tokenizers_library_decodes_them(name: str, data: st.DataObject) -> None:
    """Invalid bytes, special and added tokens included, in whatever groups they are pushed."""
    ids = data.draw(st.lists(st.integers(0, TOKENIZERS[name].vocab_size - 1), max_size=40))
    sizes = data.draw(st.lists(st.integers(0, 5), max_size=10))
    assert "".join(streamed(TOKENIZERS[name], ids, sizes)) == INNERS[name].decode(ids, skip_special_tokens=True)


def test_an_unfinished_character_is_held_back_then_delivered() -> None:
    """The four bytes of an emoji give nothing, nothing, nothing, the emoji; cut short, U+FFFD at the end."""
    detokenizer = TOKENIZERS["tiny"].detokenizer()
    assert [detokenizer.push([byte]) for byte in "🙂".encode()] == ["", "", "", "🙂"]
    assert detokenizer.push([0xF0, 0x9F]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_special_and_unknown_tokens_give_no_text() -> None:
    """Special tokens are skipped; ids behind the vocabulary (padding of a model) too."""
    assert TOKENIZERS["tiny"].decode([72, 256, 257, 261, 105, 262, 5000]) == "Hi"


def test_a_continuation_keeps_its_leading_space() -> None:
    """SentencePiece puts a space before a text: dropped at a text's start, kept in a continuation."""
    ids = INNERS["sentencepiece"].encode("the", add_special_tokens=False).ids
    tokenizer = TOKENIZERS["sentencepiece"]
    assert tokenizer.detokenizer().push(ids) == "the"
    assert tokenizer.detokenizer(at_start=False).push(ids) == " the"


def test_a_stream_that_never_becomes_valid_costs_no_more_per_token() -> None:
    """100,000 lone continuation bytes come out as they go in."""
    detokenizer = TOKENIZERS["tiny"].detokenizer()
    assert all(detokenizer.push([0x80]) == "\ufffd" for _ in range(100_000))
    assert detokenizer.finish() == ""


def test_tokenizer_files_are_those_that_exist(tmp_path: Path) -> None:
    """What a router needs, and not the weights."""
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    (tmp_path / "chat_template.jinja").write_bytes(b"x")
    (tmp_path / "model.safetensors").write_bytes(b"not sent")
    files = tokenizer_files(tmp_path)
    assert files == {"tokenizer.json": b"{}", "chat_template.jinja": b"x"}


def test_tokenizers_that_cannot_be_served_are_refused(tmp_path: Path) -> None:
    """Missing, broken, or with a decoder that is not known: an error that names the file."""
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: missing"):
        tokenizer_files(tmp_path)
    for content in (b"{", b"\xff\xfe", b'{"model": 1}'):
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
            Tokenizer({"tokenizer.json": content})
    word_piece = json.loads(INNERS["tiny"].to_str()) | {
        "decoder": {"type": "WordPiece", "prefix": "#", "cleanup": True}
    }
    with pytest.raises(CheckpointError, match="WordPiece.*supported: ByteLevel"):
        Tokenizer({"tokenizer.json": json.dumps(word_piece).encode()})


def test_the_tiny_vocabulary_is_bytes_and_special_tokens() -> None:
    """Ids 0 to 255 are the bytes themselves."""
    tokenizer = TOKENIZERS["tiny"]
    assert tokenizer.vocab_size == VOCAB_SIZE == 256 + len(SPECIAL_TOKENS)
    assert [tokenizer.token_bytes(n) for n in range(256)] == [bytes([n]) for n in range(256)]
