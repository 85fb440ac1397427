"""A real redis-server on a free loopback port, without persistence: started, killed, paused and restarted by tests."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from typing import Self

import pytest

PATIENCE_S = 30.0


class RedisServer:
    """`with RedisServer() as server:` it answers at server.port until the end. Skips the test where there is none."""

    def __init__(self, *options: str) -> None:
        """`options` as on redis-server's command line."""
        program = shutil.which("redis-server")
        if program is None:
            pytest.skip("redis-server is not installed: apt-get install redis-server")
        self._program = program
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def url(self, stream: str) -> str:
        """Of a stream in it."""
        return f"redis://127.0.0.1:{self.port}/{stream}"

    def __enter__(self) -> Self:
        for _ in range(5):  # another process may be faster to the port
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]
            self.start()
            if self._process is not None:
                return self
        raise AssertionError("redis-server does not start")

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self.kill()

    def start(self) -> None:
        """Empty, on the same port as before; returns when it answers."""
        assert self._process is None
        arguments = ("--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no")
        self._process = subprocess.Popen(
            (self._program, *arguments, *self._options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + PATIENCE_S
        while self._process.poll() is None and not self._answers():
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.01)
        if self._process.poll() is not None:
            self._process = None

    def kill(self) -> None:
        """By SIGKILL: all that it held is lost."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def pause(self) -> None:
        """It goes on to take connections, and answers nothing."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """After a pause."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(5) in (b"+PONG", b"-NOAU")
        except OSError:
            return False
