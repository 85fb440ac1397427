"""`rhizome events` record, replay, stats, verify, diff and convert, as a user types them."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from deploy import cli
from kv_events.bus.follow import follow
from kv_events.bus.memory import published
from kv_events.bus.url import open_source, publishing
from kv_events.events import BlockStored
from kv_events.inspect.recording import RecordingReader, RecordingWriter
from kv_events.log import EventLog
from kv_events.view import WorkerView
from radix import make_tree
from tests.support.recordings import Fleet, blocks, recorded
from tests.support.redis_server import RedisServer
from tests.support.router_cluster import PROMPT, Cluster, with_cluster
from tests.support.vllm_server import VllmServer, removed, stored

PATIENCE_S = 60.0


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


Command = Callable[..., Done]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`rhizome events ...` in this process."""

    def run(*arguments: object, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "argv", ["rhizome", "events", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        return Done(code if isinstance(code, int) else 0, *capsys.readouterr())

    return run


@asynccontextmanager
async def running(*arguments: object) -> AsyncIterator[asyncio.subprocess.Process]:
    """`rhizome events ...` in a process of its own."""
    command = (sys.executable, "-m", "deploy.cli", "events", *map(str, arguments))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def done(*arguments: object) -> Done:
    async with running(*arguments) as process:
        out, err = await asyncio.wait_for(process.communicate(), PATIENCE_S)
        assert process.returncode is not None
        return Done(process.returncode, out.decode(), err.decode())


def refusal(ended: Done) -> str:
    """The one line with which a command refuses bad input."""
    assert ended.code == 2, ended
    assert not ended.out
    (line,) = ended.err.splitlines()
    assert line.startswith("rhizome: ")
    return line


@pytest.mark.parametrize("command", ["record", "replay", "stats", "verify", "diff", "convert"])
def test_every_command_explains_itself(events: Command, command: str) -> None:
    """With examples."""
    told = events(command, "--help")
    assert told.code == 0
    assert "Usage: rhizome events" in told.out
    assert f"rhizome events {command}" in told.out.split("Examples:")[1]


# Recordings.


def test_stats_of_a_recording(events: Command, tmp_path: Path) -> None:
    """A table for people, a line a worker for programs; of all workers or one."""
    fleet = recorded(tmp_path / "a.rhz")
    told = events("stats", tmp_path / "a.rhz")
    assert told.code == 0
    assert told.out.splitlines()[0].endswith("3 workers, 2 s; rates are means")
    heads, *rows = told.out.splitlines()[1:]
    assert heads.split()[:3] == ["worker", "blocks", "stored/s"]
    assert [row.split()[:2] for row in rows] == [[name, str(len(log))] for name, log in fleet.logs.items()]
    assert all(row.endswith("in step") for row in rows)
    lines = events("stats", tmp_path / "a.rhz", "--json", "--worker", "worker-1").lines
    (line,) = lines
    log = fleet.logs["worker-1"]
    assert (line["name"], line["blocks"], line["next_seq"]) == ("worker-1", len(log), log.next_seq)
    assert line["digest"] == log.digest.hex()
    assert line["lag_p50_s"] == pytest.approx(0.002, abs=1e-4)


def test_verify_ends_with_0_where_all_is_right(events: Command, tmp_path: Path) -> None:
    """And says what it looked at."""
    fleet = recorded(tmp_path / "a.rhz")
    told = events("verify", tmp_path / "a.rhz")
    assert told.code == 0
    assert "all is right: 200 batches of 3 workers" in told.out
    assert all(log.digest.hex() in told.out for log in fleet.logs.values())
    *streams, verdict = events("verify", tmp_path / "a.rhz", "--json").lines
    assert [stream["name"] for stream in streams] == list(fleet.logs)
    assert verdict == {"ok": True, "streams": 3, "complete": True, "damage": "", "index_differs": False, "unread": {}}


def test_verify_names_what_is_wrong_and_ends_with_1(events: Command, tmp_path: Path) -> None:
    """A false digest with worker, epoch and batch; damage with its place; a recorder that was cut off."""
    fleet = Fleet(workers=1)
    with RecordingWriter((tmp_path / "a.rhz").open("wb")) as writer:
        fleet.begin(writer)
        fleet.record(writer, 20)
        name, batch = fleet.step()
        writer.batch(name, batch._replace(digest=bytes(16)), fleet.time_ns)
    told = events("verify", tmp_path / "a.rhz")
    assert told.code == 1
    assert re.search(r"worker-0: the digest is \w{32}, the worker's 0{32}, at batch 20 of epoch 1", told.out)
    assert events("verify", tmp_path / "a.rhz", "--json").lines[0]["first"]["seq"] == 20

    recorded(tmp_path / "b.rhz")
    data = bytearray((tmp_path / "b.rhz").read_bytes())
    (tmp_path / "cut.rhz").write_bytes(data[:-7])
    told = events("verify", tmp_path / "cut.rhz")
    assert (told.code, "cut off" in told.out) == (1, True)
    data[200] ^= 1
    (tmp_path / "b.rhz").write_bytes(data)
    told = events("verify", tmp_path / "b.rhz")
    assert told.code == 1
    assert f"damaged: {tmp_path / 'b.rhz'}: a frame's body is damaged (at byte 32)" in told.out
    for command in (("stats",), ("replay",), ("diff", tmp_path / "a.rhz"), ("convert", "--force")):
        told = events(*command, tmp_path / "b.rhz", *([tmp_path / "c.jsonl"] if command[0] == "convert" else []))
        assert told.code == 1
        assert "at byte 32" in told.err.splitlines()[-1]
    assert not (tmp_path / "c.jsonl").exists()
    assert not (tmp_path / "c.jsonl.part").exists()


def test_a_recording_replays_into_a_tree_to_the_digests_that_it_holds(events: Command, tmp_path: Path) -> None:
    """Exit code 0; and 1 where one does not come out."""
    fleet = recorded(tmp_path / "a.rhz")
    told = events("replay", tmp_path / "a.rhz")
    assert told.code == 0
    rows = [row.split() for row in told.out.splitlines()[1:]]
    assert [row[0] for row in rows] == list(fleet.logs)
    assert [row[-2:] for row in rows] == [[log.digest.hex(), "equal"] for log in fleet.logs.values()]
    with RecordingWriter((tmp_path / "b.rhz").open("wb")) as writer:
        fleet.begin(writer)
        name, batch = fleet.step()
        writer.batch(name, batch._replace(digest=bytes(16)), fleet.time_ns)
    told = events("replay", tmp_path / "b.rhz")
    assert told.code == 1
    assert f"{name}: 1 digests differ, first at batch {batch.seq} of epoch 1" in told.out
    lines = events("replay", tmp_path / "b.rhz", "--json", "--worker", name).lines
    assert [line["equal"] for line in lines] == [False]


def test_diff_of_recordings(events: Command, tmp_path: Path) -> None:
    """Exit code 0 where they are equal; else 1, the first batch that differs, and blocks."""
    recorded(tmp_path / "a.rhz")
    recorded(tmp_path / "same.rhz")
    recorded(tmp_path / "other.rhz", seed=8)
    told = events("diff", tmp_path / "a.rhz", tmp_path / "same.rhz")
    assert told.code == 0
    assert told.out.splitlines()[-1] == "equal"
    told = events("diff", tmp_path / "a.rhz", tmp_path / "other.rhz", "--limit", 2)
    assert told.code == 1
    assert re.search(r"first: batch \d+ of epoch 1\n    A: .*digest \w{32}.*\n    B: ", told.out)
    assert re.search(r"missing in B: \d+ blocks  \w{16} \w{16} and \d+ more", told.out)
    told = events("diff", tmp_path / "a.rhz", tmp_path / "other.rhz", "--json", "--worker", "worker-2")
    assert told.code == 1
    (line,) = told.lines
    assert (line["name"], line["equal"], line["first"]["epoch"]) == ("worker-2", False, 1)


def test_convert_there_and_back(events: Command, tmp_path: Path) -> None:
    """By endings, through pipes, to the same bytes; a copy of a recording that was cut off has an index."""
    recorded(tmp_path / "a.rhz")
    data = (tmp_path / "a.rhz").read_bytes()
    for ending in ("jsonl", "parquet", "rhz"):
        told = events("convert", tmp_path / "a.rhz", tmp_path / f"b.{ending}")
        assert (told.code, told.out) == (0, "")
        assert "203 records" in told.err
        assert events("convert", tmp_path / f"b.{ending}", tmp_path / f"{ending}.rhz").code == 0
        assert (tmp_path / f"{ending}.rhz").read_bytes() == data
    lines = events("convert", tmp_path / "a.rhz", "-")
    assert len(lines.lines) == 204
    assert events("convert", "-", tmp_path / "piped.rhz", stdin=lines.out).code == 0
    assert (tmp_path / "piped.rhz").read_bytes() == data
    (tmp_path / "cut.rhz").write_bytes(data[:-1])
    told = events("convert", tmp_path / "cut.rhz", tmp_path / "mended.rhz")
    assert told.code == 0
    assert "was cut off" in told.err
    assert (tmp_path / "mended.rhz").read_bytes() == data


def test_an_ending_that_is_not_known_is_refused(events: Command, tmp_path: Path) -> None:
    """Naming those that are; nothing is written. A recording is known by its first bytes, too."""
    recorded(tmp_path / "a.rhz")
    (tmp_path / "a.copy").write_bytes((tmp_path / "a.rhz").read_bytes())
    told = refusal(events("convert", tmp_path / "a.rhz", tmp_path / "b.csv"))
    assert f"destination is '{tmp_path / 'b.csv'}': a name that ends in one of .rhz, .jsonl, " in told
    (tmp_path / "a.csv").write_text("1,2\n")
    assert "source is" in refusal(events("convert", tmp_path / "a.csv", tmp_path / "b.rhz"))
    assert not any(tmp_path.glob("b.*"))
    assert events("convert", tmp_path / "a.copy", tmp_path / "b.rhz").code == 0


@pytest.mark.parametrize("command", ["tail", "tree", "stats", "replay", "verify", "diff", "convert"])
@pytest.mark.parametrize("where", ["index", "chunk"])
def test_damage_ends_with_1_and_names_the_file(events: Command, tmp_path: Path, command: str, where: str) -> None:
    """Whatever reads it, and wherever the damage is: 2 is for what is no recording."""
    path = tmp_path / "a.rhz"
    recorded(path)
    data = bytearray(path.read_bytes())
    data[-40 if where == "index" else 60] ^= 1
    path.write_bytes(data)
    more = {"diff": [path], "convert": [tmp_path / "b.jsonl"]}.get(command, [])
    told = events(command, path, *more)
    assert told.code == 1, told
    assert f"{path}: " in told.out + told.err
    assert "damaged" in told.out + told.err


@pytest.mark.parametrize("command", ["tail", "tree", "stats", "replay"])
def test_a_recording_that_was_cut_off_is_read_and_said_to_be(events: Command, tmp_path: Path, command: str) -> None:
    """What is whole of it is shown, and it is no error."""
    recorded(tmp_path / "a.rhz")
    (tmp_path / "cut.rhz").write_bytes((tmp_path / "a.rhz").read_bytes()[:-1])
    told = events(command, tmp_path / "cut.rhz")
    assert told.code == 0
    assert told.out
    assert told.err.count("was cut off: this is what is whole") == 1


def test_bad_input_is_one_line_naming_what_is_wrong(events: Command, tmp_path: Path) -> None:
    """Field, value and limit; exit code 2; nothing is written."""
    recorded(tmp_path / "a.rhz")
    (tmp_path / "junk").write_bytes(b"junk")
    (tmp_path / "junk.jsonl").write_text('{"kind": "header"}\n')
    missing, here = tmp_path / "missing", tmp_path / "a.rhz"
    for name, command in (("target", "verify"), ("target", "stats"), ("file", "replay")):
        assert f"{name} is '{missing}'" in refusal(events(command, missing))
        assert f"{name} is '{tmp_path / 'junk'}': a recording" in refusal(events(command, tmp_path / "junk"))
    assert f"b is '{missing}'" in refusal(events("diff", here, missing))
    assert "b is None: a second target, unless the first one is a router" in refusal(events("diff", here))
    assert "worker is 'x': one of worker-0" in refusal(events("diff", here, here, "--worker", "x"))
    assert "worker is 'x': one of worker-0" in refusal(events("stats", here, "--worker", "x"))
    assert "worker is 'x': one of worker-0" in refusal(events("replay", here, "--worker", "x"))
    assert "speed is 'fast': a number above 0, or max" in refusal(events("replay", here, "--speed", "fast"))
    assert "speed is 0.0: a number above 0, or max" in refusal(events("replay", here, "--speed", "0"))
    assert "one of memory://" in refusal(events("replay", here, "--into", "http://x"))
    assert "{worker} in it, or with port 0, as 3 workers" in refusal(events("replay", here, "--into", "memory://x"))
    assert "0.0.0.0" in refusal(events("replay", here, "--into", "grpc://0.0.0.0:0"))
    assert "target is" in refusal(events("record", tmp_path / "b.rhz", here))
    assert f"file is '{here}': a file that does not exist, or with --force" in refusal(
        events("record", here, "memory://x", "--for", "0.1")
    )
    assert f"destination is '{here}'" in refusal(events("convert", tmp_path / "junk.jsonl", here))
    assert "line is 1: format is None" in refusal(events("convert", tmp_path / "junk.jsonl", tmp_path / "b.rhz"))
    assert "source is" in refusal(events("convert", missing, tmp_path / "b.rhz"))
    assert "destination is" in refusal(events("convert", tmp_path / "junk.jsonl", tmp_path / "b.parquet"))
    assert "destination is" in refusal(events("convert", here, missing / "b.jsonl"))
    assert "destination is" in refusal(events("convert", here, here / "b.jsonl"))
    assert "file is" in refusal(events("record", here / "b.rhz", "memory://x", "--for", "0.1"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.rhz", "junk", "junk.jsonl"]


# Live streams.


@contextmanager
def working(name: str = "tools") -> Iterator[EventLog]:
    """A worker at memory://NAME that takes a step each millisecond."""
    log, stopped = EventLog("w0", 3, 16), threading.Event()

    def work() -> None:
        block = 0
        while not stopped.wait(0.001):
            block += 1
            log.append([BlockStored(blocks(block), 0, 16)], 0.0)

    thread = threading.Thread(target=work)
    with published(log, name):
        thread.start()
        try:
            yield log
        finally:
            stopped.set()
            thread.join()


def test_record_ends_after_so_many_batches_or_seconds(events: Command, tmp_path: Path) -> None:
    """With a whole file, which begins with a snapshot; --force replaces one."""
    with working():
        told = events("record", tmp_path / "a.rhz", "memory://tools", "--batches", 50)
        assert told.code == 0
        assert told.out.startswith(f"{tmp_path / 'a.rhz'}: 50 batches of 1 worker in ")
        told = events("record", tmp_path / "b.rhz", "memory://tools", "--for", 0.3, "--json")
        assert events("record", tmp_path / "a.rhz", "memory://tools", "--for", 0.2, "--force").code == 0
    (line,) = told.lines
    assert line["workers"] == ["w0"], "the worker's own name, not the bus's"
    assert 0.3 <= line["seconds"] < 10
    with RecordingReader(tmp_path / "b.rhz") as reader:
        summary = reader.summary()
        assert summary.complete
        assert (summary.workers["w0"].snapshots, summary.workers["w0"].batches) == (1, line["batches"])
        assert line["batches"] > 0
        assert next(reader.records()).kind.name == "SNAPSHOT"
    for name in ("a.rhz", "b.rhz"):
        assert events("verify", tmp_path / name).code == 0


def test_stats_and_verify_of_a_live_stream(events: Command) -> None:
    """What was watched; tables as time goes by."""
    with working() as log:
        told = events("stats", "memory://tools", "--for", 0.5, "--json")
        assert told.code == 0
        (line,) = told.lines
        assert (line["worker"], line["synced"], line["gaps"]) == ("w0", True, 0)
        assert 0 < line["stored"] <= log.next_seq
        assert line["stored_per_s"] > 1
        told = events("stats", "memory://tools", "--for", 0.7, "--every", 0.2)
        assert told.out.count("stored/s") >= 2
        assert "w0" in told.out
        told = events("verify", "memory://tools", "--for", 0.3)
        assert told.code == 0
        assert "all is right" in told.out


def test_diff_of_a_recording_and_a_live_stream(events: Command, tmp_path: Path) -> None:
    """Who holds what now, against then."""
    log = EventLog("w0", 3, 16)
    log.append([BlockStored(blocks(1, 2, 3), 0, 16)], 0.0)
    with published(log, "tools"):
        assert events("record", tmp_path / "a.rhz", "memory://tools", "--for", 0.3).code == 0
        assert events("diff", tmp_path / "a.rhz", "memory://tools").code == 0
        log.append([BlockStored(blocks(4), 3, 16)], 0.0)
        told = events("diff", tmp_path / "a.rhz", "memory://tools")
        assert told.code == 1
        assert "only in B: 1 block  0000000000000004" in told.out


@pytest.mark.parametrize("command", ["record", "stats", "verify"])
def test_what_cannot_be_reached_ends_with_1_and_says_why(events: Command, tmp_path: Path, command: str) -> None:
    """After the time that was given; a router is missed at once."""
    file = [tmp_path / "a.rhz"] if command == "record" else []
    told = events(command, *file, "memory://nowhere", "--for", 0.3)
    assert told.code == 1
    assert "nothing is published at memory://nowhere" in told.err.splitlines()[-1]
    assert events(command, *file, "router://127.0.0.1:1", "--for", 20, *(["--force"] if file else [])).code == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_recording_in_order(tmp_path: Path, number: signal.Signals) -> None:
    """Exit code 0 and a whole file, over a real network."""

    async def test() -> None:
        fleet = Fleet(workers=1)
        log = fleet.logs["worker-0"]
        async with publishing(log, "grpc://127.0.0.1:0") as url:
            async with running("record", tmp_path / "a.rhz", url, "--json") as process:
                while log.subscribers == 0:
                    await asyncio.sleep(0.01)
                for _ in fleet.steps(200):
                    await asyncio.sleep(0.001)
                while recorded_batches(tmp_path / "a.rhz") < 200:
                    await asyncio.sleep(0.05)
                os.kill(process.pid, number)
                out, err = await process.communicate()
                assert process.returncode == 0, err.decode()
        assert json.loads(out)["batches"] == 200
        verified = await done("verify", tmp_path / "a.rhz", "--json")
        assert verified.code == 0
        assert verified.lines[0]["digest"] == log.digest.hex()

    asyncio.run(asyncio.wait_for(test(), PATIENCE_S))


def recorded_batches(path: Path) -> int:
    """In what is flushed so far."""
    with RecordingReader(path) as reader:
        return sum(worker.batches for worker in reader.summary().workers.values())


def test_a_vllm_server_is_recorded_and_replayed_like_a_worker(events: Command, tmp_path: Path) -> None:
    """Its restarts and losses included; the recording is of ours, and all tools read it."""
    with VllmServer(topic=b"kv@pod-7@model") as server:
        server.publish(stored([11, 12]))
        stopped = threading.Event()

        def work() -> None:
            block = 100
            while not stopped.wait(0.002):
                server.publish(
                    stored([block + 1], block if block > 100 else 12), removed([block - 10]), lost=block % 7 == 0
                )
                block += 1

        thread = threading.Thread(target=work)
        thread.start()
        try:
            told = events("record", tmp_path / "a.rhz", server.url, "--batches", 100)
            watched = events("verify", server.url, "--for", 2)
        finally:
            stopped.set()
            thread.join()
    assert told.code == 0, told.err
    assert watched.code == 0, watched
    assert "only the sequence of batches was checked" in watched.out
    verified = events("verify", tmp_path / "a.rhz", "--json")
    assert verified.code == 0, verified.out
    assert verified.lines[0]["worker"] == "pod-7"
    assert verified.lines[0]["applied"] == 100
    assert verified.lines[0]["digests_sent"] is False
    assert events("replay", tmp_path / "a.rhz").code == 0


# Replays onto buses.


def restarting(path: Path) -> Fleet:
    """A recording with a restart and with lost batches."""
    fleet = Fleet(workers=1)
    with RecordingWriter(path.open("wb")) as writer:
        fleet.begin(writer)
        fleet.record(writer, 30)
        list(fleet.steps(5))
        fleet.begin(writer)
        fleet.record(writer, 30)
        fleet.restart("worker-0")
        fleet.record(writer, 30)
    return fleet


@pytest.mark.parametrize("scheme", ["memory", "grpc", "zmq"])
def test_a_replay_onto_a_bus_is_read_back_to_the_same_digests(events: Command, tmp_path: Path, scheme: str) -> None:
    """Several workers, each at its own place."""
    fleet = recorded(tmp_path / "a.rhz")
    where = "memory://replay-{worker}" if scheme == "memory" else f"{scheme}://127.0.0.1:0"
    told = events("replay", tmp_path / "a.rhz", "--into", where, "--speed", "max", "--json")
    assert told.code == 0, told.err
    places, ends = told.lines[:3], told.lines[3:]
    assert len({place["url"] for place in places}) == 3
    assert [place["worker"] for place in places] == [end["worker"] for end in ends] == list(fleet.logs)
    assert [end["digest"] for end in ends] == [log.digest.hex() for log in fleet.logs.values()]


def test_a_replay_onto_redis_stays_there(events: Command, tmp_path: Path) -> None:
    """Whoever comes later reads it; the restart, too."""
    fleet = restarting(tmp_path / "a.rhz")
    log = fleet.logs["worker-0"]
    with RedisServer() as server:
        told = events("replay", tmp_path / "a.rhz", "--into", server.url("replay:{worker}"), "--speed", "max")
        assert told.code == 0, told.err

        async def read() -> tuple[tuple[int, int], bytes]:
            view = WorkerView("worker-0", 0, make_tree())
            async with open_source(server.url("replay:worker-0")) as source:
                following = asyncio.create_task(follow(source, view))
                while view.position() != (log.epoch, log.next_seq):
                    await asyncio.sleep(0.01)
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
            return view.position(), view.digest

        assert asyncio.run(asyncio.wait_for(read(), PATIENCE_S)) == ((2, 30), log.digest)


def test_a_replay_can_be_followed_at_its_speed(tmp_path: Path) -> None:
    """From the beginning to the end, through restart and loss; it stays as long as it is held."""

    async def test() -> None:
        log = restarting(tmp_path / "a.rhz").logs["worker-0"]
        view = WorkerView("worker-0", 0, make_tree())
        arguments = ("--into", "zmq://127.0.0.1:0", "--speed", "0.5", "--hold", "--json")
        async with running("replay", tmp_path / "a.rhz", *arguments) as process:
            assert process.stdout is not None
            url = json.loads(await process.stdout.readline())["url"]
            async with open_source(url) as source:
                following = asyncio.create_task(follow(source, view, max_delay_s=0.1))
                while view.position() != (log.epoch, log.next_seq):
                    await asyncio.sleep(0.01)
                assert (view.synced, view.digest) == (True, log.digest)
                assert view.counts.applied >= 30
                told = json.loads(await process.stdout.readline())
                assert (told["equal"], told["logs"], told["digest"]) == (True, 3, log.digest.hex())
                async with aclosing(source.subscribe(log.epoch, log.next_seq - 1)) as batches:
                    assert (await anext(batches)).seq == log.next_seq - 1, "it is still there"
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
            os.kill(process.pid, signal.SIGINT)
            assert await process.wait() == 0

    asyncio.run(asyncio.wait_for(test(), PATIENCE_S))


# A router and its workers.


def test_a_router_and_its_workers_are_recorded_verified_and_compared(tmp_path: Path) -> None:
    """All streams of the router, by the workers' names; a view that is not right shows in the diff."""

    async def test(running: Cluster) -> None:
        workers = {name: await running.join(name) for name in ("worker-0", "worker-1")}
        for length, worker in zip((40, 400), workers.values(), strict=True):
            worker.hold(PROMPT[:length])
        await running.ready(2)
        target = f"router://{running.address}"
        working = asyncio.create_task(_hold_more(list(workers.values())))
        told = await asyncio.gather(
            done("record", tmp_path / "a.rhz", target, "--for", 2),
            done("stats", target, "--for", 2, "--json"),
            done("verify", target, "--for", 2, "--worker", "worker-1"),
            done("diff", target),
        )
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        assert [one.code for one in told] == [0, 0, 0, 0], told
        assert [line["name"] for line in told[1].lines] == ["worker-0", "worker-1"]
        assert told[2].out.splitlines()[1].startswith("worker-1 ")
        assert told[3].out.splitlines()[-1] == "equal"
        with RecordingReader(tmp_path / "a.rhz") as reader:
            assert sorted(reader.summary().workers) == ["worker-0", "worker-1"]
        assert (await done("verify", tmp_path / "a.rhz")).code == 0

    with_cluster(test)


def test_a_worker_that_cannot_be_read_is_not_right() -> None:
    """Neither verified nor equal, whatever its router holds of it: the commands name it, and end with 1."""

    async def test(running: Cluster) -> None:
        workers = [await running.join(name) for name in ("worker-0", "worker-1")]
        await running.ready(2)
        await workers[1].kill()
        target = f"router://{running.address}"
        verified, compared = await asyncio.gather(
            done("verify", target, "--for", 2, "--json"), done("diff", target, "--json")
        )
        assert (verified.code, compared.code) == (1, 1)
        *streams, whole = verified.lines
        assert [stream["name"] for stream in streams] == ["worker-0"]
        assert not whole["ok"]
        assert list(whole["unread"]) == ["worker-1"]
        assert [(line["name"], line["equal"]) for line in compared.lines] == [("worker-0", True), ("worker-1", False)]
        assert compared.lines[1]["unread"]

    with_cluster(test)


async def _hold_more(workers: list[Any]) -> None:
    block = 2**40
    while True:
        for worker in workers:
            block += 1
            worker.log.append([BlockStored(blocks(block), 0, 16)], 0.0)
        await asyncio.sleep(0.01)
