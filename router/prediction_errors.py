"""How good the predicted times to first token were: a metric for operators."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

WINDOW = 512  # latest requests that are told of: 8 KiB for each worker


class PredictionSummary(NamedTuple):
    """Over the latest WINDOW requests, `requests` apart; seconds, 0 before there are any."""

    requests: int = 0  # since the start
    predicted_mean_s: float = 0.0
    observed_mean_s: float = 0.0
    error_p50_s: float = 0.0  # of |predicted - observed|
    error_p90_s: float = 0.0


class PredictionErrors:
    """Predictions beside outcomes, both from the decision on, of requests whose first token passed through the router.

    That of others is heard of with a report, too late to tell.
    """

    def __init__(self) -> None:
        self.requests = 0
        self._latest = np.zeros((2, WINDOW))

    def add(self, predicted_s: float, observed_s: float) -> None:
        """One more first token."""
        self._latest[:, self.requests % WINDOW] = predicted_s, observed_s
        self.requests += 1

    def summary(self) -> PredictionSummary:
        """As of now."""
        predicted, observed = self._latest[:, : min(self.requests, WINDOW)]
        if not self.requests:
            return PredictionSummary()
        p50, p90 = np.quantile(np.abs(predicted - observed), (0.5, 0.9))
        return PredictionSummary(self.requests, float(predicted.mean()), float(observed.mean()), float(p50), float(p90))
