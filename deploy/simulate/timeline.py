"""What a simulated fleet's workers were doing over time."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from deploy.simulate.fleet import Fleet
from deploy.simulate.results import Values


@dataclass(slots=True, eq=False)
class Timeline:
    """Samples of every worker, one each time that some requests have ended."""

    times_s: list[float] = field(default_factory=list)
    waiting: list[list[int]] = field(default_factory=list)  # requests, by sample and worker
    running: list[list[int]] = field(default_factory=list)
    held: list[int] = field(default_factory=list)  # requests in routers, by sample; there when the run is over
    _prompt_tokens: list[list[int]] = field(default_factory=list)  # since the start
    _cached_tokens: list[list[int]] = field(default_factory=list)

    def sample(self, fleet: Fleet) -> None:
        """Take one now."""
        schedulers = [worker.scheduler for worker in fleet.workers]
        self.times_s.append(fleet.now)
        self.waiting.append([len(scheduler.waiting) for scheduler in schedulers])
        self.running.append([len(scheduler.running) for scheduler in schedulers])
        self._prompt_tokens.append([scheduler.prompt_tokens for scheduler in schedulers])
        self._cached_tokens.append([scheduler.cached_prompt_tokens for scheduler in schedulers])

    def finish(self, fleet: Fleet) -> None:
        """The run is over: what routers held can be told."""
        sent = [outcome for outcome in fleet.outcomes if not outcome.refused]
        arrived = np.sort([outcome.arrived_at for outcome in sent])
        routed = np.sort([outcome.routed_at for outcome in sent])
        came, went = (np.searchsorted(times, self.times_s, side="right") for times in (arrived, routed))
        self.held = (came - went).tolist()

    def hit_shares(self, span: int = 5) -> Values:
        """(samples, workers): of the prompts' tokens that were started in the last `span` samples, those cached; NaN
        where none were."""
        prompts, cached = (_last(counts, span) for counts in (self._prompt_tokens, self._cached_tokens))
        shares: Values = np.divide(cached, prompts, out=np.full(prompts.shape, np.nan), where=prompts > 0)
        return shares


def _last(counts: list[list[int]], span: int) -> Values:
    """What was counted within the last `span` samples of each."""
    values = np.array(counts, np.float64)
    before = np.zeros_like(values)
    before[span:] = values[:-span]
    return values - before
