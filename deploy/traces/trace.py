"""Traces of requests: when each came, how long it was, and which prefix blocks it shares with others.

The file format is Mooncake's (kvcache-ai/Mooncake, FAST'25), a JSON object a line: `timestamp` in milliseconds,
`input_length` and `output_length` in tokens, `hash_ids` of the prompt's blocks of 512 tokens; equal ids are equal
blocks with equal prefixes. Ours may say more on a line, and readers of the published form skip it: `block_size` where
it is not 512, `session_id`, `tenant`, `priority`. Every line stands alone, so `head`, `grep` and `cat` make traces.
Alibaba's Bailian traces (qwen-bailian-usagetraces-anon) are read, too: they are told by `parent_chat_id`.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from rhizome.errors import InvalidRequest

MOONCAKE_BLOCK_SIZE = 512
BAILIAN_BLOCK_SIZE = 16
MAX_BLOCK_SIZE = 1 << 16
MAX_TOKENS = 1 << 24  # of a prompt or an answer: more than any model takes
MAX_REQUESTS = 10_000_000  # the longest published trace has some 24,000
MAX_BLOCK_IDS = 1 << 27  # of all requests: 1 GiB of references
MAX_LINE = 1 << 24  # bytes: a prompt of a million blocks
MAX_NAME = 256  # characters of a session or tenant
MAX_TIMESTAMP = 1e14  # ms: three thousand years
MAX_PRIORITY = 1 << 31


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """A request as a trace knows it.

    arrival_s counts from the trace's first request. block_ids[i] stands for the prompt's tokens up to block i's end;
    there are ceil(input_tokens / block_size) of them, or fewer by one: tokens past the named blocks are shared with
    nobody. Session and tenant are "" where the trace does not tell.
    """

    arrival_s: float
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...]
    session: str = ""
    tenant: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival, and the tokens in each of their blocks."""

    name: str
    block_size: int
    requests: tuple[TraceRequest, ...]

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last; 0 for an empty trace."""
        return self.requests[-1].arrival_s - self.requests[0].arrival_s if self.requests else 0.0

    def scaled(self, speed: float) -> Trace:
        """The same requests, coming `speed` times as fast."""
        if not (math.isfinite(speed) and speed > 0):
            raise InvalidRequest("speed", speed, "a number above 0")
        return replace(
            self, requests=tuple(replace(request, arrival_s=request.arrival_s / speed) for request in self.requests)
        )

    def head(self, count: int) -> Trace:
        """The first `count` requests, or all where there are fewer."""
        if count < 1:
            raise InvalidRequest("requests", count, "at least 1")
        return replace(self, requests=self.requests[:count])


def read_trace(path: Path | str, block_size: int | None = None) -> Trace:
    """The trace of a file, gzipped where it ends in .gz.

    block_size is what the file's lines say, else its publisher's (Mooncake 512, Bailian 16); one given here is for
    files that say nothing. Bailian's timestamps are seconds, and its chats are sessions. The file's order counts for
    nothing: requests are sorted by timestamp, equal ones stay as they lie (a router writes a request down when it
    ends), and the first one comes at 0. Lenient where publications are: one id too few leaves the prompt's end
    unshared, one too many is cut, an output length of 0 is 1 (a prefill makes a token), and ids of blocks rather than
    prefixes (an id behind two different ones) are renumbered as prefixes.

    Errors: InvalidRequest that names file, line, field, value and limit.
    """
    path = Path(path)
    reader = _Reader(path, block_size)
    timed = sorted(reader.requests(), key=lambda request: request.arrival_s)
    if not timed:
        raise InvalidRequest(str(path), "", "at least one request")
    first = timed[0].arrival_s
    if first:
        timed = [replace(request, arrival_s=request.arrival_s - first) for request in timed]
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    return Trace(name, reader.block_size or MOONCAKE_BLOCK_SIZE, tuple(_ids_of_prefixes(timed)))


def write_trace(trace: Trace, path: Path | str) -> None:
    """Write it as read_trace reads it, gzipped where the path ends in .gz. Times are kept to the microsecond.

    Raises InvalidRequest where it cannot be written.
    """
    path = Path(path)
    try:
        with _opened(path, "wb") as file:
            for request in trace.requests:
                file.write(trace_line(request, trace.block_size))
    except OSError as error:
        raise InvalidRequest("trace", str(path), f"a file that can be written ({error})") from None


def trace_line(request: TraceRequest, block_size: int) -> bytes:
    """A request as a line of a file, its end included."""
    milliseconds = round(request.arrival_s * 1000, 3)
    fields: dict[str, Any] = {
        "timestamp": int(milliseconds) if milliseconds == int(milliseconds) else milliseconds,
        "input_length": request.input_tokens,
        "output_length": request.output_tokens,
        "hash_ids": request.block_ids,
    }
    if block_size != MOONCAKE_BLOCK_SIZE:
        fields["block_size"] = block_size
    extra = {"session_id": request.session, "tenant": request.tenant, "priority": request.priority}
    fields.update((name, value) for name, value in extra.items() if value)
    return json.dumps(fields).encode() + b"\n"


def _opened(path: Path, mode: str) -> IO[bytes]:
    if path.suffix != ".gz":
        return open(path, mode)
    # No name and no time in the header: equal traces are equal files.
    return gzip.GzipFile(str(path), mode, mtime=0)  # type: ignore[return-value]


class _Reader:
    """Lines to requests, each checked before the next is read. Times are as the file has them, in seconds."""

    def __init__(self, path: Path, block_size: int | None) -> None:
        if block_size is not None and not 1 <= block_size <= MAX_BLOCK_SIZE:
            raise InvalidRequest("block_size", block_size, f"1 to {MAX_BLOCK_SIZE}")
        self._path = path
        self._given = block_size
        self._line = 0
        self._chats: dict[int, str] = {}  # Bailian's: chat -> session
        self.block_size: int | None = None

    def requests(self) -> Iterator[TraceRequest]:
        ids = 0
        for count, line in enumerate(self._lines(), 1):
            request = self._request(line)
            ids += len(request.block_ids)
            if count > MAX_REQUESTS:
                raise self._error("requests", count, f"at most {MAX_REQUESTS}")
            if ids > MAX_BLOCK_IDS:
                raise self._error("hash_ids", ids, f"at most {MAX_BLOCK_IDS} in all")
            yield request

    def _lines(self) -> Iterator[bytes]:
        try:
            with _opened(self._path, "rb") as file:
                while line := file.readline(MAX_LINE + 1):
                    self._line += 1
                    if len(line) > MAX_LINE:
                        raise self._error("line", line[:20], f"at most {MAX_LINE} bytes")
                    if not line.isspace():
                        yield line
        except (OSError, EOFError, zlib.error) as error:
            raise InvalidRequest("trace", str(self._path), f"a file that can be read ({error})") from None

    def _request(self, line: bytes) -> TraceRequest:
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            raise self._error("line", line[:60], "a JSON object") from None
        if not isinstance(fields, dict):
            raise self._error("line", line[:60], "a JSON object")
        bailian = "parent_chat_id" in fields
        block_size = self._block_size(fields, BAILIAN_BLOCK_SIZE if bailian else MOONCAKE_BLOCK_SIZE)
        input_tokens = self._integer(fields, "input_length", 1, MAX_TOKENS)
        output_tokens = self._integer(fields, "output_length", 0, MAX_TOKENS)
        priority = self._integer(fields, "priority", -MAX_PRIORITY, MAX_PRIORITY - 1) if "priority" in fields else 0
        return TraceRequest(
            self._timestamp(fields) / (1 if bailian else 1000),
            input_tokens,
            max(output_tokens, 1),
            self._block_ids(fields, -(-input_tokens // block_size)),
            self._chat(fields) if bailian else self._text(fields, "session_id"),
            self._text(fields, "tenant"),
            priority,
        )

    def _block_size(self, fields: dict[str, Any], published: int) -> int:
        told = published if self._given is None else self._given
        if "block_size" in fields:
            told = self._integer(fields, "block_size", 1, MAX_BLOCK_SIZE)
            if self._given is not None and told != self._given:
                raise self._error("block_size", told, f"{self._given}, as was asked for")
        if self.block_size is None:
            self.block_size = told
        elif told != self.block_size:
            raise self._error("block_size", told, f"{self.block_size}, as on the lines before")
        return told

    def _block_ids(self, fields: dict[str, Any], blocks: int) -> tuple[int, ...]:
        ids = fields.get("hash_ids")
        if not isinstance(ids, list):
            raise self._error("hash_ids", ids, "a list")
        if not blocks - 1 <= len(ids) <= blocks + 1:
            limit = f"{blocks} ids, one a block of {self.block_size} tokens, give or take one"
            raise self._error("len(hash_ids)", len(ids), limit)
        for place, block in enumerate(ids):
            if type(block) is not int or not 0 <= block < 1 << 64:
                raise self._error(f"hash_ids[{place}]", block, "an integer from 0 to 2^64 - 1")
        return tuple(ids[:blocks])

    def _chat(self, fields: dict[str, Any]) -> str:
        """Turns are chats of their own that name the one before; the first one's number names the session."""
        chat = self._integer(fields, "chat_id", 0, (1 << 63) - 1)
        parent = self._integer(fields, "parent_chat_id", -1, (1 << 63) - 1)
        return self._chats.setdefault(chat, self._chats.get(parent, str(chat)))

    def _timestamp(self, fields: dict[str, Any]) -> float:
        value = fields.get("timestamp")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_TIMESTAMP:
            raise self._error("timestamp", value, f"a number from 0 to {MAX_TIMESTAMP:.0e}")
        return float(value)

    def _integer(self, fields: dict[str, Any], name: str, low: int, high: int) -> int:
        value = fields.get(name)
        if type(value) is not int or not low <= value <= high:
            raise self._error(name, value, f"an integer from {low} to {high}")
        return value

    def _text(self, fields: dict[str, Any], name: str) -> str:
        value = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool):  # session numbers are common
            value = str(value)
        if value is None:
            return ""
        if not isinstance(value, str) or len(value) > MAX_NAME:
            raise self._error(name, value, f"text of at most {MAX_NAME} characters")
        return value

    def _error(self, field: str, value: object, limit: str) -> InvalidRequest:
        return InvalidRequest(f"{self._path}, line {self._line}: {field}", value, limit)


def _ids_of_prefixes(requests: list[TraceRequest]) -> Iterable[TraceRequest]:
    """The requests with ids that stand for prefixes: as they are where each id always follows the same one."""
    parents: dict[int, int] = {}
    for request in requests:
        before = -1
        for block in request.block_ids:
            if parents.setdefault(block, before) != before:
                return _renumbered(requests)
            before = block
    return requests


def _renumbered(requests: list[TraceRequest]) -> Iterator[TraceRequest]:
    numbers: dict[tuple[int, int], int] = {}
    for request in requests:
        chain = []
        prefix = -1
        for block in request.block_ids:
            prefix = numbers.setdefault((prefix, block), len(numbers))
            chain.append(prefix)
        yield replace(request, block_ids=tuple(chain))
