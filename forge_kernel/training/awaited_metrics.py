"""Who waits for which validation metric, and whether it can come at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from forge_kernel.contract.plugin import facts
from forge_kernel.contract.run import Run
from forge_kernel.errors import Fault, PluginError
from forge_kernel.planning.plan import Plan

_TOPIC = "metric:"


class AwaitedMetrics:
    """The plugins of a run that act on validation metrics.

    Args:
        plan: what runs.
    """

    def __init__(self, plan: Plan) -> None:
        self._waiting: dict[str, list[str]] = {}  # label: metrics that have not come yet
        for entry in plan.answering("on_validation"):
            needed = facts(entry.info.requires, entry.config)
            names = [fact.removeprefix(_TOPIC) for fact in needed if fact.startswith(_TOPIC)]
            if names:
                self._waiting[entry.label] = names

    def check(self, data: Any) -> None:
        """Refuse those that would wait for ever, where the data says that it has no validation.

        Raises:
            PluginError: naming them.
        """
        if getattr(data, "has_validation", None) is not False:
            return
        faults = [
            Fault(
                f"{label} acts on the validation metric {', '.join(names)}, and the run has no "
                "validation data",
                hints=("hand in validation data, or leave it out",),
            )
            for label, names in self._waiting.items()
        ]
        if faults:
            raise PluginError(faults)

    def look(self, run: Run, metrics: Mapping[str, float]) -> None:
        """After a validation: tell of each metric that was awaited and has not come, once."""
        for label, names in list(self._waiting.items()):
            missing = [name for name in names if name not in metrics]
            if missing:
                there = ", ".join(metrics) or "none"
                run.emit_event(
                    "metric_missing",
                    f"{label} waits for the validation metric {', '.join(missing)}, which this "
                    f"validation did not give (it gave: {there}).",
                    plugin=label,
                )
        self._waiting.clear()
