"""A finished run for Python: its metrics as columns, its curves and its report as pages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from forge_kernel.api import RunError
from forge_plugins.reports.chart_cards import chart_cards
from forge_plugins.reports.page import report_page, whole_page
from forge_plugins.reports.run_data import VALIDATION, RunData, read_run
from forge_plugins.reports.seeds import Group


def run_history(folder: Path) -> dict[str, list[float | None]]:
    """The metrics of a run by name, each a column beside `step`.

    Args:
        folder: the run folder.

    Raises:
        RunError: no metrics were written.
    """
    run = _measured(folder)
    values = {_named(curve.kind, curve.metric): dict(curve.points) for curve in run.curves}
    steps = sorted({step for points in values.values() for step in points})
    columns: dict[str, list[float | None]] = {"step": [float(step) for step in steps]}
    for name, points in values.items():
        columns[name] = [points.get(step) for step in steps]
    return {**columns, "step": list(steps)}


def run_charts(folder: Path, metrics: Sequence[str]) -> str:
    """A page with the curves of some metrics, or of all.

    Raises:
        RunError: no metrics were written, or there is none of such a name.
    """
    run = _measured(folder)
    names = {_named(curve.kind, curve.metric) for curve in run.curves}
    unknown = [name for name in metrics if name not in names]
    if unknown:
        raise RunError(f"{folder}: no metric {unknown[0]!r}; there is {', '.join(sorted(names))}")
    if metrics:
        chosen = tuple(c for c in run.curves if _named(c.kind, c.metric) in metrics)
        run = dataclasses.replace(run, curves=chosen)
    return whole_page(run.name, chart_cards([Group(run.name, (run,))]))


def run_report(folder: Path) -> str:
    """The page of `forge report`."""
    return report_page([read_run(folder)])


def _named(kind: str, metric: str) -> str:
    return f"validation_{metric}" if kind == VALIDATION else metric


def _measured(folder: Path) -> RunData:
    run = read_run(folder)
    if not run.curves:
        raise RunError(f"{folder} holds no metrics: add the observer metrics_jsonl to the pipeline")
    return run
