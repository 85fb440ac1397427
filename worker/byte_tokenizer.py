"""A byte-level tokenizer with a chat template, for models that have none of their own. Torch-free."""

from __future__ import annotations

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from worker.tokenizer import BYTE_OF_CHAR, TOKENIZER_FILES

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
BOS, EOS, END = 256, 257, 261
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role not in ["system", "user", "assistant"] -%}
{{- raise_exception("role " ~ message.role ~ ": system, user or assistant is expected") -}}
{%- endif -%}
{{- "<|" ~ message.role ~ "|>\\n" ~ message.content ~ "<|end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|assistant|>\\n" -}}{%- endif -%}
"""


def byte_tokenizer() -> Tokenizer:
    """Token ids 0 to 255 are the bytes; no merges, so that any text round-trips and pieces join seamlessly."""
    vocab = dict(sorted(BYTE_OF_CHAR.items(), key=lambda entry: entry[1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS)]
    )
    return tokenizer


def byte_tokenizer_files(max_length: int) -> dict[str, bytes]:
    """The files of a checkpoint's tokenizer by name, for a model that takes at most `max_length` tokens."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "pad_token": "<|eos|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    contents = (byte_tokenizer().to_str(pretty=True), json.dumps(config, indent=2) + "\n", CHAT_TEMPLATE)
    return {name: text.encode() for name, text in zip(TOKENIZER_FILES, contents, strict=True)}
