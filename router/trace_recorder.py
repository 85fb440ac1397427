"""Records the requests that a router streamed as a trace: a JSON line each, in Mooncake's form, without any content.

`hash_ids` are the block hashes under a key that is made for each recording and kept nowhere: equal prefixes have equal
ids within one recording, and nothing else can be told from them. A line is written when its request has ended, so lines
are in that order; times are of arrival. `ttft_ms` and `predicted_ttft_ms`, both from the arrival on, are for people and
not for readers of traces. Requests whose stream goes past the router (`Route`) are not in it: how long their answers
were is not known here. Readers: deploy.traces.trace.read_trace.
"""

from __future__ import annotations

import json
import logging
import queue
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO

from google.protobuf.message import DecodeError

from radix.keys import Hashes
from rhizome.errors import InvalidRequest
from rhizome.v1 import generation_pb2

logger = logging.getLogger(__name__)

MAX_BYTES = 2**30  # of a recording, some 200,000 prompts of 8k tokens: a forgotten one must not fill the disk
MAX_PENDING = 4096  # ended requests that wait for the disk: some seconds of a busy router
ID_BYTES = 6  # 48 bits: exact in every JSON reader; two of a million blocks are alike with a chance of 0.2%


@dataclass(slots=True)
class RecordedRequest:
    """A request under way: what the line will need. Times are of a monotonic clock, in seconds."""

    arrived_s: float
    block_size: int
    prompt_tokens: int
    hashes: Hashes
    session: str
    priority: int
    tenant: str = ""
    chunks: int = 0
    last_chunk: bytes = b""
    predicted_s: float | None = None  # when the first token was to come, as predicted when the request was sent off
    first_token_s: float | None = None  # when it came

    def delivered(self, chunk: bytes) -> None:
        """A piece of the answer went to the client."""
        self.chunks += 1
        self.last_chunk = chunk

    def output_tokens(self) -> int:
        """As the last piece says; of an answer that was cut, at least one for each piece."""
        try:
            told = generation_pb2.GenerateChunk.FromString(self.last_chunk).usage.completion_tokens
        except DecodeError:  # a router passes on what it does not understand
            told = 0
        return max(told, self.chunks)


def trace_line(request: RecordedRequest, started_s: float, key: bytes) -> bytes:
    """A request as a line of a trace whose first moment is started_s."""
    raw = request.hashes.astype("<u8", copy=False).tobytes()
    ids = [blake2b(raw[at : at + 8], digest_size=ID_BYTES, key=key).digest() for at in range(0, len(raw), 8)]
    fields: dict[str, object] = {
        "timestamp": round((request.arrived_s - started_s) * 1000, 3),
        "input_length": request.prompt_tokens,
        "output_length": request.output_tokens(),
        "hash_ids": [int.from_bytes(each, "little") for each in ids],
        "block_size": request.block_size,
    }
    if request.predicted_s is not None and request.first_token_s is not None:
        fields["predicted_ttft_ms"] = round((request.predicted_s - request.arrived_s) * 1000, 3)
        fields["ttft_ms"] = round((request.first_token_s - request.arrived_s) * 1000, 3)
    if request.session:
        fields["session_id"] = request.session
    if request.tenant:
        fields["tenant"] = request.tenant
    if request.priority:
        fields["priority"] = request.priority
    return json.dumps(fields).encode() + b"\n"


class TraceRecorder:
    """Writes lines in a thread of its own; record() never waits.

    What is past a bound is left out, counted and warned of once: requests of another block size than the first one's
    (a trace has one), those that find MAX_PENDING others waiting, and all after max_bytes or an error of the disk.
    """

    def __init__(self, file: IO[bytes], started_s: float, *, max_bytes: int = MAX_BYTES) -> None:
        self.written = 0
        self.left_out = 0
        self._file = file
        self._started_s = started_s
        self._bytes_left = max_bytes
        self._block_size: int | None = None
        self._full = False
        self._counting = threading.Lock()  # both threads leave requests out
        self._key = secrets.token_bytes(32)
        self._pending: queue.Queue[RecordedRequest | None] = queue.Queue(MAX_PENDING)
        self._thread = threading.Thread(target=self._write, name="trace-recorder", daemon=True)
        self._thread.start()

    def record(self, request: RecordedRequest) -> None:
        """Take a request that has ended. To be called from one thread."""
        if self._block_size is None:
            self._block_size = request.block_size
        if request.block_size != self._block_size:
            self._leave_out(f"blocks of {request.block_size} tokens, others have {self._block_size}")
            return
        if self._full:
            self._leave_out("")
            return
        try:
            self._pending.put_nowait(request)
        except queue.Full:
            self._leave_out("the disk is too slow")

    def close(self) -> None:
        """Write what is pending, and end."""
        self._pending.put(None)
        self._thread.join()
        logger.info("trace recorded: %d requests written, %d left out", self.written, self.left_out)

    def _leave_out(self, why: str) -> None:
        with self._counting:
            self.left_out += 1
            first = self.left_out == 1
        if first:
            logger.warning("the recorded trace is not complete: %s", why)

    def _write(self) -> None:
        while (request := self._pending.get()) is not None:
            if self._full:
                self._leave_out("")
                continue
            try:
                line = trace_line(request, self._started_s, self._key)
                self._bytes_left -= len(line)
                if self._bytes_left >= 0:
                    self._file.write(line)
                    if self._pending.empty():
                        self._file.flush()
                    self.written += 1
                    continue
                why = "it has reached its greatest size"
            except Exception as error:  # whatever it is: requests go on
                why = str(error)
            self._leave_out(why)
            self._full = True


@contextmanager
def recording_trace(path: Path | None, started_s: float) -> Iterator[TraceRecorder | None]:
    """A recorder to a new file, closed on leaving; None without a path. Raises InvalidRequest for a file that exists
    or cannot be written."""
    if path is None:
        yield None
        return
    try:
        file = open(path, "xb")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise InvalidRequest("record_trace", str(path), f"a new file that can be written ({error})") from None
    with file:
        recorder = TraceRecorder(file, started_s)
        try:
            yield recorder
        finally:
            recorder.close()
