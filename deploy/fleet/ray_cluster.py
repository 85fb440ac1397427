"""A fleet on a Ray cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploy.fleet.plan import FleetPlan
from rhizome.errors import InvalidRequest

if TYPE_CHECKING:
    from deploy.fleet.commands import Control


def deploy_on_ray(plan: FleetPlan, address: str) -> None:
    """Start it."""
    raise InvalidRequest("--ray", address, "not there yet")


def ray_control(fleet: str | None, address: str) -> Control:
    """One that runs."""
    raise InvalidRequest("--ray", address, "not there yet")
