"""Text and chat messages to token ids, with the tokenizer files that a worker sends. No I/O."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import numpy as np
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from radix.keys import Tokens
from rhizome.errors import InvalidRequest

MAX_MESSAGES = 1024
ROLES = ("system", "user", "assistant")
CHARS_PER_TOKEN = 64
"""A prompt with more characters than this for each token that the model takes is refused before it is tokenized. Text
has 3 to 5 of them and the longest runs of spaces about 40, so it could not fit, and would cost seconds to find out."""


class BadTokenizer(ValueError):
    """Files that make no tokenizer; the message says which and why."""


class PromptTokenizer:
    """One model's tokenizer and chat template. Its methods may be called from several threads."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """`files`: tokenizer.json, and where there are any tokenizer_config.json and chat_template.jinja.

        Raises BadTokenizer.
        """
        if "tokenizer.json" not in files:
            raise BadTokenizer("tokenizer.json is missing")
        try:
            self._tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
        except Exception as error:  # tokenizers raises nothing more precise
            raise BadTokenizer(f"tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()  # a cut prompt is another prompt: too long ones are refused instead
        self._tokenizer.no_padding()
        try:
            config = json.loads(files.get("tokenizer_config.json", b"{}"))
            self._variables = _special_tokens(config)
            source = files["chat_template.jinja"].decode() if "chat_template.jinja" in files else _template_of(config)
            self._template = _environment().from_string(source) if source is not None else None
        except (ValueError, AttributeError, jinja2.TemplateError) as error:
            raise BadTokenizer(f"chat template: {error}") from error

    def encode(self, text: str, max_tokens: int | None = None) -> Tokens:
        """Token ids of plain text, special tokens added as the tokenizer does (a first BOS, say).

        `max_tokens` is the most that the model takes; text that cannot fit is refused unseen. Raises InvalidRequest.
        """
        return self._encode(text, max_tokens, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Mapping[str, str]], max_tokens: int | None = None) -> Tokens:
        """Token ids of a conversation, ready for the assistant's answer. Each message has a role and a content.

        Raises InvalidRequest.
        """
        return self._encode(self.render(messages, max_tokens), max_tokens, add_special_tokens=False)

    def render(self, messages: Sequence[Mapping[str, str]], max_tokens: int | None = None) -> str:
        """A conversation as text, by the model's chat template. Raises InvalidRequest."""
        if self._template is None:
            raise InvalidRequest("chat", f"{len(messages)} messages", "this model has no chat template: send text")
        if not 1 <= len(messages) <= MAX_MESSAGES:
            raise InvalidRequest("chat.messages", len(messages), f"1 to {MAX_MESSAGES} messages")
        for index, message in enumerate(messages):
            if message["role"] not in ROLES:
                raise InvalidRequest(f"chat.messages[{index}].role", message["role"], f"one of {', '.join(ROLES)}")
        _check_length("chat.messages", sum(len(message["content"]) for message in messages), max_tokens)
        pieces, length = [], 0
        try:
            for piece in self._template.generate(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._variables,
            ):
                pieces.append(piece)
                length += len(piece)
                _check_length("chat (rendered)", length, max_tokens)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            limit = f"the model's chat template refuses it: {error}"
            raise InvalidRequest("chat.messages", [message["role"] for message in messages], limit) from error
        return "".join(pieces)

    def _encode(self, text: str, max_tokens: int | None, *, add_special_tokens: bool) -> Tokens:
        _check_length("prompt", len(text), max_tokens)
        # encode_batch lets other threads run meanwhile, encode does not.
        (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        return np.array(encoding.ids, np.uint32)


def _check_length(field: str, chars: int, max_tokens: int | None) -> None:
    if max_tokens is not None and chars > max_tokens * CHARS_PER_TOKEN:
        limit = f"at most {max_tokens * CHARS_PER_TOKEN}, as the model allows {max_tokens} tokens"
        raise InvalidRequest(field, f"{chars} characters", limit)


# What Hugging Face templates expect around them (transformers, utils/chat_template_utils.py).


def _template_of(config: Mapping[str, Any]) -> str | None:
    """The template in tokenizer_config.json: a string, or named ones of which "default" is taken."""
    template = config.get("chat_template")
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    if template is None or isinstance(template, str):
        return template
    raise ValueError(f"chat_template is a {type(template).__name__}, not a string or a list")


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name, value in config.items():
        token = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(token, str):
            found[name] = token
    return found


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} marks the assistant's words for training; here it only stands for what it encloses."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, sort_keys: bool = False) -> str:
    # Jinja's own escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
