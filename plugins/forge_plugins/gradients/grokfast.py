"""Grokfast: the slow component of the gradients amplified."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginInfo, Run, Step, hookimpl
from forge_plugins.mathematics.filter_settings import swapped

if TYPE_CHECKING:
    import torch

    from forge_plugins.mathematics import grokfast as mathematics
else:
    torch = LazyModule("torch")
    mathematics = LazyModule("forge_plugins.mathematics.grokfast")


@dataclass(frozen=True, kw_only=True)
class GrokfastConfig:
    """Which average, how slow, how much of it."""

    filter: Annotated[
        Literal["ema", "ma"],
        Meta(description="exponential moving average, or mean over a window"),
    ] = "ema"
    alpha: Annotated[float, Meta(ge=0, lt=1, description="decay of the moving average (ema)")] = (
        0.98
    )
    lambda_reg: Annotated[
        float, Meta(ge=0, description="how much of the slow gradient is added")
    ] = 2.0
    window: Annotated[int, Meta(ge=1, description="gradients in the window (ma)")] = 100
    wait_until_full: Annotated[
        bool, Meta(description="leave gradients alone until the window is full (ma)")
    ] = True
    beginning: Annotated[
        Literal["first", "zero", "debiased"],
        Meta(description="what the average starts from: the first gradient, zero, or zero with "
             "the bias divided out (ema)"),
    ] = "first"  # fmt: skip
    normalize: Annotated[
        bool, Meta(description="divide by 1 + lambda_reg, so that a steady gradient keeps its size")
    ] = False

    @staticmethod
    def advice(values: Mapping[str, Any]) -> str | None:
        """A hint for settings that are wrong in a known way."""
        return swapped(values)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 1 or self.lambda_reg < 0:
            hint = self.advice({"alpha": self.alpha, "lambda_reg": self.lambda_reg})
            raise ValueError(hint or "alpha lies in [0, 1), lambda_reg is at least 0")


class Grokfast:
    """The filter with its memory, one for each parameter that has had a gradient."""

    info = PluginInfo(name="grokfast", kind=Kind.GRADIENTS, config=GrokfastConfig)

    def __init__(self, config: GrokfastConfig) -> None:
        self.config = config
        self._memory: dict[torch.nn.Parameter, Any] = {}
        self._names: dict[torch.nn.Parameter, str] = {}
        self._loaded: dict[str, Any] = {}

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Learn the parameters' names, which the checkpoint keeps the memory under."""
        self._names = {parameter: name for name, parameter in run.named_parameters()}
        for parameter, name in self._names.items():
            if name in self._loaded:
                self._memory[parameter] = self._revive(parameter, self._loaded[name])
        self._loaded = {}

    @hookimpl
    def on_gradients(self, run: Run, step: Step) -> None:
        """Filter in place; a parameter that joins late starts its own memory."""
        del run
        memory, config = self._memory, self.config
        for parameter, gradient in zip(step.parameters, step.gradients, strict=True):
            if parameter not in memory:
                memory[parameter] = self._begin(gradient)
        mine = [memory[parameter] for parameter in step.parameters]
        if config.filter == "ema":
            mathematics.filter_ema(
                step.gradients,
                mine,
                alpha=config.alpha,
                lambda_reg=config.lambda_reg,
                beginning=config.beginning,
                normalize=config.normalize,
            )
        else:
            mathematics.filter_ma(
                step.gradients,
                mine,
                lambda_reg=config.lambda_reg,
                wait_until_full=config.wait_until_full,
                normalize=config.normalize,
            )

    def _begin(self, gradient: torch.Tensor) -> Any:
        if self.config.filter == "ema":
            return mathematics.SlowGradient(
                torch.zeros_like(gradient, memory_format=torch.contiguous_format)
            )
        return mathematics.Window(gradient, self.config.window)

    @hookimpl
    def measure(self, run: Run, step: Step) -> dict[str, Any]:
        """Norm of the slow gradient."""
        del run, step
        if not self._memory:
            return {"slow_gradient_norm": None}
        if self.config.filter == "ema":
            slow = [memory.mean for memory in self._memory.values()]
        else:
            slow = [
                memory.sum / max(1, min(memory.count, len(memory.ring)))
                for memory in self._memory.values()
            ]
        return {"slow_gradient_norm": torch.nn.utils.get_total_norm(slow)}

    def state_dict(self) -> dict[str, Any]:
        """The averages by parameter name."""
        kept: dict[str, Any] = {}
        for parameter, memory in self._memory.items():
            if self.config.filter == "ema":
                kept[self._names[parameter]] = {"mean": memory.mean, "count": memory.count}
            else:
                kept[self._names[parameter]] = {
                    "ring": memory.ring, "sum": memory.sum, "count": memory.count,
                }  # fmt: skip
        return {"filter": self.config.filter, "memory": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the averages up when the parameters are known.

        Raises:
            ValueError: the state is of the other filter or of another window.
        """
        if state["filter"] != self.config.filter:
            raise ValueError(
                f"grokfast: the checkpoint holds the memory of the {state['filter']} filter, "
                f"the configuration says {self.config.filter}"
            )
        self._memory, self._loaded = {}, dict(state["memory"])
        for parameter, name in self._names.items():  # in mid-run: a rollback
            if name in self._loaded:
                self._memory[parameter] = self._revive(parameter, self._loaded.pop(name))

    def _revive(self, parameter: torch.nn.Parameter, kept: Mapping[str, Any]) -> Any:
        memory = self._begin(parameter.detach())
        if self.config.filter == "ema":
            memory.mean.copy_(kept["mean"])
        else:
            if memory.ring.shape != kept["ring"].shape:
                raise ValueError(
                    f"grokfast: the checkpoint holds a window of {len(kept['ring'])} gradients, "
                    f"the configuration says {self.config.window}"
                )
            memory.ring.copy_(kept["ring"])
            memory.sum.copy_(kept["sum"])
        memory.count = int(kept["count"])
        return memory
