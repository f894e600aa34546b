"""Writes `report.html` into the run folder when a run has ended."""

from __future__ import annotations

from dataclasses import dataclass

from forge_kernel.api import Kind, Order, PluginInfo, Run, RunResult, hookimpl


@dataclass(frozen=True, kw_only=True)
class HtmlReportConfig:
    """Nothing to set: the page shows whatever the run wrote."""


class HtmlReport:
    """Writes `report.html` into the run folder, as `forge report` does."""

    info = PluginInfo(
        name="html_report",
        kind=Kind.OBSERVERS,
        config=HtmlReportConfig,
        order=Order(after=("metrics_jsonl",)),  # its last line is to be in the page
    )

    def __init__(self, config: HtmlReportConfig) -> None:
        self.config = config

    @hookimpl
    def on_run_end(self, run: Run, result: RunResult) -> None:
        """Draw the page of a run that has ended."""
        del result
        self._draw(run)

    @hookimpl
    def on_error(self, run: Run, error: BaseException) -> None:
        """Draw the page of a run that failed, as far as it came."""
        del error
        self._draw(run)

    @staticmethod
    def _draw(run: Run) -> None:
        """Draw from the files of the run folder; without a folder there is nothing."""
        if run.folder is None:
            return
        from forge_plugins.reports.page import FILE_NAME, write_report
        from forge_plugins.reports.run_data import read_run

        write_report([read_run(run.folder)], run.folder / FILE_NAME)
