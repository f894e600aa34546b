"""torch.compile, in place, so that the keys of the state dict stay the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginInfo, Run, hookimpl

if TYPE_CHECKING:
    from torch import nn

    from forge_plugins.mathematics.optimizers import torch_compile
else:
    torch_compile = LazyModule("forge_plugins.mathematics.optimizers.torch_compile")


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
    """torch.compile, in place, so that the keys of the state dict stay the same.

    Compiles the model's forward pass when it is first used.
    """

    info = PluginInfo(name="compile", kind=Kind.WRAPPERS, config=CompileConfig)

    def __init__(self, config: CompileConfig) -> None:
        self.config = config

    @hookimpl
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Compile in place; where no compiler works, say so and leave the model as it is."""
        fault = torch_compile.compiler_fault(run.device.type)
        if fault is not None:
            run.emit_event("not_compiled", f"The model is not compiled: {fault}", plugin="compile")
            return model
        model.compile(mode=self.config.mode, dynamic=self.config.dynamic)
        return model
