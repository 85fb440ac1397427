"""What goes over ZeroMQ, frame by frame: vLLM's framing, and what our own readers ask besides. Pure.

    PUB                [topic, seq, payload]                        seq: 8 bytes, big-endian
    DEALER -> ROUTER   [empty, seq]                                 all kept batches from seq on, please
    ROUTER -> DEALER   [empty, topic, seq, payload] ...             then the end: [empty, empty, ff*8, empty]

That much is vLLM's (SGLang's, too); older releases leave the topic out. A ROUTER of ours takes further requests:

    DEALER -> ROUTER   [empty, PROBE]                               are you one of ours? (others: a seq never reached)
    DEALER -> ROUTER   [empty, MAGIC, number, request]              `number` names the request in its answer
    ROUTER -> DEALER   [empty, MAGIC, number, answer, part ...]     parts: batches, or a piece of a snapshot

`request` is msgpack of [0, *StateRequest], [1, *ReplayRequest] or [2, *SnapshotRequest], `answer` of [*Answer].
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from enum import StrEnum
from typing import Any, TypeAlias

import msgpack

from kv_events.snapshot_bytes import MAX_SNAPSHOT_BYTES
from kv_events.wire import MAX_COUNT, MAX_STRING_BYTES, WireError

MAGIC = b"rhizome/1"
NUMBER_BYTES = 8
END = b"\xff" * NUMBER_BYTES
PROBE = b"\xff" * (NUMBER_BYTES - 1) + b"\xfe"
END_OF_REPLAY = [b"", b"", END, b""]

PROOF_PREFIX = b"\0rhizome/"
"""Topics that begin so are subscribed to by readers of ours, and never published under: once the publisher has seen
such a subscription, all that came before it on the same connection are in force."""
MAX_PROOF_BYTES = 64

FOR_OTHERS = b"\x93"
"""How a batch begins that is published without our own fields: an array of three. (Ours have eight or more.)"""

MAX_REQUEST_BYTES = 256
MAX_DETAIL_BYTES = 512
MAX_ANSWER_BYTES = MAX_REQUEST_BYTES + MAX_DETAIL_BYTES + MAX_STRING_BYTES
MAX_TOKEN = 2**62


def topic_of(worker: str, model: str) -> str:
    """Where tools of vLLM's ecosystem look for a worker's events."""
    return f"kv@{worker}@{model}"


def worker_in(topic: bytes) -> str:
    """The worker that a topic names; empty when it names none."""
    parts = topic.decode(errors="replace").split("@")
    return parts[1] if len(parts) >= 3 and parts[0] == "kv" else ""


def number_bytes(number: int) -> bytes:
    """A sequence or request number on the wire."""
    return number.to_bytes(NUMBER_BYTES, "big")


def number_of(frame: bytes) -> int:
    """Raises WireError for what is no number."""
    if len(frame) != NUMBER_BYTES:
        raise WireError(f"a number has {len(frame)} bytes: {NUMBER_BYTES} are needed")
    return int.from_bytes(frame, "big")


@dataclass(frozen=True, slots=True)
class ForeignReplay:
    """What vLLM's consumers ask: all that is kept from `from_seq` on."""

    from_seq: int


@dataclass(frozen=True, slots=True)
class StateRequest:
    """Where does the log stand, and is the subscription to the topic `proof` known?"""

    proof: bytes = b""


@dataclass(frozen=True, slots=True)
class ReplayRequest:
    """The next batches from `from_seq` on, as many as one answer holds."""

    epoch: int
    from_seq: int


@dataclass(frozen=True, slots=True)
class SnapshotRequest:
    """A piece of a snapshot's bytes: of a fresh one where `token` is 0, else of the one of that token."""

    token: int = 0
    offset: int = 0


Request: TypeAlias = ForeignReplay | StateRequest | ReplayRequest | SnapshotRequest


class Status(StrEnum):
    """How a request went."""

    OK = "ok"
    CONFLICT = "conflict"  # another epoch, or a position that was not reached
    TRIMMED = "trimmed"
    BUSY = "busy"


@dataclass(frozen=True, slots=True)
class Answer:
    """To any request of ours."""

    status: Status
    detail: str  # of an error
    worker: str
    epoch: int
    next_seq: int  # of the log: the first batch that there is not yet
    closed: bool  # the worker has said goodbye; nothing follows next_seq
    proven: bool  # the subscription that was asked about is in force
    token: int = 0  # of the snapshot
    total: int = 0  # bytes of the snapshot


