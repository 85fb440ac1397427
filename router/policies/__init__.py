"""Routing policies by name, behind one interface; each runs in production and in simulation."""

from __future__ import annotations

from rhizome.errors import InvalidRequest
from router.policies.base import Policy, Prompt
from router.policies.peers import Dynamo, DynamoP16, LlmD, LMetric, SglangCacheAware
from router.policies.plain import LeastLoaded, PowerOfTwo, PrefixHash, RandomChoice, RoundRobin, Sticky
from router.policies.predicted import PredictedTtft

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        RandomChoice,
        RoundRobin,
        LeastLoaded,
        PowerOfTwo,
        Sticky,
        PrefixHash,
        SglangCacheAware,
        Dynamo,
        DynamoP16,
        LlmD,
        LMetric,
        PredictedTtft,
    )
}
DEFAULT_POLICY = PredictedTtft.name


def make_policy(name: str) -> Policy:
    """A new policy of that name. Raises InvalidRequest."""
    if name not in POLICIES:
        raise InvalidRequest("policy", name, f"one of {', '.join(POLICIES)}")
    return POLICIES[name]()


__all__ = ["DEFAULT_POLICY", "POLICIES", "Policy", "Prompt", "make_policy"]
