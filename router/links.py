"""The router's connections to its workers: a channel each, their events, and their tokenizers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from typing import Any

import grpc

from kv_events.bus import EventSource, Resync
from kv_events.bus.follow import catch_up, follow
from kv_events.bus.grpc import GrpcEventSource
from kv_events.bus.redis_stream import AUTH_VARIABLE, credentials
from kv_events.bus.url import open_source, parse_bus_url
from kv_events.wire import WireError
from rhizome import rpc
from rhizome.errors import InvalidRequest, RhizomeError, Unavailable
from rhizome.tokenizer import tokenizer_sha256
from rhizome.v1 import worker_pb2, worker_pb2_grpc
from router.core import Router
from router.fleet import ModelCard, WorkerInfo
from router.tokenizing import BadTokenizer, PromptTokenizer

logger = logging.getLogger(__name__)

MAX_TOKENIZER_BYTES = 128 * 2**20  # the largest published are about 35 MB
MAX_TOKENIZER_FILES = 16
FETCH_TIMEOUT_S = 60.0
MAX_RETRY_S = 5.0


class WorkerLink:
    """One incarnation of a worker: its channel, and the task that follows it.

    A worker that is dropped may still be answering: the channel is closed when its last stream has ended.
    """

    def __init__(self, info: WorkerInfo) -> None:
        self.info = info
        self.channel = grpc.aio.insecure_channel(info.address, options=rpc.CHANNEL_OPTIONS)
        self.stub: worker_pb2_grpc.WorkerAsyncStub = worker_pb2_grpc.WorkerStub(self.channel)
        # Without a deserializer the chunks stay bytes: they are the client's to parse.
        self.generate: Any = self.channel.unary_stream(
            "/rhizome.v1.Worker/Generate", request_serializer=worker_pb2.WorkerGenerateRequest.SerializeToString
        )
        self.task: asyncio.Task[None] | None = None
        self.source: EventSource | None = None  # while its events are followed
        self.catching_up: asyncio.Task[None] | None = None
        self._streams = 0
        self._retired = False
        self._idle = asyncio.Event()

    def events(self) -> AbstractAsyncContextManager[EventSource]:
        """Where the worker says that its events are to be read."""
        return open_source(self.info.events_url) if self.info.events_url else nullcontext(GrpcEventSource(self.channel))

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Around each answer that is streamed over the link."""
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1
            self._settle()

    def retire(self) -> None:
        """Follow the worker no longer."""
        self._retired = True
        for task in (self.task, self.catching_up):
            if task:
                task.cancel()
        self._settle()

    def _settle(self) -> None:
        if self._retired and not self._streams:
            self._idle.set()

    async def close(self) -> None:
        """Close the channel once the link is retired and idle."""
        try:
            await self._idle.wait()
        finally:
            await self.channel.close()


