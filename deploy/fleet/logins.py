"""Logins of a fleet's Redis servers, out of its URLs: processes get them by their environment, which `ps` hides."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote

from deploy.fleet.config import FleetConfig
from kv_events.bus.redis_stream import AUTH_VARIABLE, without_login
from kv_events.bus.url import BusUrl, parse_bus_url
from rhizome.errors import InvalidRequest


class Logins:
    """A login for each server (scheme, host, port). Shown, it says how many they are."""

    def __init__(self) -> None:
        self._logins: dict[tuple[str, str], str] = {}

    def __repr__(self) -> str:
        return f"Logins({len(self._logins)})"

    def take(self, field: str, url: str) -> str:
        """The URL without its password. Raises InvalidRequest where its server has another login already."""
        bus = parse_bus_url(url)
        if not bus.password:
            return url
        login = _login(bus)
        if self._logins.setdefault((bus.scheme, bus.address), login) != login:
            limit = f"the login that another URL of this fleet has for {bus.address}"
            raise InvalidRequest(field, str(without_login(bus)), limit)
        return without_login(bus).url

    def environment(self, outer: Mapping[str, str]) -> dict[str, str]:
        """What processes need besides `outer`; the fleet's logins go before those that are there."""
        entries = [f"{scheme}://{login}@{address}" for (scheme, address), login in self._logins.items()]
        entries += outer.get(AUTH_VARIABLE, "").split()
        return {AUTH_VARIABLE: " ".join(entries)} if entries else {}


def _login(bus: BusUrl) -> str:
    return f"{quote(bus.user, safe='')}:{quote(bus.password, safe='')}"


def without_logins(config: FleetConfig) -> tuple[FleetConfig, Logins]:
    """The same fleet, and what to let into its servers' environment. Raises InvalidRequest."""
    logins = Logins()
    changed: dict[str, object] = {
        "workers": [
            group.model_copy(update={"events": [logins.take("events", url) for url in group.events]})
            for group in config.workers
        ]
    }
    if config.registry:
        changed["registry"] = logins.take("registry", config.registry)
    return config.model_copy(update=changed), logins
