"""What a process says when it serves."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from deploy.processes import serve_until_stopped
from rhizome.ticket import SECRET_VARIABLE


@asynccontextmanager
async def stopped_at_once() -> AsyncIterator[str]:
    """A server that gets SIGTERM as soon as it serves."""
    asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGTERM)
    yield "127.0.0.1:7700"


@pytest.mark.parametrize(("secret", "said"), [("", True), ("a secret of the fleet", False)])
def test_a_process_without_the_fleets_secret_says_so(
    secret: str, said: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At start, once, naming the variable; the secret itself is never logged."""
    monkeypatch.setenv(SECRET_VARIABLE, secret)
    with caplog.at_level(logging.INFO):
        asyncio.run(serve_until_stopped(stopped_at_once(), supervised=False))
    assert "serving on 127.0.0.1:7700" in caplog.text
    assert (f"no {SECRET_VARIABLE}: nothing is signed" in caplog.text) == said
    assert not secret or secret not in caplog.text
