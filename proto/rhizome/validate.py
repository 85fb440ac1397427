"""The limits of a request, checked alike by the router and by a worker that a client reaches directly."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from rhizome.errors import InvalidRequest
from rhizome.v1 import generation_pb2 as pb

MAX_REQUEST_ID_CHARS = 128
MAX_NAME_CHARS = 128  # an event batch holds it too
MAX_CHOICES = 16
MAX_LOGPROBS = 20  # OpenAI's bound
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_TEMPERATURE = 100.0
MAX_REPETITION_PENALTY = 100.0

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}")
_REQUEST_ID = re.compile(rf"[\x21-\x7e]{{0,{MAX_REQUEST_ID_CHARS}}}")


def check_request_id(request_id: str) -> None:
    """Printable ASCII without spaces: it goes into logs and metadata."""
    if not _REQUEST_ID.fullmatch(request_id):
        limit = f"at most {MAX_REQUEST_ID_CHARS} printable ASCII characters without spaces"
        raise InvalidRequest("request_id", request_id, limit)


def check_tenant(tenant: str) -> None:
    """Raise InvalidRequest for a tenant's name that is too long; an empty one is nobody's in particular."""
    if len(tenant) > MAX_NAME_CHARS:
        raise InvalidRequest("tenant", tenant, f"at most {MAX_NAME_CHARS} characters")


def check_name(field: str, name: str) -> None:
    """A worker's id, a model's name, an address: printable ASCII without spaces, for logs and metadata."""
    if not (0 < len(name) <= MAX_NAME_CHARS and name.isascii() and name.isprintable() and " " not in name):
        raise InvalidRequest(field, name, f"1 to {MAX_NAME_CHARS} printable ASCII characters without spaces")


def check_address(field: str, address: str) -> None:
    """host:port, where the host is a name, an IPv4 address, or an IPv6 one in brackets."""
    if not _ADDRESS.fullmatch(address):
        raise InvalidRequest(field, address, "host:port")


def check_prompt_length(prompt_tokens: int, max_model_len: int) -> None:
    """A prompt holds a token at least and leaves room for one of the answer."""
    if prompt_tokens == 0:
        raise InvalidRequest("prompt", "", "it must hold at least one token")
    if prompt_tokens >= max_model_len:
        limit = f"the model allows {max_model_len} tokens, prompt and at least one answer token together"
        raise InvalidRequest("prompt tokens", prompt_tokens, limit)


def check_sampling(params: pb.SamplingParams, *, vocab_size: int, prompt_tokens: int, max_model_len: int) -> None:
    """Raise InvalidRequest for the first field out of its range."""

    def number(name: str, value: float, accepts: Callable[[float], bool], limit: str) -> None:
        if not (math.isfinite(value) and accepts(value)):
            raise InvalidRequest(f"sampling.{name}", value, limit)

    def at_most(name: str, value: int, limit: int) -> None:
        if value > limit:
            raise InvalidRequest(f"sampling.{name}", value, f"at most {limit}")

    if params.HasField("temperature"):
        number("temperature", params.temperature, lambda v: 0 <= v <= MAX_TEMPERATURE, f"0 to {MAX_TEMPERATURE:g}")
    if params.HasField("top_p"):
        number("top_p", params.top_p, lambda v: 0 < v <= 1, "above 0 and at most 1")
    number("min_p", params.min_p, lambda v: 0 <= v <= 1, "0 to 1")
    if params.HasField("repetition_penalty"):
        limit = f"above 0 and at most {MAX_REPETITION_PENALTY:g}"
        number("repetition_penalty", params.repetition_penalty, lambda v: 0 < v <= MAX_REPETITION_PENALTY, limit)
    number("presence_penalty", params.presence_penalty, lambda v: -2 <= v <= 2, "-2 to 2")
    number("frequency_penalty", params.frequency_penalty, lambda v: -2 <= v <= 2, "-2 to 2")
    at_most("top_k", params.top_k, vocab_size)
    room = max_model_len - prompt_tokens
    if params.max_tokens > room:
        limit = f"at most {room}: the model allows {max_model_len} tokens, and the prompt has {prompt_tokens}"
        raise InvalidRequest("sampling.max_tokens", params.max_tokens, limit)
    at_most("min_tokens", params.min_tokens, params.max_tokens or room)
    at_most("logprobs", params.logprobs, min(MAX_LOGPROBS, vocab_size))
    at_most("n", params.n, MAX_CHOICES)
    at_most("stop (strings)", len(params.stop), MAX_STOP_STRINGS)
    for text in params.stop:
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise InvalidRequest("sampling.stop", text, f"1 to {MAX_STOP_CHARS} characters each")
    at_most("stop_token_ids (ids)", len(params.stop_token_ids), MAX_STOP_TOKEN_IDS)
    for token in params.stop_token_ids:
        at_most("stop_token_ids", token, vocab_size - 1)


def check_token_ids(token_ids: NDArray[np.uint32], vocab_size: int) -> None:
    """Every token id, shape (tokens,), lies in the vocabulary."""
    outside = np.flatnonzero(token_ids >= vocab_size)
    if outside.size:
        position = int(outside[0])
        raise InvalidRequest(f"token_ids[{position}]", int(token_ids[position]), f"at most {vocab_size - 1}")
