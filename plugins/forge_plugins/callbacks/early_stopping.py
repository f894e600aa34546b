"""Stop when a validation metric has not become better for a while."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta

from forge_kernel.api import Kind, PluginInfo, Run, hookimpl
from forge_plugins.callbacks.improvement import Improvement

TAG = "early_stopping"


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingConfig:
    """Which metric, and how much patience."""

    metric: Annotated[str, Meta(min_length=1, description="name of a validation metric")] = "loss"
    mode: Annotated[
        Literal["max", "min"], Meta(description="whether higher (max) or lower (min) is better")
    ] = "min"
    patience: Annotated[
        int, Meta(ge=1, description="validations without a better metric before the stop")
    ] = 10
    min_delta: Annotated[
        float, Meta(ge=0, description="smallest change that counts as an improvement")
    ] = 0.0
    not_before: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="validations before this step are not looked at; null: none is looked at "
             "before the network is what will be exported (levels still being blended in); a "
             "number: from that step on, whatever the network is"),
    ] = None  # fmt: skip
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
