"""Answers on their way from workers to clients: over one worker, or begun at one and continued at the next."""

from __future__ import annotations

import logging
import secrets
import time
from dataclasses import dataclass, field

import grpc

from rhizome import rpc, ticket
from rhizome.errors import Unavailable
from rhizome.v1 import generation_pb2, worker_pb2
from router.core import Router
from router.decision import Decision
from router.dispatcher import Dispatcher
from router.links import Links, WorkerLink
from router.messages import PreparedRequest
from router.pull_tickets import pull_ticket
from router.request import RouteRequest
from router.trace_recorder import RecordedRequest

logger = logging.getLogger(__name__)

MAX_WORKERS_LOST = 3  # by one request
WOULD_NOT = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.ALREADY_EXISTS)  # its queue is full; not yet forgotten
STATUS_DETAILS = "grpc-status-details-bin"


class WorkerLost(Unavailable):
    """A worker went away while it served a request, or would not go on with what another began."""

    def __init__(self, link: WorkerLink, what: str, delivered: int, details: str) -> None:
        where = f"worker {link.info.worker_id} at {link.info.address}"
        super().__init__(f"{where} {what} after {delivered} chunks of the answer: {details}")


@dataclass(slots=True)
class Answer:
    """One request, and what its client has of the answer so far."""

    route: RouteRequest
    message: worker_pb2.WorkerGenerateRequest
    context: rpc.Context
    seen: RecordedRequest | None
    placed: bool = False  # the router counts it as a worker's
    delivered: int = 0  # chunks
    ended: bool = False
    # Of one that a prefill worker begins, whose chunks are read on their way.
    begun: bool = False
    tokens: bytearray = field(default_factory=bytearray)  # delivered ones, little-endian uint32
    lender: str = ""  # who holds the prompt's blocks for whoever goes on ...
    ticket: bytes = b""  # ... and shows this
    refused_by: set[str] = field(default_factory=set)  # workers that would not go on

    def begin(self, room: int) -> None:
        """A prefill worker begins it: whoever goes on must sample as that one would have, and end with the model's
        length, of which `room` tokens are left, as all workers would."""
        self.begun = self.message.hold = True
        sampling = self.message.sampling
        sampling.max_tokens = min(sampling.max_tokens or room, room)
        greedy = sampling.HasField("temperature") and sampling.temperature == 0.0
        if not greedy and not sampling.HasField("seed"):
            sampling.seed = secrets.randbits(64)

    def go_on(self) -> None:
        """Another worker goes on with it."""
        self.message.hold = False
        self.message.answered = bytes(self.tokens)

    def no_longer_lent(self) -> None:
        """Whoever went on has pulled, or who lent is gone."""
        self.lender, self.ticket = "", b""

    async def deliver(self, chunk: bytes) -> None:
        """Pass on a worker's chunk."""
        if self.begun:
            chunk = self._read(chunk)
        await self.context.write(chunk)
        self.delivered += 1
        if self.seen is not None:
            self.seen.delivered(chunk)

    def _read(self, chunk: bytes) -> bytes:
        """What is needed to go on with it. Returns what the client is to get."""
        told = generation_pb2.GenerateChunk.FromString(chunk)
        self.ended = told.finish_reason != generation_pb2.FINISH_REASON_UNSPECIFIED
        for token_id in told.token_ids:
            self.tokens += token_id.to_bytes(4, "little")
        if not self.delivered:
            self.message.answered_cached_tokens = told.usage.cached_tokens
        if not told.transfer_ticket:
            return chunk
        self.ticket = told.transfer_ticket
        told.ClearField("transfer_ticket")
        return told.SerializeToString()


