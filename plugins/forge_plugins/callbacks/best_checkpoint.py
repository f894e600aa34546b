"""Keep the checkpoint of the best validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta

from forge_kernel.api import Kind, PluginInfo, Run, hookimpl
from forge_plugins.callbacks.improvement import Improvement


@dataclass(frozen=True, kw_only=True)
class BestCheckpointConfig:
    """Which metric."""

    metric: Annotated[str, Meta(min_length=1, description="name of a validation metric")] = "loss"
    mode: Annotated[
        Literal["max", "min"], Meta(description="whether higher (max) or lower (min) is better")
    ] = "min"
    min_delta: Annotated[
        float, Meta(ge=0, description="smallest change that counts as an improvement")
    ] = 0.0
    not_before: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="validations before this step are not looked at; null: none is looked at "
             "before the network is what will be exported (levels still being blended in); a "
             "number: from that step on, whatever the network is"),
    ] = None  # fmt: skip


class BestCheckpoint:
    """Keeps the checkpoint of the best validation, pinned as `best`."""

    info = PluginInfo(
        name="best_checkpoint",
        kind=Kind.CALLBACKS,
        config=BestCheckpointConfig,
        requires=lambda config: (f"metric:{config.metric}",),
    )

    def __init__(self, config: BestCheckpointConfig) -> None:
        self.config = config
        self._best = Improvement(config.mode, config.min_delta)

    @hookimpl
    def on_validation(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Compare and ask."""
        value = metrics.get(self.config.metric)
        if run.progress.step < (self.config.not_before or 0):
            return
        if value is not None and self._best.better(value):
            run.request("save", tag="best")

    def state_dict(self) -> dict[str, Any]:
        """The best value."""
        return self._best.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the best value."""
        self._best.load_state_dict(state)
