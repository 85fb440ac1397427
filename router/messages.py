"""The core's values as messages of the wire, and back."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

from kv_events.view import WorkerView
from radix.hashing import BlockHasher, derive_salt
from radix.keys import Hashes, Tokens, hashes_of
from rhizome import validate
from rhizome.errors import InvalidRequest
from rhizome.v1 import fleet_pb2, router_pb2, worker_pb2
from router.candidates import Candidate
from router.decision import Decision
from router.fleet import Member, ModelCard, PullCounts, WorkerInfo, WorkerReport, parse_role
from router.prediction_errors import PredictionSummary
from router.request import RouteRequest
from router.tokenizing import PromptTokenizer

_REPEATED = ("prefilled_request_ids", "finished_request_ids", "pull_counts")
_CANDIDATE_FIELDS = tuple(field.name for field in router_pb2.Candidate.DESCRIPTOR.fields)
_COUNTERS = tuple(field.name for field in fields(WorkerReport) if field.name not in _REPEATED)
_PULL_COUNTS = tuple(field.name for field in fields(PullCounts))
# Transports in one status: a worker has a handful, and more from the wire would be kept for as long as it is a member.
MAX_TRANSPORTS = 16


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that was checked, tokenized and hashed: for the core, and for the worker."""

    route: RouteRequest
    message: worker_pb2.WorkerGenerateRequest


def prepare(
    request: router_pb2.GenerateRequest,
    card: ModelCard,
    tokenizer: PromptTokenizer | None,
    secret: bytes,
    *,
    streamed: bool,
) -> PreparedRequest:
    """Check, tokenize and hash a request for the model of `card`, under the fleet's secret.

    Touches no shared state. Raises InvalidRequest.
    """
    validate.check_tenant(request.tenant)
    tokens = _tokens(request, card, tokenizer)
    validate.check_prompt_length(len(tokens), card.max_model_len)
    validate.check_token_ids(tokens, card.vocab_size)
    validate.check_sampling(
        request.sampling, vocab_size=card.vocab_size, prompt_tokens=len(tokens), max_model_len=card.max_model_len
    )
    hasher = _hasher(card.name, card.block_size, secret)
    keys = hasher.keys(tokens)
    request_id = request.request_id or uuid.uuid4().hex
    route = RouteRequest(
        request_id=request_id,
        model=card.name,
        prompt_tokens=len(tokens),
        hashes=hashes_of(keys),
        sequences=max(1, request.sampling.n),
        policy=request.policy,
        session=request.session_id,
        tenant=request.tenant,
        priority=request.priority,
        bypass_prefix_cache=request.bypass_prefix_cache,
        streamed=streamed,
    )
    message = worker_pb2.WorkerGenerateRequest(
        request_id=request_id,
        model=card.name,
        token_ids=tokens.astype("<u4", copy=False).tobytes(),
        sampling=request.sampling,
        priority=request.priority,
        salt=hasher.salt,
        block_keys=keys.astype("<u8", copy=False).tobytes(),
        bypass_prefix_cache=request.bypass_prefix_cache,
    )
    return PreparedRequest(route, message)


def _tokens(request: router_pb2.GenerateRequest, card: ModelCard, tokenizer: PromptTokenizer | None) -> Tokens:
    match request.WhichOneof("prompt"):
        case "text" if tokenizer:
            if not request.text:  # of which many a tokenizer would make a BOS
                raise InvalidRequest("prompt", "", "it must not be empty")
            return tokenizer.encode(request.text, card.max_model_len)
        case "chat" if tokenizer:
            messages = [{"role": m.role, "content": m.content} for m in request.chat.messages]
            return tokenizer.encode_chat(messages, card.max_model_len)
        case "token_ids":
            ids, packed = request.token_ids.ids, request.token_ids.packed
            if ids and packed:
                raise InvalidRequest("token_ids", "ids and packed", "one of the two")
            if len(packed) % 4:
                raise InvalidRequest("token_ids.packed", f"{len(packed)} bytes", "4 bytes for each token")
            return np.frombuffer(packed, "<u4").astype(np.uint32) if packed else np.array(ids, np.uint32)
        case _:
            raise InvalidRequest("prompt", "", "text, chat or token_ids is needed")


@lru_cache(maxsize=256)
def _hasher(model: str, block_size: int, secret: bytes) -> BlockHasher:
    return BlockHasher(block_size, derive_salt(model), secret)


