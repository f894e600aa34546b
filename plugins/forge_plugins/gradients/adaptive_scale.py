"""Gradients of tensors that are far larger than is usual, scaled down before clipping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, MetricInfo, Order, PluginInfo, Run, Step, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from forge_plugins.mathematics.optimizers import gradient_scaling as mathematics
else:
    torch = LazyModule("torch")
    mathematics = LazyModule("forge_plugins.mathematics.optimizers.gradient_scaling")


@dataclass(frozen=True, kw_only=True)
class AdaptiveScaleConfig:
    """How long sizes are remembered and what counts as too large."""

    decay: Annotated[
        float, Meta(ge=0, lt=1, description="of the moving averages of the gradients' squares")
    ] = 0.99
    limit: Annotated[
        float, Meta(ge=1, description="times the median tensor's size that a gradient may have")
    ] = 10.0


class AdaptiveScale:
    """Gradients of tensors that are far larger than is usual, scaled down before clipping.

    One scale for each tensor, from a moving average of its gradient's RMS.

    Stands before clipping, where it matters: one tensor's spike no longer eats up the global norm
    that all share. (Adam alone would divide a steady scale out again.)
    """

    info = PluginInfo(
        name="adaptive_scale",
        kind=Kind.GRADIENTS,
        config=AdaptiveScaleConfig,
        order=Order(after=("grokfast",), before=("clip_norm",)),
        metrics=(MetricInfo("smallest_gradient_scale", section="Grokking"),),
    )

    def __init__(self, config: AdaptiveScaleConfig) -> None:
        self.config = config
        self._places: dict[torch.nn.Parameter, int] = {}
        self._sums: tuple[Tensor, Tensor] | None = None  # mean squares and counts, by place
        self._loaded: dict[str, Any] = {}

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Give each parameter its place."""
        named = list(run.named_parameters())
        self._places = {parameter: place for place, (_, parameter) in enumerate(named)}
        if self._loaded:
            self._take_up(run.device)
        elif self._sums is None:
            zeros = torch.zeros(len(named), dtype=torch.float32, device=run.device)
            self._sums = (zeros, zeros.clone())

    @hookimpl
    def on_gradients(self, run: Run, step: Step) -> None:
        """Scale in place, all on the device."""
        if not step.gradients:
            return
        assert self._sums is not None
        mean_square, count = self._sums
        config, places = self.config, self._places
        if len(step.parameters) == len(places):
            factors = mathematics.scale_down(
                step.gradients, mean_square, count, decay=config.decay, limit=config.limit
            )
        else:  # some parameters have no gradient
            chosen = [places[parameter] for parameter in step.parameters]
            index = torch.tensor(chosen, device=mean_square.device)
            part, times = mean_square[index], count[index]
            factors = mathematics.scale_down(
                step.gradients, part, times, decay=config.decay, limit=config.limit
            )
            mean_square[index], count[index] = part, times
        if step.logs:
            run.metrics.put("smallest_gradient_scale", factors.min())

    def state_dict(self) -> dict[str, Any]:
        """The averages, in the order of the parameters."""
        if self._sums is None:
            return {}
        return {"mean_square": self._sums[0].clone(), "count": self._sums[1].clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the averages up, when the parameters are known.

        Raises:
            ValueError: they are of another number of parameters.
        """
        self._loaded = dict(state)
        if self._sums is not None and state:  # in mid-run: a rollback
            self._take_up(self._sums[0].device)

    def _take_up(self, device: torch.device) -> None:
        kept, self._loaded = self._loaded, {}
        if len(kept["count"]) != len(self._places):
            raise ValueError(
                f"adaptive_scale: the checkpoint holds averages of {len(kept['count'])} "
                f"parameters, the model has {len(self._places)}"
            )
        self._sums = (kept["mean_square"].to(device).clone(), kept["count"].to(device).clone())