class Answers:
    """Sends requests to workers, and passes on what they answer."""

    def __init__(self, router: Router, links: Links, dispatcher: Dispatcher, secret: bytes) -> None:
        self._router = router
        self._links = links
        self._dispatcher = dispatcher
        self._secret = secret

    async def answer(self, prepared: PreparedRequest, context: rpc.Context, seen: RecordedRequest | None) -> None:
        """Route, then pass the chunks through.

        While nothing was delivered another worker can take over. What a prefill worker began another goes on with, and
        yet another where that one is lost.
        """
        answer, lost = Answer(prepared.route, prepared.message, context, seen), 0
        try:
            while not answer.ended:
                decision = await self._place(answer)
                try:
                    await self._pass_through(answer, decision)
                except WorkerLost as error:
                    lost += 1
                    if lost == MAX_WORKERS_LOST or (answer.delivered and not answer.begun):
                        raise
                    logger.warning("%s; trying another", error)
        finally:
            self._ended(answer)

    def sign(self, message: worker_pb2.WorkerGenerateRequest, decision: Decision, lent: bytes = b"") -> None:
        """Let the decision's worker serve a request by its keys, and pull what was lent for it, or what it is to fetch
        from a peer."""
        unix_ms = int(time.time() * 1000)
        ticket.sign_request(self._secret, message, decision.worker_id, decision.epoch, unix_ms)
        message.pull_ticket = lent or pull_ticket(self._secret, message, decision, self._router.fleet, unix_ms)

    async def _place(self, answer: Answer) -> Decision:
        """Who begins with it, or goes on."""
        if answer.delivered:
            decision = self._router.hand_over(
                answer.route, time.monotonic(), answer.lender if answer.ticket else "", answer.refused_by
            )
            self._dispatcher.changed()
            answer.go_on()
        else:
            self._ended(answer)  # at a worker that was lost
            decision = await self._dispatcher.place(answer.route)
            answer.placed = True
            if answer.seen is not None:
                answer.seen.predicted_s = time.monotonic() + decision.predicted_ttft_s
            if decision.begins:
                card = self._router.card(answer.route.model)
                answer.begin(card.max_model_len - answer.route.prompt_tokens)
            else:
                answer.begun = answer.message.hold = False
        self.sign(answer.message, decision, answer.ticket)
        return decision

    def _ended(self, answer: Answer) -> None:
        if answer.placed:  # else the id may be another's
            self._router.finish(answer.route.request_id, time.monotonic())
            self._dispatcher.changed()
            answer.placed = False

    async def _pass_through(self, answer: Answer, decision: Decision) -> None:
        link, context = self._links[decision.worker_id], answer.context
        before = answer.delivered
        # When the client goes away this coroutine is cancelled, and the call to the worker with it.
        call = link.generate(answer.message, timeout=context.time_remaining())
        try:
            with link.stream():
                async for chunk in call:
                    if answer.delivered == before:
                        await self._first_chunk(answer, decision)
                    await answer.deliver(chunk)
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                self._router.set_unreachable(link.info.worker_id, link.info.epoch)
                if link.info.worker_id == answer.lender:
                    answer.no_longer_lent()
                raise WorkerLost(link, "went away", answer.delivered, error.details() or "") from error
            if answer.begun and answer.delivered and error.code() in WOULD_NOT:
                answer.refused_by.add(link.info.worker_id)
                raise WorkerLost(link, "would not go on", answer.delivered, error.details() or "") from error
            details = [(key, value) for key, value in error.trailing_metadata() or () if key == STATUS_DETAILS]
            await context.abort(error.code(), error.details() or "", tuple(details))
        finally:
            call.cancel()
        if not answer.message.hold:
            answer.ended = True
        elif not answer.delivered:
            raise WorkerLost(link, "ended", 0, "it was to begin the answer")

    async def _first_chunk(self, answer: Answer, decision: Decision) -> None:
        """The worker has begun."""
        now = time.monotonic()
        self._router.first_token(answer.route.request_id, now)
        self._dispatcher.changed()
        if answer.delivered:
            answer.no_longer_lent()
            return
        answer.lender = decision.worker_id if decision.begins else ""
        if answer.seen is not None:
            answer.seen.first_token_s = now
        await answer.context.send_initial_metadata(_metadata(decision))


def _metadata(decision: Decision) -> tuple[tuple[str, str], ...]:
    return (
        ("rhizome-request-id", decision.request_id),
        ("rhizome-worker", decision.worker_id),
        ("rhizome-cached-tokens", str(decision.cached_tokens)),
        ("rhizome-predicted-ttft-ms", f"{decision.predicted_ttft_s * 1000:.1f}"),
    )
