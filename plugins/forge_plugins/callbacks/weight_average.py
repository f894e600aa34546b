"""An exponential moving average of the weights, used by validation and export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginInfo, Run, Step, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import nn

    from forge_plugins.mathematics.optimizers import averaged_model
    from forge_plugins.mathematics.optimizers.averaged_model import ShadowModel
else:
    torch = LazyModule("torch")
    averaged_model = LazyModule("forge_plugins.mathematics.optimizers.averaged_model")


@dataclass(frozen=True, kw_only=True)
class WeightAverageConfig:
    """How slow the average is."""

    decay: Annotated[float, Meta(ge=0, lt=1, description="decay of the average per step")] = 0.999
    start_step: Annotated[
        int, Meta(ge=0, description="optimizer steps before the average begins")
    ] = 0
    warm: Annotated[
        bool,
        Meta(description="faster at first: the decay is at most (1 + n) / (10 + n) in its step n"),
    ] = True


class WeightAverage:
    """An exponential moving average of the weights, used by validation and export.

    A second model of the averaged weights; buffers are those of the model in training. The averages
    of a half-precision model are kept in fp32, and rounded for the second model.
    """

    info = PluginInfo(name="weight_average", kind=Kind.CALLBACKS, config=WeightAverageConfig)

    def __init__(self, config: WeightAverageConfig) -> None:
        self.config = config
        self._shadow: ShadowModel | None = None
        self._loaded: dict[str, Any] | None = None
        self._count = 0

    def _ready(self, run: Run) -> ShadowModel:
        """The average: of the weights as they are, or of the checkpoint, when first asked for."""
        if self._shadow is None:
            self._shadow = averaged_model.ShadowModel(run.model)
            if self._loaded is not None:
                self._shadow.put(self._loaded)
                self._loaded = None
        return self._shadow

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Begin with the weights as they are, or with those of the checkpoint."""
        _ = self._ready(run)

    @hookimpl
    def on_step_end(self, run: Run, step: Step) -> None:
        """One step of the average."""
        shadow = self._ready(run)
        mine = shadow.weights()
        theirs = [
            parameter.detach().to(average.dtype)
            for average, parameter in zip(mine, run.model.parameters(), strict=True)
        ]
        if step.number <= self.config.start_step:
            torch._foreach_copy_(mine, theirs)
        else:
            decay = self.config.decay
            if self.config.warm:
                decay = min(decay, (1.0 + self._count) / (10.0 + self._count))
            self._count += 1
            torch._foreach_lerp_(mine, theirs, 1.0 - decay)
        shadow.follow()

    @hookimpl
    def compute_evaluation_model(self, run: Run) -> nn.Module:
        """The averaged model."""
        return self._ready(run).model

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights and the steps that went into them."""
        weights = {} if self._shadow is None else self._shadow.named_weights()
        return {"count": self._count, "weights": weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the average."""
        self._count = int(state["count"])
        if self._shadow is None:
            self._loaded = dict(state["weights"])
        else:
            self._shadow.put(state["weights"])
