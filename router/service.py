"""The router's gRPC server: Router for clients and operators, Fleet for workers, around one Router core."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import NoReturn

import grpc

from kv_events.bus.redis_registry import parse_registry_url
from radix.tree import DEFAULT_MAX_BLOCKS, DEFAULT_MAX_BLOCKS_PER_WORKER, LARGEST_MAX_BLOCKS
from rhizome import rpc, ticket, validate
from rhizome.errors import InvalidRequest, Unavailable
from rhizome.v1 import fleet_pb2, router_pb2, worker_pb2
from router.answers import Answers
from router.core import Router
from router.disagg import LOCAL_PREFILL_S
from router.dispatcher import Dispatcher
from router.fleet import HEARTBEATS_PER_LEASE, LEASE_S
from router.links import Links, WorkerLink, check_events_url
from router.messages import (
    PreparedRequest,
    add_index,
    decision_message,
    explanation_message,
    observed_entry,
    predictions_message,
    prepare,
    worker_entry,
    worker_info,
    worker_report,
)
from router.objective import Objective
from router.observed import Observed, observed_card, observing, parse_observed, warn_of_other_block_sizes
from router.policies import DEFAULT_POLICY
from router.registry import RegistryFollower
from router.trace_recorder import RecordedRequest, TraceRecorder, recording_trace
from router.whole_tree import TreeSender

logger = logging.getLogger(__name__)

EXPIRY_INTERVAL_S = 0.25
INLINE_BYTES = 8192  # a longer request is tokenized and hashed in a thread, so that others do not wait for it
INLINE_PACKED_BYTES = 2**18  # token ids only need to be hashed: 64k of them in a millisecond
CLEAR_TIMEOUT_S = 10.0
INDEX_CHUNK_BLOCKS = 2**16  # 512 KiB


class RouterService:
    """rhizome.v1.Router."""

    def __init__(
        self,
        router: Router,
        links: Links,
        dispatcher: Dispatcher,
        observed: Sequence[Observed],
        secret: bytes,
        recorder: TraceRecorder | None = None,
    ) -> None:
        self._router = router
        self._links = links
        self._dispatcher = dispatcher
        self._observed = observed
        self._secret = secret
        self._recorder = recorder
        self._answers = Answers(router, links, dispatcher, secret)
        self._trees = TreeSender(router.fleet, router.index)

    async def generate(self, request: router_pb2.GenerateRequest, context: rpc.Context) -> None:
        """See Answers.answer."""
        arrived_s = time.monotonic()
        prepared = await self._prepare(request, streamed=True)
        if self._recorder is None:
            await self._answers.answer(prepared, context, None)
            return
        route, card = prepared.route, self._router.card(prepared.route.model)
        seen = RecordedRequest(
            arrived_s, card.block_size, route.prompt_tokens, route.hashes, route.session, route.priority, route.tenant
        )
        try:
            await self._answers.answer(prepared, context, seen)
        finally:
            self._recorder.record(seen)

    async def route(self, request: router_pb2.GenerateRequest, context: rpc.Context) -> router_pb2.RouteResponse:
        """Decide and reserve; the client goes to the worker itself."""
        prepared = await self._prepare(request, streamed=False)
        decision = await self._dispatcher.place(prepared.route)
        self._answers.sign(prepared.message, decision)
        return router_pb2.RouteResponse(
            decision=decision_message(decision), worker_address=decision.address, request=prepared.message
        )

    async def explain(self, request: router_pb2.GenerateRequest, context: rpc.Context) -> router_pb2.Decision:
        """What route would decide; where there are only observed servers, what they hold of the prompt."""
        fleet, observed = self._router.fleet, {server.bus.model for server in self._observed}
        if observed and not fleet.serving(request.model) and (request.model in observed - {""} or not len(fleet)):
            return await self._explain_observed(request)
        prepared = await self._prepare(request, streamed=True)
        return explanation_message(self._router.explain(prepared.route, time.monotonic()), prepared.route.hashes)

    async def _explain_observed(self, request: router_pb2.GenerateRequest) -> router_pb2.Decision:
        card = observed_card(self._observed, request.model)
        if request.WhichOneof("prompt") in ("text", "chat"):
            raise Unavailable(
                f"no worker of model {card.name} is registered, whose tokenizer is needed: ask with token ids instead"
            )
        prepared = await asyncio.to_thread(prepare, request, card, None, self._secret, streamed=False)
        decision = self._router.explain_observed(prepared.route, card.block_size)
        return explanation_message(decision, prepared.route.hashes)

    async def list_workers(
        self, request: router_pb2.ListWorkersRequest, context: rpc.Context
    ) -> router_pb2.ListWorkersResponse:
        """Every registered and every observed worker, with what this router knows of it."""
        timing = self._router.timing
        response = router_pb2.ListWorkersResponse(predictions=predictions_message(timing.errors.summary()))
        now, tree = time.monotonic(), self._router.index.tree
        for member in self._router.fleet.members():
            entry = worker_entry(member, now)
            view = self._router.view(entry.worker_id)
            entry.in_flight = len(self._router.load.of(entry.worker_id).reservations)
            entry.predictions.CopyFrom(predictions_message(timing.errors_of(entry.worker_id).summary()))
            entry.pace = max(timing.of(entry.worker_id).pace)
            add_index(entry, view, tree.count(view.worker_index))
            response.workers.append(entry)
        for worker_id, events_url in self._router.observed.items():
            entry, view = observed_entry(worker_id, events_url), self._router.view(worker_id)
            add_index(entry, view, tree.count(view.worker_index))
            response.workers.append(entry)
        return response

    async def get_index(self, request: router_pb2.GetIndexRequest, context: rpc.Context) -> None:
        """The blocks of one worker or all, in chunks; at least one chunk a worker. Raises NotServed."""
        fleet, index = self._router.fleet, self._router.index
        names = [*(member.info.worker_id for member in fleet.members()), *self._router.observed]
        if request.worker_id:
            names = [request.worker_id if request.worker_id in names else fleet.get(request.worker_id).info.worker_id]
        views = [self._router.view(name) for name in names]
        # All of it at one moment: while chunks are written, events go on.
        held = [(view, view.position()[0], view.digest, index.tree.blocks(view.worker_index)) for view in views]
        for view, epoch, digest, blocks in held:
            for start in range(0, max(1, len(blocks)), INDEX_CHUNK_BLOCKS):
                chunk = router_pb2.IndexChunk(
                    worker_id=view.worker_name,
                    epoch=epoch,
                    digest=digest,
                    total_blocks=len(blocks),
                    block_hashes=blocks[start : start + INDEX_CHUNK_BLOCKS].astype("<u8", copy=False).tobytes(),
                )
                await context.write(chunk.SerializeToString())

    async def get_tree(self, request: router_pb2.GetTreeRequest, context: rpc.Context) -> None:
        """The whole tree with the workers' names, and the hottest prefixes. Raises InvalidRequest, Overloaded."""
        await self._trees.send(request, context)

    async def set_draining(
        self, request: router_pb2.SetDrainingRequest, context: rpc.Context
    ) -> router_pb2.SetDrainingResponse:
        """Stop or resume routing to a worker. Raises NotServed."""
        self._router.set_draining(request.worker_id, request.draining)
        return router_pb2.SetDrainingResponse()

    async def clear_caches(
        self, request: router_pb2.ClearCachesRequest, context: rpc.Context
    ) -> router_pb2.ClearCachesResponse:
        """Have every worker forget what no running request uses. Raises Unavailable naming those that did not."""

        async def clear(link: WorkerLink) -> int:
            try:
                answer = await link.stub.ClearCache(worker_pb2.ClearCacheRequest(), timeout=CLEAR_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                raise Unavailable(f"worker {link.info.worker_id}: {error.details()}") from error
            return answer.blocks

        results = await asyncio.gather(*map(clear, self._links), return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        if failures:
            raise Unavailable("caches not cleared: " + "; ".join(map(str, failures)))
        return router_pb2.ClearCachesResponse(blocks=sum(r for r in results if isinstance(r, int)))

    async def _prepare(self, request: router_pb2.GenerateRequest, *, streamed: bool) -> PreparedRequest:
        """Check, tokenize, hash: a long prompt in a thread, which must not see the core."""
        validate.check_request_id(request.request_id)
        card = self._router.card(request.model)
        tokenizer = None if request.WhichOneof("prompt") == "token_ids" else self._links.tokenizer(card)
        if request.ByteSize() <= (INLINE_PACKED_BYTES if request.token_ids.packed else INLINE_BYTES):
            return prepare(request, card, tokenizer, self._secret, streamed=streamed)
        return await asyncio.to_thread(prepare, request, card, tokenizer, self._secret, streamed=streamed)


class FleetService:
    """rhizome.v1.Fleet, and what workers announce in a registry. Each raises RhizomeError."""

    def __init__(
        self, router: Router, links: Links, dispatcher: Dispatcher, observed: Sequence[Observed], secret: bytes
    ) -> None:
        self._router = router
        self._dispatcher = dispatcher
        self._links = links
        self._observed = observed
        self._secret = secret

    async def register(self, request: fleet_pb2.RegisterRequest, context: rpc.Context) -> fleet_pb2.RegisterResponse:
        """See join."""
        self.join(request)
        return fleet_pb2.RegisterResponse(
            lease_s=self._router.fleet.lease_s,
            heartbeat_interval_s=self._router.fleet.lease_s / HEARTBEATS_PER_LEASE,
        )

    async def heartbeat(self, request: fleet_pb2.HeartbeatRequest, context: rpc.Context) -> fleet_pb2.HeartbeatResponse:
        """See hear."""
        return fleet_pb2.HeartbeatResponse(draining=self.hear(request))

    async def deregister(
        self, request: fleet_pb2.DeregisterRequest, context: rpc.Context
    ) -> fleet_pb2.DeregisterResponse:
        """See leave."""
        self.leave(request)
        return fleet_pb2.DeregisterResponse()

    def join(self, request: fleet_pb2.RegisterRequest) -> None:
        """Give a worker its lease, and begin to follow it."""
        ticket.check_member(self._secret, request)
        info = worker_info(request)
        validate.check_address("address", info.address)
        check_events_url(info.events_url)
        known = self._router.fleet.find(info.worker_id)
        if self._router.register(info, time.monotonic()):
            if known and known.info.address != info.address:
                former = f"epoch {known.info.epoch} at {known.info.address}"
                logger.warning("worker %s: %s is replaced; ids must be unique", info.worker_id, former)
            logger.info("worker %s of epoch %d joined from %s", info.worker_id, info.epoch, info.address)
            warn_of_other_block_sizes(self._observed, info.model.name, info.model.block_size)
            self._links.open(info)

    def hear(self, request: fleet_pb2.HeartbeatRequest) -> bool:
        """Renew a lease, and learn the worker's state; returns whether it is draining."""
        ticket.check_member(self._secret, request)
        status = request.status
        draining = self._router.heartbeat(status.worker_id, status.epoch, worker_report(status), time.monotonic())
        self._links.told(status.worker_id, status.epoch, status.next_event_seq)
        self._dispatcher.changed()
        return draining

    def leave(self, request: fleet_pb2.DeregisterRequest) -> None:
        """A worker leaves."""
        ticket.check_member(self._secret, request)
        self._router.deregister(request.worker_id, request.epoch)
        self._links.retire(request.worker_id)
        logger.info("worker %s of epoch %d left", request.worker_id, request.epoch)


def _handlers(service: RouterService, fleet: FleetService) -> tuple[grpc.GenericRpcHandler, ...]:
    routing = {
        "Generate": rpc.streaming(router_pb2.GenerateRequest, service.generate),
        "Route": rpc.unary(router_pb2.GenerateRequest, service.route),
        "Explain": rpc.unary(router_pb2.GenerateRequest, service.explain),
        "ListWorkers": rpc.unary(router_pb2.ListWorkersRequest, service.list_workers),
        "GetIndex": rpc.streaming(router_pb2.GetIndexRequest, service.get_index),
        "GetTree": rpc.streaming(router_pb2.GetTreeRequest, service.get_tree),
        "SetDraining": rpc.unary(router_pb2.SetDrainingRequest, service.set_draining),
        "ClearCaches": rpc.unary(router_pb2.ClearCachesRequest, service.clear_caches),
    }
    joining = {
        "Register": rpc.unary(fleet_pb2.RegisterRequest, fleet.register),
        "Heartbeat": rpc.unary(fleet_pb2.HeartbeatRequest, fleet.heartbeat),
        "Deregister": rpc.unary(fleet_pb2.DeregisterRequest, fleet.deregister),
    }
    return (
        grpc.method_handlers_generic_handler("rhizome.v1.Router", routing),
        grpc.method_handlers_generic_handler("rhizome.v1.Fleet", joining),
    )


async def _expire(router: Router, links: Links) -> NoReturn:
    at_cap: dict[str, int] = {}
    while True:
        await asyncio.sleep(EXPIRY_INTERVAL_S)
        try:
            before, at_cap = at_cap, router.index.at_cap()
            for worker_id in at_cap.keys() - before.keys():
                logger.warning(
                    "worker %s: the index is at a cap (--max-blocks, --max-blocks-per-worker): %d blocks left out",
                    worker_id,
                    at_cap[worker_id],
                )
            for info in router.expire(time.monotonic()):
                logger.warning("worker %s of epoch %d: its lease ran out", info.worker_id, info.epoch)
                links.retire(info.worker_id)
            links.forget_unused_tokenizers()
        except Exception:  # a defect here must not keep dead workers for ever
            logger.exception("expiry failed")


@asynccontextmanager
async def running_router(
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    policy: str = DEFAULT_POLICY,
    objective: Objective | None = None,
    secret: bytes = b"",
    insecure: bool = False,
    lease_s: float = LEASE_S,
    max_blocks: int = DEFAULT_MAX_BLOCKS,
    max_blocks_per_worker: int = DEFAULT_MAX_BLOCKS_PER_WORKER,
    observe: Sequence[str] = (),
    record_trace: Path | None = None,
    registry: str = "",
    local_prefill_s: float = LOCAL_PREFILL_S,
    validate: bool = False,
) -> AsyncIterator[str]:
    """A serving router; yields its host:port (port 0: a free one).

    Raises InvalidRequest for an unknown policy, a host off loopback without `insecure`, a port in use, caps of the
    index out of range, `observe` that is not NAME=URL. With `secret` only workers that sign their registration join.
    Servers to observe are indexed and get no requests. `validate` checks the core's invariants all the time, for tests.
    What is streamed is recorded to the new file record_trace. `registry` is a URL (kv_events.bus.redis_registry) where
    workers announce themselves, besides those that call this router. Decode workers compute prompts themselves that
    take at most `local_prefill_s`.
    """
    rpc.check_bind_host(host, insecure=insecure)
    for field, cap in (("max_blocks", max_blocks), ("max_blocks_per_worker", max_blocks_per_worker)):
        if not 1 <= cap <= LARGEST_MAX_BLOCKS:
            raise InvalidRequest(field, cap, f"1 to {LARGEST_MAX_BLOCKS}")
    observed = [parse_observed(each) for each in observe]
    router = Router(
        policy=policy,
        objective=objective,
        lease_s=lease_s,
        max_blocks=max_blocks,
        max_blocks_per_worker=max_blocks_per_worker,
        local_prefill_s=local_prefill_s,
        validate=validate,
    )
    links = Links(router)
    dispatcher = Dispatcher(router)
    recording = ExitStack()
    recorder = recording.enter_context(recording_trace(record_trace, time.monotonic()))
    server = grpc.aio.server(options=rpc.SERVER_OPTIONS)
    fleet = FleetService(router, links, dispatcher, observed, secret)
    service = RouterService(router, links, dispatcher, observed, secret, recorder)
    server.add_generic_rpc_handlers(_handlers(service, fleet))
    tasks: list[asyncio.Task[NoReturn]] = [asyncio.create_task(_expire(router, links))]
    if registry:
        tasks.append(asyncio.create_task(RegistryFollower(parse_registry_url(registry), router, fleet).run()))
    try:
        async with (
            observing(router, observed, secret),
            rpc.serving(server, host, port, ("rhizome.v1.Router", "rhizome.v1.Fleet")) as address,
        ):
            yield address
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await links.close()  # answers under way end within the server's grace
        recording.close()
