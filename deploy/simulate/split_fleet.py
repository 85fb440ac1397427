"""A simulated fleet with prefill apart from decode: what one worker begins another goes on with, pulling its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from deploy.simulate.fleet import Fleet, number_of
from deploy.traces.trace import Trace
from rhizome.errors import RhizomeError
from router.decision import Decision
from router.fleet import Role, WorkerInfo
from worker.simulated import SimulatedWorker
from worker.step_time import Hardware


@dataclass(frozen=True, slots=True)
class Split:
    """How many workers of each role there are."""

    prefill: int
    decode: int
    both: int = 0

    @property
    def workers(self) -> int:
        return self.prefill + self.decode + self.both

    @property
    def roles(self) -> list[Role]:
        """By worker."""
        return [Role.PREFILL] * self.prefill + [Role.DECODE] * self.decode + [Role.BOTH] * self.both

    def __str__(self) -> str:
        counts = {"prefill": self.prefill, "decode": self.decode, "both": self.both}
        return ",".join(f"{name}={count}" for name, count in counts.items() if count)


class SplitFleet(Fleet):
    """See Fleet. Whoever goes on pulls at the hardware's pace, one prompt after the other; the other end of the network
    is not modelled. A lent block stays where it is until it was pulled."""

    def __init__(self, trace: Trace, hardware: Hardware, split: Split, **given: Any) -> None:
        self._roles = split.roles
        super().__init__(trace, hardware, workers=split.workers, peer_fetch=True, **given)

    def _registered(self, info: WorkerInfo) -> WorkerInfo:
        return replace(info, role=self._roles[number_of(info.worker_id)])

    def _send(self, number: int, decision: Decision) -> None:
        if decision.begins and self.outcomes[number].output_tokens > 1:
            self._begun.add(number)
        super()._send(number, decision)

    def _add(self, worker: SimulatedWorker, number: int) -> None:
        outcome, priority = self.outcomes[number], self.trace.requests[number].priority
        hashes, name = self._hashes[number].tolist(), str(number)
        if number in self._begun:
            worker.add(name, outcome.prompt_tokens, 1, hashes, priority)
        elif outcome.begun_by >= 0:  # the first token is one more of the prompt
            worker.add(name, outcome.prompt_tokens + 1, outcome.output_tokens - 1, hashes, priority, counted=False)
        else:
            super()._add(worker, number)

    def _first_token(self, number: int) -> None:
        if self.outcomes[number].begun_by < 0:
            super()._first_token(number)

    def _lend(self, number: int) -> None:
        outcome = self.outcomes[number]
        self._begun.discard(number)
        outcome.begun_by = outcome.worker
        lent = self.workers[outcome.worker].pin(self._hashes[number].tolist())
        self._at(self.now + self._network.delay_s, partial(self._hand_over, number, lent))

    def _hand_over(self, number: int, lent: Sequence[int]) -> None:
        """The router has the first token, and chooses who goes on."""
        outcome, replica = self.outcomes[number], self._replica_of(number)
        lender = f"worker-{outcome.begun_by}" if lent else ""
        try:
            decision = replica.router.hand_over(self._request(number), self.now, lender)
        except RhizomeError:
            self._give_back(outcome.begun_by, lent)
            self._refuse(number)
        else:
            outcome.worker = number_of(decision.worker_id)
            self._at(self.now + self._network.delay_s, partial(self._take_over, number, lent))
        self._dispatch(replica)

    def _take_over(self, number: int, lent: Sequence[int]) -> None:
        hashes = self._hashes[number][: len(lent)].tolist()
        ends_at = self._pull(number, hashes)
        if ends_at is None:
            self._go_on(number, lent, [])
        else:
            self._at(ends_at, partial(self._go_on, number, lent, hashes))

    def _go_on(self, number: int, lent: Sequence[int], pulled: list[int]) -> None:
        outcome = self.outcomes[number]
        if pulled:
            self.workers[outcome.worker].adopt(pulled, self.now)
        self._give_back(outcome.begun_by, lent)
        self._accept(number)

    def _give_back(self, lender: int, lent: Sequence[int]) -> None:
        worker = self.workers[lender]
        worker.unpin(lent)
        if not worker.busy:  # what waits there may have waited for these blocks
            self._begin(lender)

    def _refuse(self, number: int) -> None:
        self.outcomes[number].first_token_at = np.nan  # an answer that ends with an error is none
        super()._refuse(number)