def worker_info(request: fleet_pb2.RegisterRequest) -> WorkerInfo:
    """A registration in the core's words. Raises InvalidRequest for an unknown role."""
    card = request.model
    return WorkerInfo(
        worker_id=request.worker_id,
        epoch=request.epoch,
        address=request.address,
        role=parse_role(request.role),
        model=ModelCard(card.name, card.max_model_len, card.vocab_size, card.block_size, card.tokenizer_sha256),
        blocks_total=request.blocks_total,
        max_running=request.max_running,
        max_waiting=request.max_waiting,
        max_batched_tokens=request.max_batched_tokens,
        events_url=request.events_url,
        fetch_token_s=request.fetch_token_s,
        transfer_offers=tuple(request.transfer_offers),
    )


def worker_report(status: worker_pb2.WorkerStatus) -> WorkerReport:
    """A status in the core's words."""
    return WorkerReport(
        **{name: getattr(status, name) for name in _COUNTERS},
        pull_counts=tuple(
            PullCounts(**{name: getattr(counts, name) for name in _PULL_COUNTS})
            for counts in status.pull_counts[:MAX_TRANSPORTS]
        ),
        prefilled_request_ids=tuple(status.prefilled_request_ids),
        finished_request_ids=tuple(status.finished_request_ids),
    )


def worker_entry(member: Member, now: float) -> router_pb2.WorkerEntry:
    """What the fleet knows of a worker; load and index are the caller's to add."""
    info = member.info
    entry = router_pb2.WorkerEntry(
        worker_id=info.worker_id,
        epoch=info.epoch,
        address=info.address,
        role=fleet_pb2.WorkerRole.ValueType(info.role),
        draining=member.draining,
        events_url=info.events_url,
        lease_left_s=max(0.0, member.lease_until - now),
        model=fleet_pb2.ModelCard(
            name=info.model.name,
            max_model_len=info.model.max_model_len,
            vocab_size=info.model.vocab_size,
            block_size=info.model.block_size,
            tokenizer_sha256=info.model.tokenizer_sha256,
        ),
    )
    if member.report is not None:
        counters = {name: getattr(member.report, name) for name in _COUNTERS}
        entry.status.CopyFrom(worker_pb2.WorkerStatus(worker_id=info.worker_id, epoch=info.epoch, **counters))
        for counts in member.report.pull_counts:
            entry.status.pull_counts.add(**{name: getattr(counts, name) for name in _PULL_COUNTS})
    return entry


def observed_entry(worker_id: str, events_url: str) -> router_pb2.WorkerEntry:
    """A worker that is indexed and did not register; its index is the caller's to add."""
    return router_pb2.WorkerEntry(worker_id=worker_id, role=fleet_pb2.WORKER_ROLE_OBSERVED, events_url=events_url)


def add_index(entry: router_pb2.WorkerEntry, view: WorkerView, blocks: int) -> None:
    """Fill in what the index knows of a worker: its view, which has so many blocks."""
    counts = view.counts
    entry.indexed_blocks = blocks
    entry.index_digest = view.digest
    entry.next_event_seq = view.position()[1]
    entry.index_synced = view.synced
    entry.resyncs = counts.resyncs
    entry.events_applied = counts.applied
    entry.events_duplicate = counts.duplicates
    entry.events_stale = counts.stale
    entry.event_gaps = counts.gaps
    entry.digest_mismatches = counts.mismatches
    entry.events_malformed = counts.malformed


def predictions_message(summary: PredictionSummary) -> router_pb2.Predictions:
    """How good predictions were."""
    return router_pb2.Predictions(**summary._asdict())


def explanation_message(decision: Decision, hashes: Hashes) -> router_pb2.Decision:
    """A decision with all its candidates, the prompt's block hashes, and who else holds how much of it."""
    message = _decision_message(decision, decision.candidates)
    message.block_hashes = hashes.astype("<u8", copy=False).tobytes()
    message.decode_worker_id = decision.goes_on
    for overlap in decision.observed:
        message.observed.add(worker_id=overlap.worker_id, cached_tokens=overlap.cached_tokens)
    return message


def decision_message(decision: Decision) -> router_pb2.Decision:
    """A decision with the chosen candidate and the next best."""
    return _decision_message(decision, decision.nearest())


def _decision_message(decision: Decision, candidates: Sequence[Candidate]) -> router_pb2.Decision:
    return router_pb2.Decision(
        worker_id=decision.worker_id,
        policy=decision.policy,
        reason=decision.reason,
        prompt_tokens=decision.prompt_tokens,
        candidates=[_candidate_message(candidate) for candidate in candidates],
        held_s=decision.held_s,
    )


def _candidate_message(candidate: Candidate) -> router_pb2.Candidate:
    return router_pb2.Candidate(**{name: getattr(candidate, name) for name in _CANDIDATE_FIELDS})
