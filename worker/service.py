"""The worker's gRPC server: Worker and KvEvents over one engine."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass

import grpc
import numpy as np

from kv_events.bus.grpc import KvEventsService
from radix.hashing import SALT_BYTES, BlockHasher, derive_salt
from radix.keys import KEY_BYTES, keys_from_bytes
from rhizome import rpc, ticket, validate
from rhizome.errors import InvalidRequest, NotServed, RhizomeError
from rhizome.v1 import fleet_pb2, generation_pb2, worker_pb2
from worker.answer import FinishReason
from worker.engine import EngineStatus, Output
from worker.engine_thread import EngineThread
from worker.peers import PeerBlocks
from worker.plan import SamplingParams
from worker.sequence import EngineRequest

FILE_CHUNK_BYTES = 2**20

_FINISH_REASONS = {
    FinishReason.STOP: generation_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: generation_pb2.FINISH_REASON_LENGTH,
}


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """Who this worker is, and what it serves."""

    worker_id: str
    epoch: int
    model: fleet_pb2.ModelCard
    tokenizer_files: dict[str, bytes]
    secret: bytes = b""


class WorkerService:
    """Requests to the engine's thread, its outputs back as chunks."""

    def __init__(
        self,
        identity: WorkerIdentity,
        thread: EngineThread,
        wall_ms: Callable[[], int],
        peers: PeerBlocks | None = None,
    ) -> None:
        """`peers`: for requests that say from whom to pull what they need."""
        self._identity = identity
        self._thread = thread
        self._peers = peers
        self._wall_ms = wall_ms
        salt = derive_salt(identity.model.name)
        self._own_hasher = BlockHasher(identity.model.block_size, salt, identity.secret)

    async def generate(self, request: worker_pb2.WorkerGenerateRequest, context: rpc.Context) -> None:
        """Stream a request's chunks. When the call ends before, whoever ended it, so does the request."""
        engine_request = self._parse(request)
        if request.pull_ticket and self._peers is not None:
            await self._peers.fetch(engine_request, request.pull_ticket)
        outputs: asyncio.Queue[Output | RhizomeError] = asyncio.Queue()  # bounded by the request's max_tokens
        loop = asyncio.get_running_loop()

        def listener(item: Output | RhizomeError) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(outputs.put_nowait, item)

        self._thread.submit(engine_request, listener)
        try:
            first = True
            while True:
                output = await outputs.get()
                if isinstance(output, RhizomeError):
                    raise output
                await context.write(self._chunk(output, first=first).SerializeToString())
                first = False
                if output.request_finished:
                    return
        finally:
            # A client that went away, or its deadline: the blocks are free before the next step.
            self._thread.cancel(engine_request.request_id, listener)

    async def get_status(self, request: worker_pb2.GetStatusRequest, context: rpc.Context) -> worker_pb2.WorkerStatus:
        """As of the last step."""
        return status_message(self._identity, self._thread.status)

    async def get_tokenizer(self, request: worker_pb2.GetTokenizerRequest, context: rpc.Context) -> None:
        """The tokenizer's files in pieces."""
        for name, data in sorted(self._identity.tokenizer_files.items()):
            for at in range(0, max(len(data), 1), FILE_CHUNK_BYTES):
                piece = worker_pb2.FileChunk(name=name, data=data[at : at + FILE_CHUNK_BYTES])
                await context.write(piece.SerializeToString())

    async def clear_cache(
        self, request: worker_pb2.ClearCacheRequest, context: rpc.Context
    ) -> worker_pb2.ClearCacheResponse:
        """Between two steps."""
        blocks = await asyncio.wrap_future(self._thread.call(self._thread.engine.clear_cache))
        return worker_pb2.ClearCacheResponse(blocks=blocks)

    def _parse(self, request: worker_pb2.WorkerGenerateRequest) -> EngineRequest:
        """Check everything, then build the engine's request."""
        model = self._identity.model
        validate.check_request_id(request.request_id)
        if request.model not in ("", model.name):
            raise NotServed(f"model {request.model!r} is not served here; {model.name!r} is")
        if len(request.token_ids) % 4:
            raise InvalidRequest("token_ids", len(request.token_ids), "bytes: 4 for each token")
        prompt_tokens = len(request.token_ids) // 4
        validate.check_prompt_length(prompt_tokens, model.max_model_len)
        tokens = np.frombuffer(request.token_ids, "<u4")
        validate.check_token_ids(tokens, model.vocab_size)
        sampling = request.sampling
        validate.check_sampling(
            sampling, vocab_size=model.vocab_size, prompt_tokens=prompt_tokens, max_model_len=model.max_model_len
        )
        answered = _answered(request, model.vocab_size, model.max_model_len - prompt_tokens)
        hasher, keys = self._own_hasher, None
        identity = self._identity
        signed = ticket.has_valid_ticket(identity.secret, request, identity.worker_id, identity.epoch, self._wall_ms())
        if signed:
            if len(request.salt) != SALT_BYTES:
                raise InvalidRequest("salt", len(request.salt), f"{SALT_BYTES} bytes")
            full_blocks = prompt_tokens // model.block_size
            if len(request.block_keys) != KEY_BYTES * full_blocks:
                raise InvalidRequest(
                    "block_keys", len(request.block_keys), f"bytes: {KEY_BYTES} for each of {full_blocks} blocks"
                )
            hasher = BlockHasher(model.block_size, request.salt, identity.secret)
            keys = keys_from_bytes(request.block_keys)
        return EngineRequest(
            request_id=request.request_id or uuid.uuid4().hex,
            token_ids=tokens.tolist(),
            params=_sampling_params(sampling, model.max_model_len - prompt_tokens),
            hasher=hasher,
            keys=hasher.keys(tokens) if keys is None else keys,
            priority=request.priority,
            bypass_prefix_cache=request.bypass_prefix_cache,
            answered=answered,
            answered_cached_tokens=request.answered_cached_tokens
            if request.HasField("answered_cached_tokens")
            else None,
            hold=request.hold and (signed or not identity.secret),  # it keeps blocks from others
        )

    def _chunk(self, output: Output, *, first: bool) -> generation_pb2.GenerateChunk:
        chunk = generation_pb2.GenerateChunk(index=output.choice, token_ids=[output.token.token_id], text=output.text)
        if output.token.logprob is not None:
            logprob = chunk.logprobs.add(token_id=output.token.token_id, logprob=output.token.logprob)
            for token_id, value in output.token.top:
                logprob.top.add(token_id=token_id, logprob=value)
        if first:
            chunk.worker_id = self._identity.worker_id
        if output.ticket:
            chunk.transfer_ticket = output.ticket
        if output.finish_reason is not None:
            chunk.finish_reason = _FINISH_REASONS[output.finish_reason]
        if first or output.finish_reason is not None:
            chunk.usage.prompt_tokens = output.prompt_tokens
            chunk.usage.cached_tokens = output.cached_tokens
            chunk.usage.completion_tokens = output.completion_tokens
        return chunk


