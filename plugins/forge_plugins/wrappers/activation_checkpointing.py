"""Activations computed again on the way back instead of kept: less memory, more time."""

from __future__ import annotations

import fnmatch
import functools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, Order, PluginError, PluginInfo, Run, hookimpl

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch
    from torch import nn
    from torch.utils import checkpoint as checkpointing

    from forge_plugins.mathematics.optimizers import kept_buffers
else:
    torch = LazyModule("torch")
    nn = LazyModule("torch.nn")
    checkpointing = LazyModule("torch.utils.checkpoint")
    kept_buffers = LazyModule("forge_plugins.mathematics.optimizers.kept_buffers")


@dataclass(frozen=True, kw_only=True)
class ActivationCheckpointingConfig:
    """Which layers are computed again."""

    layers: Annotated[
        tuple[str, ...] | None,
        Meta(description="names, as glob patterns; null: the members of each nn.ModuleList (the "
             "blocks of a transformer), or the model's children where there is none"),
    ] = None  # fmt: skip
    every: Annotated[
        int,
        Meta(
            ge=1,
            description="apply to every n-th of them; 2: every other one keeps its activations",
        ),
    ] = 1


class ActivationCheckpointing:
    """Less memory, more time: activations are computed again on the way back.

    Each layer keeps its inputs only (Chen et al. 2016, arXiv 1604.06174).

    The gradients are the same to the bit: what is random is drawn again from the same state, and
    running means are written once. Keys of the state dict stay as they are.
    """

    info = PluginInfo(
        name="activation_checkpointing",
        kind=Kind.WRAPPERS,
        config=ActivationCheckpointingConfig,
        order=Order(before=("compile",)),
    )

    def __init__(self, config: ActivationCheckpointingConfig) -> None:
        self.config = config

    @hookimpl
    def transform_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Exchange the forward passes of the layers, in place.

        Raises:
            PluginError: no layer has such a name.
        """
        del run
        result = self._chosen(model)
        if not result:
            raise PluginError(
                f"activation_checkpointing: no layer of {type(model).__name__} is named "
                f"{list(self.config.layers or ())}; its children are "
                f"{', '.join(name for name, _ in model.named_children()) or 'none'}"
            )
        for layer in result[:: self.config.every]:
            layer.forward = _Recomputed(layer)
        return model

    def _chosen(self, model: nn.Module) -> list[nn.Module]:
        if self.config.layers is not None:
            return [
                module for name, module in model.named_modules()
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.config.layers)
            ]  # fmt: skip
        lists = [item for item in model.modules() if isinstance(item, nn.ModuleList)]
        members = [member for item in lists for member in item]
        return members or list(model.children()) or [model]


class _Recomputed:
    """The forward pass of a layer whose inputs alone are kept.

    An object that knows its layer, not a closure: a copy of the model has copies that know theirs.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.own = vars(layer).get("forward")  # another wrapper's, if there is one

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        forward = self.own or functools.partial(type(self.layer).forward, self.layer)
        # the second pass writes running means too, which the first one has written already
        options: dict[str, Any] = {"context_fn": self._contexts} if self._writes() else {}
        return checkpointing.checkpoint(
            forward, *arguments, use_reentrant=False, **options, **named
        )

    def _writes(self) -> bool:
        """Whether the layer may write buffers; a compiler traces one pass only."""
        return any(True for _ in self.layer.buffers()) and not torch.compiler.is_compiling()

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Round the first pass, and round the second."""
        return nullcontext(), kept_buffers.buffers_kept(self.layer)
