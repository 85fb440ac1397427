"""The event benchmark: it runs, with whatever of Redis and the peer is here."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from benchmarks import events
from benchmarks.events_peer import Payload, PeerEvents
from benchmarks.events_plan import Plan
from benchmarks.events_processes import Engine, has_redis
from benchmarks.peer_index import peer_name
from benchmarks.readme import events_section
from kv_events import wire
from kv_events.log import EventLog
from radix.keys import ROOT_HASH

TINY = Plan(
    workers=4,
    decode_rounds=2,
    decode_sessions=4,
    decode_filled=4,
    foreign_sessions=2,
    transports=("memory", "grpc", "redis"),
    flood_rounds=1,
    flood_s=0.1,
    paced_s=0.05,
    settle_s=0.02,
    append_batches=200,
    stalled=(0, 1),
    steps=3,
    recovery_blocks=5_000,
    recovery_prefixes=10,
    recovery_rounds=1,
)


def test_every_part_of_the_benchmark_gives_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows have the names that others look for and a figure each, and go to the table and the JSON alike; what Redis
    has no server for is left out, and said so; README's section can be made of them."""
    path = tmp_path / "events.json"
    assert events.main(["--json", str(path)], TINY) == 0
    report = json.loads(path.read_text())
    assert report["name"] == "events"
    rows = {each["what"]: each for each in report["rows"]}
    assert len(rows) == len(report["rows"]), "two rows have one name"
    expected = {
        *(f"decode {kind} {into}" for kind in ("store", "remove") for into in ("tree", "view")),
        *("decode foreign store", "decode foreign remove blocks", "append"),
        *(f"bus {transport}{part}" for transport in ("memory", "grpc") for part in ("", " lag p50", " lag p99")),
        *(f"publish {transport} {count} stalled" for transport in ("memory", "grpc") for count in (0, 1)),
        *("recovery grpc", "recovery grpc right"),
    }
    of_redis = {"bus redis lag p99", "publish redis stopped", "publish redis dead", "recovery redis"}
    assert expected <= rows.keys()
    assert of_redis & rows.keys() == (of_redis if has_redis() else set())
    assert all(each["ours"] > 0 for name, each in rows.items() if not name.endswith(" right"))
    assert report["machine"]["redis"] == has_redis()
    output = capsys.readouterr()
    assert "recovery grpc" in output.out
    assert has_redis() or "redis-server is not on the path" in output.err
    section = events_section(report)
    assert "| grpc |" in section
    assert ("Rows of Redis are missing" in section) == (not has_redis())


@pytest.mark.parametrize("arguments", [["--fast"], ["--json"], ["--json", "no/such/folder/events.json"]])
def test_bad_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown option, or a file that could not be written after minutes of work, is told at once."""
    with pytest.raises(SystemExit) as ended:
        events.main(arguments, TINY)
    assert ended.value.code == 2
    assert "--" in capsys.readouterr().err


def test_the_engine_holds_no_more_however_long_it_runs() -> None:
    """What it stores it removes again: one batch of 16 blocks a step."""
    log = EventLog("w", 1, 16)
    engine = Engine(log, sessions=3)
    held = []
    for _ in range(4 * 24):
        engine.step()
        held.append(len(log))
    assert max(held) == 3 * 64
    assert held[23::24] == [0] * 4
    assert all(abs(after - before) == 16 for before, after in pairwise(held))


@pytest.mark.skipif(not peer_name(), reason="the peer is not installed: extra `bench`")
def test_both_ways_of_the_peer_lead_to_the_same_tree() -> None:
    """The JSON that is made beforehand says what the payload says."""
    prepared, made = PeerEvents(), PeerEvents()
    log = EventLog("w", 1, 16)
    engine = Engine(log, sessions=1)
    payloads = []
    for _ in range(6):
        engine.step()
        event = log.since(log.next_seq - 1)[0].events[0]
        parent = getattr(event, "parent_hash", None)
        hashes = event.block_hashes
        json_bytes = prepared.removed(hashes) if parent is None else prepared.stored(hashes, parent)
        payloads.append(Payload(0, wire.encode(log.since(log.next_seq - 1)[0]), json_bytes))
    prepared.feed(payloads)
    made.feed_all(payloads, tokens=False)
    chain = np.concatenate([wire.decode(payload.data).events[0].block_hashes for payload in payloads[:4]])
    assert wire.decode(payloads[0].data).events[0].parent_hash == ROOT_HASH
    for query in (chain, chain[:40], chain[:16]):
        depths = prepared.index.depths(prepared.index.query(query))
        assert depths == made.index.depths(made.index.query(query)) == {0: min(len(query), 32)}
