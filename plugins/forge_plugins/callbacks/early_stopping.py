"""Stop when a validation metric has not become better for a while."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta

from forge_kernel.api import Kind, PluginInfo, Run, hookimpl
from forge_plugins.callbacks.improvement import Improvement
from forge_plugins.callbacks.watched_metric import MetricName, MinDelta, Mode, NotBefore

TAG = "early_stopping"


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingConfig:
    """Which metric, and how much patience."""

    metric: MetricName = "loss"
    mode: Mode = "min"
    patience: Annotated[
        int, Meta(ge=1, description="validations without a better metric before the stop")
    ] = 10
    min_delta: MinDelta = 0.0
    not_before: NotBefore = None
    restore_best: Annotated[
        bool, Meta(description="end with the weights of the best validation")
    ] = False


class EarlyStopping:
    """Stops when a validation metric stops improving."""

    info = PluginInfo(
        name="early_stopping",
        kind=Kind.CALLBACKS,
        config=EarlyStoppingConfig,
        requires=lambda config: (f"metric:{config.metric}",),
    )

    def __init__(self, config: EarlyStoppingConfig) -> None:
        self.config = config
        self._best = Improvement(config.mode, config.min_delta)
        self._waited = 0
        self._over = False  # the validation of the restored weights decides nothing more

    @hookimpl
    def on_validation(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Keep the best, or lose patience."""
        config = self.config
        value = metrics.get(config.metric, math.nan)
        if self._over or run.progress.step < (config.not_before or 0):
            return
        if not math.isfinite(value):
            return  # nothing was measured: neither better nor worse
        if self._best.better(value):
            self._waited = 0
            if config.restore_best:
                run.request("save", tag=TAG)
            return
        self._waited += 1
        if self._waited < config.patience:
            return
        reason = f"{config.metric} not better for {self._waited} validations"
        run.request("stop", reason=reason)
        self._over = True
        if config.restore_best and self._best.best is not None:
            run.request("restore", tag=TAG)

    def state_dict(self) -> dict[str, Any]:
        """The best value and the validations since."""
        return {"best": self._best.state_dict(), "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the count."""
        self._best.load_state_dict(state["best"])
        self._waited = int(state["waited"])
