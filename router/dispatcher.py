"""Gives requests their decisions: at once, or when the router core lets go of them."""

from __future__ import annotations

import asyncio
import time

from rhizome.errors import RhizomeError
from router.core import Router
from router.decision import Decision
from router.holding import PATIENCE_S
from router.request import RouteRequest


class Dispatcher:
    """The requests of a service that the core holds. `changed` is to be called after whatever may set some free."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._waiting: dict[str, asyncio.Future[Decision]] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def place(self, request: RouteRequest) -> Decision:
        """Route a request and reserve its load; to be ended by Router.finish. Raises what Router.submit raises."""
        decision = self._router.submit(request, time.monotonic())
        if decision is not None:
            return decision
        future: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        self._waiting[request.request_id] = future
        try:
            self.changed()
            return await future
        except BaseException:  # the client has gone, or its deadline: perhaps just when its turn came
            self._router.finish(request.request_id, time.monotonic())
            raise
        finally:
            del self._waiting[request.request_id]

    def changed(self) -> None:
        """Let go what can go now."""
        if not self._router.held:
            return
        for request_id, decision in self._router.dispatch(time.monotonic()):
            future = self._waiting[request_id]
            if future.done():  # cancelled: `place` takes the reservation back
                continue
            if isinstance(decision, RhizomeError):
                future.set_exception(decision)
            else:
                future.set_result(decision)
        if self._router.held and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PATIENCE_S, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.changed()
