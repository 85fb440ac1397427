"""A real worker over gRPC: a torch engine on a tiny checkpoint, reached directly."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from deploy.processes import WorkerSettings, running_worker
from kv_events.bus.grpc import GrpcEventSource
from kv_events.events import BlockStored
from radix.hashing import BlockHasher, derive_salt
from radix.keys import hashes_of
from rhizome import rpc, ticket
from rhizome.errors import InvalidRequest
from rhizome.v1 import generation_pb2 as pb
from rhizome.v1 import worker_pb2, worker_pb2_grpc
from tests.support.router_cluster import refusal
from worker.transfer.memory import BlockLayout, BlockMemory
from worker.transfer.puller import Puller
from worker.transfer.transports.tcp import TcpTransport

VOCAB = 262
SECRET = b"a fleet's secret"


def packed(tokens: list[int]) -> bytes:
    return np.array(tokens, "<u4").tobytes()


def request(tokens: list[int], **sampling: object) -> worker_pb2.WorkerGenerateRequest:
    fields = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True} | sampling
    return worker_pb2.WorkerGenerateRequest(token_ids=packed(tokens), sampling=pb.SamplingParams(**fields))  # type: ignore[arg-type]


class Worker:
    """A running worker and the stubs to reach it."""

    def __init__(self, address: str, channel: grpc.aio.Channel) -> None:
        self.address = address
        self.channel = channel
        self.stub = worker_pb2_grpc.WorkerStub(channel)

    async def chunks(self, message: worker_pb2.WorkerGenerateRequest) -> list[pb.GenerateChunk]:
        return [chunk async for chunk in self.stub.Generate(message)]

    async def status(self) -> worker_pb2.WorkerStatus:
        return await self.stub.GetStatus(worker_pb2.GetStatusRequest())

    async def until(self, holds: Callable[[worker_pb2.WorkerStatus], bool]) -> worker_pb2.WorkerStatus:
        """Wait for the status to fulfil a condition."""
        async with asyncio.timeout(30):
            while not holds(status := await self.status()):
                await asyncio.sleep(0.01)
        return status


@asynccontextmanager
async def worker(model: Path, **settings: object) -> AsyncIterator[Worker]:
    """A worker that must have no block in use when the test is through."""
    async with running_worker(
        WorkerSettings(model, "worker-0", threads=1, kv_cache_mib=8, validate=True, **settings)
    ) as address:  # type: ignore[arg-type]
        async with grpc.aio.insecure_channel(address, options=rpc.CHANNEL_OPTIONS) as channel:
            served = Worker(address, channel)
            yield served
            await served.until(lambda status: status.blocks_in_use == 0 and not status.running and not status.waiting)


def with_worker(model: Path, test: Callable[[Worker], Awaitable[None]], **settings: object) -> None:
    async def main() -> None:
        async with worker(model, **settings) as served:
            await test(served)

    asyncio.run(main())


def test_an_answer_streams_with_its_usage(tiny_model: Path) -> None:
    """The first chunk names the worker and what was cached; the last one the reason and the completion tokens."""

    async def test(served: Worker) -> None:
        for cached in (0, 32):
            chunks = await served.chunks(request(list(range(40))))
            assert len(chunks) == 8
            assert chunks[0].worker_id == "worker-0"
            assert (chunks[0].usage.prompt_tokens, chunks[0].usage.cached_tokens) == (40, cached)
            assert chunks[-1].finish_reason == pb.FINISH_REASON_LENGTH
            assert chunks[-1].usage.completion_tokens == 8
        assert (await served.status()).cached_prompt_tokens == 32

    with_worker(tiny_model, test)


def test_several_choices_and_logprobs(tiny_model: Path) -> None:
    """n choices each end with their own reason; logprobs name the chosen and the top tokens."""

    async def test(served: Worker) -> None:
        chunks = await served.chunks(request([1, 2, 3], n=3, temperature=1.0, seed=1, logprobs=2, max_tokens=4))
        assert sorted(chunk.index for chunk in chunks) == [0] * 4 + [1] * 4 + [2] * 4
        assert all(len(chunk.logprobs[0].top) == 2 for chunk in chunks)
        assert chunks[-1].usage.completion_tokens == 12
        assert sum(chunk.finish_reason != 0 for chunk in chunks) == 3

    with_worker(tiny_model, test)


BAD_REQUESTS = {
    "prompt": (request([]), "at least one token"),
    "prompt tokens": (request([1] * 2048), "2048"),
    "token_ids[2]": (request([1, 2, VOCAB, 3]), str(VOCAB - 1)),
    "sampling.temperature": (request([1], temperature=-1.0), "0 to 100"),
    "sampling.temperature ": (request([1], temperature=float("nan")), "0 to 100"),
    "sampling.top_p": (request([1], top_p=0.0), "above 0"),
    "sampling.top_k": (request([1], top_k=10**9), str(VOCAB)),
    "sampling.min_p": (request([1], min_p=1.5), "0 to 1"),
    "sampling.repetition_penalty": (request([1], repetition_penalty=float("inf")), "at most 100"),
    "sampling.presence_penalty": (request([1], presence_penalty=3.0), "-2 to 2"),
    "sampling.frequency_penalty": (request([1], frequency_penalty=-2.5), "-2 to 2"),
    "sampling.max_tokens": (request([1], max_tokens=2**32 - 1), "2047"),
    "sampling.min_tokens": (request([1], max_tokens=2, min_tokens=3), "2"),
    "sampling.logprobs": (request([1], logprobs=21), "20"),
    "sampling.n": (request([1], n=17), "16"),
    "sampling.stop (strings)": (request([1], stop=["x"] * 17), "16"),
    "sampling.stop": (request([1], stop=["x" * 257]), "256"),
    "sampling.stop_token_ids": (request([1], stop_token_ids=[VOCAB]), str(VOCAB - 1)),
    "token_ids": (worker_pb2.WorkerGenerateRequest(token_ids=b"abc"), "4 for each"),
    "request_id": (worker_pb2.WorkerGenerateRequest(request_id="a b", token_ids=packed([1])), "printable ASCII"),
}


def test_bad_values_are_refused_by_name_and_limit_and_the_server_goes_on(tiny_model: Path) -> None:
    """INVALID_ARGUMENT with google.rpc.BadRequest; nothing is computed for any of them."""

    async def test(served: Worker) -> None:
        for field, (message, limit) in BAD_REQUESTS.items():
            error = await refusal(served.chunks(message), grpc.StatusCode.INVALID_ARGUMENT)
            status = rpc_status.from_call(error)
            assert status is not None
            details = error_details_pb2.BadRequest()
            assert status.details[0].Unpack(details)
            assert details.field_violations[0].field == field.strip()
            assert limit in details.field_violations[0].description
        assert (await served.status()).prefill_steps == 0
        assert len(await served.chunks(request([1]))) == 8

    with_worker(tiny_model, test)


def test_bytes_that_are_no_message_are_refused(tiny_model: Path) -> None:
    """Invalid UTF-8 in a string, and noise: INVALID_ARGUMENT, and the server goes on."""

    async def test(served: Worker) -> None:
        generate = served.channel.unary_stream("/rhizome.v1.Worker/Generate")
        for data in (b"\x0a\x02\xff\xfe", b"\xff\xff\xff"):

            async def send(data: bytes = data) -> None:
                async for _ in generate(data):
                    pass

            error = await refusal(send(), grpc.StatusCode.INVALID_ARGUMENT)
            assert "UTF-8" in (error.details() or "")
        assert len(await served.chunks(request([1]))) == 8

    with_worker(tiny_model, test)


def test_a_caller_that_leaves_while_the_cache_is_to_be_cleared_harms_nobody(tiny_model: Path) -> None:
    """The command waits behind a step; cancelled, it must not take the engine with it."""

    async def test(served: Worker) -> None:
        answer = asyncio.create_task(served.chunks(request([1, 2, 3], max_tokens=400)))
        await served.until(lambda status: status.running == 1)
        for _ in range(30):
            call = served.stub.ClearCache(worker_pb2.ClearCacheRequest())
            await asyncio.sleep(0)
            call.cancel()
        assert len(await answer) == 400
        assert len(await served.chunks(request([1]))) == 8

    with_worker(tiny_model, test)


def test_an_unknown_model_is_named_with_the_one_that_is_served(tiny_model: Path) -> None:
    """NOT_FOUND says what to ask for instead."""

    async def test(served: Worker) -> None:
        message = request([1])
        message.model = "gpt"
        error = await refusal(served.chunks(message), grpc.StatusCode.NOT_FOUND)
        assert error.details() == "model 'gpt' is not served here; 'tiny' is"

    with_worker(tiny_model, test)


def test_a_message_of_100_mb_is_refused_and_the_server_goes_on(tiny_model: Path) -> None:
    """gRPC refuses it at its bound, naming both sizes."""

    async def test(served: Worker) -> None:
        message = worker_pb2.WorkerGenerateRequest(token_ids=bytes(100 * 2**20))
        error = await refusal(served.chunks(message), grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert str(rpc.MAX_MESSAGE_BYTES) in (error.details() or "")
        assert len(await served.chunks(request([1]))) == 8

    with_worker(tiny_model, test)


def test_a_client_that_goes_away_frees_its_blocks(tiny_model: Path) -> None:
    """Cancelled mid-stream: the engine forgets the request although it had hundreds of tokens to go."""

    async def test(served: Worker) -> None:
        call = served.stub.Generate(request([1, 2, 3], max_tokens=2000))
        async for _ in call:
            break
        assert (await served.until(lambda status: status.running == 1)).blocks_in_use > 0
        call.cancel()
        status = await served.until(lambda status: status.running == 0)
        assert status.blocks_in_use == 0
        assert status.decode_tokens < 2000

    with_worker(tiny_model, test)


def test_a_deadline_reaches_the_engine(tiny_model: Path) -> None:
    """When the caller's time is up the request is gone from the engine."""

    async def test(served: Worker) -> None:
        async def stream() -> None:
            async for _ in served.stub.Generate(request([1, 2, 3], max_tokens=2000), timeout=0.3):
                pass

        await refusal(stream(), grpc.StatusCode.DEADLINE_EXCEEDED)
        await served.until(lambda status: status.running == 0 and status.blocks_in_use == 0)

    with_worker(tiny_model, test)


