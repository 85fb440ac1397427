"""`rhizome calibrate`: measures a running worker, fits a model of its step times, writes it as a hardware file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, fields
from datetime import date
from functools import partial
from pathlib import Path

import grpc
import numpy as np

from kv_events.bus.grpc import GrpcEventSource
from rhizome import rpc
from rhizome.errors import Conflict, InvalidRequest, RhizomeError
from rhizome.v1 import generation_pb2, worker_pb2, worker_pb2_grpc
from rhizome.validate import check_address, check_name
from router.client import Client
from worker.hardware_file import dump_hardware, parse_hardware
from worker.step_fit import StepFit, Work, fit_steps
from worker.step_time import Hardware

MAX_ERROR = 0.15  # p90 of what was held out; a simulation on worse figures would mislead
ANSWER_TOKENS = 24  # of each measured batch of decodes
SHORT = 64  # tokens of context that count for little
CALL_TIMEOUT_S = 600.0
IDLE_TIMEOUT_S = 60.0
_COUNTERS = tuple(entry.name for entry in fields(Work))


class PoorFit(RhizomeError):
    """The measurements do not follow the model; the message says how far off it is."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is tried. Sizes in tokens."""

    longest: int = 16_384  # prompt
    max_batch: int = 32  # sequences that decode at once
    rounds: int = 3  # of all measurements; of each the fastest counts


@dataclass(slots=True)
class Probe:
    """A worker that nobody else uses, and how it is asked."""

    stub: worker_pb2_grpc.WorkerAsyncStub
    block_size: int
    capacity: int  # tokens of KV
    longest: int  # tokens of a prompt that it takes
    worker_id: str = ""
    asked: int = 0  # prompt tokens of the measurement under way
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(1))

    def tokens(self, count: int) -> list[int]:
        """Tokens that were never asked before, which any vocabulary holds."""
        return [int(token) for token in self.random.integers(32, 127, count)]

    async def ask(
        self, tokens: list[int], answer: int = 1, *, cached: bool = False, begun: Callable[[], object] = lambda: None
    ) -> None:
        """Generate so many tokens; `cached` reads and fills the prefix cache. `begun` is called at the first token."""
        sampling = generation_pb2.SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
        request = worker_pb2.WorkerGenerateRequest(
            token_ids=np.array(tokens, "<u4").tobytes(), sampling=sampling, bypass_prefix_cache=not cached
        )
        self.asked += len(tokens)
        call = self.stub.Generate(request, timeout=CALL_TIMEOUT_S)
        try:
            async for _ in call:
                begun()
        finally:
            call.cancel()

    async def measure(self, work: Callable[[], Awaitable[object]]) -> Work:
        """What the worker counts while `work` is done. Raises Conflict where others' requests came in between."""
        before = await self.idle(0)
        self.asked = 0
        await work()
        after = await self.idle(before.prompt_tokens + self.asked)
        if after.prompt_tokens - before.prompt_tokens != self.asked:
            raise Conflict(f"worker {self.worker_id} served others meanwhile: calibrate one that nobody else uses")
        return _work(after) - _work(before)

    async def idle(self, prompt_tokens: int) -> worker_pb2.WorkerStatus:
        """The status once so many prompt tokens are counted and nothing runs any more: it follows the last token."""
        try:
            async with asyncio.timeout(IDLE_TIMEOUT_S):
                while True:
                    status = await self.stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=CALL_TIMEOUT_S)
                    if status.prompt_tokens >= prompt_tokens and not status.running and not status.waiting:
                        return status
                    await asyncio.sleep(0.002)
        except TimeoutError:
            raise Conflict(f"worker {self.worker_id} is busy: calibrate one that nobody else uses") from None

    # What is measured. All random; only a prefix that is to be found in the cache is asked for twice.

    async def prompt(self, length: int) -> None:
        """One prompt alone."""
        await self.ask(self.tokens(length))

    async def after_prefix(self, prefix: list[int], length: int) -> None:
        """New tokens after a prefix that the cache may hold."""
        await self.ask(prefix + self.tokens(length), cached=True)

    async def batch(self, count: int, length: int) -> None:
        """So many answers at once."""
        await asyncio.gather(*(self.ask(self.tokens(length), ANSWER_TOKENS) for _ in range(count)))

    async def mixed(self, count: int, context: int, length: int) -> None:
        """A prompt that comes while so many answers are given."""
        begun = [asyncio.Event() for _ in range(count)]
        room = self.longest - context
        answers = [asyncio.create_task(self.ask(self.tokens(context), room, begun=start.set)) for start in begun]
        all_begun = asyncio.create_task(_all(begun))
        try:
            while not all_begun.done():
                await asyncio.wait([all_begun, *answers], return_when=asyncio.FIRST_COMPLETED)
                for answer in answers:
                    if answer.done():
                        answer.result()  # one that failed says why
            await self.prompt(length)
        finally:
            for task in (all_begun, *answers):
                task.cancel()
            await asyncio.gather(all_begun, *answers, return_exceptions=True)