def encode_request(number: int, request: Request) -> list[bytes]:
    """The frames that a DEALER sends."""
    if isinstance(request, ForeignReplay):
        return [b"", number_bytes(request.from_seq)]
    kind = _KINDS.index(type(request))
    return [b"", MAGIC, number_bytes(number), msgpack.packb([kind, *astuple(request)])]


def decode_request(frames: list[bytes]) -> tuple[int, Request]:
    """A request's number and itself, from the frames after the asker's identity. Raises WireError."""
    if frames == [b"", PROBE]:
        return 0, StateRequest()
    if len(frames) == 2 and frames[0] == b"":
        return 0, ForeignReplay(number_of(frames[1]))
    if len(frames) != 4 or frames[:2] != [b"", MAGIC]:
        raise WireError("neither a replay request nor one of ours")
    kind, *values = _unpacked(frames[3], MAX_REQUEST_BYTES)
    if type(kind) is not int or not 0 <= kind < len(_KINDS):
        raise WireError(f"a request of the unknown kind {kind!r}")
    return number_of(frames[2]), _KINDS[kind](*_checked(_KINDS[kind], values))


def encode_answer(number: int, answer: Answer, parts: list[bytes]) -> list[bytes]:
    """The frames that a ROUTER sends, after the asker's identity."""
    return [b"", MAGIC, number_bytes(number), msgpack.packb(list(astuple(answer))), *parts]


def decode_answer(frames: list[bytes]) -> tuple[int, Answer, list[bytes]]:
    """The number of the request, its answer and the parts. Raises WireError for anything else."""
    if len(frames) < 4 or frames[:2] != [b"", MAGIC]:
        raise WireError("not an answer of ours")
    values = _checked(Answer, _unpacked(frames[3], MAX_ANSWER_BYTES))
    return number_of(frames[2]), Answer(Status(values[0]), *values[1:]), frames[4:]


def goodbye(epoch: int, next_seq: int) -> bytes:
    """The payload that ends a worker's stream: to vLLM's consumers a batch without events."""
    payload: bytes = msgpack.packb([0.0, [], 0, 0, "goodbye", epoch, next_seq])
    return payload


def is_goodbye(payload: bytes, epoch: int, next_seq: int) -> bool:
    """Whether a payload ends this stream. Batches of ours have version 1 where this has 0."""
    return len(payload) < 64 and payload == goodbye(epoch, next_seq)


_KINDS: list[Any] = [StateRequest, ReplayRequest, SnapshotRequest]

_LIMITS: dict[str, tuple[int, int]] = {
    "epoch": (0, MAX_COUNT),
    "from_seq": (0, MAX_COUNT),
    "next_seq": (0, MAX_COUNT),
    "token": (0, MAX_TOKEN),
    "offset": (0, MAX_SNAPSHOT_BYTES),
    "total": (0, MAX_SNAPSHOT_BYTES),
    "proof": (0, MAX_PROOF_BYTES),
    "worker": (1, MAX_STRING_BYTES),
    "detail": (0, MAX_DETAIL_BYTES),
}
_TYPES: dict[str, type] = {"int": int, "str": str, "bytes": bytes, "bool": bool, "Status": str}


def _unpacked(frame: bytes, limit: int) -> list[Any]:
    if len(frame) > limit:
        raise WireError(f"a header has {len(frame)} bytes: at most {limit}")
    try:
        value = msgpack.unpackb(frame, max_map_len=0, max_ext_len=0)
    except (msgpack.UnpackException, ValueError, RecursionError) as error:
        raise WireError(f"not msgpack: {type(error).__name__} {error}") from error
    if type(value) is not list or not value:
        raise WireError("a header is no array")
    return value


def _checked(kind: Any, values: list[Any]) -> list[Any]:
    """As many of `values` as `kind` has fields, each of its type and within its limits; more may follow them."""
    wanted = fields(kind)
    if len(values) < len(wanted):
        raise WireError(f"{kind.__name__} has {len(values)} fields: {len(wanted)} are needed")
    for field, value in zip(wanted, values, strict=False):
        if type(value) is not _TYPES[str(field.type)]:
            raise WireError(f"{field.name} is of type {type(value).__name__}: {field.type} is needed")
        if field.type == "Status":
            if value not in list(Status):
                raise WireError(f"the unknown status {value!r:.40}")
        elif field.name in _LIMITS:
            low, high = _LIMITS[field.name]
            size = _size(value)
            if not low <= size <= high:
                raise WireError(f"{field.name} is {size}: {low} to {high}")
    return values[: len(wanted)]


def _size(value: Any) -> int:
    return value if isinstance(value, int) else len(value.encode(errors="replace") if isinstance(value, str) else value)
