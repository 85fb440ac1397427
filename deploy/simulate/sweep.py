"""Runs simulations, several at a time in processes of their own; what comes out does not depend on how many."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from deploy.simulate.fleet import Fleet
from deploy.simulate.results import Case, Row, Setting, Values, row_of, ttfts
from deploy.simulate.saturation import busy_speed, find_saturation
from deploy.simulate.split_fleet import SplitFleet
from deploy.simulate.timeline import Timeline
from rhizome.errors import Unavailable

POLL_S = 0.2  # how often progress is told

Tell = Callable[[int], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A finished case: its row, and what its plots are drawn from."""

    case: Case
    row: Row
    ttft_s: Values
    timeline: Timeline


def replay(setting: Setting, case: Case, tell: Tell | None = None) -> Run:
    """Run one case. `tell` is told now and then how many requests have ended since it was told last."""
    began = time.perf_counter()
    given = {
        "policy": case.policy,
        "objective": setting.objective,
        "routers": setting.routers,
        "network": setting.network,
        "seed": setting.seed,
        "host_tier": setting.host_tier,
        "prior_error": setting.prior_error,
    }
    fleet: Fleet
    trace = setting.trace.scaled(case.speed)
    if case.split is None:
        fleet = Fleet(trace, setting.hardware, workers=case.workers, peer_fetch=setting.peer_fetch, **given)  # type: ignore[arg-type]
    else:
        fleet = SplitFleet(trace, setting.hardware, case.split, **given)
    timeline = Timeline()
    told = 0

    def until(ended: int) -> None:
        nonlocal told
        timeline.sample(fleet)
        if tell is not None:
            tell(ended - told)
        told = ended

    fleet.run(until)
    timeline.finish(fleet)
    if tell is not None:
        tell(len(setting.trace) - told)
    row = row_of(fleet, setting, case, time.perf_counter() - began)
    return Run(case, row, ttfts(fleet.outcomes), timeline)


def saturation(setting: Setting, policy: str, workers: int, tell: Tell | None = None) -> float:
    """The speed that saturates so many workers under a policy. Raises InvalidRequest where none does."""

    def measure(speed: float) -> Row:
        return replay(setting, Case(policy, workers, speed), tell).row

    return find_saturation(measure, busy_speed(setting.trace, setting.hardware, workers))


class Sweep:
    """Runs in up to `jobs` processes; with one job, in this process."""

    def __init__(self, setting: Setting, jobs: int) -> None:
        self._setting = setting
        self._jobs = jobs

    def runs(
        self, cases: Sequence[Case], tell: Tell | None = None, finished: Callable[[list[Run]], None] | None = None
    ) -> list[Run]:
        """All cases, in their order. `finished` is told after each one which there are."""
        return self._all([partial(_replay_here, case) for case in cases], tell, finished)

    def saturations(self, wanted: Sequence[tuple[str, int]], tell: Tell | None = None) -> dict[tuple[str, int], float]:
        """The speeds that saturate, by policy and workers."""
        found = self._all([partial(_saturation_here, policy, workers) for policy, workers in wanted], tell)
        return dict(zip(wanted, found, strict=True))

    def _all(
        self,
        tasks: Sequence[Callable[[], T]],
        tell: Tell | None,
        finished: Callable[[list[T]], None] | None = None,
    ) -> list[T]:
        done: dict[int, T] = {}

        def keep(number: int, result: T) -> None:
            done[number] = result
            if finished is not None:
                finished([done[other] for other in sorted(done)])

        if self._jobs == 1 or len(tasks) == 1:
            _prepare(self._setting, tell or (lambda _: None))
            for number, task in enumerate(tasks):
                keep(number, task())
        else:
            self._in_processes(tasks, tell, keep)
        return [done[number] for number in range(len(tasks))]

    def _in_processes(
        self, tasks: Sequence[Callable[[], T]], tell: Tell | None, keep: Callable[[int, T], None]
    ) -> None:
        context = multiprocessing.get_context("spawn")  # alike everywhere, and nothing is inherited
        counter = context.Value("q", 0)
        told = 0
        pool = ProcessPoolExecutor(min(self._jobs, len(tasks)), context, _prepare_process, (self._setting, counter))
        with _closed(pool):
            numbers: dict[Future[T], int] = {pool.submit(task): number for number, task in enumerate(tasks)}
            left = set(numbers)
            while left:
                ended, left = wait(left, POLL_S, FIRST_COMPLETED)
                for future in sorted(ended, key=numbers.__getitem__):
                    keep(numbers[future], future.result())
                if tell is not None and counter.value > told:
                    tell(counter.value - told)
                    told = counter.value


@contextmanager
def _closed(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Whatever ends it ends the processes, too: a run may take long."""
    try:
        yield
    except BaseException as error:
        for process in list(pool._processes.values()):
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise Unavailable("a simulating process died: out of memory? fewer --jobs need less") from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_here: tuple[Setting, Tell] | None = None
"""Of this process: sent once, not with each case."""


def _prepare(setting: Setting, tell: Tell) -> None:
    global _here
    _here = setting, tell


def _prepare_process(setting: Setting, counter: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback

    def tell(ended: int) -> None:
        with counter.get_lock():
            counter.value += ended

    _prepare(setting, tell)


def _replay_here(case: Case) -> Run:
    assert _here is not None
    return replay(_here[0], case, _here[1])


def _saturation_here(policy: str, workers: int) -> float:
    assert _here is not None
    return saturation(_here[0], policy, workers, _here[1])
