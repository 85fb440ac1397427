"""The Redis bus when others write to a worker's stream, or may not read it: zombies, strangers, poisoned entries."""

from __future__ import annotations

import asyncio
import logging
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest
from redis import Redis
from redis.exceptions import ResponseError

from kv_events import wire
from kv_events.bus import redis_publisher
from kv_events.bus.redis import open_source
from kv_events.bus.redis_stream import AUTH_VARIABLE, TTL_S
from kv_events.bus.url import parse_bus_url
from kv_events.events import BlockStored
from kv_events.snapshot_bytes import decode_snapshot
from radix import make_tree
from rhizome.errors import InvalidRequest, Unavailable
from tests.support.redis_fleet import Worker, be_impatient, in_step, published, router, run, until
from tests.support.redis_server import RedisServer

PASSWORD = "Xylophon:4711@7"


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture
def client(server: RedisServer) -> Iterator[Redis]:
    with Redis(port=server.port) as redis:
        redis.flushall()
        yield redis


@pytest.fixture
def url(server: RedisServer, client: Redis) -> str:
    return server.url("kv")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    be_impatient(monkeypatch)


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_zombie_changes_nothing_and_says_so_once(url: str, client: Redis, caplog: pytest.LogCaptureFixture) -> None:
    """A former incarnation that goes on beside the new one: neither entries nor the snapshot are ever its own."""

    async def test() -> None:
        zombie, worker = Worker(epoch=5), Worker(epoch=6)
        async with published(zombie, url), router(url) as view:
            await zombie.run(30)
            await in_step(view, zombie)
            async with published(worker, url):
                await worker.run(30)
                await in_step(view, worker)
                await zombie.run(100)
                await worker.run(30)
                await until(lambda: bool(errors(caplog)))
                await asyncio.sleep(0.2)  # it looks again some times
                await in_step(view, worker)
                assert view.counts.stale == view.counts.mismatches == 0
                ids = [entry[0] for entry in client.xrange("kv")]
                assert all(entry.startswith(b"6-") for entry in ids)
                assert decode_snapshot(client.get("kv:snapshot")).epoch == 6

    run(test())
    (error,) = errors(caplog)
    assert "a newer start of this worker, or another one, publishes there; nothing is published there until" in error


