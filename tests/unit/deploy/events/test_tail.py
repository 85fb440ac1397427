"""`rhizome events tail`: what it prints of recordings and of live streams."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.events.show import clock_text
from deploy.events.tail import TailOptions, run_tail
from kv_events.bus.url import publishing
from kv_events.events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from kv_events.inspect.recording import RecordingWriter
from kv_events.inspect.words import parse_key
from kv_events.log import EventLog
from radix.keys import Hashes
from rhizome.errors import InvalidRequest, RhizomeError
from router.service import running_router

TS = 1_700_000_000.25


def hashes(*values: int) -> Hashes:
    return np.array(values, dtype=np.uint64)


STORED = BlockStored(hashes(0xAB, 0xAC, 0xAD), 0, 16, np.arange(48, dtype=np.uint32))
MORE = BlockStored(hashes(0xF0 << 56), 0xAD, 16, medium="CPU")
REMOVED = BlockRemoved(hashes(0xAD, 0xAC))
CLEARED = AllBlocksCleared()


@pytest.fixture
def recording(tmp_path: Path) -> str:
    """Two workers, a second between their batches."""
    logs = {name: EventLog(name, 5, 16) for name in ("worker-0", "w1\x1b[2J")}
    said: list[tuple[str, list[Event]]] = [
        ("worker-0", [STORED]),
        ("w1\x1b[2J", [MORE]),
        ("worker-0", [REMOVED, MORE]),
        ("worker-0", [CLEARED]),
    ]
    path = tmp_path / "some.rhz"
    with RecordingWriter(path.open("wb")) as writer:
        writer.snapshot("worker-0", logs["worker-0"].snapshot(), int(TS * 1e9))
        for number, (name, events) in enumerate(said):
            time_s = TS + number
            writer.batch(name, logs[name].append(events, time_s), int(time_s * 1e9))
        writer.mark("worker-0", "the end", int((TS + 9) * 1e9))
    return str(path)


def printed(capsys: pytest.CaptureFixture[str], target: str, **options: Any) -> list[str]:
    asyncio.run(run_tail(TailOptions(target, **options)))
    return capsys.readouterr().out.splitlines()


def values(capsys: pytest.CaptureFixture[str], target: str, **options: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed(capsys, target, as_json=True, **options)]


def test_an_event_is_a_line_with_all_that_it_says(recording: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Time, worker, batch, kind, tier, blocks, first keys, parent; no control character of a name gets through."""
    first, second = clock_text(TS), clock_text(TS + 1)
    assert printed(capsys, recording)[:3] == [
        "-- worker-0: 0 blocks as of 5/0",
        f"{first}  worker-0  5/0  stored   device  3 blocks   00000000000000ab … 00000000000000ad"
        "  first of a prompt  48 tokens",
        f"{second}  w1?[2J    5/0  stored   host    1 block    f000000000000000  after 00000000000000ad",
    ]


