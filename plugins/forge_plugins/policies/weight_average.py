"""An exponential moving average of the weights, used by validation and export."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginInfo, Run, Step, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = LazyModule("torch")


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
    """A second model of the averaged weights; buffers are those of the model in training."""

    info = PluginInfo(name="weight_average", kind=Kind.POLICIES, config=WeightAverageConfig)

    def __init__(self, config: WeightAverageConfig) -> None:
        self.config = config
        self._model: nn.Module | None = None
        self._loaded: dict[str, Any] | None = None
        self._count = 0

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Begin with the weights as they are, or with those of the checkpoint."""
        self._model = copy.deepcopy(run.model)
        self._model.requires_grad_(False)
        for own, other in zip(self._model.modules(), run.model.modules(), strict=True):
            for name in getattr(other, "follows", ()):  # state that goes on with the training
                setattr(own, name, getattr(other, name))
        if self._loaded is not None:
            self._put(self._loaded)
            self._loaded = None

    def _pairs(self, run: Run) -> tuple[list[Tensor], list[Tensor]]:
        assert self._model is not None
        mine = [parameter.detach() for parameter in self._model.parameters()]
        return mine, [parameter.detach() for parameter in run.model.parameters()]

    @hookimpl
    def on_step_end(self, run: Run, step: Step) -> None:
        """One step of the average."""
        mine, theirs = self._pairs(run)
        if step.number <= self.config.start_step:
            torch._foreach_copy_(mine, theirs)
            return
        decay = self.config.decay
        if self.config.warm:
            decay = min(decay, (1.0 + self._count) / (10.0 + self._count))
        self._count += 1
        torch._foreach_lerp_(mine, theirs, 1.0 - decay)
        assert self._model is not None
        for own, other in zip(self._model.buffers(), run.model.buffers(), strict=True):
            own.copy_(other)
        for module in self._model.modules():  # what a layer keeps of its old weights is void
            forget = getattr(module, "forget", None)
            if callable(forget):
                forget()

    @hookimpl
    def compute_evaluation_model(self, run: Run) -> nn.Module:
        """The averaged model."""
        del run
        assert self._model is not None, "the run has started"
        return self._model

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights and the steps that went into them."""
        if self._model is None:
            return {"count": 0, "weights": {}}
        weights = {name: value.detach() for name, value in self._model.named_parameters()}
        return {"count": self._count, "weights": weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the average."""
        self._count = int(state["count"])
        if self._model is None:
            self._loaded = dict(state["weights"])
        else:
            self._put(state["weights"])

    def _put(self, weights: dict[str, Any]) -> None:
        assert self._model is not None
        for name, value in self._model.named_parameters():
            value.detach().copy_(weights[name])
