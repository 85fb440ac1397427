"""Which routers a worker belongs to, where that changes while it serves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, NoReturn


class RouterList:
    """Addresses, host:port. Changes are made on the event loop that `follow` runs on."""

    def __init__(self, addresses: Iterable[str] = ()) -> None:
        self._addresses = frozenset(addresses)
        self._changed = asyncio.Event()

    def set(self, addresses: Iterable[str]) -> None:
        """These are all of them from now on."""
        self._addresses = frozenset(addresses)
        self._changed.set()

    async def follow(self, member: Callable[[str], Coroutine[Any, Any, None]]) -> NoReturn:
        """Run `member(address)` for each address as long as it is listed. Raises what the first that fails raises."""
        tasks: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                self._changed.clear()
                await _cancelled(tasks.pop(address) for address in tasks.keys() - self._addresses)
                for address in self._addresses - tasks.keys():
                    tasks[address] = asyncio.create_task(member(address))
                changed = asyncio.create_task(self._changed.wait())
                try:
                    await asyncio.wait({changed, *tasks.values()}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    changed.cancel()
                for address in [address for address, task in tasks.items() if task.done()]:
                    await tasks.pop(address)
        finally:
            await _cancelled(tasks.values())


async def _cancelled(tasks: Iterable[asyncio.Task[None]]) -> None:
    ending = list(tasks)
    for task in ending:
        task.cancel()
    await asyncio.gather(*ending, return_exceptions=True)