def test_json_lines_hold_the_same(recording: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every key, and names as they are."""
    lines = values(capsys, recording)
    assert lines[0] == {"note": "snapshot", "worker": "worker-0", "text": "0 blocks as of 5/0"}
    assert lines[1] == {
        "ts": TS,
        "worker": "worker-0",
        "epoch": 5,
        "seq": 0,
        "kind": "stored",
        "tier": "device",
        "blocks": 3,
        "keys": ["00000000000000ab", "00000000000000ac", "00000000000000ad"],
        "parent": None,
        "block_size": 16,
        "tokens": 48,
    }
    assert [line.get("kind", line.get("note")) for line in lines] == [
        *("snapshot", "stored", "stored", "removed", "stored", "cleared", "mark")
    ]
    assert lines[2]["parent"] == "00000000000000ad"
    assert lines[5] == {"ts": TS + 3, "worker": "worker-0", "epoch": 5, "seq": 2, "kind": "cleared"}


def events(lines: list[dict[str, Any]]) -> list[tuple[str, int, str]]:
    return [(line["worker"], line["seq"], line["kind"]) for line in lines if "kind" in line]


def test_filters_leave_what_was_asked_for(recording: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By worker, kind, key and sequence number; a limit counts events."""
    name = "w1\x1b[2J"
    assert events(values(capsys, recording, workers=(name,))) == [(name, 0, "stored")]
    assert events(values(capsys, recording, kinds=("removed",))) == [("worker-0", 1, "removed")]
    assert events(values(capsys, recording, kinds=("cleared",))) == [("worker-0", 2, "cleared")]
    two = values(capsys, recording, kinds=("cleared", "removed"))
    assert [kind for _, _, kind in events(two)] == ["removed", "cleared"]
    assert events(values(capsys, recording, start=1))[0] == ("worker-0", 1, "removed")
    assert len(events(values(capsys, recording, limit=2))) == 2
    lines = values(capsys, recording, key=parse_key("key", "00000000000000ad"))
    assert events(lines) == [("worker-0", 0, "stored"), ("worker-0", 1, "removed")]
    assert [line["keys"] for line in lines if "kind" in line] == [["00000000000000ad"]] * 2
    assert len(events(values(capsys, recording, key=parse_key("key", "f")))) == 2
    with pytest.raises(InvalidRequest, match="worker is 'w7': one of "):
        printed(capsys, recording, workers=("w7",))


def test_rates_go_second_by_second(recording: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As they were then, in a recording; a line for each worker that has said something."""
    lines = [line for line in values(capsys, recording, rates=True) if "note" not in line]
    first = int(TS)
    assert [
        (line["ts"] - first, line["worker"], line["stored"], line["removed"], line["cleared"]) for line in lines
    ] == [
        (0, "worker-0", 3, 0, 0),
        (1, "worker-0", 0, 0, 0),
        (1, "w1\x1b[2J", 1, 0, 0),
        (2, "worker-0", 1, 2, 0),
        (2, "w1\x1b[2J", 0, 0, 0),
        (3, "worker-0", 0, 0, 1),
        (3, "w1\x1b[2J", 0, 0, 0),
    ]
    text = [line for line in printed(capsys, recording, rates=True) if not line.startswith("--")]
    assert text[0] == f"{clock_text(TS)[:8]}  worker-0     1 batches/s         3 stored/s         0 removed/s"
    assert text[5].endswith("cleared 1 time")


def test_a_live_stream_is_followed_or_read_to_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    """Over a real bus: what is kept, then what comes; a worker that it does not carry is nobody."""
    log = EventLog("worker-0", 3, 16)
    for number in range(4):
        log.append([BlockStored(hashes(number + 1), number, 16)], TS)

    async def main() -> None:
        async with asyncio.timeout(30), publishing(log, "grpc://127.0.0.1:0") as url:
            await run_tail(TailOptions(url, follow=False, as_json=True))
            await run_tail(TailOptions(url, follow=False, start=3, as_json=True))
            await run_tail(TailOptions(url, workers=("another",), follow=False, as_json=True))
            following = asyncio.create_task(run_tail(TailOptions(url, start=3, limit=2, as_json=True)))
            while not log.subscribers:
                await asyncio.sleep(0.01)
            log.append([CLEARED], TS)
            await following
            rates = asyncio.create_task(run_tail(TailOptions(url, rates=True, limit=2, as_json=True)))
            while not rates.done():
                log.append([REMOVED], TS)
                await asyncio.sleep(0.05)
            await rates

    asyncio.run(main())
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["seq"] for line in lines if "seq" in line] == [0, 1, 2, 3, 3, 3, 4]
    assert {line["worker"] for line in lines} == {"worker-0"}
    rates = [line for line in lines if "batches" in line]
    assert len(rates) == 2
    assert all(line["removed"] == 2 * line["batches"] > 0 for line in rates[1:])


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("nothing-there", "target is 'nothing-there': router://HOST:PORT, a bus URL"),
        ("http://127.0.0.1:1", "target is 'http://127.0.0.1:1': router://HOST:PORT, a bus URL"),
        ("router://nowhere", "target is 'nowhere': host:port"),
        ("grpc://127.0.0.1", "a port, as in host:port"),
        ("router://127.0.0.1:1", "router://127.0.0.1:1: UNAVAILABLE"),
        ("grpc://127.0.0.1:1", "UNAVAILABLE"),
    ],
)
def test_what_is_no_target_or_is_not_there_is_an_error(target: str, said: str) -> None:
    """With what is wrong, and nothing is waited for."""
    with pytest.raises(RhizomeError, match=said):
        asyncio.run(run_tail(TailOptions(target)))


def test_a_router_taken_for_a_worker_is_said_to_be_one() -> None:
    """With the URL that it has."""

    async def main() -> None:
        async with running_router() as address:
            await run_tail(TailOptions(f"grpc://{address}"))

    with pytest.raises(RhizomeError, match="a router's workers are at router://HOST:PORT"):
        asyncio.run(main())


def test_a_file_that_is_no_recording_is_refused(tmp_path: Path) -> None:
    """Bad input, not a crash."""
    path = tmp_path / "file"
    path.write_bytes(b"something else")
    with pytest.raises(InvalidRequest, match="a recording of events"):
        asyncio.run(run_tail(TailOptions(str(path))))
