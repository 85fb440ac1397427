"""`rhizome events verify`: every sequence number and every digest, of a recording or of live streams."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from deploy.events.files import open_recording
from deploy.events.following import following, ticks
from deploy.events.progress import duration_text, progress_bar, status_line
from deploy.events.show import Output, table
from deploy.events.targets import Targets, open_targets
from kv_events.inspect.recording import RecordingError
from kv_events.inspect.verify import RecordingVerdict, StreamVerdict, Verifier, verify_recording
from kv_events.inspect.words import counted, printable
from rhizome.errors import InvalidRequest

HEADS = ("worker", "at", "blocks", "batches", "duplicates", "late", "lost", "mismatches", "digest", "verdict")


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """What `verify` was asked for."""

    target: str
    workers: tuple[str, ...] = ()  # of a live target; none: all
    for_s: float | None = 10.0  # a live target; None: until a signal
    as_json: bool = False


async def run_verify(options: VerifyOptions) -> bool:
    """Print what was found, and return whether all is right. Raises InvalidRequest, Unavailable."""
    output, unread = Output(as_json=options.as_json), dict[str, str]()
    if "://" not in options.target:
        if options.workers:
            raise InvalidRequest("worker", options.workers[0], "a live target: a recording is verified whole")
        verdict = await asyncio.to_thread(_of_recording, Path(options.target))
    else:
        async with open_targets(options.target, options.workers) as targets:
            streams, unread = await _live(targets, options.for_s)
            verdict = RecordingVerdict(complete=True, streams=streams)
    _tell(output, verdict, unread)
    return verdict.ok and not unread


def _of_recording(path: Path) -> RecordingVerdict:
    try:
        with open_recording("target", path) as reader, progress_bar("verifying", reader.size_bytes) as advance:
            return verify_recording(reader, advance)
    except RecordingError as error:  # of its index
        return RecordingVerdict(complete=False, damage=str(error))


async def _live(targets: Targets, for_s: float | None) -> tuple[list[StreamVerdict], dict[str, str]]:
    """What was found, and of which streams nothing came, by name: why."""
    verifier = Verifier()
    async with following(targets, verifier.consumer) as followed:
        with status_line() as show:
            async with aclosing(ticks(0.5, for_s)) as ticking:
                async for elapsed_s in ticking:
                    await followed.refresh()
                    show(f"verifying {targets.target}: {duration_text(round(elapsed_s))} · Ctrl-C ends")
        for name in followed.foreign:
            verifier.consumer(name).without_digests()
        followed.check_reached()
        unread = followed.unread
    return [stream for stream in verifier.verdicts() if stream.name not in unread], unread


def _tell(output: Output, verdict: RecordingVerdict, unread: dict[str, str]) -> None:
    harm = [*_harm(verdict), *(printable(f"{name}: not read: {why}") for name, why in unread.items())]
    ok = verdict.ok and not unread
    if output.as_json:
        for stream in verdict.streams:
            output.json(stream.as_json())
        whole = {"complete": verdict.complete, "damage": verdict.damage, "index_differs": verdict.index_differs}
        output.json({"ok": ok, "streams": len(verdict.streams), "unread": unread} | whole)
        return
    if verdict.streams:
        for line in table(HEADS, [_row(stream) for stream in verdict.streams]):
            output.line(line)
    for text in harm:
        output.text(text, "bad")
    if ok:
        sent = [stream for stream in verdict.streams if stream.digests_sent]
        foreign = [stream for stream in verdict.streams if not stream.digests_sent]
        if sent or not foreign:
            output.text(f"all is right: {_amount(sent)}", "stored")
        if foreign:
            told = f"in order, and no more is known: {_amount(foreign)} without digests"
            output.text(f"{told}; only the sequence of batches was checked", "note")


def _amount(streams: list[StreamVerdict]) -> str:
    batches = counted(sum(stream.applied for stream in streams), "batch", "batches")
    return f"{batches} of {counted(len(streams), 'worker')}"


def _row(stream: StreamVerdict) -> list[str]:
    return [
        printable(stream.worker if "://" in stream.name and stream.worker else stream.name),
        f"{stream.epoch}/{stream.next_seq}",
        f"{stream.blocks:,}",
        f"{stream.applied:,}",
        f"{stream.duplicates:,}",
        f"{stream.late:,}",
        f"{stream.lost:,}",
        f"{stream.mismatches:,}",
        stream.digest.hex(),
        "WRONG" if not stream.ok else "right" if stream.digests_sent else "in order",
    ]


def _harm(verdict: RecordingVerdict) -> list[str]:
    """What is wrong, a line each."""
    harm = [f"{printable(stream.name)}: {stream.first}" for stream in verdict.streams if stream.first]
    if verdict.damage:
        harm.append(f"damaged: {verdict.damage}; what comes after is not verified")
    elif not verdict.complete:
        harm.append("cut off: the recorder did not end in order; this is what is whole")
    if verdict.index_differs:
        harm.append("the index does not tell of the batches that there are")
    return harm
