"""Weights are drawn to zero as soon as the training data is known by heart."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from msgspec import Meta

from forge_kernel.api import (
    Kind,
    LazyModule,
    LogRecord,
    MetricInfo,
    PluginError,
    PluginInfo,
    Run,
    Step,
    hookimpl,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = LazyModule("torch")


@dataclass(frozen=True, kw_only=True)
class DelayedCompressionConfig:
    """How strong, on which weights, and from when on."""

    renamed: ClassVar[Mapping[str, str]] = {"figure": "metric"}

    strength: Annotated[
        float, Meta(ge=0, description="factor of the sum of the squared weights")
    ] = 0.01
    metric: Annotated[
        str,
        Meta(min_length=1, description="metric of the training log that tells when; it is read at "
             "each log line (run.log_every)"),
    ] = "loss"  # fmt: skip
    threshold: Annotated[float, Meta(description="of the metric: compression begins there")] = 0.05
    mode: Annotated[
        Literal["max", "min"], Meta(description="whether the metric rises or falls to it")
    ] = "min"
    names: Annotated[
        tuple[str, ...],
        Meta(min_length=1, description="weights that are compressed, by parameter name with * "
             "and ?"),
    ] = ("*weight",)  # fmt: skip


class DelayedCompression:
    """Draws weights to zero as soon as the training data is known by heart.

    Adds `strength` times the squared Frobenius norms once the metric has been reached, for good.

    The method of the vuciv/grokfast repository ("A simple method for accelerating grokking"): let
    the network overfit first, then make it small. It passes through the optimizer, as L2 decay
    does.
    """

    info = PluginInfo(
        name="delayed_compression",
        kind=Kind.REGULARIZERS,
        config=DelayedCompressionConfig,
        metrics=(MetricInfo("squared_weights", goal="min"),),
    )

    def __init__(self, config: DelayedCompressionConfig) -> None:
        self.config = config
        self._weights: list[nn.Parameter] = []
        self._active = False

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Find the weights."""
        patterns = self.config.names
        self._weights = [
            parameter
            for name, parameter in run.named_parameters()
            if parameter.requires_grad and any(fnmatch.fnmatchcase(name, each) for each in patterns)
        ]
        if not self._weights:
            raise PluginError(
                f"delayed_compression: no trainable parameter has a name like {list(patterns)}"
            )

    @hookimpl
    def on_log(self, run: Run, record: LogRecord) -> None:
        """Begin when the metric is there."""
        config = self.config
        if self._active:
            return
        if config.metric not in record.metrics:
            raise PluginError(
                f"delayed_compression: the log has no metric '{config.metric}'; it has "
                f"{', '.join(sorted(record.metrics))}"
            )
        value = record.metrics[config.metric]
        if value is None:
            return
        reached = value >= config.threshold if config.mode == "max" else value <= config.threshold
        if reached:
            self._active = True
            run.emit_event(
                "compression_began",
                f"Compression begins: {config.metric} is {value:.4g}.",
                metric=config.metric,
                value=value,
            )

    @hookimpl
    def regularize(self, run: Run, step: Step) -> Tensor | None:
        """The squared norms, once it is time."""
        if not self._active:
            return None
        total = torch.stack([weight.square().sum() for weight in self._weights]).sum()
        if step.logs:
            run.metrics.put("squared_weights", total.detach())
        return total * self.config.strength

    def state_dict(self) -> dict[str, Any]:
        """Whether compression has begun."""
        return {"active": self._active}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it up."""
        self._active = bool(state["active"])
