"""What a routing policy is: it scores candidates, and the least score wins."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from radix.keys import Hashes
from router.candidates import Candidates
from router.table import Floats


@dataclass(slots=True, eq=False)  # a frozen one takes ten times as long to make
class Prompt:
    """What a policy knows of a request beside its candidates. Not to be changed."""

    request_id: str
    hashes: Hashes  # of its full blocks
    session: str = ""
    priority: int = 0


class Policy(ABC):
    """One rule of choice. A router makes one of each policy that it uses; most keep no state."""

    name: ClassVar[str]
    holds: ClassVar[bool] = False  # requests may wait in the router until their best worker is nearly free
    unit: ClassVar[str] = ""  # of scores, for people

    @abstractmethod
    def scores(self, prompt: Prompt, candidates: Candidates) -> Floats:
        """Shape (workers,): the least wins. Changes nothing that a later call could see."""

    def tie(self, least: float) -> float:
        """The score up to which candidates count as equal to the least one: the one with the most free blocks of these,
        then the fewest sequences, then the one not chosen for the longest, is taken."""
        return least

    def placed(self, prompt: Prompt, candidates: Candidates, row: int) -> None:  # noqa: B027 - most need not know
        """The request goes to the worker of that row."""

    def forget(self, slot: int) -> None:  # noqa: B027
        """The worker of that slot is gone."""
