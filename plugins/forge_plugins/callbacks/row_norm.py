"""Rows of weight matrices are kept within a norm."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginError, PluginInfo, Run, Step, hookimpl

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = LazyModule("torch")


@dataclass(frozen=True, kw_only=True)
class RowNormConfig:
    """How long a row may be, and which."""

    max_norm: Annotated[float, Meta(gt=0, description="largest Euclidean norm of a row")] = 2.0
    names: Annotated[
        tuple[str, ...],
        Meta(
            min_length=1,
            description="matrices that are watched, by parameter name; glob pattern",
        ),
    ] = ("*",)
    scale_first: Annotated[
        bool, Meta(description="bring every row to this norm before the first step")
    ] = False


class RowNorm:
    """Keeps the rows of weight matrices within a norm, after each step.

    The norm constraint of "Clip to Grok" (the cliptogrok repository): with Lion it groks without
    any weight decay.
    """

    info = PluginInfo(name="row_norm", kind=Kind.CALLBACKS, config=RowNormConfig)

    def __init__(self, config: RowNormConfig) -> None:
        self.config = config
        self._watched: list[nn.Parameter] = []

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Find the matrices."""
        patterns = self.config.names
        self._watched = [
            parameter
            for name, parameter in run.named_parameters()
            if parameter.requires_grad
            and parameter.ndim == 2
            and any(fnmatch.fnmatchcase(name, each) for each in patterns)
        ]
        if not self._watched:
            raise PluginError(
                f"row_norm: no matrix that is trained has a name like {list(patterns)}"
            )

    @hookimpl
    def on_weights(self, run: Run, step: Step) -> None:
        """Shorten the rows that have grown beyond the norm."""
        del run
        limit = self.config.max_norm
        raise_too = self.config.scale_first and step.number == 1
        for parameter in self._watched:
            if not parameter.requires_grad:  # frozen since the run began
                continue
            weight = parameter.detach()
            norms = torch.linalg.vector_norm(weight, dim=1, keepdim=True).clamp_min(1e-12)
            factors = limit / norms
            weight.mul_(factors if raise_too else factors.clamp_max(1.0))