async def _all(events: list[asyncio.Event]) -> None:
    for event in events:
        await event.wait()


Measurement = tuple[str, bool, Callable[[], Awaitable[object]]]
"""In words; whether it is held out from the fit; what is done."""


def measurements(probe: Probe, effort: Effort) -> list[Measurement]:
    """Each kind of work at several sizes; those held out have sizes between these."""
    longest = min(effort.longest, probe.longest)
    room = int(0.8 * min(probe.capacity, 4 * longest))  # tokens of all sequences of a batch together
    found: list[Measurement] = []

    def prompts(lengths: list[int], *, held_out: bool) -> None:
        found.extend((f"prompt of {n}", held_out, partial(probe.prompt, n)) for n in lengths)

    def batch(count: int, length: int, *, held_out: bool) -> None:
        length = min(length, room // count - ANSWER_TOKENS, probe.longest - ANSWER_TOKENS)
        if length >= 2:
            what = f"{count} answers at {length}"
            found.append((what, held_out, partial(probe.batch, count, length)))

    lengths = [longest >> shift for shift in range(longest.bit_length()) if longest >> shift >= 16]
    prompts(lengths, held_out=False)
    prompts([length * 3 // 4 for length in lengths[::3]], held_out=True)
    for share, new in ((2, SHORT), (2, longest // 4), (4, longest // 8)):
        prefix = probe.tokens(longest // share)
        found.append((f"{new} after {len(prefix)}", False, partial(probe.after_prefix, prefix, new)))
    counts = [1 << shift for shift in range(effort.max_batch.bit_length()) if 1 << shift <= effort.max_batch]
    for count in counts:
        batch(count, SHORT, held_out=False)
        batch(count, longest // 2, held_out=False)
        batch(max(1, count * 3 // 4), longest // 5, held_out=True)
    for count, held_out in ((counts[-1] // 2, False), (counts[-1] // 3, True)):
        if count and count * (longest // 8 + ANSWER_TOKENS) + longest // 2 < room:
            what = f"prompt of {longest // 2} beside {count} answers"
            found.append((what, held_out, partial(probe.mixed, count, longest // 8, longest // 2)))
    return found


async def calibrate(
    address: str, effort: Effort, *, name: str, max_running: int, say: Callable[[str], None]
) -> tuple[Hardware, StepFit]:
    """Measure the worker at `address`, which nobody else may use meanwhile; takes a minute or so on a GPU.

    `max_running` goes into the hardware, for no worker tells it. The terms that a step's counters cannot show stay 0:
    `context_square_s` (they add up contexts, not their squares), host tier and fetch (no request asks for them). What
    streaming costs besides, with 32 answers at once and more, is in no step's time, and not in the fit either.

    Raises Conflict for a busy worker and PoorFit for one whose times make no model; gRPC's errors as they are.
    """
    async with _probe(address) as probe:
        budget = await _token_budget(probe, min(effort.longest, probe.longest))
        plan = measurements(probe, effort)
        taken: list[list[Work]] = [[] for _ in plan]
        for number in range(effort.rounds):
            for (what, _, action), works in zip(plan, taken, strict=True):
                works.append(await probe.measure(action))
                say(f"round {number + 1} of {effort.rounds}: {what}: {1000 * works[-1].seconds:.1f} ms in steps")
        best = [min(works, key=lambda work: work.seconds) for works in taken]  # what disturbs only adds
    held = [held_out for _, held_out, _ in plan]
    fit = fit_steps(
        [work for work, out in zip(best, held, strict=True) if not out],
        [work for work, out in zip(best, held, strict=True) if out],
    )
    source = f"rhizome calibrate, {date.today()}, worker {probe.worker_id}: steps that were not fitted are predicted "
    source += f"with an error of {fit.error_p50:.1%} (p50), {fit.error_p90:.1%} (p90)"
    hardware = Hardware(
        name=name,
        source=source,
        steps=fit.model,
        kv_tokens=probe.capacity,
        max_batched_tokens=max(budget, max_running),
        max_running=max_running,
    )
    try:
        return parse_hardware(dump_hardware(hardware), "the fit"), fit
    except InvalidRequest as error:
        raise PoorFit(f"what was measured makes no hardware: {error}") from error


@asynccontextmanager
async def _probe(address: str) -> AsyncIterator[Probe]:
    """A probe of an idle worker: its KV, and the longest prompt that it takes."""
    async with grpc.aio.insecure_channel(address, options=rpc.CHANNEL_OPTIONS) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        status = await stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=IDLE_TIMEOUT_S)
        if status.running or status.waiting:
            raise Conflict(f"worker {status.worker_id} is busy: calibrate one that nobody else uses")
        block_size = (await GrpcEventSource(channel).snapshot()).block_size
        capacity = status.blocks_total * block_size
        yield Probe(stub, block_size, capacity, capacity - ANSWER_TOKENS, worker_id=status.worker_id)


async def _token_budget(probe: Probe, longest: int) -> int:
    """The most tokens that one step takes, or the longest prompt where that is less.

    Lowers `probe.longest` to what the worker takes.
    """
    while True:
        try:
            steps = await _steps_of(probe, longest)
            break
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.INVALID_ARGUMENT or longest < 4 * SHORT:
                raise
        longest //= 2
    probe.longest = longest
    fits, too_many = longest // steps, longest + 1  # a prompt of `fits` tokens takes one step
    if steps == 1:
        return longest
    too_many = longest // (steps - 1) + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if await _steps_of(probe, middle) == 1:
            fits = middle
        else:
            too_many = middle
    return fits


async def _steps_of(probe: Probe, length: int) -> int:
    work = await probe.measure(lambda: probe.prompt(length))
    return work.prefill_steps + work.decode_steps  # a single token that is left over counts as a decode


def _work(status: worker_pb2.WorkerStatus) -> Work:
    return Work(**{name: getattr(status, name) for name in _COUNTERS})


@asynccontextmanager
async def worker_address(router: str, worker_id: str | None) -> AsyncIterator[str]:
    """The address of one of a router's workers, to which the router sends nothing meanwhile.

    Raises InvalidRequest where it is not there or several are and none is named.
    """
    async with Client(router) as client:
        entries = {entry.worker_id: entry for entry in await client.workers() if entry.address}
        if worker_id is None and len(entries) == 1:
            (worker_id,) = entries
        entry = entries.get(worker_id or "")
        if entry is None:
            limit = f"one of {', '.join(sorted(entries))}" if entries else "a registered worker; there is none"
            raise InvalidRequest("id", worker_id, limit)
        if not entry.draining:
            await client.set_draining(entry.worker_id, draining=True)
        try:
            yield entry.address
        finally:
            if not entry.draining:
                with suppress(grpc.aio.AioRpcError):  # a router that has gone meanwhile drains nobody
                    await client.set_draining(entry.worker_id, draining=False)


def report(hardware: Hardware, fit: StepFit) -> str:
    """The fit as a table for people."""
    lines = [f"{'term':<16} {'seconds':>11} {'largest share':>14} {'error p50':>10} {'p90':>6}"]
    for term in fit.terms:
        shown = [f"{share:.1%}" if share is not None else "-" for share in (term.error_p50, term.error_p90)]
        lines.append(f"{term.name:<16} {term.seconds:>11.4g} {term.largest_share:>14.1%} {shown[0]:>10} {shown[1]:>6}")
    lines.append(f"{'held out':<16} {'':>11} {'':>14} {fit.error_p50:>10.1%} {fit.error_p90:>6.1%}")
    lines.append(f"KV {hardware.kv_tokens} tokens, token budget of a step {hardware.max_batched_tokens}")
    return "\n".join(lines)


async def run_calibrate(
    out: Path,
    *,
    router: str,
    worker: str | None,
    worker_id: str | None,
    name: str | None,
    effort: Effort,
    max_running: int,
    force: bool,
    say: Callable[[str], None],
) -> str:
    """Calibrate the worker at address `worker`, or else one of the router's, and write `out`; returns the report.

    Raises InvalidRequest before anything is measured, PoorFit where the error is too large unless `force` is given.
    """
    _check(out, effort, max_running, name or out.stem, {"router": router} if worker is None else {"worker": worker})
    async with AsyncExitStack() as stack:
        address = worker
        if address is None:
            address = await stack.enter_async_context(worker_address(router, worker_id))
        hardware, fit = await calibrate(address, effort, name=name or out.stem, max_running=max_running, say=say)
    text = report(hardware, fit)
    if fit.error_p90 > MAX_ERROR and not force:
        limit = f"{MAX_ERROR:.0%} is the limit, nothing was written (--force writes; more --rounds may help)"
        raise PoorFit(f"{text}\nthe p90 of the error is {fit.error_p90:.1%}: {limit}")
    out.write_text(dump_hardware(hardware), "utf-8")
    return text


def _check(out: Path, effort: Effort, max_running: int, name: str, addresses: dict[str, str]) -> None:
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise InvalidRequest("out", str(out), "a file in a folder that exists")
    least = {"longest": 16 * SHORT, "max_batch": 1, "rounds": 1}
    for field_name, value in least.items():
        if getattr(effort, field_name) < value:
            raise InvalidRequest(field_name, getattr(effort, field_name), f"at least {value}")
    for field_name, address in addresses.items():
        check_address(field_name, address)
    check_name("name", name)
    if max_running < 1:
        raise InvalidRequest("max_running", max_running, "at least 1")
