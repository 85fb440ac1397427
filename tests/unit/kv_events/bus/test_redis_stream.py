"""How a stream in Redis is named, reached and read."""

from __future__ import annotations

import asyncio

import pytest

from kv_events.bus.redis_stream import AUTH_VARIABLE, StreamId, answer, credentials, without_login
from kv_events.bus.url import parse_bus_url
from kv_events.wire import WireError


def test_ids_order_as_positions_do() -> None:
    """By epoch, then by position; as text they are what Redis takes."""
    assert str(StreamId(7, 0)) == "7-0"
    assert StreamId.parse(b"7-12") == (7, 12)
    assert StreamId(7, 12) < StreamId(7, 13) < StreamId(8, 0)


@pytest.mark.parametrize("text", [b"", b"7", b"7-", b"-1", b"7-1-2", b"a-b", "7-1", None, 7])
def test_what_is_no_id_is_a_wire_error(text: object) -> None:
    """Whatever answers in Redis's place."""
    with pytest.raises(WireError, match="is not an ID of a stream"):
        StreamId.parse(text)


def of(url: str) -> tuple[str, str]:
    return credentials(parse_bus_url(url))


def test_credentials_are_used_for_their_server_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the URL before those of the environment; none for a server that neither names."""
    monkeypatch.setenv(AUTH_VARIABLE, "ann:a%3Ab@redis.example:6379 :c@[::1]:7000")
    assert of("rediss://redis.example:6379/3/kv") == ("ann", "a:b")
    assert of("redis://[::1]:7000/kv") == ("", "c")
    assert of("redis://bob:d@redis.example/kv") == ("bob", "d")
    assert of("redis://redis.example:6380/kv") == ("", "")
    assert of("redis://other.example/kv") == ("", "")


@pytest.mark.parametrize(
    ("written", "url", "sent"),
    [
        ("", "rediss://redis.example/kv", True),
        ("", "redis://redis.example/kv", False),
        ("rediss://", "rediss://redis.example/kv", True),
        ("rediss://", "redis://redis.example/kv", False),
        ("redis://", "redis://redis.example/kv", True),
        ("redis://", "rediss://redis.example/kv", False),
        ("", "redis://127.0.0.1/kv", True),
        ("", "redis://[::1]/kv", True),
        ("", "redis://localhost/kv", True),
        ("rediss://", "redis://127.0.0.1/kv", False),
        ("", "redis://127.0.0.1.example/kv", False),
    ],
)
def test_a_password_goes_over_a_network_in_the_clear_only_where_the_operator_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, written: str, url: str, sent: bool
) -> None:
    """Whoever names a server by redis:// in the place of rediss:// does not get the login; that is logged."""
    server = parse_bus_url(url).address
    monkeypatch.setenv(AUTH_VARIABLE, f"{written}ann:Xylophon@{server}")
    assert of(url) == (("ann", "Xylophon") if sent else ("", ""))
    assert ("is not sent by" in caplog.text) is not sent
    assert "Xylophon" not in caplog.text


def test_a_server_may_have_a_login_for_each_scheme(monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order."""
    monkeypatch.setenv(AUTH_VARIABLE, "redis://:plain@redis.example:6379 rediss://:safe@redis.example:6379")
    assert of("redis://redis.example/kv") == ("", "plain")
    assert of("rediss://redis.example/kv") == ("", "safe")


def test_what_others_are_told_has_no_login() -> None:
    """Host, database and stream remain."""
    bus = parse_bus_url("redis://ann:secret@redis.example/3/kv:w0")
    assert without_login(bus).url == str(without_login(bus)) == "redis://redis.example:6379/3/kv:w0"


def test_a_command_without_an_answer_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an error that says how long it was waited for."""
    monkeypatch.setattr("kv_events.bus.redis_stream.TIMEOUT_S", 0.01)

    async def never() -> None:
        await asyncio.Event().wait()

    with pytest.raises(TimeoutError, match=r"no answer within 0.02 s"):
        asyncio.run(answer(never(), 0.01))