def test_a_zombie_that_is_faster_to_an_empty_redis_is_overtaken(
    url: str, client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Everything is lost, and the former incarnation writes first: routers take nothing of it, and the new one wins."""

    async def test() -> None:
        zombie, worker = Worker(epoch=5), Worker(epoch=6)
        zombie.go_on(30)
        async with AsyncExitStack() as stack:
            view = await stack.enter_async_context(router(url))
            async with published(worker, url):
                await worker.run(30)
                await in_step(view, worker)
            client.flushall()
            async with published(zombie, url):
                await until(lambda: client.exists("kv"))
                await asyncio.sleep(0.1)
                assert view.position() == (6, 30)
                assert view.synced
                async with published(worker, url):
                    await worker.run(30)
                    await in_step(view, worker)
                    zombie.go_on(1)
                    await until(lambda: bool(errors(caplog)))  # it has given up

    run(test())


def test_a_worker_that_was_wrongly_superseded_comes_back(
    url: str, client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Something of a later epoch, left by a clock that was ahead, keeps a live worker out until it is gone, not for
    good; that is told once."""
    left = (("9-7", {"batch": "of the future"}), ("9-8", {"end": ""}))
    for entry_id, fields in left:
        client.xadd("kv", fields, id=entry_id)

    async def test() -> None:
        worker = Worker()
        async with published(worker, url):
            await worker.run(30)
            await until(lambda: bool(errors(caplog)))
            await asyncio.sleep(0.2)  # it looks again some times
            assert [entry[0] for entry in client.xrange("kv")] == [entry_id.encode() for entry_id, _ in left]
            client.delete("kv")
            async with router(url) as view:
                await worker.run(30)
                await in_step(view, worker)

    run(test())
    assert len(errors(caplog)) == 1


def test_a_stranger_that_takes_the_stream_over_ends_publishing(
    url: str, client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """An entry with an ID of Redis's own making is of a later epoch than any: it is not fought over."""

    async def test() -> None:
        worker = Worker()
        async with published(worker, url), router(url) as view:
            await worker.run(30)
            await in_step(view, worker)
            client.xadd("kv", {"hello": "there"})
            worker.go_on(30)
            await until(lambda: bool(errors(caplog)))
            assert view.position() == (5, 30)
            assert view.synced

    run(test())
    assert len(errors(caplog)) == 1


def poison(kind: str, payload: bytes) -> dict[bytes, bytes]:
    """The entry of a batch, spoiled."""
    batch = wire.decode(payload)
    blocks = np.array([2**50], dtype=np.uint64)
    spoiled = {
        "another seq": batch._replace(events=tuple(batch.events), seq=7),
        "another worker": batch._replace(events=(BlockStored(blocks, 0, 16),), worker="w1"),
        "other blocks": batch._replace(events=(BlockStored(blocks, 0, 16),)),
    }
    if kind in spoiled:
        return {b"batch": wire.encode(spoiled[kind])}
    return {"not a batch": {b"batch": b"\xc1nonsense"}, "no batch": {b"batches": payload}, "an end": {b"end": b""}}[
        kind
    ]


@pytest.mark.parametrize(
    ("kind", "counter"),
    [
        ("not a batch", "malformed"),
        ("no batch", "malformed"),
        ("an end", "malformed"),
        ("another seq", "malformed"),
        ("another worker", "stale"),
        ("other blocks", "mismatches"),
    ],
)
def test_a_poisoned_entry_is_counted_and_healed(
    url: str, client: Redis, monkeypatch: pytest.MonkeyPatch, kind: str, counter: str
) -> None:
    """What somebody wrote in a batch's place reaches no other worker's blocks; the worker's next snapshot, which it
    writes after some time of itself, ends the trouble."""
    monkeypatch.setattr(redis_publisher, "SNAPSHOT_S", 1e9)

    async def test() -> None:
        worker, tree = Worker(), make_tree()
        tree.store(1, np.array([1, 2, 3], dtype=np.uint64))  # the bystander w1
        async with published(worker, url), router(url) as early:
            await in_step(early, worker)
            await worker.run(30)
            await in_step(early, worker)
            with client.pipeline() as rewriting:
                rewriting.delete("kv")
                for entry_id, fields in client.xrange("kv"):
                    wrong = poison(kind, fields[b"batch"]) if entry_id == b"5-15" else fields
                    rewriting.xadd("kv", wrong, id=entry_id)
                rewriting.execute()
            async with router(url, tree) as late:
                await until(lambda: getattr(late.counts, counter) >= 3)
                assert not late.synced or late.position() == (5, 14)
                monkeypatch.setattr(redis_publisher, "SNAPSHOT_S", 0.0)
                await in_step(late, worker)
                await worker.run(10)
                await in_step(late, worker)
                await in_step(early, worker)
        assert tree.blocks(1).tolist() == [1, 2, 3]

    run(test())


def test_an_entry_in_the_place_of_the_next_batch_is_healed_at_once(url: str, client: Redis) -> None:
    """The worker takes it for its own, as it would where an answer was lost, and writes a snapshot after it."""

    async def test() -> None:
        worker = Worker()
        async with published(worker, url), router(url) as view:
            await worker.run(30)
            await in_step(view, worker)
            client.xadd("kv", {"batch": "nonsense"}, id="5-31")
            await until(lambda: view.counts.malformed >= 1)
            await worker.run(10)
            await in_step(view, worker)

    run(test())


def test_what_a_dead_worker_leaves_expires(url: str, client: Redis) -> None:
    """Both keys have a time to live, which the worker prolongs while it rests."""

    async def test() -> None:
        worker = Worker()
        async with published(worker, url), router(url) as view:
            await worker.run(10)
            await in_step(view, worker)
            for key in ("kv", "kv:snapshot"):
                client.expire(key, 30)
            await until(lambda: client.ttl("kv") > 30 and client.ttl("kv:snapshot") > 30)
        assert 0 < client.ttl("kv") <= TTL_S
        assert 0 < client.ttl("kv:snapshot") <= TTL_S

    run(test())


def test_credentials_are_told_to_nobody(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """From the URL or the environment they open the door; they are in no log, no error and no URL that others get."""
    caplog.set_level(logging.DEBUG)
    quoted = "Xylophon%3A4711%407"

    async def test(server: RedisServer) -> None:
        worker = Worker()
        where = f"127.0.0.1:{server.port}"
        wrong = parse_bus_url(f"redis://:{quoted}wrong@{where}/kv")
        async with open_source(wrong) as source:
            with pytest.raises(Unavailable) as refused:
                await source.snapshot()
            assert "Xylophon" not in str(refused.value)
        async with published(worker, wrong.url):
            await until(lambda: "trying until events can be published" in caplog.text)
        async with published(worker, f"redis://:{quoted}@{where}/kv") as told:
            assert told == f"redis://{where}/kv"
            with pytest.raises(Unavailable):
                async with open_source(parse_bus_url(told)) as source:
                    await source.snapshot()
            monkeypatch.setenv(AUTH_VARIABLE, f"u:other@127.0.0.1:1 :{quoted}@{where}")
            async with router(told) as view:
                await worker.run(20)
                await in_step(view, worker)

    with RedisServer("--requirepass", PASSWORD) as server:
        run(test(server))
    assert "Xylophon" not in caplog.text


def test_over_tls_a_server_must_prove_who_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """rediss:// reads and writes where the certificate holds for the host, and says nothing to others."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed: apt-get install openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ("-subj", "/CN=redis", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2", "-nodes")
    out = ("-newkey", "rsa:2048", "-keyout", str(key), "-out", str(certificate))
    subprocess.run([openssl, "req", "-x509", *out, *subject], check=True, capture_output=True)

    async def test(port: int) -> None:
        worker = Worker()
        worker.go_on(20)
        async with (
            published(worker, f"rediss://127.0.0.1:{port}/kv") as told,
            open_source(parse_bus_url(told)) as source,
        ):
            with pytest.raises(Unavailable, match="certificate verify failed"):
                await source.snapshot()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        async with published(worker, f"rediss://127.0.0.1:{port}/kv") as told, router(told) as view:
            await in_step(view, worker)
        async with open_source(parse_bus_url(f"rediss://localhost:{port}/kv")) as source:
            with pytest.raises(Unavailable, match="certificate"):
                await source.snapshot()

    with RedisServer() as server:
        with Redis(port=server.port) as client, socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            files = {"tls-cert-file": certificate, "tls-key-file": key}
            try:
                for name, value in ({"tls-auth-clients": "no"} | files | {"tls-port": port}).items():
                    client.config_set(name, str(value))
            except ResponseError as error:
                pytest.skip(f"this redis-server knows no TLS: {error}")
        run(test(port))


def test_credentials_that_cannot_be_read_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the variable's name; its value is a secret."""
    for value in ("Xylophon", "Xylophon@host:1", "u:Xylophon@host", ":Xylophon@host:one", "http://:Xylophon@h:1"):
        monkeypatch.setenv(AUTH_VARIABLE, value)

        async def test() -> None:
            async with open_source(parse_bus_url("redis://127.0.0.1:1/kv")):
                pass

        with pytest.raises(InvalidRequest, match=AUTH_VARIABLE) as refused:
            run(test())
        assert "Xylophon" not in str(refused.value)
