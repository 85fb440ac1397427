"""The routers that a worker belongs to, where they change."""

from __future__ import annotations

import asyncio

import pytest

from deploy.router_list import RouterList


def test_a_member_runs_for_each_router_as_long_as_it_is_listed() -> None:
    """Those that stay are left alone; those that go are cancelled, to take their leave."""
    running: list[str] = []
    began: list[str] = []

    async def member(address: str) -> None:
        began.append(address)
        running.append(address)
        try:
            await asyncio.Event().wait()
        finally:
            running.remove(address)

    async def main() -> None:
        routers = RouterList(["a", "b"])
        following = asyncio.create_task(routers.follow(member))
        for listed in (["a", "b"], ["b", "c"], [], ["a"]):
            routers.set(listed)
            async with asyncio.timeout(10):
                while sorted(running) != listed:
                    await asyncio.sleep(0)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        assert running == []

    asyncio.run(main())
    assert sorted(began) == ["a", "a", "b", "c"]


def test_a_router_that_refuses_the_worker_ends_it() -> None:
    """As where the list does not change; the other members leave first."""
    left: list[str] = []

    async def member(address: str) -> None:
        if address == "b":
            raise ValueError("refused")
        try:
            await asyncio.Event().wait()
        finally:
            left.append(address)

    with pytest.raises(ValueError, match="refused"):
        asyncio.run(RouterList(["a", "b"]).follow(member))
    assert left == ["a"]