def _answered(request: worker_pb2.WorkerGenerateRequest, vocab_size: int, room: int) -> tuple[int, ...]:
    """The tokens that were delivered before. Without the first part's seed only a greedy answer can go on."""
    if not request.answered:
        return ()
    if len(request.answered) % 4:
        raise InvalidRequest("answered", len(request.answered), "bytes: 4 for each token")
    tokens = np.frombuffer(request.answered, "<u4")
    if len(tokens) >= room:
        raise InvalidRequest("answered", f"{len(tokens)} tokens", f"below the {room} that the model leaves room for")
    if tokens.max() >= vocab_size:
        raise InvalidRequest("answered", int(tokens.max()), f"0 to {vocab_size - 1}")
    sampling = request.sampling
    greedy = sampling.HasField("temperature") and sampling.temperature == 0.0
    if not greedy and not sampling.HasField("seed"):
        raise InvalidRequest("sampling.seed", None, "the one of the tokens in `answered`")
    return tuple(tokens.tolist())


def _sampling_params(sampling: generation_pb2.SamplingParams, room: int) -> SamplingParams:
    """A checked message in the engine's words. Without a seed a random one is drawn."""
    return SamplingParams(
        max_tokens=sampling.max_tokens or room,
        temperature=sampling.temperature if sampling.HasField("temperature") else 1.0,
        top_k=sampling.top_k,
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        min_p=sampling.min_p,
        seed=sampling.seed if sampling.HasField("seed") else secrets.randbits(64),
        min_tokens=sampling.min_tokens,
        stop=tuple(sampling.stop),
        stop_token_ids=frozenset(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        n=sampling.n or 1,
    )


def status_message(identity: WorkerIdentity, status: EngineStatus) -> worker_pb2.WorkerStatus:
    """An engine's status as it goes over the wire."""
    times, transfers = status.times, status.transfers
    return worker_pb2.WorkerStatus(
        worker_id=identity.worker_id,
        epoch=identity.epoch,
        running=status.running,
        waiting=status.waiting,
        blocks_total=status.blocks_total,
        blocks_in_use=status.blocks_in_use,
        blocks_cached=status.blocks_cached,
        prefill_tokens_outstanding=status.prefill_tokens_outstanding,
        prefill_steps=times.prefill_steps,
        prefill_tokens=times.prefill_tokens,
        prefill_s=times.prefill_s,
        decode_steps=times.decode_steps,
        decode_tokens=times.decode_tokens,
        decode_s=times.decode_s,
        prefill_attention=times.prefill_attention,
        prefill_decodes=times.prefill_decodes,
        prefill_context=times.prefill_context,
        decode_context=times.decode_context,
        preemptions=status.preemptions,
        prompt_tokens=status.prompt_tokens,
        cached_prompt_tokens=status.cached_prompt_tokens,
        host_cached_prompt_tokens=status.host_cached_prompt_tokens,
        next_event_seq=status.next_event_seq,
        pulls=transfers.pulls,
        pulls_short=transfers.pulls_short,
        pulled_blocks=transfers.pulled_blocks,
        pulled_bytes=transfers.pulled_bytes,
        pull_transport=transfers.pull_transport,
        lent_blocks=transfers.lent_blocks,
        pull_skipped_blocks=transfers.skipped_blocks,
        pull_counts=[
            worker_pb2.PullCounts(transport=name, **asdict(counts)) for name, counts in transfers.pulls_by_transport
        ],
        fetch_token_s=transfers.fetch_token_s,
    )


@asynccontextmanager
async def running_server(
    identity: WorkerIdentity,
    thread: EngineThread,
    host: str,
    port: int,
    peers: PeerBlocks | None = None,
    *,
    handlers: Sequence[grpc.GenericRpcHandler] = (),
) -> AsyncIterator[str]:
    """Serve the engine behind `thread`, which pulls through `peers`, and what else `handlers` are for; yields the bound
    address."""
    server = grpc.aio.server(options=rpc.SERVER_OPTIONS)
    service = WorkerService(identity, thread, wall_ms=lambda: int(time.time() * 1000), peers=peers)
    methods = {
        "Generate": rpc.streaming(worker_pb2.WorkerGenerateRequest, service.generate),
        "GetStatus": rpc.unary(worker_pb2.GetStatusRequest, service.get_status),
        "GetTokenizer": rpc.streaming(worker_pb2.GetTokenizerRequest, service.get_tokenizer),
        "ClearCache": rpc.unary(worker_pb2.ClearCacheRequest, service.clear_cache),
    }
    events = KvEventsService(thread.engine.event_log)
    worker = grpc.method_handlers_generic_handler("rhizome.v1.Worker", methods)
    server.add_generic_rpc_handlers((worker, events.handler(), *handlers))
    async with rpc.serving(server, host, port, ("rhizome.v1.Worker", "rhizome.v1.KvEvents")) as address:
        try:
            yield address
        finally:
            # Event streams end by themselves, and do not hold up the server's end.
            thread.engine.event_log.close()
