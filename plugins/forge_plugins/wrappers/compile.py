"""torch.compile, in place, so that the keys of the state dict stay the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from forge_kernel.api import Kind, PluginInfo, Run, hookimpl

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """What torch.compile is told."""

    mode: Annotated[
        Literal["default", "reduce-overhead", "max-autotune"],
        Meta(description="how hard the compiler tries"),
    ] = "default"
    dynamic: Annotated[
        bool | None,
        Meta(description="expect batches of several sizes; null: find out (the last batch of an "
             "epoch is often smaller)"),
    ] = None  # fmt: skip


class Compile:
    """Compiles the model's forward pass when it is first used."""

    info = PluginInfo(name="compile", kind=Kind.WRAPPERS, config=CompileConfig)

    def __init__(self, config: CompileConfig) -> None:
        self.config = config

    @hookimpl
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Compile in place; torch itself says which compiler is missing, if one is."""
        del run
        model.compile(mode=self.config.mode, dynamic=self.config.dynamic)
        return model