def test_more_than_may_wait_is_refused_with_a_time_to_retry(tiny_model: Path) -> None:
    """RESOURCE_EXHAUSTED with RetryInfo; those accepted are all answered."""

    async def test(served: Worker) -> None:
        running = [asyncio.create_task(served.chunks(request([0], max_tokens=300)))]
        await served.until(lambda status: status.running == 1)
        running += [asyncio.create_task(served.chunks(request([at], max_tokens=300))) for at in (1, 2)]
        await served.until(lambda status: status.running == 1 and status.waiting == 2)
        error = await refusal(served.chunks(request([9])), grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert "2 is the limit" in (error.details() or "")
        status = rpc_status.from_call(error)
        assert status is not None
        retry = error_details_pb2.RetryInfo()
        assert status.details[0].Unpack(retry)
        assert retry.retry_delay.ToMilliseconds() > 0
        assert [len(chunks) for chunks in await asyncio.gather(*running)] == [300] * 3

    with_worker(tiny_model, test, max_running=1, max_waiting=2)


def test_events_tell_what_the_cache_holds(tiny_model: Path) -> None:
    """The stream names exactly the full blocks of prompt and answer, under the default salt; a clear empties it."""

    async def test(served: Worker) -> None:
        prompt = [at % 250 for at in range(40)]
        chunks = await served.chunks(request(prompt))
        answer = [token for chunk in chunks for token in chunk.token_ids]
        hasher = BlockHasher(16, derive_salt("tiny"))
        expected = hashes_of(hasher.keys(np.array([*prompt, *answer[:-1]], np.uint32)))
        source = GrpcEventSource(served.channel)
        snapshot = await source.snapshot()
        assert sorted(snapshot.block_hashes.tolist()) == sorted(expected.tolist())
        cleared = await served.stub.ClearCache(worker_pb2.ClearCacheRequest())
        assert cleared.blocks == len(expected)
        assert len((await source.snapshot()).block_hashes) == 0

    with_worker(tiny_model, test)


def test_events_tell_prompts_where_the_worker_is_set_to(tiny_model: Path) -> None:
    """For consumers that need tokens; their keys are those of the event."""

    async def test(served: Worker) -> None:
        prompt = [at % 250 for at in range(40)]
        await served.chunks(request(prompt, max_tokens=1))
        batches = await GrpcEventSource(served.channel).replay(0, 0)
        (stored,) = [event for batch in batches for event in batch.events]
        assert isinstance(stored, BlockStored)
        assert stored.token_ids is not None
        assert stored.token_ids.tolist() == prompt[:32]
        keys = BlockHasher(16, derive_salt("tiny")).keys(stored.token_ids)
        assert stored.block_hashes.tolist() == hashes_of(keys).tolist()

    with_worker(tiny_model, test, event_token_ids=True)


def test_own_keys_are_made_under_the_fleets_secret(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt and answer alike, with and without a ticket: the keys that a router of the fleet computes."""
    monkeypatch.setenv(ticket.SECRET_VARIABLE, SECRET.decode())
    hasher = BlockHasher(16, derive_salt("tiny"), SECRET)

    async def test(served: Worker) -> None:
        source = GrpcEventSource(served.channel)
        epoch = (await served.status()).epoch
        for prompt, signed in ((list(range(40)), False), (list(range(100, 140)), True)):
            message = request(prompt, max_tokens=24)
            if signed:
                message.salt, message.block_keys = hasher.salt, hasher.keys(prompt).tobytes()
                ticket.sign_request(SECRET, message, "worker-0", epoch, int(time.time() * 1000))
            answer = [token for chunk in await served.chunks(message) for token in chunk.token_ids]
            assert len(answer) > 16, "a block of the answer is hashed by the worker"
            held = set((await source.snapshot()).block_hashes.tolist())
            assert set(hashes_of(hasher.keys([*prompt, *answer[:-1]])).tolist()) <= held

    with_worker(tiny_model, test)


def test_keys_count_only_under_a_valid_ticket(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signed keys are taken as they are; unsigned ones are ignored, tampered, foreign and expired tickets refused."""
    monkeypatch.setenv(ticket.SECRET_VARIABLE, SECRET.decode())

    async def test(served: Worker) -> None:
        epoch = (await served.status()).epoch
        prompt = list(range(20))
        salt = derive_salt("tiny", tenant="somebody")
        keys = BlockHasher(16, salt, SECRET).keys(np.array(prompt, np.uint32))

        def signed(worker_id: str = "worker-0", unix_ms: int | None = None) -> worker_pb2.WorkerGenerateRequest:
            message = request(prompt)
            message.salt, message.block_keys = salt, keys.tobytes()
            now = int(time.time() * 1000) if unix_ms is None else unix_ms
            ticket.sign_request(SECRET, message, worker_id, epoch, now)
            return message

        await served.chunks(signed())
        source = GrpcEventSource(served.channel)
        assert (await source.snapshot()).block_hashes.tolist() == hashes_of(keys).tolist()

        forged = request(prompt)
        forged.salt, forged.block_keys = salt, keys.tobytes()
        assert (await served.chunks(forged))[0].usage.cached_tokens == 0, "unsigned keys reach nobody's blocks"

        tampered = signed()
        tampered.token_ids = packed([9, *prompt[1:]])
        assert "signature" in (
            (await refusal(served.chunks(tampered), grpc.StatusCode.PERMISSION_DENIED)).details() or ""
        )
        for bad in (signed("worker-1"), signed(unix_ms=0)):
            await refusal(served.chunks(bad), grpc.StatusCode.PERMISSION_DENIED)

    with_worker(tiny_model, test)


def test_blocks_are_held_for_routers_only(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To hold is asked for under a ticket; else the whole answer comes, and nothing is kept."""
    monkeypatch.setenv(ticket.SECRET_VARIABLE, SECRET.decode())

    async def test(served: Worker) -> None:
        message = request(list(range(40)), max_tokens=4)
        message.hold = True
        chunks = await served.chunks(message)
        assert len(chunks) == 4
        assert not any(chunk.transfer_ticket for chunk in chunks)
        epoch = (await served.status()).epoch
        message.salt = derive_salt("tiny")
        message.block_keys = BlockHasher(16, message.salt, SECRET).keys(np.arange(40, dtype=np.uint32)).tobytes()
        ticket.sign_request(SECRET, message, "worker-0", epoch, int(time.time() * 1000))
        (only,) = await served.chunks(message)
        assert (await served.until(lambda status: status.blocks_in_use == 2)).lent_blocks == 2
        puller = Puller(BlockMemory.shared(BlockLayout(64), 1), [TcpTransport()], secret=SECRET)
        await asyncio.to_thread(puller.release, only.transfer_ticket)

    with_worker(tiny_model, test)


def test_health_reflection_and_the_tokenizer_are_served(tiny_model: Path) -> None:
    """Standard probes work, and a router gets the tokenizer's files whole."""

    async def test(served: Worker) -> None:
        health = health_pb2_grpc.HealthStub(served.channel)
        for service in ("", "rhizome.v1.Worker", "rhizome.v1.KvEvents"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(served.channel)
        call = reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        names = {entry.name async for reply in call for entry in reply.list_services_response.service}
        assert {"rhizome.v1.Worker", "rhizome.v1.KvEvents", "grpc.health.v1.Health"} <= names
        files: dict[str, bytes] = {}
        async for piece in served.stub.GetTokenizer(worker_pb2.GetTokenizerRequest()):
            files[piece.name] = files.get(piece.name, b"") + piece.data
        assert files["tokenizer.json"] == (tiny_model / "tokenizer.json").read_bytes()

    with_worker(tiny_model, test)


def test_a_port_in_use_and_senseless_settings_are_refused_by_name(tiny_model: Path, tmp_path: Path) -> None:
    """Before a checkpoint is read: role, host, sizes, folder; then the port."""

    async def start(**settings: object) -> None:
        async with worker(tiny_model, **settings):
            pass

    for settings, words in (
        ({"role": "both-ish"}, "role is 'both-ish': one of both, prefill, decode"),
        ({"host": "0.0.0.0"}, "host is '0.0.0.0'.*--insecure"),
        ({"block_size": 0}, "block_size is 0: at least 1"),
        ({"max_model_len": 4096}, "max_model_len is 4096: at most"),
        ({"max_running": 600}, "max_batched_tokens is 512: at least max_running"),
        ({"max_model_len": 0}, "max_model_len is 0: at least 1"),
        ({"model_name": "my model"}, "model_name is 'my model': .* without spaces"),
        ({"host": "0.0.0.0", "insecure": True, "routers": ("127.0.0.1:1",)}, "advertise is None: .* wildcard"),
        ({"routers": ("nowhere",)}, "router is 'nowhere': host:port"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            asyncio.run(start(**settings))
    with pytest.raises(InvalidRequest, match="kv_cache_mib is 100000000: at most this machine's"):
        WorkerSettings(tiny_model, "w", kv_cache_mib=100_000_000).check()
    with pytest.raises(InvalidRequest, match="id is '': 1 to"):
        WorkerSettings(tiny_model, "").check()
    with pytest.raises(InvalidRequest, match="model is '.*': a folder"):
        asyncio.run(_start_on(tmp_path / "nothing"))

    async def twice(served: Worker) -> None:
        with pytest.raises(InvalidRequest, match="port is .*: it must be free on 127.0.0.1"):
            await start(port=int(served.address.rpartition(":")[2]))

    with_worker(tiny_model, twice)


async def _start_on(folder: Path) -> None:
    async with worker(folder):
        pass
