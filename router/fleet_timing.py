"""The learned step costs of all workers, written through to the decisions' table, and how good predictions were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from router.fleet import WorkerReport
from router.prediction_errors import PredictionErrors
from router.table import Column, WorkerTable
from router.timing import PRIOR, StepCosts, WorkerTiming, typical

REFRESH_S = 1.0  # between looks at what a model's workers have shown together


@dataclass(slots=True, eq=False)
class _Model:
    """The workers that serve it, and what they have shown: the prior of each."""

    name: str
    prior: StepCosts
    workers: dict[str, _Worker] = field(default_factory=dict)
    refreshed_at: float | None = None


@dataclass(slots=True, eq=False)
class _Worker:
    model: _Model
    slot: int
    timing: WorkerTiming
    errors: PredictionErrors = field(default_factory=PredictionErrors)


class FleetTiming:
    """Timings by worker. What is not known of one is taken to be as with the others of its model, at first `prior`."""

    def __init__(self, table: WorkerTable, prior: StepCosts = PRIOR) -> None:
        self.errors = PredictionErrors()  # of all workers
        self._table = table
        self._prior = prior
        self._models: dict[str, _Model] = {}
        self._workers: dict[str, _Worker] = {}

    def __contains__(self, worker_id: str) -> bool:
        return worker_id in self._workers

    def of(self, worker_id: str) -> WorkerTiming:
        """The timing of a worker that was added."""
        return self._workers[worker_id].timing

    def errors_of(self, worker_id: str) -> PredictionErrors:
        """Of requests that went to a worker that was added."""
        return self._workers[worker_id].errors

    def add(self, worker_id: str, model_name: str, slot: int) -> None:
        """Start with what the model's other workers have shown."""
        model = self._models.setdefault(model_name, _Model(model_name, self._prior))
        worker = self._workers[worker_id] = _Worker(model, slot, WorkerTiming(model.prior))
        model.workers[worker_id] = worker
        self._write(worker)

    def drop(self, worker_id: str) -> None:
        """Forget a worker; with a model's last one, the model."""
        if worker_id in self._workers:
            model = self._workers.pop(worker_id).model
            del model.workers[worker_id]
            if not model.workers:
                del self._models[model.name]

    def observe(self, worker_id: str, report: WorkerReport, now: float) -> None:
        """Learn from a worker's report."""
        worker = self._workers[worker_id]
        if worker.timing.observe(report, worker.model.prior):
            self._write(worker)
        refreshed_at = worker.model.refreshed_at
        if refreshed_at is None or now >= refreshed_at + REFRESH_S:
            self._refresh(worker.model, now)

    def first_token(self, worker_id: str, predicted_s: float, observed_s: float) -> None:
        """What became of a prediction; the worker may be gone."""
        self.errors.add(predicted_s, observed_s)
        if worker_id in self._workers:
            self._workers[worker_id].errors.add(predicted_s, observed_s)

    def _refresh(self, model: _Model, now: float) -> None:
        shown = typical(worker.timing for worker in model.workers.values())
        if shown is None:
            return
        model.prior, model.refreshed_at = shown, now
        for worker in model.workers.values():
            if not worker.timing.measured:
                worker.timing.start_from(shown)
                self._write(worker)

    def _write(self, worker: _Worker) -> None:
        self._table.set(worker.slot, Column.PREFILL_STEP_S, worker.timing.costs)

    def check(self, worker_ids: Sequence[str]) -> None:
        """Assert the invariants: exactly these workers, and the table says what is learned of each."""
        assert sorted(self._workers) == sorted(worker_ids)
        assert sum(len(model.workers) for model in self._models.values()) == len(self._workers)
        for worker in self._workers.values():
            costs = self._table.values[Column.PREFILL_STEP_S : Column.CONTEXT_S + 1, worker.slot]
            assert tuple(costs.tolist()) == worker.timing.costs
