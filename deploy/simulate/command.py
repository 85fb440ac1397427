"""Carries out `rhizome simulate`: runs what is planned, shows it, writes it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from deploy.events.progress import progress_bar, status_line
from deploy.simulate.plan import Plan
from deploy.simulate.plots import can_draw, draw_plots
from deploy.simulate.results import Setting, document, header_of, known_saturation
from deploy.simulate.show import show_rows, show_saturation
from deploy.simulate.sweep import Run, Sweep
from rhizome.errors import InvalidRequest

RESULTS = "results.json"
MAX_RESULTS_BYTES = 1 << 28  # of a former file


def run_simulate(plan: Plan, setting: Setting, *, jobs: int, out: Path | None, as_json: bool) -> None:
    """Raises InvalidRequest where `out` cannot be written, before anything is run."""
    header = header_of(setting)
    sweep = Sweep(setting, jobs)
    if out is not None:
        _make_folder(out)
    found = known_saturation(_former(out), header)
    wanted = [pair for pair in plan.saturations if pair not in found]
    if wanted:
        with _counting("finding saturation") as tell:
            found |= sweep.saturations(wanted, tell)
        _write(out, document(header, found, ()))

    cases = plan.cases(found)
    with progress_bar("simulating", len(cases) * len(setting.trace)) as advance:
        runs = sweep.runs(
            cases,
            _summed(advance),
            lambda finished: _write(out, document(header, found, [run.row for run in finished])),
        )
    rows = [run.row for run in runs]
    if as_json:
        typer.echo(json.dumps(document(header, found, rows), allow_nan=False))
    elif plan.saturate:
        shown = {pair: found[pair] for pair in plan.saturations}
        show_saturation(shown, len(setting.trace) / setting.trace.duration_s)
    else:
        show_rows(rows)
    if out is not None:
        typer.echo(str(out / RESULTS), err=True)
        _draw(runs, out)


def _draw(runs: Sequence[Run], out: Path) -> None:
    if not runs:
        return
    if not can_draw():
        typer.echo("no plots: matplotlib is not installed (pip install 'rhizome[plots]')", err=True)
        return
    for path in draw_plots(runs, out):
        typer.echo(str(path), err=True)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        writable = os.access(out, os.W_OK)
    except OSError as error:
        raise InvalidRequest("--out", str(out), f"a folder that can be written ({error})") from None
    if not writable:
        raise InvalidRequest("--out", str(out), "a folder that can be written")


def _former(out: Path | None) -> object:
    """What a former run wrote; None where there is nothing that can be read."""
    if out is None:
        return None
    path = out / RESULTS
    try:
        if path.stat().st_size > MAX_RESULTS_BYTES:
            return None
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _write(out: Path | None, results: dict[str, Any]) -> None:
    """As a whole or not at all."""
    if out is None:
        return
    part = out / f".{RESULTS}.part"
    try:
        part.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", "utf-8")
        part.replace(out / RESULTS)
    except OSError as error:
        raise InvalidRequest("--out", str(out), f"a folder that can be written ({error})") from None


def _summed(advance: Callable[[int], None]) -> Callable[[int], None]:
    """Takes increments and passes sums on."""
    done = 0

    def tell(more: int) -> None:
        nonlocal done
        done += more
        advance(done)

    return tell


@contextmanager
def _counting(what: str) -> Iterator[Callable[[int], None]]:
    """For work of which nobody knows the end."""
    with status_line() as show:
        yield _summed(lambda done: show(f"{what}: {done:,} requests replayed"))
