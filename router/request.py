"""RouteRequest: what a decision needs to know of a request."""

from __future__ import annotations

from dataclasses import dataclass

from radix.keys import Hashes


@dataclass(slots=True, eq=False)  # a frozen one takes ten times as long to make
class RouteRequest:
    """What a decision needs to know of a request. The prompt itself is not among it. Not to be changed."""

    request_id: str
    model: str
    prompt_tokens: int  # at least 1
    hashes: Hashes  # of the prompt's full blocks
    sequences: int = 1  # choices
    policy: str = ""  # the router's
    session: str = ""
    tenant: str = ""  # whose share of the fleet it counts to while requests wait
    priority: int = 0  # a smaller number goes before all others
    bypass_prefix_cache: bool = False
    streamed: bool = True  # the answer passes through this router, which will call first_token and finish
