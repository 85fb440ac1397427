"""The worker's half of tokenization: token ids back to text, piece by piece, and the files a router needs. Torch-free.

Detokenization works on bytes: each token stands for fixed bytes and one incremental UTF-8 decoder holds back what is
not a whole character yet. That is O(1) for each token, whatever the text; the usual way (decode a window of tokens
and compare) grows its window on text that never becomes valid.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HFTokenizer

from worker.config import CheckpointError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
MAX_TOKENIZER_BYTES = 256 * 2**20  # the largest published are about 35 MB


def tokenizer_files(directory: str | Path) -> dict[str, bytes]:
    """Those of TOKENIZER_FILES that exist. Raises CheckpointError without tokenizer.json."""
    files = {}
    for name in TOKENIZER_FILES:
        path = Path(directory) / name
        if not path.is_file():
            continue
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise CheckpointError(path, f"larger than {MAX_TOKENIZER_BYTES} bytes")
        files[name] = path.read_bytes()
    if TOKENIZER_FILES[0] not in files:
        raise CheckpointError(Path(directory) / TOKENIZER_FILES[0], "missing")
    return files


class Tokenizer:
    """Decodes the token ids of one checkpoint. Raises CheckpointError for a tokenizer it does not know."""

    def __init__(self, files: Mapping[str, bytes], directory: str | Path = "") -> None:
        file = Path(directory) / TOKENIZER_FILES[0]
        data = files[TOKENIZER_FILES[0]]
        try:
            inner = HFTokenizer.from_str(data.decode())
            decoder = json.loads(data).get("decoder") or {}
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(file, f"not a tokenizer ({error})") from error
        self._inner = inner
        self._piece_bytes, self.strips_leading_space = _piece_decoder(decoder, file)
        added = inner.get_added_tokens_decoder()
        self._special = frozenset(token for token, entry in added.items() if entry.special)
        self._bytes: dict[int, bytes] = {}  # filled as tokens come, at most one entry a token id

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """From a checkpoint directory."""
        return cls(tokenizer_files(directory), directory)

    @property
    def vocab_size(self) -> int:
        """Tokens known, added ones included; a model's vocabulary may be larger (padding)."""
        return int(self._inner.get_vocab_size(with_added_tokens=True))

    def token_bytes(self, token_id: int) -> bytes:
        """What a token contributes to the text; nothing for special and unknown ones."""
        found = self._bytes.get(token_id)
        if found is None:
            piece = None if token_id in self._special else self._inner.id_to_token(token_id)
            found = b"" if piece is None else self._piece_bytes(piece)
            self._bytes[token_id] = found
        return found

    def decode(self, token_ids: Sequence[int]) -> str:
        """The whole text; special tokens are left out, bytes that are no UTF-8 become U+FFFD."""
        detokenizer = self.detokenizer()
        return detokenizer.push(token_ids) + detokenizer.finish()

    def detokenizer(self, *, at_start: bool = True) -> Detokenizer:
        """For one answer. `at_start` false keeps the leading space that SentencePiece puts before a text."""
        return Detokenizer(self, strip_leading_space=at_start and self.strips_leading_space)


class Detokenizer:
    """Token ids in, text out as soon as it is certain; the pieces concatenate to `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer, *, strip_leading_space: bool) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = strip_leading_space

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; an unfinished character waits for the next push."""
        data = b"".join(map(self._tokenizer.token_bytes, token_ids))
        return self._stripped(self._utf8.decode(data))

    def finish(self) -> str:
        """What was held back, now that nothing follows: an unfinished character becomes U+FFFD."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        if text and self._strip:
            self._strip = False
            return text.removeprefix(" ")
        return text


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes (openai/gpt-2, encoder.py, bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_level_alphabet()


def _byte_level_piece(piece: str) -> bytes:
    codes = [BYTE_OF_CHAR.get(char, -1) for char in piece]
    return piece.encode() if -1 in codes else bytes(codes)  # as the tokenizers library does for added tokens


def _sentencepiece_piece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            pass
    return piece.replace("▁", " ").encode()


def _piece_decoder(decoder: dict[str, Any], file: Path) -> tuple[Any, bool]:
    """The function piece -> bytes and whether a text's first space is dropped, from tokenizer.json's decoder."""
    steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level_piece, False
    if kinds and all(kind in ("Replace", "ByteFallback", "Fuse", "Strip", "Metaspace") for kind in kinds):
        metaspace = any(s.get("type") == "Metaspace" and s.get("prepend_scheme") != "never" for s in steps)
        return _sentencepiece_piece, metaspace or "Strip" in kinds
    raise CheckpointError(
        file,
        f"decoder is {kinds!r}; supported: ByteLevel, or SentencePiece's Replace, ByteFallback, Fuse, Strip, Metaspace",
    )