class Links:
    """The links of all registered workers, and the tokenizers of their models."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._links: dict[str, WorkerLink] = {}
        self._tokenizers: dict[str, PromptTokenizer] = {}
        self._fetching: dict[str, asyncio.Lock] = {}  # by digest: one worker of a model fetches for all
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self, info: WorkerInfo) -> None:
        """Connect to a worker that has just been registered, in place of its former incarnation."""
        self.retire(info.worker_id)
        link = self._links[info.worker_id] = WorkerLink(info)
        link.task = self._start(self._run(link))
        self._start(link.close())

    def retire(self, worker_id: str) -> None:
        """The worker was dropped. Its events are not applied any more; its streams go on."""
        link = self._links.pop(worker_id, None)
        if link is not None:
            link.retire()

    def __getitem__(self, worker_id: str) -> WorkerLink:
        return self._links[worker_id]

    def __iter__(self) -> Iterator[WorkerLink]:
        return iter(list(self._links.values()))

    def tokenizer(self, card: ModelCard) -> PromptTokenizer:
        """A model's tokenizer. Raises Unavailable while it is not there."""
        try:
            return self._tokenizers[card.tokenizer_sha256]
        except KeyError:
            raise Unavailable(f"the tokenizer of model {card.name} has not come from its worker yet") from None

    def forget_unused_tokenizers(self) -> None:
        """Those of models that nobody serves any more."""
        used = {link.info.model.tokenizer_sha256 for link in self}
        self._tokenizers = {sha: tokenizer for sha, tokenizer in self._tokenizers.items() if sha in used}
        self._fetching = {sha: lock for sha, lock in self._fetching.items() if sha in used}

    async def close(self) -> None:
        """Retire all, and give up what still runs."""
        for link in self:
            self.retire(link.info.worker_id)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _run(self, link: WorkerLink) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow(link))
            group.create_task(self._prepare(link))

    async def _follow(self, link: WorkerLink) -> None:
        view, name = self._router.view(link.info.worker_id), f"events of worker {link.info.worker_id}"
        while True:
            try:
                async with link.events() as link.source:
                    await follow(link.source, view, name=name)
            except Exception:  # a defect here must not leave a worker without its index for good
                logger.exception("worker %s: following its events failed", link.info.worker_id)
                link.source = None
                await asyncio.sleep(MAX_RETRY_S)

    def told(self, worker_id: str, epoch: int, next_event_seq: int) -> None:
        """A worker reports how far its events are (0: it does not tell). What was lost at the end of the stream is
        fetched; should that fail, the next report leads to another try."""
        link = self._links.get(worker_id)
        if link is None or link.info.epoch != epoch or not next_event_seq:
            return
        needed = self._router.view(worker_id).told(epoch, next_event_seq)
        if needed is not Resync.NONE and link.source and (link.catching_up is None or link.catching_up.done()):
            link.catching_up = self._start(self._catch_up(link, link.source, needed))

    async def _catch_up(self, link: WorkerLink, source: EventSource, needed: Resync) -> None:
        logger.info("worker %s: the last of its events did not come; asking for them", link.info.worker_id)
        try:
            await catch_up(source, self._router.view(link.info.worker_id), needed)
        except (RhizomeError, WireError) as error:
            logger.debug("worker %s: %s", link.info.worker_id, error)

    async def _prepare(self, link: WorkerLink) -> None:
        """Make sure of the model's tokenizer, then let requests come."""
        delay_s = 0.1
        while True:
            try:
                await self._ensure_tokenizer(link)
            except Exception as error:  # whatever a worker's files are, its events are followed meanwhile
                problem = error.details() if isinstance(error, grpc.aio.AioRpcError) else repr(error)
                logger.warning("worker %s: no tokenizer: %s; trying again", link.info.worker_id, problem)
                await asyncio.sleep(delay_s)
                delay_s = min(MAX_RETRY_S, 2 * delay_s)
            else:
                self._router.set_ready(link.info.worker_id, link.info.epoch)
                return

    async def _ensure_tokenizer(self, link: WorkerLink) -> None:
        wanted = link.info.model.tokenizer_sha256
        async with self._fetching.setdefault(wanted, asyncio.Lock()):
            if wanted in self._tokenizers:
                return
            files = await collect_files(
                link.stub.GetTokenizer(worker_pb2.GetTokenizerRequest(), timeout=FETCH_TIMEOUT_S)
            )
            found = tokenizer_sha256(files)
            if found != wanted:
                raise BadTokenizer(f"the files' digest is {found}, the model card says {wanted}")
            self._tokenizers[wanted] = await asyncio.to_thread(PromptTokenizer, files)


def check_events_url(url: str) -> None:
    """Raise InvalidRequest for one that a router could not, or should not, read a worker's events at; empty is fine."""
    if not url:
        return
    bus = parse_bus_url(url)
    if bus.scheme == "memory" or bus.port == 0:
        raise InvalidRequest("events_url", str(bus), "a port that others can reach: grpc://, zmq:// or redis://")
    if bus.user or bus.password:
        raise InvalidRequest("events_url", str(bus), f"no login: routers bring their own ({AUTH_VARIABLE})")
    if bus.scheme.startswith("redis"):
        credentials(bus)  # readable, if there are any


async def collect_files(chunks: AsyncIterable[worker_pb2.FileChunk]) -> dict[str, bytes]:
    """Files from their pieces. Raises BadTokenizer past a bound."""
    pieces: dict[str, list[bytes]] = {}
    size_bytes = 0
    async for chunk in chunks:
        pieces.setdefault(chunk.name, []).append(chunk.data)
        size_bytes += len(chunk.data)
        if size_bytes > MAX_TOKENIZER_BYTES or len(pieces) > MAX_TOKENIZER_FILES:
            raise BadTokenizer(f"more than {MAX_TOKENIZER_BYTES} bytes or {MAX_TOKENIZER_FILES} files")
    return {name: b"".join(parts) for name, parts in pieces.items()}
