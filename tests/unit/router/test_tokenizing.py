"""PromptTokenizer: what Hugging Face's own code makes of the same files, and clear refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rhizome.errors import InvalidRequest
from router.tokenizing import MAX_MESSAGES, BadTokenizer, PromptTokenizer
from tests.support.scripted_worker import byte_tokenizer_files

FILES = byte_tokenizer_files()
CONVERSATION = [
    {"role": "system", "content": "Be <brief> & “kind”."},
    {"role": "user", "content": "Hi\nthere"},
    {"role": "assistant", "content": "  Hello.  "},
    {"role": "user", "content": "日本語 ok"},
]

TEMPLATES = {
    "llama 3": (
        "{{- bos_token }}\n{%- for message in messages %}\n    {{- '<|start|>' + message['role'] + '<|end|>\n\n' }}\n"
        "    {{- message['content'] | trim + eos_token }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|start|>assistant<|end|>\n\n' }}\n{%- endif %}\n"
    ),
    "blocks and comments": (
        "{# a comment #}\n{% for message in messages %}\n    {% if message.role == 'user' %}\n"
        "U: {{ message.content }}\n    {% else %}\nO: {{ message.content }}\n    {% endif %}\n{% endfor %}\n"
    ),
    "qwen-like": (
        "{%- set ns = namespace(last=0) %}{%- for message in messages %}{%- if message.role == 'user' %}"
        "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{{- messages[ns.last].content | tojson }}"
        "{%- for message in messages[::-1] %}{%- if loop.index > 2 %}{%- break %}{%- endif %}{{- message.role }}"
        "{%- endfor %}"
    ),
    "generation marks": (
        "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
        "{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
    ),
    "tojson of all": "{{ messages | tojson(indent=2) }}{{ strftime_now('%Y') }}{{ tools is defined and tools }}",
}


def tokenizer_with(config: dict[str, Any], **files: bytes) -> PromptTokenizer:
    return PromptTokenizer(FILES | {"tokenizer_config.json": json.dumps(config).encode()} | files)


def reference() -> PreTrainedTokenizerFast:
    inner = Tokenizer.from_str(FILES["tokenizer.json"].decode())
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|bos|>", eos_token="<|eos|>")


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_templates_render_as_transformers_does(name: str) -> None:
    """White space, filters, loop controls and all."""
    template = TEMPLATES[name]
    tokenizer = tokenizer_with({"bos_token": "<|bos|>", "eos_token": {"content": "<|eos|>"}, "chat_template": template})
    expected = reference().apply_chat_template(
        CONVERSATION, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    assert tokenizer.render(CONVERSATION) == expected


@given(st.text())
def test_text_is_encoded_as_transformers_does(text: str) -> None:
    """Any text, special tokens in it included."""
    assert PromptTokenizer(FILES).encode(text + "<|eos|>").tolist() == reference()(text + "<|eos|>").input_ids


def test_special_tokens_are_added_to_text_and_not_to_chats() -> None:
    """A template writes its own bos; plain text gets the tokenizer's."""
    inner = Tokenizer.from_str(FILES["tokenizer.json"].decode())
    inner.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 256)])
    inner.enable_truncation(2)
    inner.enable_padding(length=50)
    tokenizer = PromptTokenizer(FILES | {"tokenizer.json": inner.to_str().encode()})
    assert tokenizer.encode("abc").tolist()[0] == 256
    assert len(tokenizer.encode("abc")) == 4  # neither cut nor padded
    assert tokenizer.encode_chat([{"role": "user", "content": "x"}]).tolist().count(256) == 1


def test_where_the_template_comes_from() -> None:
    """chat_template.jinja before tokenizer_config.json; of named templates the default one."""
    message = [{"role": "user", "content": "x"}]
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "D{{ messages[0].content }}"}]
    assert tokenizer_with({"chat_template": named}).render(message) == "Dx"
    assert tokenizer_with({"chat_template": named}, **{"chat_template.jinja": b"J"}).render(message) == "J"
    without = PromptTokenizer({"tokenizer.json": FILES["tokenizer.json"]})
    with pytest.raises(InvalidRequest, match="no chat template: send text"):
        without.encode_chat(message)
    assert without.encode("x").shape == (1,)


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "chat.messages"),
        ([{"role": "user", "content": ""}] * (MAX_MESSAGES + 1), "chat.messages"),
        ([{"role": "user", "content": "x"}, {"role": "tool", "content": "x"}], "chat.messages[1].role"),
        ([{"role": "", "content": "x"}], "chat.messages[0].role"),
        ([{"role": "user", "content": "x" * 2000}], "chat.messages"),
    ],
)
def test_bad_conversations_are_refused(messages: list[dict[str, str]], field: str) -> None:
    """By field, before the template runs."""
    with pytest.raises(InvalidRequest) as caught:
        PromptTokenizer(FILES).encode_chat(messages, max_tokens=10)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content.upper() }}", "undefined|no element"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' + 1 }}", "refuses it"),
        ("{% for _ in range(100000) %}xxxxxxxxxx{% endfor %}", "at most 640"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe|refuses it"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|refuses it"),
    ],
)
def test_a_templates_trouble_is_the_requests(template: str, says: str) -> None:
    """Its own refusals, errors, endless output and attempts to break out: InvalidRequest, nothing worse."""
    tokenizer = tokenizer_with({"chat_template": template})
    with pytest.raises(InvalidRequest, match=says):
        tokenizer.encode_chat([{"role": "user", "content": "x"}], max_tokens=10)


def test_text_that_cannot_fit_is_refused_unseen() -> None:
    """At 64 characters for each token that the model takes."""
    tokenizer = PromptTokenizer(FILES)
    assert len(tokenizer.encode("x" * 640, max_tokens=10)) == 640
    with pytest.raises(InvalidRequest, match="at most 640, as the model allows 10 tokens"):
        tokenizer.encode("x" * 641, max_tokens=10)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "tokenizer.json is missing"),
        ({"tokenizer.json": b"{}"}, "tokenizer.json"),
        ({"tokenizer.json": b"\xff"}, "tokenizer.json"),
        (FILES | {"tokenizer_config.json": b"not json"}, "chat template"),
        (FILES | {"tokenizer_config.json": b"[1]"}, "chat template"),
        (FILES | {"tokenizer_config.json": b"[]", "chat_template.jinja": b"x"}, "chat template"),
        (FILES | {"tokenizer_config.json": b'{"chat_template": 7}'}, "not a string or a list"),
        (FILES | {"chat_template.jinja": b"{% if %}"}, "chat template"),
    ],
)
def test_files_that_make_no_tokenizer(files: dict[str, bytes], says: str) -> None:
    """Each is told by name."""
    with pytest.raises(BadTokenizer, match=says):
        PromptTokenizer(files)
