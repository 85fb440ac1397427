"""Runs an engine on a thread of its own; everybody else talks to it through a queue. Knows neither asyncio nor gRPC."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeAlias, TypeVar

from rhizome.errors import RhizomeError, Unavailable
from worker.engine import Engine, EngineStatus, Output
from worker.sequence import EngineRequest

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

STALLED_S = 0.01  # between looks whether a stalled engine can go on: what it waits for comes as a command

Listener: TypeAlias = Callable[[Output | RhizomeError], None]
"""Called on the engine's thread; must return at once. An error is the last thing that it is told."""


class EngineThread:
    """Commands are taken between steps, so the engine itself needs no lock.

    What waits in the command queue is bounded by the callers: each has at most its own request there.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.status: EngineStatus = engine.status()  # as of the last step; replaced, never changed
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._listeners: dict[str, Listener] = {}
        self._stopping = False
        self.ended: Future[None] = Future()  # when the thread ends; with the error that ended it
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End after the current step; requests in flight are told that the worker stops."""
        self._commands.put(self._stop)
        self._thread.join()

    def submit(self, request: EngineRequest, listener: Listener) -> None:
        """Hand a request over. A refusal reaches the listener as its error."""
        self._commands.put(lambda: self._add(request, listener))

    def cancel(self, request_id: str, listener: Listener) -> None:
        """Forget the request that `listener` listens to; one that has ended is ignored."""
        self._commands.put(lambda: self._cancel(request_id, listener))

    def call(self, function: Callable[[], _T]) -> Future[_T]:
        """Run something between two steps."""
        future: Future[_T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return  # whoever asked has gone meanwhile
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._commands.put(run)
        return future

    def _loop(self) -> None:
        """Until stopped. A defect outside a step ends the thread, tells everybody, and lets the owner know."""
        try:
            self._work()
        except Exception as error:
            _log.exception("the engine's thread failed")
            self._end(Unavailable(f"the engine failed: {error}"))
            self.ended.set_exception(error)
        else:
            self.ended.set_result(None)

    def _work(self) -> None:
        while not self._stopping:
            self._take_commands()
            if self.engine.has_work and not self._stopping:
                self._step()
            self.status = self.engine.status()

    def _take_commands(self) -> None:
        """All that wait; blocks for one when the engine has nothing to do, or can do nothing."""
        block = self.engine.stalled or not self.engine.has_work
        while True:
            try:
                command = self._commands.get(block=block, timeout=STALLED_S if self.engine.stalled else None)
            except queue.Empty:
                return
            command()
            block = False

    def _step(self) -> None:
        try:
            outputs = self.engine.step()
        except Exception as error:
            _log.exception("an engine step failed; all requests in flight are ended and the cache is cleared")
            self.engine.abort_all()
            self._end(RhizomeError(f"the engine failed: {error}"))
            return
        for output in outputs:
            self._tell(output.request_id, output, last=output.request_finished)

    def _tell(self, request_id: str, item: Output | RhizomeError, *, last: bool) -> None:
        listener = self._listeners.pop(request_id) if last else self._listeners[request_id]
        listener(item)

    def _add(self, request: EngineRequest, listener: Listener) -> None:
        try:
            self.engine.add(request)
        except RhizomeError as error:
            listener(error)
            return
        self._listeners[request.request_id] = listener

    def _cancel(self, request_id: str, listener: Listener) -> None:
        if self._listeners.get(request_id) is listener:
            del self._listeners[request_id]
            self.engine.cancel(request_id)

    def _stop(self) -> None:
        self._stopping = True
        self.engine.abort_all()
        self._end(Unavailable("the worker stops"))

    def _end(self, error: RhizomeError) -> None:
        """Nothing more will come for anybody who listens now."""
        listeners, self._listeners = self._listeners, {}
        for listener in listeners.values():
            listener(error)
